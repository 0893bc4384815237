"""One request over several links, step by step, and a sender that lies to a receiver with others."""

from itertools import count

import pytest
from msgspec.structs import replace

from pagewire.allocator import PageAllocator
from pagewire.transfer.actions import Action, Begin, Dropped, Refused, RequestFailed, Send, Start
from pagewire.transfer.frames import Abort, Ack, Block, Chunk, Commit, Credit, Held, Reserve
from pagewire.transfer.handoff import NO_GENERATION, Wire, prompt_sha256
from pagewire.transfer.receiver import Receiver
from pagewire.transfer.sender import Sender
from pagewire.transfer.shares import shares

OURS = Held(0, 4, 0, 4, 4, 4, "float32", "none")
LOW, HIGH = replace(OURS, head_stop=2), replace(OURS, head_start=2)
PROMPT = tuple(range(6))


def wire(held: Held) -> Wire:
    return Wire(b"f" * 32, (held,))


class D:
    """4 pages of 4 tokens; link 1 has the lower heads, link 2 the upper ones."""

    def __init__(self) -> None:
        self.now_ms = 0
        self.pages = PageAllocator(4)
        capabilities = count()
        self.machine = Receiver(
            self.pages, 4, (OURS,), vocab_size=50, max_waiting=4, timeout_ms=100,
            now_ms=lambda: self.now_ms, new_capability=lambda: next(capabilities).to_bytes(16, "little"),
        )  # fmt: skip
        for number, held in ((1, LOW), (2, HIGH)):
            self.machine.link(number, wire(held), 2)

    def reserves(self, request_id: str = "a", **fields) -> dict[int, Reserve]:
        sends = self.machine.submit(request_id, PROMPT, 8, links=(1, 2), **fields)
        return {send.link: send.frame for send in sends}

    def chunk(self, reserve: Reserve, block: Block | None = None, tokens: tuple[int, int] = (0, 6)) -> Chunk:
        block = block or reserve.blocks[0]
        return Chunk(
            request_id=reserve.request_id, generation=reserve.generation, capability=reserve.capability,
            fingerprint=b"f" * 32, group=0, layer_start=block.layer_start, layer_stop=block.layer_stop,
            head_start=block.head_start, head_stop=block.head_stop, head_dim=4, head_dim_v=4, token_start=tokens[0],
            token_stop=tokens[1], dtype="float32", scale_kind="none", checksum_kind="crc32c", checksum=0,
            payload_bytes=wire(OURS).block_bytes(block, tokens[1] - tokens[0]), slot=0,
        )  # fmt: skip

    def arrives(self, number: int, chunk: Chunk) -> list[Action]:
        (unpack,) = self.machine.chunk(number, chunk)
        return self.machine.unpacked(unpack)

    def commit(self, number: int, reserve: Reserve, first_token: int = 9) -> list[Action]:
        commit = Commit(
            reserve.request_id, reserve.generation, reserve.capability, first_token, prompt_sha256(PROMPT), ()
        )
        return self.machine.commit(number, commit)


def aborts(actions: list[Action]) -> list[tuple[int, int]]:
    """Link and generation."""
    return [(a.link, a.frame.generation) for a in actions if isinstance(a, Send) and isinstance(a.frame, Abort)]


def test_a_request_from_two_senders_runs_once_both_have_committed() -> None:
    d = D()
    reserves = d.reserves()
    assert [reserve.blocks for reserve in reserves.values()] == [(Block(0, 0, 4, 0, 2),), (Block(0, 0, 4, 2, 4),)]
    for number, reserve in reserves.items():
        d.arrives(number, d.chunk(reserve))
    (ack,) = d.commit(2, reserves[2])
    assert ack.link == 2
    ack, start = d.commit(1, reserves[1])
    assert isinstance(start, Start) and [share.link for share in start.shares] == [1, 2] and ack.link == 1
    assert d.machine.lost(1) == d.machine.lost(2) == [] and d.machine.request_ids() == ["a"]
    d.machine.release("a")
    assert d.pages.num_free == 4


