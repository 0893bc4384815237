"""The handoff step by step: what each event makes each side do."""

import pytest
from msgspec.structs import replace

from pagewire.allocator import PageAllocator
from pagewire.transfer.actions import Begin, Cancelled, Dropped, RequestFailed, Send, Start, Unpack
from pagewire.transfer.codec import FrameCodec
from pagewire.transfer.frames import Abort, Ack, Chunk, Commit, Credit, Reserve
from pagewire.transfer.handoff import NO_GENERATION, prompt_sha256
from pagewire.transfer.receiver import Receiver
from pagewire.transfer.sender import Sender
from transfer.wires import small_wire

WIRE = small_wire(num_layers=2, num_kv_heads=1)
PAGE_SIZE, NUM_STAGING_SLOTS = 4, 2


class Pair:
    """A receiver of 4 pages and a sender of 3, whose staging slots hold 4 tokens of a layer."""

    def __init__(self) -> None:
        self.now_ms = 0
        self.d_pages, self.p_pages = PageAllocator(4), PageAllocator(3)
        self.d = Receiver(
            self.d_pages, PAGE_SIZE, WIRE.groups, vocab_size=50, max_waiting=1, timeout_ms=100,
            now_ms=lambda: self.now_ms, new_capability=lambda: b"c" * 16,
        )  # fmt: skip
        self.p = Sender(self.p_pages, PAGE_SIZE, now_ms=lambda: self.now_ms)
        self.number = 0
        self.link()

    def link(self) -> None:
        self.number += 1
        self.links = (self.number,)
        self.p.link(self.number, WIRE, NUM_STAGING_SLOTS, WIRE.packed_bytes(0, 1, 1, 4))
        self.d.link(self.number, WIRE, NUM_STAGING_SLOTS)

    def lose(self) -> tuple[list, list]:
        self.links = ()
        return self.d.lost(self.number), self.p.lost(self.number)

    def reserve(self, request_id: str, prompt_len: int = 6, num_tokens: int = 8) -> Reserve:
        (send,) = self.d.submit(request_id, tuple(range(prompt_len)), num_tokens, links=self.links)
        assert send.link == self.number
        return send.frame

    def begin(self, request_id: str, prompt_len: int = 6) -> Reserve:
        reserve = self.reserve(request_id, prompt_len)
        self.p.submit(request_id, tuple(range(prompt_len)), self.links)
        (begin,) = self.p.reserve(self.number, reserve)
        assert isinstance(begin, Begin)
        return reserve

    def compute(self, request_id: str, prompt_len: int = 6) -> None:
        for layer in range(2):
            self.p.layer_ready(request_id, layer, 0, prompt_len)
        self.p.prefilled(request_id, first_token=9)

    def next_chunk(self) -> Chunk:
        push = self.p.next_send()
        (send,) = self.p.pushed(push, WIRE.block_bytes(push.block, push.tokens[1] - push.tokens[0]), 0)
        return send.frame

    def deliver(self, chunk: Chunk) -> list:
        (unpack,) = self.d.chunk(self.number, chunk)
        assert isinstance(unpack, Unpack)
        actions = self.d.unpacked(unpack)
        self.p.credit(self.number, actions[0].frame)
        return actions[1:]

    def all_free(self) -> bool:
        return self.d_pages.num_free == 4 and self.p_pages.num_free == 3


def test_a_request_goes_all_the_way() -> None:
    pair = Pair()
    reserve = pair.begin("a")
    assert (reserve.num_cached, reserve.num_tokens, reserve.deadline_ms) == (0, 6, 100)
    pair.compute("a")
    assert pair.p_pages.counts() == {"free": 1, "active": 0, "cached": 0, "leased": 2}
    seen = []
    for _ in range(3):  # what a layer of 4 tokens takes holds two of 2
        chunk = pair.next_chunk()
        seen.append((chunk.block.layers, chunk.tokens))
        assert pair.deliver(chunk) == []
    assert seen == [((0, 1), (0, 4)), ((1, 2), (0, 4)), ((0, 2), (4, 6))]
    commit = pair.p.next_send().frame
    assert isinstance(commit, Commit) and commit.first_token == 9
    ack, start = pair.d.commit(pair.number, commit)
    assert isinstance(start, Start) and len(start.pages) == 2
    assert pair.p.ack(pair.number, ack.frame) == [Dropped("a")]
    assert pair.p_pages.num_free == 3
    assert pair.d.release("a") == []
    assert pair.all_free()


