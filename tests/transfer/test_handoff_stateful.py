"""Both ends of the handoff under every interleaving: nothing leaks, nothing is accepted that should not be.

The two machines are joined by two queues. Rules deliver, delay, cancel, fail, replay, lose frames and
whole connections, make new ones, and let time pass in any order; at the end of each run the rest is
played out fairly, and every request must have been answered.
"""

from collections import Counter, deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from msgspec.structs import replace

from pagewire.allocator import PageAllocator
from pagewire.transfer.actions import (
    Begin,
    Cancelled,
    Dropped,
    Push,
    Refused,
    RequestFailed,
    Send,
    Share,
    Start,
    Unpack,
)
from pagewire.transfer.codec import ConnectionLost, FrameCodec
from pagewire.transfer.frames import Abort, Ack, Chunk, Commit, Credit, Frame, Reserve
from pagewire.transfer.handoff import Phase, prompt_sha256
from pagewire.transfer.receiver import Receiver
from pagewire.transfer.sender import Sender
from transfer.wires import small_wire

PAGE_SIZE = 4
D_PAGES, P_PAGES = 9, 6
NUM_STAGING_SLOTS = 2
WIRE = small_wire(num_layers=3)
HEADS = 2
STAGING_SLOT_BYTES = WIRE.packed_bytes(0, 1, HEADS, 4)  # or two layers of 2 tokens, or all of one
TIMEOUT_MS = 1000


