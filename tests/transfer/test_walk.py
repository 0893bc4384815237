"""Every interleaving of a small world, breadth first: one sender, one receiver, two requests, few pages and slots, and
at any point a cancel, the link's loss and a deadline. No step may break an invariant, and wherever nothing is left to
happen, every request has ended on both sides and nothing is held.
"""

import pickle
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from itertools import combinations
from typing import Any

import pytest
from msgspec import Struct

from pagewire.allocator import PageAllocator
from pagewire.transfer.actions import Begin, Cancelled, Dropped, Push, RequestFailed, Send, Start, Unpack
from pagewire.transfer.frames import Abort, Ack, Chunk, Commit, Credit, Reserve
from pagewire.transfer.handoff import Phase
from pagewire.transfer.receiver import Receiver
from pagewire.transfer.sender import Sender
from transfer.wires import small_wire

WIRE = small_wire(num_layers=1, num_kv_heads=1)
LINK, PAGE_SIZE, TIMEOUT_MS = 1, 2, 1000


@dataclass
class Clock:
    ms: int = 0

    def __call__(self) -> int:
        return self.ms


@dataclass
class Capabilities:
    given: int = 0

    def __call__(self) -> bytes:
        self.given += 1
        return self.given.to_bytes(16, "little")


@dataclass(frozen=True)
class Small:
    """What is small, and what may go wrong, once each."""

    prompts: tuple[int, ...] = (3, 1)  # tokens, a page of 2 each
    d_pages: int = 2  # the first needs both: the other one waits
    p_pages: int = 2
    num_slots: int = 1
    slot_tokens: int = 2
    faults: tuple[str, ...] = ()