def test_commit_before_the_last_chunk_fails_the_request() -> None:
    pair = Pair()
    reserve = pair.begin("a")
    pair.compute("a")
    for _ in range(2):
        pair.deliver(pair.next_chunk())
    failed, abort = pair.d.commit(
        pair.number, Commit("a", 1, reserve.capability, 9, prompt_sha256(tuple(range(6))), ())
    )
    assert isinstance(failed, RequestFailed) and "not arrived" in failed.message
    assert pair.p.abort(pair.number, abort.frame) == [Dropped("a")]
    assert pair.all_free()


@pytest.mark.parametrize(
    ("change", "words"),
    [({"prompt_sha256": prompt_sha256((5, 4, 3, 2, 1, 0))}, "hash"), ({"first_token": 50}, "first token 50")],
)
def test_a_commit_of_something_else_fails_the_request(change: dict, words: str) -> None:
    pair = Pair()
    pair.begin("a")
    pair.compute("a")
    for _ in range(3):
        pair.deliver(pair.next_chunk())
    failed, _ = pair.d.commit(pair.number, replace(pair.p.next_send().frame, **change))
    assert isinstance(failed, RequestFailed) and words in failed.message
    assert pair.d_pages.num_free == 4


def test_no_credit_no_chunk() -> None:
    pair = Pair()
    pair.begin("a")
    pair.compute("a")
    first, _ = pair.next_chunk(), pair.next_chunk()
    assert pair.p.next_send() is None
    pair.deliver(first)
    assert pair.next_chunk().slot == first.slot


def test_a_chunk_that_cannot_be_packed_gives_its_slot_back() -> None:
    pair = Pair()
    pair.begin("a")
    pair.compute("a")
    failed, abort = pair.p.not_pushed(pair.p.next_send(), "pack raised")
    assert (failed, type(abort.frame)) == (RequestFailed("a", "pack raised"), Abort)
    pair.d.abort(pair.number, abort.frame)
    assert pair.all_free()
    pair.begin("b")
    pair.compute("b")
    assert {pair.next_chunk().slot, pair.next_chunk().slot} == {0, 1}


def test_a_bad_payload_fails_its_request_and_returns_the_slot() -> None:
    pair = Pair()
    pair.begin("a")
    pair.compute("a")
    chunk = pair.next_chunk()
    (unpack,) = pair.d.chunk(pair.number, chunk)
    credit, failed, abort = pair.d.unpacked(unpack, "checksum")
    assert (credit.frame, failed) == (Credit(chunk.slot), RequestFailed("a", "checksum"))
    pair.p.credit(pair.number, credit.frame)
    pair.p.abort(pair.number, abort.frame)
    assert pair.all_free()


