"""The handoff step by step: what each event makes each side do."""

from dataclasses import replace

import pytest

from pagewire.allocator import PageAllocator
from pagewire.transfer.codec import FrameCodec
from pagewire.transfer.frames import Abort, Ack, Chunk, Commit, Credit, Reserve
from pagewire.transfer.handoff import (
    NO_GENERATION,
    Begin,
    Cancelled,
    Dropped,
    RequestFailed,
    Send,
    Start,
    Unpack,
    prompt_sha256,
)
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
            self.d_pages, PAGE_SIZE, WIRE, vocab_size=50, max_waiting=1, timeout_ms=100,
            now_ms=lambda: self.now_ms, new_capability=lambda: b"c" * 16,
        )  # fmt: skip
        self.link()

    def link(self) -> None:
        slot_bytes = WIRE.packed_bytes(1, 1, 4)
        self.p = Sender(self.p_pages, PAGE_SIZE, WIRE, NUM_STAGING_SLOTS, slot_bytes, now_ms=lambda: self.now_ms)
        assert self.d.link(NUM_STAGING_SLOTS) == []

    def reserve(self, request_id: str, prompt_len: int = 6, num_tokens: int = 8) -> Reserve:
        (send,) = self.d.submit(request_id, tuple(range(prompt_len)), num_tokens)
        return send.frame

    def begin(self, request_id: str, prompt_len: int = 6) -> Reserve:
        reserve = self.reserve(request_id, prompt_len)
        self.p.submit(request_id, tuple(range(prompt_len)))
        (begin,) = self.p.reserve(reserve)
        assert isinstance(begin, Begin)
        return reserve

    def compute(self, request_id: str, prompt_len: int = 6) -> None:
        for layer in range(2):
            self.p.layer_ready(request_id, layer, 0, prompt_len)
        self.p.prefilled(request_id, first_token=9)

    def next_chunk(self) -> Chunk:
        push = self.p.next_send()
        (layer, next_layer), (start, stop) = push.layers, push.tokens
        num_bytes = WIRE.packed_bytes(next_layer - layer, 1, stop - start)
        return self.p.chunk_frame(push, num_bytes, 0)

    def deliver(self, chunk: Chunk) -> list:
        (unpack,) = self.d.chunk(chunk)
        assert isinstance(unpack, Unpack)
        actions = self.d.unpacked(chunk)
        self.p.credit(actions[0].frame)
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
        seen.append((chunk.block[0], chunk.block[2]))
        assert pair.deliver(chunk) == []
    assert seen == [((0, 1), (0, 4)), ((1, 2), (0, 4)), ((0, 2), (4, 6))]
    commit = pair.p.next_send().frame
    assert isinstance(commit, Commit) and commit.first_token == 9
    ack, start = pair.d.commit(commit)
    assert isinstance(start, Start) and len(start.pages) == 2
    assert pair.p.ack(ack.frame) == [Dropped("a")]
    assert pair.p_pages.num_free == 3
    assert pair.d.release("a") == []
    assert pair.all_free()


def test_commit_before_the_last_chunk_fails_the_request() -> None:
    pair = Pair()
    reserve = pair.begin("a")
    pair.compute("a")
    for _ in range(2):
        pair.deliver(pair.next_chunk())
    failed, abort = pair.d.commit(Commit("a", 1, reserve.capability, 9, prompt_sha256(tuple(range(6))), ()))
    assert isinstance(failed, RequestFailed) and "not arrived" in failed.message
    assert pair.p.abort(abort.frame) == [Dropped("a")]
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
    failed, _ = pair.d.commit(replace(pair.p.next_send().frame, **change))
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
    pair.d.abort(abort.frame)
    assert pair.all_free()
    pair.begin("b")
    pair.compute("b")
    assert {pair.next_chunk().slot, pair.next_chunk().slot} == {0, 1}


def test_a_bad_payload_fails_its_request_and_returns_the_slot() -> None:
    pair = Pair()
    pair.begin("a")
    pair.compute("a")
    chunk = pair.next_chunk()
    pair.d.chunk(chunk)
    credit, failed, abort = pair.d.unpacked(chunk, "checksum")
    assert (credit.frame, failed) == (Credit(chunk.slot), RequestFailed("a", "checksum"))
    pair.p.credit(credit.frame)
    pair.p.abort(abort.frame)
    assert pair.all_free()