class World:
    def __init__(self, small: Small) -> None:
        self.small = small
        self.now_ms = Clock()
        self.d_pages, self.p_pages = PageAllocator(small.d_pages), PageAllocator(small.p_pages)
        self.sender = Sender(self.p_pages, PAGE_SIZE, now_ms=self.now_ms)
        self.receiver = Receiver(
            self.d_pages, PAGE_SIZE, WIRE.groups, vocab_size=50, max_waiting=2, timeout_ms=TIMEOUT_MS,
            now_ms=self.now_ms, new_capability=Capabilities(),
        )  # fmt: skip
        self.sender.link(LINK, WIRE, small.num_slots, WIRE.packed_bytes(0, 1, 1, small.slot_tokens))
        self.receiver.link(LINK, WIRE, small.num_slots)
        self.faults = set(small.faults)
        every = [("submit", i) for i in range(len(small.prompts))]
        self.front_to = {"p": list(every), "d": list(every)}
        self.frames_to: dict[str, list] = {"p": [], "d": []}
        self.broken, self.hears_of_it = False, set()
        self.computing: list[str] = []
        self.pushing: list[Push] = []
        self.unpacking: list[Unpack] = []
        self.running: list[str] = []
        self.arrived: dict[str, frozenset] = {}  # of the generation that is live
        self.ended: dict[str, list[str]] = {"p": [], "d": []}

    # ------------------------------------------------------------------ events: their names, and what they do

    def events(self) -> Iterator[tuple]:
        for side in ("p", "d"):
            if self.front_to[side]:
                yield "front", side
            if self.frames_to[side]:
                yield "frame", side
            if side in self.hears_of_it:
                yield "lost", side
        yield from (("compute", i) for i in range(len(self.computing)))
        if self._can_send():
            yield ("send",)
        yield from (("pushed", i) for i in range(len(self.pushing)))
        yield from (("unpacked", i) for i in range(len(self.unpacking)))
        yield from (("decoded", i) for i in range(len(self.running)))

    def mishaps(self) -> Iterator[tuple]:
        if "cancel" in self.faults:
            yield from (("cancel", i) for i in range(len(self.small.prompts)))
        if "loss" in self.faults:
            yield ("loss",)
        if "deadline" in self.faults:
            yield ("deadline",)

    def _can_send(self) -> bool:
        links = self.sender._links.values()
        return bool(self.sender._commits or any(link.unpushed._full and link.credits for link in links))

    def happens(self, what: str, *of: Any) -> None:
        getattr(self, f"_{what}")(*of)
        self.check()

    def _front(self, side: str) -> None:
        what, i = self.front_to[side].pop(0)
        request_id, token_ids = f"r{i}", tuple(range(self.small.prompts[i]))
        if what == "cancel":
            machine = self.receiver if side == "d" else self.sender
            self.do(side, machine.cancel(request_id))
        elif side == "d":
            self.do("d", self.receiver.submit(request_id, token_ids, len(token_ids) + 1, links=(LINK,)))
        else:
            self.do("p", self.sender.submit(request_id, token_ids, (LINK,)))

    def _frame(self, side: str) -> None:
        frame = self.frames_to[side].pop(0)
        p, d = self.sender, self.receiver
        to_p: dict[type, Callable] = {Reserve: p.reserve, Credit: p.credit, Ack: p.ack}
        to_d: dict[type, Callable] = {Chunk: d.chunk, Commit: d.commit}
        handlers = to_p | {Abort: p.abort} if side == "p" else to_d | {Abort: d.abort}
        self.do(side, handlers[type(frame)](LINK, frame))

    def _compute(self, i: int) -> None:
        request_id = self.computing.pop(i)
        self.sender.layer_ready(request_id, 0, 0, self.small.prompts[int(request_id[1:])])
        self.do("p", self.sender.prefilled(request_id, 9))

    def _send(self) -> None:
        send = self.sender.next_send()
        if isinstance(send, Push):
            self.pushing.append(send)
        else:
            self.do("p", [send])

    def _pushed(self, i: int) -> None:
        push = self.pushing.pop(i)
        self.do("p", self.sender.pushed(push, WIRE.block_bytes(push.block, push.tokens[1] - push.tokens[0]), 0))

    def _unpacked(self, i: int) -> None:
        unpack = self.unpacking.pop(i)
        chunk = unpack.chunk
        self.arrived[chunk.request_id] = self.arrived[chunk.request_id] | set(range(*chunk.tokens))
        self.do("d", self.receiver.unpacked(unpack))

    def _decoded(self, i: int) -> None:
        request_id = self.running.pop(i)
        self.ended["d"].append(request_id)
        self.do("d", self.receiver.release(request_id))

    def _cancel(self, i: int) -> None:
        self.faults.remove("cancel")
        for messages in self.front_to.values():
            messages.append(("cancel", i))

    def _loss(self) -> None:
        """What was sent may still be read, until its reader hears of the loss."""
        self.faults.remove("loss")
        self.broken, self.hears_of_it = True, {"p", "d"}

    def _lost(self, side: str) -> None:
        self.hears_of_it.remove(side)
        self.frames_to[side].clear()
        self.do(side, (self.sender if side == "p" else self.receiver).lost(LINK))

    def _deadline(self) -> None:
        self.faults.remove("deadline")
        self.now_ms.ms += TIMEOUT_MS
        self.do("d", self.receiver.tick())
        self.do("p", self.sender.tick())

    def do(self, side: str, actions: list) -> None:
        for action in actions:
            match action:
                case Send(frame):
                    if not self.broken:
                        self.frames_to["d" if side == "p" else "p"].append(frame)
                        if isinstance(frame, Reserve):
                            self.arrived[frame.request_id] = frozenset()
                case Begin(request_id):
                    self.computing.append(request_id)
                case Unpack():
                    self.unpacking.append(action)
                case Start(request_id):
                    assert self.arrived[request_id] == set(range(self.small.prompts[int(request_id[1:])]))
                    self.running.append(request_id)
                case RequestFailed(request_id) | Cancelled(request_id) | Dropped(request_id):
                    assert not isinstance(action, RequestFailed) or self.now_ms.ms, action
                    self.ended[side].append(request_id)
                    working = self.computing if side == "p" else self.running
                    if request_id in working:
                        working.remove(request_id)

    # ------------------------------------------------------------------ what must hold

    def check(self) -> None:
        p, d = self.sender, self.receiver
        for allocator in (self.p_pages, self.d_pages):
            assert sum(allocator.counts().values()) == allocator.num_pages
        held_by_p = [*p._live.values(), *{one for one in p._moving.values() if one.phase is Phase.GONE}]
        held_by_d = [*d._live.values(), *{one for one in d._moving.values() if one.phase is Phase.GONE}]
        for held, allocator in ((held_by_p, self.p_pages), (held_by_d, self.d_pages)):
            pages = [page for one in held for page in one.pages]
            assert len(pages) == len(set(pages)) == allocator.num_pages - allocator.num_free
        for ended in self.ended.values():
            assert len(ended) == len(set(ended))
        every = set(range(self.small.num_slots))
        if LINK in p._links:
            link = p._links[LINK]
            assert sorted([*link.credits, *link.sent_staging]) == sorted(every)
            assert {slot for _, slot in p._moving} <= link.sent_staging
            if not self.broken:
                assert not (set(link.credits) | {push.staging_slot for push in self.pushing}) & self.being_read()
        if LINK in d._links:
            assert sorted([*d._links[LINK].granted_staging, *self.being_read()]) == sorted(every)

    def being_read(self) -> set[int]:
        return {slot for _, slot in self.receiver._moving}

    def check_end(self) -> None:
        every = sorted(f"r{i}" for i in range(len(self.small.prompts)))
        assert sorted(self.ended["p"]) == sorted(self.ended["d"]) == every, self.ended
        assert not self.sender._live and not self.receiver._live and not self.receiver._waiting
        assert self.p_pages.num_free == self.p_pages.num_pages and self.d_pages.num_free == self.d_pages.num_pages
        for link in self.sender._links.values():
            assert len(link.credits) == self.small.num_slots and not link.early
            assert not link.ungranted and not link.refused

    def state(self) -> Any:
        return canonical(self.__dict__)