@pytest.mark.parametrize("end", ["cancel", "fail"])
@pytest.mark.parametrize("phase", ["waiting", "granted", "prefilling", "draining", "pushed", "committed"])
@pytest.mark.parametrize("side", ["d", "p"])
def test_ending_a_request_in_every_phase(side: str, phase: str, end: str) -> None:
    """One answer, one ABORT unless there is nobody to tell, nothing left behind, and the next one runs."""
    pair = Pair()
    if phase == "waiting":
        pair.p.submit("a", tuple(range(6)), pair.links)
        if side == "d":
            pair.reserve("first", 15, 16)  # takes every page
            assert pair.d.submit("a", tuple(range(6)), 8, links=pair.links) == []
    elif phase == "granted":
        pair.begin("first", prompt_len=8)  # two of P's three pages
        pair.p.submit("a", tuple(range(6)), pair.links)
        assert pair.p.reserve(pair.number, pair.reserve("a")) == []  # P has no pages
    else:
        pair.begin("a")
        if phase != "prefilling":
            pair.compute("a")
    if phase in ("pushed", "committed"):
        for _ in range(3):
            pair.deliver(pair.next_chunk())
    if phase == "committed":
        ack, _ = pair.d.commit(pair.number, pair.p.next_send().frame)
    machine, other = (pair.d, pair.p) if side == "d" else (pair.p, pair.d)
    arguments = ("a",) if end == "cancel" else ("a", "why")
    answer, *rest = getattr(machine, end)(*arguments)
    assert answer == (Cancelled("a") if end == "cancel" else RequestFailed("a", "why"))
    for send in rest:
        assert isinstance(send.frame, Abort)
        other.abort(pair.number, send.frame)
    if phase == "committed":
        if side == "d":  # the ACK is on its way
            assert rest == [] and pair.p.ack(pair.number, ack.frame) == [Dropped("a")]
        else:  # D has everything: it goes on until the front cancels it there
            assert pair.d.request_ids() == ["a"] and pair.p.ack(pair.number, ack.frame) == []
            pair.d.cancel("a")
    assert getattr(machine, end)(*arguments) == []
    assert pair.p.next_send() is None
    for request_id in ("a", "first"):
        pair.p.cancel(request_id)
        pair.d.cancel(request_id)
    assert pair.all_free()
    assert pair.d.num_waiting == pair.p.num_waiting == 0
    pair.begin("next")


def test_pages_that_come_free_admit_the_next() -> None:
    pair = Pair()
    pair.begin("a", prompt_len=8)
    pair.p.submit("b", tuple(range(6)), pair.links)
    assert pair.p.reserve(pair.number, pair.reserve("b")) == []
    assert [type(action) for action in pair.p.cancel("a")] == [Cancelled, Send, Begin]


def test_a_refused_request_is_refused_at_both_sides_in_any_order() -> None:
    pair = Pair()
    for p_first in (True, False):
        request_id = f"huge{p_first}"
        if p_first:
            assert pair.p.submit(request_id, tuple(range(6)), pair.links) == []
        failed, abort = pair.d.submit(request_id, tuple(range(6)), 17, links=pair.links)
        assert "5 pages" in failed.message and abort.frame.generation == NO_GENERATION
        assert pair.p.abort(pair.number, abort.frame) == ([Dropped(request_id)] if p_first else [])
        if not p_first:
            assert pair.p.submit(request_id, tuple(range(6)), pair.links) == [Dropped(request_id)]
        assert pair.p.request_ids() == []


def test_a_full_queue_refuses() -> None:
    pair = Pair()
    pair.reserve("a", num_tokens=16)
    assert pair.d.submit("b", (1,), 4, links=pair.links) == []
    assert isinstance(pair.d.submit("c", (1,), 4, links=pair.links)[0], RequestFailed)
    assert pair.d.num_waiting == 1


def test_a_grant_for_an_ended_request_is_aborted() -> None:
    pair = Pair()
    pair.p.submit("a", tuple(range(6)), pair.links)
    pair.p.cancel("a")
    (abort,) = pair.p.reserve(pair.number, pair.reserve("a"))
    assert pair.d.abort(pair.number, abort.frame) == [Dropped("a")]
    assert pair.all_free()


def test_what_is_not_committed_in_time_fails() -> None:
    pair = Pair()
    pair.begin("a")
    pair.now_ms = 99
    assert pair.d.tick() == []
    pair.now_ms = 100
    failed, abort = pair.d.tick()
    assert isinstance(failed, RequestFailed) and "100 ms" in failed.message
    pair.p.abort(pair.number, abort.frame)
    assert pair.all_free()


def test_d_waits_as_long_as_anything_comes() -> None:
    """The one granted last waits its turn at P while the first one's KV comes."""
    pair = Pair()
    pair.begin("a")
    pair.reserve("b", prompt_len=6)
    pair.compute("a")
    for _ in range(3):
        pair.now_ms += 90
        assert pair.d.tick() == []
        pair.deliver(pair.next_chunk())
    pair.now_ms += 90
    assert pair.d.tick() == []
    pair.d.commit(pair.number, pair.p.next_send().frame)
    pair.now_ms += 99
    assert pair.d.tick() == []
    pair.now_ms += 1
    assert [action.request_id for action in pair.d.tick()[:1]] == ["b"]