class Handoff(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now_ms = 0
        self.capabilities = 0
        self.d_pages, self.p_pages = PageAllocator(D_PAGES), PageAllocator(P_PAGES)
        self.receiver = Receiver(
            self.d_pages, PAGE_SIZE, WIRE.groups, vocab_size=100, max_waiting=3,
            timeout_ms=TIMEOUT_MS, now_ms=lambda: self.now_ms, new_capability=self.new_capability,
        )  # fmt: skip
        self.sender = Sender(self.p_pages, PAGE_SIZE, now_ms=lambda: self.now_ms)
        self.linked = False
        self.number = 0  # of the link
        self.local: set[str] = set()
        self.prompts: dict[str, tuple[int, ...]] = {}
        self.max_tokens: dict[str, int] = {}
        self.d_submits: deque[str] = deque()  # sent by the front, not delivered yet
        self.p_submits: deque[str] = deque()
        self.prefilling: dict[str, int] = {}  # tokens computed
        self.computed: set[str] = set()  # prefilled, no ACK yet
        self.unpacking: list[Unpack] = []
        self.pushing: list[Push] = []
        self.running: list[str] = []
        self.arrived: dict[int, set] = {}  # generation -> (layer, head, token) in D's pages
        self.sent_chunks: list[Chunk] = []
        self.ended_at_d: Counter = Counter()
        self.ended_at_p: Counter = Counter()
        self.frame_is_missing = False  # from this connection, and nobody knows yet
        self.honest = True  # until the peer repeats or forges a chunk
        self.answered: Counter = Counter()  # what the front heard: RequestFailed, Cancelled, finished, or saw lost
        self.link()

    # ------------------------------------------------------------------ the connection

    @precondition(lambda self: not self.linked)
    @rule()
    def link(self) -> None:
        self.linked = True
        self.frame_is_missing = False
        self.to_d: deque[bytes] = deque()
        self.to_p: deque[bytes] = deque()
        self.p_codec, self.d_codec = FrameCodec(), FrameCodec()
        self.sent_to: dict[FrameCodec, list[bytes]] = {self.p_codec: [], self.d_codec: []}
        self.number += 1
        self.sender.link(self.number, WIRE, NUM_STAGING_SLOTS, STAGING_SLOT_BYTES)
        self.receiver.link(self.number, WIRE, NUM_STAGING_SLOTS)

    @precondition(lambda self: self.linked)
    @rule()
    def lose(self) -> None:
        """Both sides notice; the front answers for what they drop, and sends nothing to P that has ended: the ABORT
        that would have told P may be gone.
        """
        self.linked = False
        self.to_d.clear()
        self.to_p.clear()
        waits_for_d = {i.request_id for i in self.receiver._live.values() if i.phase is not Phase.RUNNING} - self.local
        actions = self.receiver.lost(self.number)
        dropped = {action.request_id for action in actions if isinstance(action, Dropped)}
        assert dropped == waits_for_d
        self.d(actions)
        at_p = set(self.sender.request_ids())
        actions = self.sender.lost(self.number)
        assert {action.request_id for action in actions} == at_p
        assert self.p_pages.num_free == P_PAGES or self.pushing
        self.p(actions)
        self.front_drops(dropped | at_p)

    def front_drops(self, request_ids: set[str]) -> None:
        self.answered.update(request_ids)
        self.p_submits = deque(i for i in self.p_submits if i not in self.answered)

    @precondition(lambda self: self.to_d or self.to_p)
    @rule(number=st.integers(0, 99))
    def a_frame_is_lost(self, number: int) -> None:
        frames = self.to_d if number % 2 and self.to_d or not self.to_p else self.to_p
        del frames[number % len(frames)]
        self.frame_is_missing = True

    @precondition(lambda self: self.unpacking and self.linked)
    @rule()
    def another_peer_comes_while_payloads_of_the_last_one_are_unpacked(self) -> None:
        self.lose()
        self.link()

    def received(self, codec: FrameCodec, frames: deque) -> Frame | None:
        """None: a frame before this one is missing."""
        data = frames.popleft()
        try:
            frame = codec.decode(data)
        except ConnectionLost:
            self.lose()
            return None
        assert data == self.sent_to[codec].pop(0)
        return frame

    def send(self, frame: Frame, codec: FrameCodec, to: FrameCodec, frames: deque) -> None:
        frames.append(codec.encode(frame))
        self.sent_to[to].append(frames[-1])

    def new_capability(self) -> bytes:
        self.capabilities += 1
        return self.capabilities.to_bytes(16, "little")

    # ------------------------------------------------------------------ carrying out actions

    def d(self, actions: list) -> None:
        for action in actions:
            match action:
                case Send(frame, number):
                    assert (
                        self.linked and number == self.number and getattr(frame, "request_id", None) not in self.local
                    )
                    self.send(frame, self.d_codec, self.p_codec, self.to_p)
                case Begin(request_id, pages):
                    assert request_id in self.local
                    assert len(pages) * PAGE_SIZE >= len(self.prompts[request_id]) + self.max_tokens[request_id]
                    self.running.append(request_id)
                case Unpack(number, chunk, pages):
                    assert number == self.number
                    prompt = self.prompts[chunk.request_id]
                    assert 0 <= chunk.token_start < chunk.token_stop <= len(prompt)
                    assert all(self.d_pages.state(page) == "active" for page in pages)
                    self.unpacking.append(action)
                case Start(request_id, _, (Share(_, _, commit),)):
                    assert self.arrived[commit.generation] == self.every_cell(request_id)
                    assert commit.prompt_sha256 == prompt_sha256(self.prompts[request_id])
                    self.running.append(request_id)
                case RequestFailed(request_id) | Cancelled(request_id):
                    self.answered[request_id] += 1
                    self.end_at_d(request_id)
                case Dropped(request_id):
                    self.end_at_d(request_id)

    def p(self, actions: list) -> None:
        for action in actions:
            match action:
                case Send(frame, number):
                    assert self.linked and number == self.number
                    self.send(frame, self.p_codec, self.d_codec, self.to_d)
                case Begin(request_id, pages):
                    assert len(pages) * PAGE_SIZE >= len(self.prompts[request_id])
                    self.prefilling[request_id] = 0
                case RequestFailed(request_id) | Cancelled(request_id):
                    self.answered[request_id] += 1
                    self.end_at_p(request_id)
                case Dropped(request_id):
                    self.end_at_p(request_id)
                case Refused(reason):
                    assert not (self.honest and "CREDIT" in reason), reason

    def end_at_d(self, request_id: str) -> None:
        self.ended_at_d[request_id] += 1
        if request_id in self.running:
            self.running.remove(request_id)

    def end_at_p(self, request_id: str) -> None:
        self.ended_at_p[request_id] += 1
        self.prefilling.pop(request_id, None)
        self.computed.discard(request_id)

    def every_cell(self, request_id: str) -> set:
        return {
            (layer, head, token)
            for layer in range(3)
            for head in range(HEADS)
            for token in range(len(self.prompts[request_id]))
        }

    # ------------------------------------------------------------------ the front

    @rule(prompt_len=st.integers(1, 14), max_tokens=st.integers(1, 14), local=st.sampled_from([False, False, True]))
    def submit(self, prompt_len: int, max_tokens: int, local: bool) -> None:
        request_id = f"r{len(self.prompts)}"
        self.prompts[request_id] = tuple(range(prompt_len))
        self.max_tokens[request_id] = max_tokens
        self.d_submits.append(request_id)
        if local:
            self.local.add(request_id)
            return
        self.p_submits.append(request_id)

    @precondition(lambda self: self.d_submits)
    @rule()
    def submit_reaches_d(self) -> None:
        request_id = self.d_submits.popleft()
        prompt = self.prompts[request_id]
        num_tokens = len(prompt) + self.max_tokens[request_id]
        links = () if request_id in self.local else (self.number,)
        actions = self.receiver.submit(request_id, prompt, num_tokens, links=links)
        if not self.linked and request_id not in self.local:
            assert actions == [Dropped(request_id)]
            self.front_drops({request_id})
        self.d(actions)

    @precondition(lambda self: self.p_submits and self.linked)
    @rule(problem=st.sampled_from([None, None, None, "not here"]))
    def submit_reaches_p(self, problem: str | None) -> None:
        request_id = self.p_submits.popleft()
        self.p(self.sender.submit(request_id, self.prompts[request_id], (self.number,), problem))

    def any_request(self, number: int) -> str:
        """One that still lives somewhere, if there is any."""
        ids = self.receiver.request_ids() + self.sender.request_ids() or list(self.prompts)
        return ids[number % len(ids)]

    @precondition(lambda self: self.prompts)
    @rule(number=st.integers(0, 99), d_first=st.booleans())
    def cancel(self, number: int, d_first: bool) -> None:
        """Behind the Submit on the same channel, so only what was delivered can be cancelled."""
        request_id = self.any_request(number)
        if request_id in self.d_submits or request_id in self.p_submits:
            return
        both = [lambda: self.d(self.receiver.cancel(request_id))]
        both.append(lambda: self.p(self.sender.cancel(request_id)))
        for one in both if d_first else reversed(both):
            one()

    @precondition(lambda self: self.prompts)
    @rule(number=st.integers(0, 99), at_d=st.booleans())
    def one_side_fails(self, number: int, at_d: bool) -> None:
        request_id = self.any_request(number)
        if at_d:
            self.d(self.receiver.fail(request_id, "a forward raised"))
        else:
            self.p(self.sender.fail(request_id, "a forward raised"))

    # ------------------------------------------------------------------ P works

    @precondition(lambda self: self.prefilling)
    @rule(number=st.integers(0, 99), num_tokens=st.integers(1, 8))
    def forward(self, number: int, num_tokens: int) -> None:
        request_id = list(self.prefilling)[number % len(self.prefilling)]
        start = self.prefilling[request_id]
        stop = min(start + num_tokens, len(self.prompts[request_id]))
        for layer in range(3):
            self.sender.layer_ready(request_id, layer, start, stop)
        self.prefilling[request_id] = stop
        if stop == len(self.prompts[request_id]):
            del self.prefilling[request_id]
            if self.max_tokens[request_id] == 1:
                self.answered[request_id] += 1
                self.ended_at_p[request_id] += 1
                self.p(self.sender.finished(request_id))
            else:
                self.computed.add(request_id)
                self.p(self.sender.prefilled(request_id, 7))

    @rule()
    def push(self) -> None:
        send = self.sender.next_send()
        if isinstance(send, Send):
            self.p([send])
        elif isinstance(send, Push):
            assert WIRE.block_bytes(send.block, send.tokens[1] - send.tokens[0]) <= STAGING_SLOT_BYTES
            self.pushing.append(send)

    @precondition(lambda self: self.pushing)
    @rule(number=st.integers(0, 99), packing_fails=st.sampled_from([False, False, False, True]))
    def pushed(self, number: int, packing_fails: bool = False) -> None:
        """Pushes may end in any order, and after their request did."""
        push = self.pushing.pop(number % len(self.pushing))
        if packing_fails:
            self.p(self.sender.not_pushed(push, "pack raised"))
            return
        num_bytes = WIRE.block_bytes(push.block, push.tokens[1] - push.tokens[0])
        actions = self.sender.pushed(push, num_bytes, 0)
        self.sent_chunks += [send.frame for send in actions if isinstance(send, Send) and isinstance(send.frame, Chunk)]
        self.p(actions)

    @precondition(lambda self: self.to_p)
    @rule()
    def frame_reaches_p(self) -> None:
        if frame := self.received(self.p_codec, self.to_p):
            handle = {Reserve: self.sender.reserve, Credit: self.sender.credit,
                      Ack: self.sender.ack, Abort: self.sender.abort}[type(frame)]  # fmt: skip
            self.p(handle(self.number, frame))

    # ------------------------------------------------------------------ D works

    @precondition(lambda self: self.to_d)
    @rule()
    def frame_reaches_d(self) -> None:
        if frame := self.received(self.d_codec, self.to_d):
            receiver = self.receiver
            self.d(
                {Chunk: receiver.chunk, Commit: receiver.commit, Abort: receiver.abort}[type(frame)](self.number, frame)
            )

    @precondition(lambda self: self.unpacking)
    @rule(number=st.integers(0, 99), problem=st.sampled_from([None, None, None, "checksum"]))
    def unpacked(self, number: int, problem: str | None = None) -> None:
        """Unpacks may end in any order, and after their request did."""
        unpack = self.unpacking.pop(number % len(self.unpacking))
        chunk = unpack.chunk
        if not problem:
            self.arrived.setdefault(chunk.generation, set()).update(
                (layer, head, token)
                for layer in range(chunk.layer_start, chunk.layer_stop)
                for head in range(chunk.head_start, chunk.head_stop)
                for token in range(chunk.token_start, chunk.token_stop)
            )
        self.d(self.receiver.unpacked(unpack, problem))

    @precondition(lambda self: self.running)
    @rule()
    def decode_ends(self) -> None:
        request_id = self.running.pop(0)
        self.answered[request_id] += 1
        self.ended_at_d[request_id] += 1
        self.d(self.receiver.release(request_id))

    @rule(ms=st.integers(1, TIMEOUT_MS))
    def time_passes(self, ms: int) -> None:
        self.now_ms += ms
        self.d(self.receiver.tick())
        self.p(self.sender.tick())

    # ------------------------------------------------------------------ progress

    def moves(self) -> list:
        """What can happen next when nothing goes wrong."""
        return [
            move
            for possible, move in (
                (self.d_submits, self.submit_reaches_d),
                (not self.linked, self.link),
                (self.p_submits and self.linked, lambda: self.submit_reaches_p(problem=None)),
                (self.to_p, self.frame_reaches_p),
                (self.to_d, self.frame_reaches_d),
                (self.prefilling, lambda: self.forward(len(self.to_d), 5)),
                (self.can_push(), self.push),
                (self.pushing, lambda: self.pushed(len(self.to_d))),
                (self.unpacking, lambda: self.unpacked(len(self.to_p))),
                (self.running, self.decode_ends),
            )
            if possible
        ]

    def can_push(self) -> bool:
        links = self.sender._links.values()
        return bool(self.sender._commits or any(link.unpushed._full and link.credits for link in links))

    @rule(choices=st.lists(st.integers(0, 7), min_size=5, max_size=40))
    def play(self, choices: list[int]) -> None:
        for choice in choices:
            if moves := self.moves():
                moves[choice % len(moves)]()
                self.pages_are_conserved()
                self.staging_slots_are_conserved()

    # ------------------------------------------------------------------ a peer that misbehaves

    @precondition(lambda self: self.sent_chunks and self.linked)
    @rule(number=st.integers(0, 99))
    def old_chunk_again(self, number: int) -> None:
        """Taken only with exact coverage, so at most it fails its own request."""
        self.honest = False
        self.d(self.receiver.chunk(self.number, self.sent_chunks[number % len(self.sent_chunks)]))

    def granted_staging(self) -> set[int]:
        return self.receiver._links[self.number].granted_staging if self.linked else set()

    def granted(self) -> list:
        return [i for i in self.receiver._live.values() if i.phase is Phase.RECEIVING]

    def pushed_to(self) -> list:
        """Those of which no COMMIT has come: a chunk behind that is a late one, whatever it says."""
        return [i for i in self.granted() if not any(leg.commit for leg in i.legs.values())]

    @precondition(lambda self: self.granted() and self.granted_staging())
    @rule(
        number=st.integers(0, 99),
        change=st.sampled_from([{"capability": b"x" * 16}, {"generation": 10**6}, {"request_id": "nobody"}]),
    )
    def forged_chunk(self, number: int, change: dict) -> None:
        """Whoever does not know the reservation cannot write into it."""
        self.honest = False
        incoming = self.granted()[number % len(self.granted())]
        chunk = self.chunk_for(incoming, min(self.granted_staging()))
        before = list(self.receiver._live)
        actions = self.receiver.chunk(self.number, replace(chunk, **change))
        assert actions == [Send(Credit(chunk.slot), self.number)]
        assert list(self.receiver._live) == before
        self.d(actions)

    @precondition(lambda self: self.pushed_to() and self.granted_staging())
    @rule(
        number=st.integers(0, 99),
        change=st.sampled_from(
            [
                {"token_start": 15, "token_stop": 16},
                {"layer_start": 3, "layer_stop": 4},
                {"layer_stop": 4, "payload_bytes": WIRE.packed_bytes(0, 4, 2, 1)},
                {"head_start": 1, "head_stop": 3},
                {"payload_bytes": 1},
                {"head_dim": 5},
                {"dtype": "int8"},
                {"fingerprint": b"g" * 32},
                {"group": 1},
                {"checksum_kind": "none"},
            ]
        ),
    )
    def misfit_chunk(self, number: int, change: dict) -> None:
        """Fails its own request; nothing is unpacked."""
        self.honest = False
        incoming = self.pushed_to()[number % len(self.pushed_to())]
        chunk = self.chunk_for(incoming, min(self.granted_staging()))
        actions = self.receiver.chunk(self.number, replace(chunk, **change))
        assert actions[0] == Send(Credit(chunk.slot), self.number)
        assert isinstance(actions[1], RequestFailed) and actions[1].request_id == incoming.request_id
        self.d(actions)

    @precondition(lambda self: len(self.granted_staging()) < NUM_STAGING_SLOTS and self.granted())
    @rule(number=st.integers(0, 99))
    def chunk_in_a_staging_slot_being_read(self, number: int) -> None:
        self.honest = False
        incoming = self.granted()[number % len(self.granted())]
        chunk = self.chunk_for(incoming, min(self.being_read()))
        assert [type(action) for action in self.receiver.chunk(self.number, chunk)] == [Refused]

    def being_read(self) -> set[int]:
        return {slot for number, slot in self.receiver._moving if number == self.number}

    def chunk_for(self, incoming, staging_slot: int) -> Chunk:
        """The first token of layer 0, as its sender would have said it."""
        reserve = incoming.legs[self.number].reserve
        return Chunk(
            request_id=incoming.request_id, generation=reserve.generation,
            capability=reserve.capability, fingerprint=WIRE.fingerprint, group=0, layer_start=0,
            layer_stop=1, head_start=0, head_stop=2, head_dim=4, head_dim_v=4, token_start=0,
            token_stop=1, dtype="float32", scale_kind="none", checksum_kind="crc32c", checksum=0,
            payload_bytes=WIRE.packed_bytes(0, 1, 2, 1), slot=staging_slot,
        )  # fmt: skip

    @precondition(lambda self: self.granted())
    @rule(number=st.integers(0, 99), change=st.sampled_from([{}, {"prompt_sha256": b"h" * 32}, {"first_token": 100}]))
    def forged_commit(self, number: int, change: dict) -> None:
        """`Start` is only for exact coverage of the very prompt: checked where it is carried out."""
        incoming = self.granted()[number % len(self.granted())]
        reserve = incoming.legs[self.number].reserve
        commit = Commit(
            incoming.request_id, reserve.generation, reserve.capability, 7,
            prompt_sha256(self.prompts[incoming.request_id]), (),
        )  # fmt: skip
        actions = self.receiver.commit(self.number, replace(commit, **change))
        assert not (change and any(isinstance(action, Start) for action in actions))
        self.d(actions)

    # ------------------------------------------------------------------ what must always hold

    @invariant()
    def pages_are_conserved(self) -> None:
        for allocator in (self.d_pages, self.p_pages):
            assert sum(allocator.counts().values()) == allocator.num_pages
        live = [page for incoming in self.receiver._live.values() for page in incoming.pages]
        assert len(set(live)) == len(live) == self.d_pages.counts()["active"]
        gone = {i for i in self.receiver._moving.values() if i.phase is Phase.GONE}
        assert self.d_pages.counts()["leased"] == sum(len(incoming.pages) for incoming in gone)
        mine = Counter()
        for outgoing in self.sender._live.values():
            mine["leased" if outgoing.phase is Phase.DRAINING else "active"] += len(outgoing.pages)
        gone = {one for one in self.sender._moving.values() if one.phase is Phase.GONE}
        mine["leased"] += sum(len(outgoing.pages) for outgoing in gone)
        assert mine["active"] == self.p_pages.counts()["active"]
        assert mine["leased"] == self.p_pages.counts()["leased"]

    @invariant()
    def staging_slots_are_conserved(self) -> None:
        if not self.linked:
            assert not self.granted_staging()
            return
        every = set(range(NUM_STAGING_SLOTS))
        assert self.granted_staging() | self.being_read() == every
        assert self.granted_staging().isdisjoint(self.being_read())
        link = self.sender._links[self.number]
        assert set(link.credits) | link.sent_staging == every and len(link.credits) == len(set(link.credits))
        assert link.sent_staging.isdisjoint(link.credits)
        if self.honest:  # P never writes into a staging slot that D reads
            writing = {slot for number, slot in self.sender._moving if number == self.number}
            assert self.being_read().isdisjoint(writing | set(link.credits))

    @invariant()
    def a_side_ends_a_request_once(self) -> None:
        assert all(count == 1 for count in self.ended_at_d.values())
        assert all(count == 1 for count in self.ended_at_p.values())

    def teardown(self) -> None:
        """Played out fairly, every request is answered, and everything is given back."""
        for step in range(5000):
            if moves := self.moves():
                moves[step % len(moves)]()
            elif self.receiver._live or self.sender._live:
                self.time_passes(TIMEOUT_MS)  # a frame was lost, or P's Submit with its connection
                if self.frame_is_missing and not self.moves():
                    self.lose()  # no later frame shows the gap
            else:
                break
            self.pages_are_conserved()
            self.staging_slots_are_conserved()
        while self.pushing:  # of a link that is gone, or a request
            self.pushed(0)
        while self.unpacking:
            self.unpacked(0)
        assert not self.receiver._live and not self.sender._live
        assert not self.receiver._moving and not self.sender._moving
        assert self.d_pages.num_free == D_PAGES and self.p_pages.num_free == P_PAGES
        assert (
            self.frame_is_missing
            or not self.linked
            or len(self.sender._links[self.number].credits) == NUM_STAGING_SLOTS
        )
        assert set(self.answered) == set(self.prompts)


TestHandoff = Handoff.TestCase
TestHandoff.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)
