"""The handoff of a request's KV from senders (P) to a receiver (D): what both sides' machines share.

`Sender` and `Receiver`, each in its file, are two pure state machines. Events are method calls; the
`actions` they return are to be carried out in order. There are no sockets, tensors or clocks in there, so every
interleaving can be tested.

    Receiver   waiting --pages free--> receiving --every sender's COMMIT--> running --release--> gone
               waiting --pages free, no senders--> running
    Sender     waiting --every RESERVE, pages free--> prefilling --last forward--> draining --every ACK--> gone

Both may cancel or fail a request in any state; all it holds is then released, once. Whoever ends a
request answers to the front and sends ABORT to the others, which release in silence. When a link is
lost, each drops what still needs it and tells the others, and nobody answers. Each serves many links
at once; a link has a number that is never used again, staging slots of its own, and its own `Wire`.
"""

import hashlib
import struct
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import Any, Generic, TypeVar

from msgspec import Struct

from pagewire.allocator import PageAllocator
from pagewire.transfer.actions import Action, Cancelled, Dropped, Refused, RequestFailed, Send
from pagewire.transfer.coverage import NOTHING, Coverage
from pagewire.transfer.frames import DTYPES, Abort, Block, ChecksumKind, Commit, Frame, Held, Reserve

NO_GENERATION = 0  # of an ABORT before any RESERVE
DTYPE_BYTES = dict(zip(DTYPES, (4, 2, 2, 1, 1, 1), strict=True))