def test_what_does_not_count_is_no_progress() -> None:
    pair = Pair()
    pair.begin("a")
    pair.compute("a")
    chunk = pair.next_chunk()
    pair.now_ms = 99
    pair.d.chunk(pair.number, replace(chunk, capability=b"?" * 16))
    pair.d.commit(pair.number, Commit("a", 99, b"?" * 16, 9, b"h" * 32, ()))
    pair.now_ms = 100
    assert pair.d.tick() != []


@pytest.mark.parametrize("stuck", ["credits", "ack", "pages"])
def test_p_waits_as_long_as_anything_moves(stuck: str) -> None:
    pair = Pair()
    reserve = pair.begin("a", prompt_len=8)
    assert reserve.deadline_ms == 100
    if stuck == "pages":
        pair.p.submit("b", tuple(range(6)), pair.links)
        assert pair.p.reserve(pair.number, pair.reserve("b")) == []
    for layer in range(2):
        pair.now_ms += 99
        assert pair.p.tick() == []
        pair.p.layer_ready("a", layer, 0, 8)
    pair.p.prefilled("a", first_token=9)
    for _ in range(4 if stuck == "ack" else 2):
        pair.now_ms += 99
        assert pair.p.tick() == []
        chunk = pair.next_chunk()
        if stuck == "ack":
            pair.deliver(chunk)
    if stuck == "ack":
        pair.now_ms += 99
        assert pair.p.tick() == []
        assert isinstance(pair.p.next_send().frame, Commit)
    assert pair.p.next_send() is None
    pair.now_ms += 99
    assert pair.p.tick() == []
    pair.now_ms += 1
    failed, abort, *rest = pair.p.tick()
    assert failed == RequestFailed("a", "the KV did not leave: nothing moved between P and D within 100 ms")
    assert abort.frame.generation == reserve.generation
    if stuck == "pages":  # with a's pages b could begin, but its clock ran out as well
        assert [type(action) for action in rest] == [Begin, RequestFailed, Send]
    assert pair.p_pages.num_free == 3


def test_a_request_that_was_not_granted_waits_for_ever_at_p() -> None:
    pair = Pair()
    pair.p.submit("a", tuple(range(6)), pair.links)
    pair.now_ms = 10**9
    assert pair.p.tick() == [] and pair.p.request_ids() == ["a"]


def test_the_longest_patience_fits_its_field() -> None:
    pair = Pair()
    d = Receiver(
        pair.d_pages, PAGE_SIZE, WIRE.groups, vocab_size=50, max_waiting=1, timeout_ms=1 << 40,
        now_ms=lambda: 0, new_capability=lambda: b"c" * 16,
    )  # fmt: skip
    d.link(1, WIRE, NUM_STAGING_SLOTS)
    (send,) = d.submit("a", (1,), 4, links=(1,))
    assert FrameCodec().encode(send.frame)


def test_an_ack_for_nothing_changes_nothing() -> None:
    pair = Pair()
    pair.begin("a")
    (refused,) = pair.p.ack(pair.number, Ack("a", 1))
    assert "not committed" in refused.reason
    assert pair.p.request_ids() == ["a"]


def test_a_request_id_may_come_again() -> None:
    pair = Pair()
    for _ in range(2):
        pair.begin("a")
        pair.d.abort(pair.number, pair.p.cancel("a")[1].frame)
    pair.p.submit("a", tuple(range(6)), pair.links)
    pair.p.cancel("a")  # before the grant
    pair.d.abort(pair.number, pair.p.reserve(pair.number, pair.reserve("a"))[0].frame)
    pair.d.submit("a", tuple(range(6)), 17)  # refused, and P hears of it first
    pair.p.abort(pair.number, Abort("a", NO_GENERATION, "too large"))
    assert pair.p.submit("a", tuple(range(6)), pair.links) == [Dropped("a")]
    pair.begin("a")