def canonical(value: Any) -> Any:
    """Equal for worlds with the same future: which pages somebody has makes no difference, only how many."""
    if value is None or isinstance(value, (int, str, bytes, Phase)):
        return value
    if isinstance(value, PageAllocator):
        return tuple(value.counts().values())
    if isinstance(value, dict):
        return tuple((canonical(k), len(v) if k == "pages" else canonical(v)) for k, v in value.items())
    if isinstance(value, (set, frozenset)):
        return tuple(sorted(map(canonical, value)))
    if isinstance(value, (list, tuple, deque)):
        return tuple(map(canonical, value))
    if callable(value):
        return None
    if is_dataclass(value):
        of = {field.name: getattr(value, field.name) for field in fields(value)}
        return type(value).__name__, canonical(of)
    if isinstance(value, Struct):
        return type(value).__name__, canonical({name: getattr(value, name) for name in value.__struct_fields__})
    return type(value).__name__, canonical(value.__dict__)


def walk(small: Small) -> tuple[int, int, int]:
    """The numbers of states, steps and ends."""
    start = World(small)
    seen, todo = {hash(start.state())}, deque([(pickle.dumps(start), ())])
    num_steps = num_ends = 0
    while todo:
        data, path = todo.popleft()
        world: World = pickle.loads(data)
        events = list(world.events())
        if not events:
            num_ends += 1
            with_path(path, world.check_end)
        for event in (*events, *world.mishaps()):
            num_steps += 1
            after: World = pickle.loads(data)
            with_path((*path, event), partial(after.happens, *event))
            state = hash(after.state())
            if state not in seen:
                seen.add(state)
                todo.append((pickle.dumps(after), (*path, event)))
    return len(seen), num_steps, num_ends


def with_path(path: tuple, check: Callable[[], None]) -> None:
    try:
        check()
    except Exception as error:
        raise AssertionError(f"after {path}: {error!r}") from error


FAULTS = ("cancel", "loss", "deadline")
SMALL = {
    "nothing, 2 slots of a token": Small(num_slots=2, slot_tokens=1, p_pages=3, d_pages=3),
    **{fault: Small(faults=(fault,)) for fault in FAULTS},
}
LARGER = {
    **{f"{a} and {b}": Small(faults=(a, b)) for a, b in combinations(FAULTS, 2)},
    "cancel, 2 slots of a token": Small(num_slots=2, slot_tokens=1, p_pages=3, d_pages=3, faults=("cancel",)),
    "loss, pages for all": Small(num_slots=2, p_pages=3, d_pages=4, faults=("loss",)),
}
WORLDS = [
    *(pytest.param(small, id=name) for name, small in SMALL.items()),
    *(
        pytest.param(small, id=name, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])
        for name, small in LARGER.items()
    ),
]


@pytest.mark.parametrize("small", WORLDS)
def test_every_interleaving(small: Small, record_property: Callable) -> None:
    num_states, num_steps, num_ends = walk(small)
    record_property("states", num_states)
    print(f"{num_states} states, {num_steps} steps, {num_ends} ends")
    assert num_states > 100 and num_ends > 0