@pytest.mark.parametrize("end", ["cancel", "fail"])
@pytest.mark.parametrize("phase", ["waiting", "granted", "prefilling", "draining", "pushed", "committed"])
@pytest.mark.parametrize("side", ["d", "p"])
def test_ending_a_request_in_every_phase(side: str, phase: str, end: str) -> None:
    """One answer, one ABORT unless there is nobody to tell, nothing left behind, and the next one runs."""
    pair = Pair()
    if phase == "waiting":
        pair.p.submit("a", tuple(range(6)))
        if side == "d":
            pair.reserve("first", 15, 16)  # takes every page
            assert pair.d.submit("a", tuple(range(6)), 8) == []
    elif phase == "granted":
        pair.begin("first", prompt_len=8)  # two of P's three pages
        pair.p.submit("a", tuple(range(6)))
        assert pair.p.reserve(pair.reserve("a")) == []  # P has no pages
    else:
        pair.begin("a")
        if phase != "prefilling":
            pair.compute("a")
    if phase in ("pushed", "committed"):
        for _ in range(3):
            pair.deliver(pair.next_chunk())
    if phase == "committed":
        ack, _ = pair.d.commit(pair.p.next_send().frame)
    machine, other = (pair.d, pair.p) if side == "d" else (pair.p, pair.d)
    arguments = ("a",) if end == "cancel" else ("a", "why")
    answer, *rest = getattr(machine, end)(*arguments)
    assert answer == (Cancelled("a") if end == "cancel" else RequestFailed("a", "why"))
    for send in rest:
        assert isinstance(send.frame, Abort)
        other.abort(send.frame)
    if phase == "committed":
        if side == "d":  # the ACK is on its way
            assert rest == [] and pair.p.ack(ack.frame) == [Dropped("a")]
        else:  # D has everything: it goes on until the front cancels it there
            assert pair.d.request_ids() == ["a"] and pair.p.ack(ack.frame) == []
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
    pair.p.submit("b", tuple(range(6)))
    assert pair.p.reserve(pair.reserve("b")) == []
    assert [type(action) for action in pair.p.cancel("a")] == [Cancelled, Send, Begin]


def test_a_refused_request_is_refused_at_both_sides_in_any_order() -> None:
    pair = Pair()
    for p_first in (True, False):
        request_id = f"huge{p_first}"
        if p_first:
            assert pair.p.submit(request_id, tuple(range(6))) == []
        failed, abort = pair.d.submit(request_id, tuple(range(6)), 17)
        assert "5 pages" in failed.message and abort.frame.generation == NO_GENERATION
        assert pair.p.abort(abort.frame) == ([Dropped(request_id)] if p_first else [])
        if not p_first:
            assert pair.p.submit(request_id, tuple(range(6))) == []
        assert pair.p.request_ids() == []


def test_a_full_queue_refuses() -> None:
    pair = Pair()
    pair.reserve("a", num_tokens=16)
    assert pair.d.submit("b", (1,), 4) == []
    assert isinstance(pair.d.submit("c", (1,), 4)[0], RequestFailed)
    assert pair.d.num_waiting == 1


def test_a_grant_for_an_ended_request_is_aborted() -> None:
    pair = Pair()
    pair.p.submit("a", tuple(range(6)))
    pair.p.cancel("a")
    (abort,) = pair.p.reserve(pair.reserve("a"))
    assert pair.d.abort(abort.frame) == [Dropped("a")]
    assert pair.all_free()


def test_what_is_not_committed_in_time_fails() -> None:
    pair = Pair()
    pair.begin("a")
    pair.now_ms = 99
    assert pair.d.tick() == []
    pair.now_ms = 100
    failed, abort = pair.d.tick()
    assert isinstance(failed, RequestFailed) and "100 ms" in failed.message
    pair.p.abort(abort.frame)
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
    pair.d.commit(pair.p.next_send().frame)
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
    pair.d.chunk(replace(chunk, capability=b"?" * 16))
    pair.d.commit(Commit("a", 99, b"?" * 16, 9, b"h" * 32, ()))
    pair.now_ms = 100
    assert pair.d.tick() != []


@pytest.mark.parametrize("stuck", ["credits", "ack", "pages"])
def test_p_waits_as_long_as_anything_moves(stuck: str) -> None:
    pair = Pair()
    reserve = pair.begin("a", prompt_len=8)
    assert reserve.deadline_ms == 100
    if stuck == "pages":
        pair.p.submit("b", tuple(range(6)))
        assert pair.p.reserve(pair.reserve("b")) == []
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
    pair.p.submit("a", tuple(range(6)))
    pair.now_ms = 10**9
    assert pair.p.tick() == [] and pair.p.request_ids() == ["a"]


def test_the_longest_patience_fits_its_field() -> None:
    pair = Pair()
    d = Receiver(
        pair.d_pages, PAGE_SIZE, WIRE, vocab_size=50, max_waiting=1, timeout_ms=1 << 40,
        now_ms=lambda: 0, new_capability=lambda: b"c" * 16,
    )  # fmt: skip
    d.link(NUM_STAGING_SLOTS)
    (send,) = d.submit("a", (1,), 4)
    assert FrameCodec().encode(send.frame)