def test_ids_of_which_one_side_heard_are_forgotten_in_time() -> None:
    pair = Pair()
    for i in range(5000):
        pair.p.abort(pair.number, Abort(f"r{i}", NO_GENERATION, "refused"))
    assert len(pair.p._links[pair.number].refused) == 4096


def test_a_lost_peer_takes_its_requests_and_the_next_one_is_not_confused() -> None:
    pair = Pair()
    old = pair.begin("a")
    pair.compute("a")
    chunk = pair.next_chunk()
    (unpack,) = pair.d.chunk(pair.number, chunk)
    links, old_number = pair.links, pair.number
    assert pair.lose() == ([Dropped("a")], [Dropped("a")])
    assert pair.p_pages.num_free == 3
    assert pair.d_pages.counts() == {"free": 2, "active": 0, "cached": 0, "leased": 2}
    assert pair.d.submit("b", (1,), 4, links=links) == [Dropped("b")] == pair.p.submit("b", (1,), links)
    assert pair.d.request_ids() == []

    pair.link()
    new = pair.begin("a")
    assert new.generation > old.generation
    pair.compute("a")
    again = pair.next_chunk()
    assert again.slot == chunk.slot
    assert pair.d.frame(old_number, again) == [] == pair.p.frame(old_number, Credit(0))
    (second,) = pair.d.chunk(pair.number, again)
    assert set(second.pages).isdisjoint(unpack.pages)
    assert pair.d.unpacked(unpack) == []  # of the peer that is gone: no credit
    assert pair.d_pages.counts()["leased"] == 0
    pair.p.credit(pair.number, pair.d.unpacked(second)[0].frame)
    late = replace(pair.next_chunk(), generation=old.generation)
    (credit,) = pair.d.chunk(pair.number, late)
    pair.p.credit(pair.number, credit.frame)
    pair.d.cancel("a")
    pair.p.cancel("a")
    assert pair.all_free()


def test_a_running_request_outlives_the_peer() -> None:
    pair = Pair()
    pair.begin("a")
    pair.compute("a")
    for _ in range(3):
        pair.deliver(pair.next_chunk())
    pair.d.commit(pair.number, pair.p.next_send().frame)
    assert pair.lose() == ([], [Dropped("a")])
    assert pair.d.request_ids() == ["a"]
    assert pair.d.release("a") == []
    assert pair.all_free()


@pytest.mark.parametrize("linked", [True, False])
def test_a_request_of_d_alone(linked: bool) -> None:
    """Needs pages and nobody: it waits in the queue, and no frame is sent for it."""
    pair = Pair()
    if not linked:
        pair.lose()
    (begin,) = pair.d.submit("a", tuple(range(6)), 12)
    assert begin == Begin("a", [0, 1, 2])
    assert pair.d.submit("b", tuple(range(6)), 8) == []
    assert [type(action) for action in pair.d.submit("c", (1,), 4)] == [RequestFailed]
    assert pair.d.submit("a", (1,), 4)[0].reason == "request a was submitted twice"
    pair.now_ms = 10**9
    assert pair.d.tick() == []
    assert pair.d.release("a") == [Begin("b", [3, 0])]
    assert pair.d.fail("b", "why") == [RequestFailed("b", "why")]
    pair.d.submit("d", tuple(range(6)), 16)
    pair.d.submit("e", tuple(range(6)), 16)
    assert pair.d.cancel("e") == [Cancelled("e")]
    assert pair.d.cancel("d") == [Cancelled("d")]
    assert pair.all_free()


def test_what_waits_behind_a_lost_peers_requests_begins() -> None:
    pair = Pair()
    pair.reserve("a", num_tokens=16)
    assert pair.d.submit("b", (1,), 4) == []
    assert pair.lose()[0] == [Dropped("a"), Begin("b", [0])]


def test_d_aborts_nothing_of_a_peer_that_is_gone() -> None:
    pair = Pair()
    pair.reserve("a", num_tokens=16)
    assert pair.d.submit("b", tuple(range(6)), 8, links=pair.links) == []
    assert pair.lose()[0] == [Dropped("a"), Dropped("b")]
    assert pair.d.num_waiting == 0 and pair.all_free()