class Wire(Struct, frozen=True):
    """What both ends of a link make of their HELLOs; every chunk repeats what concerns it."""

    fingerprint: bytes  # of the model, 32 bytes
    groups: tuple[Held, ...]  # what both hold of each, in the dtype and with the scales that travel
    checksum_kind: ChecksumKind = "crc32c"

    def packed_bytes(self, group: int, num_layers: int, num_heads: int, num_tokens: int) -> int:
        """Of a payload; the layout is `PackedShape`'s."""
        held, rows = self.groups[group], num_layers * num_heads * num_tokens
        num_bytes = rows * (held.head_dim + held.head_dim_v) * DTYPE_BYTES[held.dtype]
        if held.scale_kind == "none":
            return num_bytes
        num_scales = {"tensor": num_layers, "head": num_layers * num_heads, "token_head": rows}[held.scale_kind]
        return -(-num_bytes // 16) * 16 + 4 * num_scales * (2 if held.head_dim_v else 1)

    def block_bytes(self, block: Block, num_tokens: int) -> int:
        num_layers, num_heads = block.layer_stop - block.layer_start, block.head_stop - block.head_start
        return self.packed_bytes(block.group, num_layers, num_heads, num_tokens)


def mismatch(ours: object, theirs: object, names: tuple[str, ...]) -> str | None:
    """The first of the fields `names` in which they differ, in words."""
    for name in names:
        both = getattr(ours, name), getattr(theirs, name)
        if both[0] != both[1]:
            expected, got = (of.hex()[:16] if isinstance(of, bytes) else of for of in both)
            return f"{name}: expected {expected}, got {got}"
    return None


def prompt_sha256(token_ids: tuple[int, ...]) -> bytes:
    """Of the ids, a little-endian u32 each."""
    return hashlib.sha256(struct.pack(f"<{len(token_ids)}I", *token_ids)).digest()


class Phase(Enum):
    WAITING = 1
    RECEIVING = 2  # receiver: granted, chunks come
    RUNNING = 3  # receiver: committed or local, D's alone
    PREFILLING = 4  # sender: pages owned, forwards run
    DRAINING = 5  # sender: computed, pages leased to the transfer
    GONE = 6


class Link(Struct, eq=False, kw_only=True):
    wire: Wire
    progress_ms: int  # when anything that counts last moved over it


class Leg(Struct, eq=False):
    """What goes of a request over one link."""

    reserve: Reserve | None = None  # once it was granted
    commit: Commit | None = None  # P: to be sent when nothing is to be pushed. D: came, maybe before all is unpacked
    over: bool = False  # the link is needed no more
    blocks: tuple[Block, ...] = ()  # D: that come over it
    coverage: Coverage = NOTHING  # D: what of them has come, once they were granted

    @property
    def generation(self) -> int:
        return self.reserve.generation if self.reserve else NO_GENERATION


class Request(Struct, eq=False):
    request_id: str
    token_ids: tuple[int, ...]
    legs: dict[int, Leg]
    num_pages: int  # that it needs, besides the prefix's
    since_ms: int = 0  # last granted, or when P had computed it all
    phase: Phase = Phase.WAITING
    pages: list[int] = []
    num_cached: int = 0  # D: tokens that are there before the handoff; pages that are full of them are never written


OfLink = TypeVar("OfLink", bound=Link)


class Machine(ABC, Generic[OfLink]):
    """What both sides do. `free + active + cached + leased == num_pages` holds after every call.

    Links come and go: `link` and `lost` say so; a frame of a link that is not there changes nothing.
    """

    sides: tuple[str, str]  # ours and the other's
    other: str  # what is at the end of a link
    late: str  # of a request, when nothing moves

    def __init__(self, allocator: PageAllocator, page_size: int, now_ms: Callable[[], int]) -> None:
        self._allocator = allocator
        self._page_size = page_size
        self._now_ms = now_ms
        self._progress_ms = now_ms()  # when anything moved at all
        self._links: dict[int, OfLink] = {}
        self._live: dict[str, Request] = {}
        self._waiting: deque[Request] = deque()  # for pages of ours
        self._moving: dict[tuple[int, int], Request] = {}  # link, staging slot -> whose payload's pages are in use
        self._takes: dict[type[Frame], Callable[[int, Any], list[Action]]] = {Abort: self.abort}

    @property
    def num_waiting(self) -> int:
        return sum(request.phase is Phase.WAITING for request in self._live.values())

    def request_ids(self) -> list[str]:
        return list(self._live)

    def frame(self, number: int, frame: Frame) -> list[Action]:
        """What came over a link."""
        if number not in self._links:
            return []
        ours, others = self.sides
        if type(frame) not in self._takes:
            return [Refused(f"{others} sent {type(frame).__name__}, which only {ours} sends")]
        return self._takes[type(frame)](number, frame)

    def lost(self, number: int) -> list[Action]:
        """The other side is gone, and with it what still needs it."""
        self._links.pop(number, None)
        dropped = [one for one in self._live.values() if number in one.legs and not one.legs[number].over]
        ended = [self._end(one, Dropped(one.request_id), f"another {self.other} is gone") for one in dropped]
        return [*sum(ended, []), *self._admit()]

    def abort(self, number: int, abort: Abort) -> list[Action]:
        _, leg = self._find(number, abort.request_id)
        if leg is None or leg.over or abort.generation != leg.generation:
            return []
        leg.over = True  # nothing more from there, and nothing to tell it
        return self._give_up(abort.request_id, Dropped(abort.request_id), abort.reason)

    def cancel(self, request_id: str) -> list[Action]:
        return self._give_up(request_id, Cancelled(request_id), "cancelled")

    def fail(self, request_id: str, message: str) -> list[Action]:
        return self._give_up(request_id, RequestFailed(request_id, message), message)

    def tick(self) -> list[Action]:
        """Fails what was granted when neither that nor any progress is within its `deadline_ms`: any at all, until P
        has computed it, and then any over a link that it needs.
        """
        now_ms, late = self._now_ms(), {}
        for request in self._live.values():
            computing = request.phase in (Phase.WAITING, Phase.PREFILLING)
            granted = [(number, leg.reserve) for number, leg in request.legs.items() if leg.reserve and not leg.over]
            for number, reserve in granted:
                progress_ms = self._progress_ms if computing else self._links[number].progress_ms
                if now_ms - max(request.since_ms, progress_ms) >= reserve.deadline_ms:
                    late[request.request_id] = f"{self.late} within {reserve.deadline_ms} ms"
        return [action for request_id, message in late.items() for action in self.fail(request_id, message)]

    @abstractmethod
    def _admitted(self, request: Request) -> list[Action]:
        """It has its pages."""

    def _find(self, number: int, request_id: str) -> tuple[Request | None, Leg | None]:
        request = self._live.get(request_id)
        return request, request.legs.get(number) if request else None

    def _progressed(self, number: int) -> None:
        self._progress_ms = self._links[number].progress_ms = self._now_ms()

    def _is_moving(self, number: int, request: Request) -> bool:
        """Whether a payload of it is being packed or unpacked for the link."""
        return any(of is request and at == number for (at, _), of in self._moving.items())

    def _end_move(self, number: int, staging_slot: int) -> Request:
        request = self._moving.pop((number, staging_slot))
        if request.phase is Phase.GONE and request not in self._moving.values():
            self._allocator.end_lease(request.pages[request.num_cached // self._page_size :])
        return request

    def _give_up(self, request_id: str, answer: Action | None, reason: str) -> list[Action]:
        request = self._live.get(request_id)
        return [*self._end(request, answer, reason), *self._admit()] if request else []

    def _end(self, request: Request, answer: Action | None, reason: str) -> list[Action]:
        """Releases what it holds and tells every other side that still takes part."""
        told = [
            Send(Abort(request.request_id, leg.generation, reason[:256]), number)
            for number, leg in request.legs.items()
            if number in self._links and not leg.over
        ]
        del self._live[request.request_id]
        if request in self._waiting:
            self._waiting.remove(request)
        num_whole = request.num_cached // self._page_size
        written = request.pages[num_whole:]
        self._allocator.free(request.pages[:num_whole])
        # what moves in or out of these pages cannot be called back: leased until it is over
        moving = request in self._moving.values()
        if request.phase is not Phase.DRAINING:
            self._allocator.free(written, to="leased" if moving else "free")
        elif not moving:
            self._allocator.end_lease(written)
        request.phase = Phase.GONE
        return [*([answer] if answer else []), *told]

    def _admit(self) -> list[Action]:
        actions: list[Action] = []
        while self._waiting and self._waiting[0].num_pages <= self._allocator.num_free:
            request = self._waiting.popleft()
            request.pages += self._allocator.alloc(request.num_pages)
            actions += self._admitted(request)
        return actions