def test_an_ack_for_nothing_changes_nothing() -> None:
    pair = Pair()
    pair.begin("a")
    (refused,) = pair.p.ack(Ack("a", 1))
    assert "not committed" in refused.reason
    assert pair.p.request_ids() == ["a"]


def test_a_request_id_may_come_again() -> None:
    pair = Pair()
    for _ in range(2):
        pair.begin("a")
        pair.d.abort(pair.p.cancel("a")[1].frame)
    pair.p.submit("a", tuple(range(6)))
    pair.p.cancel("a")  # before the grant
    pair.d.abort(pair.p.reserve(pair.reserve("a"))[0].frame)
    pair.d.submit("a", tuple(range(6)), 17)  # refused, and P hears of it first
    pair.p.abort(Abort("a", NO_GENERATION, "too large"))
    assert pair.p.submit("a", tuple(range(6))) == []
    pair.begin("a")


def test_ids_of_which_one_side_heard_are_forgotten_in_time() -> None:
    pair = Pair()
    for i in range(5000):
        pair.p.abort(Abort(f"r{i}", NO_GENERATION, "refused"))
    assert len(pair.p._refused._ids) == 4096


def test_a_lost_peer_takes_its_requests_and_the_next_one_is_not_confused() -> None:
    pair = Pair()
    old = pair.begin("a")
    pair.compute("a")
    chunk = pair.next_chunk()
    (unpack,) = pair.d.chunk(chunk)
    assert pair.d.lost() == [Dropped("a")] == pair.p.lost()
    assert pair.p_pages.num_free == 3
    assert pair.d_pages.counts() == {"free": 2, "active": 0, "cached": 0, "leased": 2}
    assert pair.d.submit("b", (1,), 4) == [Dropped("b")]
    assert pair.d.request_ids() == []

    pair.link()
    new = pair.begin("a")
    assert new.generation > old.generation
    pair.compute("a")
    again = pair.next_chunk()
    assert again.slot == chunk.slot
    (second,) = pair.d.chunk(again)
    assert set(second.pages).isdisjoint(unpack.pages)
    assert pair.d.unpacked(chunk) == []  # of the peer that is gone: no credit
    assert pair.d_pages.counts()["leased"] == 0
    pair.p.credit(pair.d.unpacked(again)[0].frame)
    late = replace(pair.next_chunk(), generation=old.generation)
    (credit,) = pair.d.chunk(late)
    pair.p.credit(credit.frame)
    pair.d.cancel("a")
    pair.p.cancel("a")
    assert pair.all_free()


def test_a_running_request_outlives_the_peer() -> None:
    pair = Pair()
    pair.begin("a")
    pair.compute("a")
    for _ in range(3):
        pair.deliver(pair.next_chunk())
    pair.d.commit(pair.p.next_send().frame)
    assert pair.d.lost() == [] and pair.p.lost() == [Dropped("a")]
    assert pair.d.request_ids() == ["a"]
    assert pair.d.release("a") == []
    assert pair.all_free()


@pytest.mark.parametrize("linked", [True, False])
def test_a_request_of_d_alone(linked: bool) -> None:
    """Needs pages and nobody: it waits in the queue, and no frame is sent for it."""
    pair = Pair()
    if not linked:
        pair.d.lost()
    (begin,) = pair.d.submit("a", tuple(range(6)), 12, local=True)
    assert begin == Begin("a", [0, 1, 2])
    assert pair.d.submit("b", tuple(range(6)), 8, local=True) == []
    assert [type(action) for action in pair.d.submit("c", (1,), 4, local=True)] == [RequestFailed]
    assert pair.d.submit("a", (1,), 4, local=True)[0].reason == "request a was submitted twice"
    pair.now_ms = 10**9
    assert pair.d.tick() == []
    assert pair.d.release("a") == [Begin("b", [3, 0])]
    assert pair.d.fail("b", "why") == [RequestFailed("b", "why")]
    pair.d.submit("d", tuple(range(6)), 16, local=True)
    pair.d.submit("e", tuple(range(6)), 16, local=True)
    assert pair.d.cancel("e") == [Cancelled("e")]
    assert pair.d.cancel("d") == [Cancelled("d")]
    assert pair.all_free()


def test_what_waits_behind_a_lost_peers_requests_begins() -> None:
    pair = Pair()
    pair.reserve("a", num_tokens=16)
    assert pair.d.submit("b", (1,), 4, local=True) == []
    assert pair.d.lost() == [Dropped("a"), Begin("b", [0])]


def test_d_aborts_nothing_of_a_peer_that_is_gone() -> None:
    pair = Pair()
    pair.reserve("a", num_tokens=16)
    assert pair.d.submit("b", tuple(range(6)), 8) == []
    assert pair.d.lost() == [Dropped("a"), Dropped("b")]
    assert pair.d.num_waiting == 0 and pair.all_free()