def test_replicas_share_layers_and_one_may_be_left_with_none() -> None:
    assert shares([OURS], {1: [OURS], 2: [OURS], 3: [OURS]}) == {
        1: (Block(0, 0, 1, 0, 4),),
        2: (Block(0, 1, 2, 0, 4),),
        3: (Block(0, 2, 4, 0, 4),),
    }
    one = replace(OURS, layer_stop=1)
    assert shares([one], {1: [one], 2: [one]}) == {1: (), 2: (Block(0, 0, 1, 0, 4),)}


@pytest.mark.parametrize(
    ("links", "sentence"),
    [
        ({1: LOW}, "no link holds group 0, layer 0, head 2"),
        ({1: LOW, 2: replace(HIGH, layer_start=1)}, "no link holds group 0, layer 0, head 2"),
        ({1: LOW, 2: replace(OURS, head_start=1)}, r"layers \[0, 4\) x heads \(1, 4\) overlap another link's"),
    ],
)
def test_what_is_missing_or_overlaps_is_named(links: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        shares([OURS], {number: [held] for number, held in links.items()})
    d = D()
    failed, abort = d.machine.submit("a", PROMPT, 8, links=(1,))
    assert failed == RequestFailed("a", "no link holds group 0, layer 0, head 2")
    assert (abort.link, abort.frame.generation) == (1, NO_GENERATION) and d.pages.num_free == 4


LIES = {
    "of another's heads": lambda d, r: d.machine.chunk(1, d.chunk(r[1], r[2].blocks[0])),
    "into another's heads": lambda d, r: d.machine.chunk(1, d.chunk(r[1], Block(0, 0, 4, 1, 3))),
    "of another's reservation": lambda d, r: d.machine.chunk(1, d.chunk(r[2])),
    "outside the tokens": lambda d, r: d.machine.chunk(1, d.chunk(r[1], tokens=(3, 7))),
    "of another group": lambda d, r: d.machine.chunk(1, replace(d.chunk(r[1]), group=1)),
    "twice": lambda d, r: [d.arrives(1, d.chunk(r[1])), d.machine.chunk(1, d.chunk(r[1], tokens=(5, 6)))][1],
    "commits too early": lambda d, r: d.commit(1, r[1]),
    "commits for another": lambda d, r: d.commit(1, r[2]),
    "commits twice": lambda d, r: [d.arrives(1, d.chunk(r[1])), d.commit(1, r[1]), d.commit(1, r[1])][2],
    "another first token": lambda d, r: [
        *(d.arrives(number, d.chunk(reserve)) for number, reserve in r.items()),
        d.commit(2, r[2]),
        d.commit(1, r[1], first_token=8),
    ][3],
}


@pytest.mark.parametrize("lie", LIES)
def test_one_sender_lies(lie: str) -> None:
    """It is refused, or fails its request; it never starts, and the next one is as if nothing had been."""
    d = D()
    reserves = d.reserves()
    actions = LIES[lie](d, reserves)
    ignored = lie in ("of another's reservation", "commits for another", "commits twice")
    if ignored:
        assert actions in ([Send(Credit(0), 1)], [Refused("COMMIT for a, which is not receiving")])
        d.machine.cancel("a")
    else:
        failed = next(action for action in actions if isinstance(action, RequestFailed))
        words = {"another first token": "first token 8, another sender's 9", "twice": "came twice"}
        assert failed.request_id == "a" and words.get(lie, "") in failed.message
        assert set(aborts(actions)) == {(number, 1) for number in ((1,) if lie == "another first token" else (1, 2))}
    assert d.pages.num_free == 4 and d.machine.request_ids() == []
    assert all(link.granted_staging == {0, 1} for link in d.machine._links.values())
    for number, reserve in d.reserves("next").items():
        d.arrives(number, d.chunk(reserve))
        last = d.commit(number, reserve)
    assert isinstance(last[-1], Start)


@pytest.mark.parametrize("phase", ["waiting", "receiving"])
def test_a_lost_link_drops_what_needs_it_and_the_other_sender_hears_of_it(phase: str) -> None:
    d = D()
    if phase == "waiting":
        d.machine.submit("first", PROMPT, 16)
        assert d.reserves() == {}
    else:
        d.reserves()
    actions = d.machine.lost(1)
    assert actions[0] == Dropped("a") and aborts(actions) == [(2, 0 if phase == "waiting" else 1)]
    gone = d.machine.submit("b", PROMPT, 8, links=(1, 2))
    assert gone[0] == Dropped("b") and aborts(gone) == [(2, 0)]


def test_a_link_that_moves_does_not_keep_another_one_alive() -> None:
    d = D()
    reserves = d.reserves()
    d.now_ms = 99
    d.arrives(1, d.chunk(reserves[1]))
    assert d.machine.tick() == []
    d.now_ms = 100
    assert "nothing came from P" in d.machine.tick()[0].message
    reserves = d.reserves("b")
    for number in (1, 2):
        d.arrives(number, d.chunk(reserves[number]))
    d.commit(1, reserves[1])
    d.now_ms = 199
    assert d.machine.tick() == []


class TestPrefix:
    def test_its_pages_are_the_requests_and_only_the_last_one_is_written(self) -> None:
        d = D()
        prefix = tuple(d.pages.alloc(2))
        d.pages.share(prefix[:1])  # full, and somebody else's too
        reserves = d.reserves(num_cached=5, prefix=prefix)
        assert {reserve.num_cached for reserve in reserves.values()} == {5}
        (unpack,) = d.machine.chunk(1, d.chunk(reserves[1], tokens=(5, 6)))
        assert tuple(unpack.pages) == prefix
        d.machine.cancel("a")
        assert (d.pages.ref_count(prefix[0]), d.pages.state(prefix[1])) == (1, "leased")
        d.machine.unpacked(unpack)
        assert d.pages.num_free == 3

    @pytest.mark.parametrize(
        ("num_cached", "num_pages", "shared", "words"),
        [
            (6, 2, False, "6 of 6 tokens are cached"),
            (5, 1, False, "in 1 pages"),
            (5, 2, True, "is to be written behind 5 cached tokens, but shared"),
        ],
    )
    def test_one_that_cannot_be_is_refused(self, num_cached: int, num_pages: int, shared: bool, words: str) -> None:
        d = D()
        prefix = tuple(d.pages.alloc(num_pages))
        if shared:
            d.pages.share(prefix)
        failed = d.machine.submit("a", PROMPT, 8, links=(1, 2), num_cached=num_cached, prefix=prefix)[0]
        assert isinstance(failed, RequestFailed) and words in failed.message
        assert d.pages.num_free == (2 if shared else 4)


class P:
    """3 pages of 4 tokens; three D that hold everything."""

    def __init__(self) -> None:
        self.now_ms = 0
        self.pages = PageAllocator(3)
        self.machine = Sender(self.pages, 4, now_ms=lambda: self.now_ms)
        for number in (1, 2, 3):
            self.machine.link(number, wire(OURS), 2, wire(OURS).packed_bytes(0, 4, 4, 6))

    def reserve(
        self, number: int, request_id: str = "a", num_cached: int = 0, held: Held = OURS, group: int = 0
    ) -> list[Action]:
        block = Block(group, *held.layers, *held.heads)
        return self.machine.reserve(number, Reserve(request_id, 10 + number, b"c" * 16, num_cached, 6, 100, (block,)))

    def begin(self, *links: int, request_id: str = "a", **fields) -> None:
        assert self.machine.submit(request_id, PROMPT, links) == []
        for number in links:
            actions = self.reserve(number, request_id, **fields)
        assert actions == [Begin(request_id, actions[0].pages)]

    def compute(self, request_id: str = "a") -> None:
        for layer in range(4):
            self.machine.layer_ready(request_id, layer, 0, 6)
        self.machine.prefilled(request_id, 9)

    def sent(self) -> list[tuple[int, str]]:
        """Everything that may leave, by link and kind."""
        found = []
        while send := self.machine.next_send():
            if not isinstance(send, Send):
                size = wire(OURS).block_bytes(send.block, send.tokens[1] - send.tokens[0])
                (send,) = self.machine.pushed(send, size, 0)
            found.append((send.link, type(send.frame).__name__))
        return found


def test_a_prompt_is_prefilled_once_for_two_receivers() -> None:
    p = P()
    p.begin(1, 2, num_cached=3)
    p.compute()
    assert sorted(p.sent()) == [(1, "Chunk"), (1, "Commit"), (2, "Chunk"), (2, "Commit")]
    assert p.machine.ack(2, Ack("a", 12)) == [] and p.pages.counts()["leased"] == 2
    assert "not committed" in p.machine.ack(2, Ack("a", 12))[0].reason
    assert p.machine.lost(2) == []  # it has all it needs
    assert p.machine.ack(1, Ack("a", 11)) == [Dropped("a")] and p.pages.num_free == 3


def test_one_receiver_that_gives_up_ends_it_for_all() -> None:
    p = P()
    p.begin(1, 2)
    actions = p.machine.abort(1, Abort("a", 11, "full"))
    assert actions[0] == Dropped("a") and aborts(actions) == [(2, 12)] and p.pages.num_free == 3
    assert p.machine.submit("b", PROMPT, (1, 2)) == []
    assert p.machine.abort(1, Abort("b", NO_GENERATION, "refused")) == [Dropped("b")]
    assert aborts(p.reserve(2, "b")) == [(2, 12)]  # its RESERVE was on its way
    assert p.machine.abort(1, Abort("c", NO_GENERATION, "refused")) == []
    assert p.machine.submit("c", PROMPT, (1, 2)) == [Dropped("c")]
    assert aborts(p.reserve(2, "c")) == [(2, 12)]


def test_links_take_turns_and_one_without_credits_keeps_nobody() -> None:
    p = P()
    p.begin(1)
    p.compute()
    assert p.sent() == [(1, "Chunk"), (1, "Commit")]
    p.machine.submit("b", PROMPT, (2,))
    assert p.reserve(2, "b") == []  # a has two of three pages
    p.machine.submit("c", PROMPT, (3,))
    p.reserve(3, "c")
    assert [type(action) for action in p.machine.lost(1)] == [Dropped, Begin]
    p.compute("b")
    assert p.sent() == [(2, "Chunk"), (2, "Commit")]
    p.now_ms = 100  # D 2 says nothing, and what P does for others does not count
    failed = p.machine.tick()
    assert [a.request_id for a in failed if isinstance(a, RequestFailed)] == ["b", "c"]


def test_pages_that_a_push_reads_are_not_reused_before_it_is_over() -> None:
    p = P()
    p.begin(1, 2)
    for layer in range(4):
        p.machine.layer_ready("a", layer, 0, 6)
    first, second = p.machine.next_send(), p.machine.next_send()
    assert {first.link, second.link} == {1, 2}
    p.machine.cancel("a")
    assert p.pages.counts() == {"free": 1, "active": 0, "cached": 0, "leased": 2}
    p.machine.submit("b", PROMPT, (3,))
    assert p.reserve(3, "b") == []
    assert p.machine.credit(1, Credit(first.staging_slot))[0].reason.startswith("CREDIT for staging slot")
    assert p.machine.pushed(first, 1, 0) == []
    p.machine.lost(2)
    assert [type(action) for action in p.machine.not_pushed(second, "no")] == [Begin]
    assert len(p.machine._links[1].credits) == 2


@pytest.mark.parametrize("of", [{"held": replace(OURS, head_stop=5)}, {"group": 1}], ids=["head", "group"])
def test_a_block_that_is_not_of_what_both_hold_fails_the_request(of: dict) -> None:
    p = P()
    p.machine.submit("a", PROMPT, (1,))
    failed, abort = p.reserve(1, **of)
    assert "RESERVE: Block(" in failed.message and abort.frame.generation == 11
    assert "other links" in P_with_a().reserve(2)[0].reason


def P_with_a() -> P:
    p = P()
    p.machine.submit("a", PROMPT, (1,))
    return p
