"""Both ends of the handoff under every interleaving: nothing leaks, nothing is accepted that should not be.

The two machines are joined by two queues. Rules deliver, delay, cancel, fail, replay and let time pass
in any order; at the end of each run the rest is played out fairly, and every request must have been
answered.
"""

from collections import Counter, deque
from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pagewire.allocator import PageAllocator
from pagewire.transfer.frames import Abort, Ack, Chunk, Commit, Credit, Reserve
from pagewire.transfer.handoff import (
    Begin,
    Cancelled,
    Dropped,
    Phase,
    Push,
    Refused,
    RequestFailed,
    Send,
    Start,
    Unpack,
)
from pagewire.transfer.receiver import Receiver
from pagewire.transfer.sender import Sender
from transfer.wires import small_wire

PAGE_SIZE = 4
D_PAGES, P_PAGES = 9, 6
NUM_STAGING_SLOTS = 2
WIRE = small_wire()
STAGING_SLOT_BYTES = WIRE.packed_bytes(1, WIRE.num_kv_heads, 3)
TIMEOUT_MS = 1000


class Handoff(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now_ms = 0
        self.capabilities = 0
        self.d_pages, self.p_pages = PageAllocator(D_PAGES), PageAllocator(P_PAGES)
        self.receiver = Receiver(
            self.d_pages, PAGE_SIZE, WIRE, NUM_STAGING_SLOTS, vocab_size=100, max_waiting=3,
            timeout_ms=TIMEOUT_MS, now_ms=lambda: self.now_ms, new_capability=self.new_capability,
        )  # fmt: skip
        self.sender = Sender(self.p_pages, PAGE_SIZE, WIRE, NUM_STAGING_SLOTS, STAGING_SLOT_BYTES)
        self.to_d: deque = deque()
        self.to_p: deque = deque()
        self.prompts: dict[str, tuple[int, ...]] = {}
        self.max_tokens: dict[str, int] = {}
        self.d_submits: deque[str] = deque()  # sent by the front, not delivered yet
        self.p_submits: deque[str] = deque()
        self.prefilling: dict[str, int] = {}  # tokens computed
        self.computed: set[str] = set()  # prefilled, no ACK yet
        self.unpacking: list[Unpack] = []
        self.running: list[str] = []
        self.arrived: dict[int, set] = {}  # generation -> (layer, head, token) in D's pages
        self.sent_chunks: list[Chunk] = []
        self.ended_at_d: Counter = Counter()
        self.ended_at_p: Counter = Counter()
        self.honest = True  # until the peer repeats or forges a chunk
        self.answered: Counter = Counter()  # what the front heard: RequestFailed, Cancelled, finished

    def new_capability(self) -> bytes:
        self.capabilities += 1
        return self.capabilities.to_bytes(16, "little")

    # ------------------------------------------------------------------ carrying out actions

    def d(self, actions: list) -> None:
        for action in actions:
            match action:
                case Send(frame):
                    self.to_p.append(frame)
                case Unpack(chunk, pages):
                    prompt = self.prompts[chunk.request_id]
                    assert 0 <= chunk.token_start < chunk.token_stop <= len(prompt)
                    assert all(self.d_pages.state(page) == "active" for page in pages)
                    self.unpacking.append(action)
                case Start(request_id, _, commit):
                    assert self.arrived[commit.generation] == self.every_cell(request_id)
                    assert commit.token_ids == self.prompts[request_id]
                    self.running.append(request_id)
                case RequestFailed(request_id) | Cancelled(request_id):
                    self.answered[request_id] += 1
                    self.end_at_d(request_id)
                case Dropped(request_id):
                    self.end_at_d(request_id)

    def p(self, actions: list) -> None:
        for action in actions:
            match action:
                case Send(frame):
                    self.to_d.append(frame)
                case Begin(request_id, pages):
                    assert len(pages) * PAGE_SIZE >= len(self.prompts[request_id])
                    self.prefilling[request_id] = 0
                case RequestFailed(request_id) | Cancelled(request_id):
                    self.answered[request_id] += 1
                    self.end_at_p(request_id)
                case Dropped(request_id):
                    self.end_at_p(request_id)

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
            for layer in range(WIRE.num_layers)
            for head in range(WIRE.num_kv_heads)
            for token in range(len(self.prompts[request_id]))
        }

    # ------------------------------------------------------------------ the front

    @rule(prompt_len=st.integers(1, 14), max_tokens=st.integers(1, 14))
    def submit(self, prompt_len: int, max_tokens: int) -> None:
        request_id = f"r{len(self.prompts)}"
        self.prompts[request_id] = tuple(range(prompt_len))
        self.max_tokens[request_id] = max_tokens
        self.d_submits.append(request_id)
        self.p_submits.append(request_id)

    @precondition(lambda self: self.d_submits)
    @rule()
    def submit_reaches_d(self) -> None:
        request_id = self.d_submits.popleft()
        prompt = self.prompts[request_id]
        num_tokens = len(prompt) + self.max_tokens[request_id]
        self.d(self.receiver.submit(request_id, prompt, num_tokens))

    @precondition(lambda self: self.p_submits)
    @rule(problem=st.sampled_from([None, None, None, "not here"]))
    def submit_reaches_p(self, problem: str | None) -> None:
        request_id = self.p_submits.popleft()
        self.p(self.sender.submit(request_id, self.prompts[request_id], problem))

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
        for layer in range(WIRE.num_layers):
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

    @rule(packing_fails=st.sampled_from([False, False, False, True]))
    def push(self, packing_fails: bool = False) -> None:
        send = self.sender.next_send()
        if isinstance(send, Send):
            self.to_d.append(send.frame)
        elif isinstance(send, Push) and packing_fails:
            self.p(self.sender.not_pushed(send, "pack raised"))
        elif isinstance(send, Push):
            assert send.stop - send.start <= 3
            num_bytes = WIRE.packed_bytes(1, WIRE.num_kv_heads, send.stop - send.start)
            chunk = self.sender.chunk_frame(send, num_bytes, 0)
            self.sent_chunks.append(chunk)
            self.to_d.append(chunk)

    @precondition(lambda self: self.to_p)
    @rule()
    def frame_reaches_p(self) -> None:
        frame = self.to_p.popleft()
        handle = {Reserve: self.sender.reserve, Credit: self.sender.credit,
                  Ack: self.sender.ack, Abort: self.sender.abort}[type(frame)]  # fmt: skip
        self.p(handle(frame))

    # ------------------------------------------------------------------ D works

    @precondition(lambda self: self.to_d)
    @rule()
    def frame_reaches_d(self) -> None:
        frame = self.to_d.popleft()
        handle = {Chunk: self.receiver.chunk, Commit: self.receiver.commit, Abort: self.receiver.abort}[type(frame)]
        self.d(handle(frame))

    @precondition(lambda self: self.unpacking)
    @rule(number=st.integers(0, 99), problem=st.sampled_from([None, None, None, "checksum"]))
    def unpacked(self, number: int, problem: str | None = None) -> None:
        """Unpacks may end in any order, and after their request did."""
        chunk = self.unpacking.pop(number % len(self.unpacking)).chunk
        if not problem:
            self.arrived.setdefault(chunk.generation, set()).update(
                (layer, head, token)
                for layer in range(chunk.layer_start, chunk.layer_stop)
                for head in range(chunk.head_start, chunk.head_stop)
                for token in range(chunk.token_start, chunk.token_stop)
            )
        self.d(self.receiver.unpacked(chunk, problem))

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

    # ------------------------------------------------------------------ progress

    def moves(self) -> list:
        """What can happen next when nothing goes wrong."""
        return [
            move
            for possible, move in (
                (self.d_submits, self.submit_reaches_d),
                (self.p_submits, lambda: self.submit_reaches_p(problem=None)),
                (self.to_p, self.frame_reaches_p),
                (self.to_d, self.frame_reaches_d),
                (self.prefilling, lambda: self.forward(len(self.to_d), 5)),
                (self.can_push(), lambda: self.push(packing_fails=False)),
                (self.unpacking, lambda: self.unpacked(len(self.to_p))),
                (self.running, self.decode_ends),
            )
            if possible
        ]

    def can_push(self) -> bool:
        return bool(self.sender._commits or (self.sender._pushes and self.sender._credits))

    @rule(choices=st.lists(st.integers(0, 7), min_size=5, max_size=40))
    def play(self, choices: list[int]) -> None:
        for choice in choices:
            if moves := self.moves():
                moves[choice % len(moves)]()
                self.pages_are_conserved()
                self.staging_slots_are_conserved()

    # ------------------------------------------------------------------ a peer that misbehaves

    @precondition(lambda self: self.sent_chunks)
    @rule(number=st.integers(0, 99))
    def old_chunk_again(self, number: int) -> None:
        """Taken only with exact coverage, so at most it fails its own request."""
        self.honest = False
        self.d(self.receiver.chunk(self.sent_chunks[number % len(self.sent_chunks)]))

    def granted(self) -> list:
        return [i for i in self.receiver._live.values() if i.phase is Phase.RECEIVING]

    @precondition(lambda self: self.granted() and self.receiver._granted_staging)
    @rule(
        number=st.integers(0, 99),
        change=st.sampled_from([{"capability": b"x" * 16}, {"generation": 10**6}, {"request_id": "nobody"}]),
    )
    def forged_chunk(self, number: int, change: dict) -> None:
        """Whoever does not know the reservation cannot write into it."""
        self.honest = False
        incoming = self.granted()[number % len(self.granted())]
        chunk = self.chunk_for(incoming, min(self.receiver._granted_staging))
        before = list(self.receiver._live)
        actions = self.receiver.chunk(replace(chunk, **change))
        assert actions == [Send(Credit(chunk.slot))]
        assert list(self.receiver._live) == before
        self.d(actions)

    @precondition(lambda self: self.granted() and self.receiver._granted_staging)
    @rule(
        number=st.integers(0, 99),
        change=st.sampled_from(
            [
                {"token_start": 15, "token_stop": 16},
                {"layer_start": 2, "layer_stop": 3},
                {"head_start": 1, "head_stop": 3},
                {"payload_bytes": 1},
                {"head_dim": 5},
                {"dtype": "int8"},
                {"fingerprint": b"g" * 32},
                {"group": 1},
            ]
        ),
    )
    def misfit_chunk(self, number: int, change: dict) -> None:
        """Fails its own request; nothing is unpacked."""
        self.honest = False
        incoming = self.granted()[number % len(self.granted())]
        chunk = self.chunk_for(incoming, min(self.receiver._granted_staging))
        actions = self.receiver.chunk(replace(chunk, **change))
        assert actions[0] == Send(Credit(chunk.slot))
        assert isinstance(actions[1], RequestFailed) and actions[1].request_id == incoming.request_id
        self.d(actions)

    @precondition(lambda self: len(self.receiver._granted_staging) < NUM_STAGING_SLOTS and self.granted())
    @rule(number=st.integers(0, 99))
    def chunk_in_a_staging_slot_being_read(self, number: int) -> None:
        self.honest = False
        incoming = self.granted()[number % len(self.granted())]
        chunk = self.chunk_for(incoming, min(self.receiver._unpacking))
        assert [type(action) for action in self.receiver.chunk(chunk)] == [Refused]

    def chunk_for(self, incoming, staging_slot: int) -> Chunk:
        """The first token of layer 0, as its sender would have said it."""
        return Chunk(
            request_id=incoming.request_id, generation=incoming.generation,
            capability=incoming.capability, fingerprint=WIRE.fingerprint, group=0, layer_start=0,
            layer_stop=1, head_start=0, head_stop=2, head_dim=4, head_dim_v=4, token_start=0,
            token_stop=1, dtype="float32", scale_kind="none", checksum_kind="crc32c", checksum=0,
            payload_bytes=WIRE.packed_bytes(1, 2, 1), slot=staging_slot,
        )  # fmt: skip

    @precondition(lambda self: self.granted())
    @rule(number=st.integers(0, 99), change=st.sampled_from([{}, {"token_ids": (99,)}, {"first_token": 100}]))
    def forged_commit(self, number: int, change: dict) -> None:
        """`Start` is only for exact coverage of the very prompt: checked where it is carried out."""
        incoming = self.granted()[number % len(self.granted())]
        commit = Commit(
            incoming.request_id, incoming.generation, incoming.capability, 7, self.prompts[incoming.request_id], ()
        )
        actions = self.receiver.commit(replace(commit, **change))
        assert not (change and any(isinstance(action, Start) for action in actions))
        self.d(actions)

    @precondition(lambda self: any(isinstance(frame, Commit) for frame in self.to_d))
    @rule()
    def commit_is_lost(self) -> None:
        self.to_d.remove(next(frame for frame in self.to_d if isinstance(frame, Commit)))

    # ------------------------------------------------------------------ what must always hold

    @invariant()
    def pages_are_conserved(self) -> None:
        for allocator in (self.d_pages, self.p_pages):
            assert sum(allocator.counts().values()) == allocator.num_pages
        live = [page for incoming in self.receiver._live.values() for page in incoming.pages]
        assert len(set(live)) == len(live) == self.d_pages.counts()["active"]
        gone = {i for i in self.receiver._unpacking.values() if i.phase is Phase.GONE}
        assert self.d_pages.counts()["leased"] == sum(len(incoming.pages) for incoming in gone)
        mine = Counter()
        for outgoing in self.sender._live.values():
            mine["leased" if outgoing.phase is Phase.DRAINING else "active"] += len(outgoing.pages)
        assert mine["active"] == self.p_pages.counts()["active"]
        assert mine["leased"] == self.p_pages.counts()["leased"]

    @invariant()
    def staging_slots_are_conserved(self) -> None:
        every = set(range(NUM_STAGING_SLOTS))
        assert self.receiver._granted_staging | set(self.receiver._unpacking) == every
        assert self.receiver._granted_staging.isdisjoint(self.receiver._unpacking)
        assert set(self.sender._credits) | self.sender._sent_staging == every
        assert self.sender._sent_staging.isdisjoint(self.sender._credits)
        if self.honest:  # P never writes into a staging slot that D reads
            assert set(self.sender._credits).isdisjoint(self.receiver._unpacking)

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
                self.time_passes(TIMEOUT_MS)  # whose COMMIT was lost
            else:
                break
            self.pages_are_conserved()
            self.staging_slots_are_conserved()
        assert not self.receiver._live and not self.sender._live
        assert self.d_pages.num_free == D_PAGES and self.p_pages.num_free == P_PAGES
        assert len(self.sender._credits) == NUM_STAGING_SLOTS
        assert set(self.answered) == set(self.prompts)


TestHandoff = Handoff.TestCase
TestHandoff.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)
