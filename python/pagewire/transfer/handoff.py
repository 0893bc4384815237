"""The handoff of a request's KV from a sender (P) to a receiver (D), as two pure state machines.

Events are method calls; what they return is to be carried out in order. There are no sockets,
tensors or clocks in here, so every interleaving can be tested.

    Receiver   waiting --pages free--> receiving --COMMIT covers all--> running --release--> gone
    Sender     waiting --RESERVE, pages free--> prefilling --last forward--> draining --ACK--> gone

Both may cancel or fail a request in any state; all it holds is then released, once. Whoever ends a
request answers to the front and sends ABORT to the other, which releases in silence.
"""

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from pagewire.allocator import PageAllocator
from pagewire.transfer.coverage import Coverage
from pagewire.transfer.frames import Abort, Ack, Chunk, Commit, Credit, Frame, Hello, Reserve

NO_GENERATION = 0  # of an ABORT before any RESERVE
MAX_REMEMBERED = 4096  # request ids of which only one side has heard


@dataclass(frozen=True)
class Wire:
    """What both ends agree on in HELLO and every chunk repeats."""

    fingerprint: bytes  # of the model, 32 bytes
    num_layers: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    dtype: str
    scale_kind: str
    packed_bytes: Callable[[int, int, int], int]  # (num_layers, num_heads, num_tokens) -> bytes

    def mismatch(self, other: Hello | Chunk, names: tuple[str, ...]) -> str:
        """The first of the fields `names` in which `other` differs, in words; "" if none."""
        for name in names:
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                return f"{name}: expected {_show(ours)}, got {_show(theirs)}"
        return ""


HELLO_FIELDS = (
    "fingerprint", "num_layers", "num_kv_heads", "head_dim", "head_dim_v", "dtype", "scale_kind",
)  # fmt: skip
CHUNK_FIELDS = ("fingerprint", "head_dim", "head_dim_v", "dtype", "scale_kind")


def _show(value: object) -> str:
    return value.hex()[:16] if isinstance(value, bytes) else str(value)


@dataclass(frozen=True)
class Send:
    frame: Frame


@dataclass(frozen=True)
class Failed:
    """Tell the front; everything the request held here is released."""

    request_id: str
    message: str


@dataclass(frozen=True)
class Cancelled:
    """Tell the front; everything the request held here is released."""

    request_id: str


@dataclass(frozen=True)
class Dropped:
    """The other side ended the request and answers for it; everything it held here is released."""

    request_id: str


@dataclass(frozen=True)
class Refused:
    """A frame that changed nothing, and why."""

    reason: str


@dataclass(frozen=True)
class Unpack:
    """Verify the chunk's checksum, move its payload into `pages`, then call `unpacked`."""

    chunk: Chunk
    pages: list[int]


@dataclass(frozen=True)
class Start:
    """The prompt's KV is complete in `pages`: decode."""

    request_id: str
    pages: list[int]
    commit: Commit


@dataclass(frozen=True)
class Begin:
    """D has granted and `pages` are ours: prefill."""

    request_id: str
    pages: list[int]


@dataclass(frozen=True)
class Push:
    """Pack a layer of tokens [start, stop) from `pages` into the slot, then send `chunk_frame`."""

    request_id: str
    pages: list[int]
    layer: int
    start: int
    stop: int
    slot: int


Action = Send | Failed | Cancelled | Dropped | Refused | Unpack | Start | Begin


class Phase(Enum):
    WAITING = 1
    RECEIVING = 2  # receiver: granted, chunks come
    RUNNING = 3  # receiver: committed, decoding
    PREFILLING = 4  # sender: pages owned, forwards run
    DRAINING = 5  # sender: computed, pages leased to the transfer
    GONE = 6


@dataclass(eq=False)
class _Incoming:
    request_id: str
    token_ids: tuple[int, ...]
    num_pages: int
    phase: Phase = Phase.WAITING
    pages: list[int] = field(default_factory=list)
    generation: int = NO_GENERATION
    capability: bytes = b""
    deadline_ms: int = 0
    coverage: Coverage | None = None
    num_unpacking: int = 0
    commit: Commit | None = None  # arrived while chunks were still being unpacked


class Receiver:
    """D's side. `free + active + cached + leased == num_pages` holds after every call."""

    def __init__(
        self,
        allocator: PageAllocator,
        page_size: int,
        wire: Wire,
        num_slots: int,
        *,
        vocab_size: int,
        max_waiting: int,
        timeout_ms: int,
        now_ms: Callable[[], int],
        new_capability: Callable[[], bytes],
    ) -> None:
        self._allocator = allocator
        self._page_size = page_size
        self._wire = wire
        self._vocab_size = vocab_size
        self._max_waiting = max_waiting
        self._timeout_ms = timeout_ms
        self._now_ms = now_ms
        self._new_capability = new_capability
        self._live: dict[str, _Incoming] = {}
        self._waiting: deque[_Incoming] = deque()
        self._granted_slots = set(range(num_slots))  # P's to write
        self._unpacking: dict[int, _Incoming] = {}  # slot -> owner of the chunk in it
        self._generation = NO_GENERATION

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def request_ids(self) -> list[str]:
        return list(self._live)

    def submit(
        self, request_id: str, token_ids: tuple[int, ...], num_tokens: int, problem: str = ""
    ) -> list[Action]:
        """`num_tokens`: prompt and output together, all reserved before P may push.
        `problem`: why the request cannot run here, as the caller found.
        """
        if request_id in self._live:
            return [Refused(f"request {request_id} was submitted twice")]
        num_pages = -(-num_tokens // self._page_size)
        if problem:
            pass
        elif num_pages > self._allocator.num_pages:
            problem = f"the request needs {num_pages} pages, D has {self._allocator.num_pages}"
        elif len(self._waiting) >= self._max_waiting:
            problem = f"{self._max_waiting} requests are waiting for pages, no more are queued"
        if problem:
            return [Failed(request_id, problem), _abort(request_id, NO_GENERATION, problem)]
        incoming = _Incoming(request_id, token_ids, num_pages)
        self._live[request_id] = incoming
        self._waiting.append(incoming)
        return self._admit()

    def chunk(self, chunk: Chunk) -> list[Action]:
        if chunk.slot not in self._granted_slots:
            return [Refused(f"chunk in staging slot {chunk.slot}, which was not granted")]
        incoming = self._receiving(chunk)
        if incoming is None:
            # late: its request is gone; the slot's bytes are not looked at
            return [Send(Credit(chunk.slot))]
        problem = self._chunk_problem(chunk, incoming)
        if problem:
            return [Send(Credit(chunk.slot)), *self.fail(incoming.request_id, problem)]
        self._granted_slots.remove(chunk.slot)
        self._unpacking[chunk.slot] = incoming
        incoming.num_unpacking += 1
        return [Unpack(chunk, incoming.pages)]

    def unpacked(self, chunk: Chunk, problem: str = "") -> list[Action]:
        """The answer to `Unpack`; `problem` says why the payload is not in the pages."""
        incoming = self._unpacking.pop(chunk.slot)
        self._granted_slots.add(chunk.slot)
        incoming.num_unpacking -= 1
        actions: list[Action] = [Send(Credit(chunk.slot))]
        if incoming.phase is Phase.GONE:
            if incoming.num_unpacking == 0:
                self._allocator.end_lease(incoming.pages)
                actions += self._admit()
        elif problem:
            actions += self.fail(incoming.request_id, problem)
        elif incoming.commit and incoming.num_unpacking == 0:
            actions += self.commit(incoming.commit)
        return actions

    def commit(self, commit: Commit) -> list[Action]:
        incoming = self._receiving(commit)
        if incoming is None:
            return [Refused(f"COMMIT for {commit.request_id}, which is not receiving")]
        if incoming.num_unpacking:
            incoming.commit = commit
            return []
        assert incoming.coverage is not None
        problem = ""
        if commit.token_ids != incoming.token_ids:
            problem = "COMMIT: its token ids are not the prompt's"
        elif commit.first_token >= self._vocab_size:
            problem = f"COMMIT: first token {commit.first_token}, vocabulary of {self._vocab_size}"
        elif not incoming.coverage.complete:
            problem = "COMMIT: KV of some layer, head and token has not arrived"
        if problem:
            return self.fail(incoming.request_id, problem)
        incoming.phase = Phase.RUNNING
        ack = Ack(incoming.request_id, incoming.generation)
        return [Send(ack), Start(incoming.request_id, incoming.pages, commit)]

    def abort(self, abort: Abort) -> list[Action]:
        incoming = self._live.get(abort.request_id)
        if (
            incoming is None
            or incoming.phase is not Phase.RECEIVING
            or abort.generation != incoming.generation
        ):
            return []
        return [Dropped(incoming.request_id), *self._end(incoming)]

    def cancel(self, request_id: str) -> list[Action]:
        return self._give_up(request_id, Cancelled(request_id), "cancelled")

    def fail(self, request_id: str, message: str) -> list[Action]:
        return self._give_up(request_id, Failed(request_id, message), message)

    def release(self, request_id: str) -> list[Action]:
        """A running request has ended in good order."""
        incoming = self._live[request_id]
        assert incoming.phase is Phase.RUNNING, incoming.phase
        return self._end(incoming)

    def tick(self) -> list[Action]:
        """Fails what was granted and not committed in time."""
        late = [
            incoming.request_id
            for incoming in self._live.values()
            if incoming.phase is Phase.RECEIVING and incoming.deadline_ms <= self._now_ms()
        ]
        message = f"the KV did not arrive within {self._timeout_ms} ms"
        return [action for request_id in late for action in self.fail(request_id, message)]

    def _admit(self) -> list[Action]:
        actions: list[Action] = []
        while self._waiting and self._waiting[0].num_pages <= self._allocator.num_free:
            incoming = self._waiting.popleft()
            self._generation += 1
            incoming.phase = Phase.RECEIVING
            incoming.pages = self._allocator.alloc(incoming.num_pages)
            incoming.generation = self._generation
            incoming.capability = self._new_capability()
            incoming.deadline_ms = self._now_ms() + self._timeout_ms
            num_tokens = len(incoming.token_ids)
            incoming.coverage = Coverage(
                self._wire.num_layers, self._wire.num_kv_heads, 0, num_tokens
            )
            reserve = Reserve(
                incoming.request_id, incoming.generation, incoming.capability, 0, num_tokens,
                self._timeout_ms,
            )  # fmt: skip
            actions.append(Send(reserve))
        return actions

    def _receiving(self, frame: Chunk | Commit) -> _Incoming | None:
        incoming = self._live.get(frame.request_id)
        if (
            incoming is None
            or incoming.phase is not Phase.RECEIVING
            or frame.generation != incoming.generation
            or frame.capability != incoming.capability
        ):
            return None
        return incoming

    def _chunk_problem(self, chunk: Chunk, incoming: _Incoming) -> str:
        assert incoming.coverage is not None
        layers = (chunk.layer_start, chunk.layer_stop)
        heads = (chunk.head_start, chunk.head_stop)
        tokens = (chunk.token_start, chunk.token_stop)
        problem = self._wire.mismatch(chunk, CHUNK_FIELDS)
        expected_bytes = self._wire.packed_bytes(
            layers[1] - layers[0], heads[1] - heads[0], tokens[1] - tokens[0]
        )
        if not problem and chunk.group != 0:
            problem = f"group: expected 0, got {chunk.group}"
        if not problem and chunk.payload_bytes != expected_bytes:
            problem = f"payload_bytes: expected {expected_bytes}, got {chunk.payload_bytes}"
        problem = problem or incoming.coverage.add(layers, heads, tokens)
        return problem and f"CHUNK: {problem}"

    def _give_up(self, request_id: str, answer: Action, reason: str) -> list[Action]:
        incoming = self._live.get(request_id)
        if incoming is None:
            return []
        actions = [answer]
        if incoming.phase is not Phase.RUNNING:
            actions.append(_abort(request_id, incoming.generation, reason))
        return actions + self._end(incoming)

    def _end(self, incoming: _Incoming) -> list[Action]:
        del self._live[incoming.request_id]
        if incoming.phase is Phase.WAITING:
            self._waiting.remove(incoming)
        # a payload on its way into these pages cannot be called back: leased until it is in
        self._allocator.free(incoming.pages, to="leased" if incoming.num_unpacking else "free")
        incoming.phase = Phase.GONE
        return self._admit()


class _Remembered:
    """The last MAX_REMEMBERED request ids that were added and not taken."""

    def __init__(self) -> None:
        self._ids: OrderedDict[str, None] = OrderedDict()

    def add(self, request_id: str) -> None:
        self._ids[request_id] = None
        if len(self._ids) > MAX_REMEMBERED:
            self._ids.popitem(last=False)

    def take(self, request_id: str) -> bool:
        return self._ids.pop(request_id, self) is None


@dataclass(eq=False)
class _Outgoing:
    request_id: str
    token_ids: tuple[int, ...]
    phase: Phase = Phase.WAITING
    reserve: Reserve | None = None
    pages: list[int] = field(default_factory=list)
    num_unpushed: int = 0  # entries of the push queue
    commit: Commit | None = None


class Sender:
    """P's side. It holds no more requests than D queues or admits: D aborts what it refuses."""

    def __init__(
        self, allocator: PageAllocator, page_size: int, wire: Wire, num_slots: int, slot_bytes: int
    ) -> None:
        """Raises ValueError when a slot cannot hold one token of one layer."""
        token_bytes = wire.packed_bytes(1, wire.num_kv_heads, 1)
        if slot_bytes < token_bytes:
            raise ValueError(
                f"slot_bytes: expected at least {token_bytes} (one token of one layer), "
                f"got {slot_bytes}"
            )
        self._allocator = allocator
        self._page_size = page_size
        self._wire = wire
        self._tokens_per_slot = slot_bytes // token_bytes
        self._credits = deque(range(num_slots))
        self._sent_slots: set[int] = set()
        self._live: dict[str, _Outgoing] = {}
        self._granted: deque[_Outgoing] = deque()  # waiting for pages of ours
        self._early: dict[str, Reserve] = {}  # RESERVE that overtook its Submit
        # each entry is consumed by what it waits for:
        self._ungranted = _Remembered()  # ended here; D's RESERVE or refusal is still on its way
        self._refused = _Remembered()  # refused by D; the front's Submit is still on its way
        self._pushes: deque[tuple[_Outgoing, int, int, int]] = deque()  # layer, start, stop
        self._commits: deque[_Outgoing] = deque()

    @property
    def num_waiting(self) -> int:
        return sum(outgoing.phase is Phase.WAITING for outgoing in self._live.values())

    def request_ids(self) -> list[str]:
        return list(self._live)

    def submit(
        self, request_id: str, token_ids: tuple[int, ...], problem: str = ""
    ) -> list[Action]:
        """`problem`: why the request cannot run here, as the caller found."""
        if request_id in self._live:
            return [Refused(f"request {request_id} was submitted twice")]
        if self._refused.take(request_id):
            return []
        outgoing = self._live[request_id] = _Outgoing(request_id, token_ids)
        num_pages = self._num_pages(outgoing)
        if not problem and num_pages > self._allocator.num_pages:
            problem = f"the prompt needs {num_pages} pages, P has {self._allocator.num_pages}"
        early = self._early.pop(request_id, None)
        if problem:
            outgoing.reserve = early
            return self.fail(request_id, problem)
        return self.reserve(early) if early else []

    def reserve(self, reserve: Reserve) -> list[Action]:
        request_id = reserve.request_id
        outgoing = self._live.get(request_id)
        if self._ungranted.take(request_id) or (
            outgoing is None and len(self._early) >= MAX_REMEMBERED
        ):
            return [_abort(request_id, reserve.generation, "not known here any more")]
        if outgoing is None:
            self._early[request_id] = reserve
            return []
        if outgoing.reserve is not None:
            return [Refused(f"RESERVE for {request_id}, which has one")]
        outgoing.reserve = reserve
        if reserve.num_tokens != len(outgoing.token_ids):
            return self.fail(
                request_id,
                f"RESERVE: expected {len(outgoing.token_ids)} tokens, got {reserve.num_tokens}",
            )
        self._granted.append(outgoing)
        return self._admit()

    def layer_ready(self, request_id: str, layer: int, start: int, stop: int) -> None:
        """Tokens [start, stop) of the layer are in our cache; `next_send` says when they leave."""
        outgoing = self._live[request_id]
        assert outgoing.reserve is not None
        start = max(start, outgoing.reserve.num_cached)
        for at in range(start, stop, self._tokens_per_slot):
            self._pushes.append((outgoing, layer, at, min(at + self._tokens_per_slot, stop)))
            outgoing.num_unpushed += 1

    def prefilled(
        self, request_id: str, first_token: int, digests: tuple[bytes, ...] = ()
    ) -> list[Action]:
        """The last forward is over: only the transfer needs the pages now."""
        outgoing = self._live[request_id]
        assert outgoing.phase is Phase.PREFILLING and outgoing.reserve is not None
        outgoing.phase = Phase.DRAINING
        self._allocator.free(outgoing.pages, to="leased")
        reserve = outgoing.reserve
        outgoing.commit = Commit(
            request_id, reserve.generation, reserve.capability, first_token, outgoing.token_ids,
            digests,
        )  # fmt: skip
        if outgoing.num_unpushed == 0:
            self._commits.append(outgoing)
        return []

    def next_send(self) -> Push | Send | None:
        """The next chunk or COMMIT that may leave now. A failed Push is answered `not_pushed`."""
        if self._commits:
            outgoing = self._commits.popleft()
            assert outgoing.commit is not None
            return Send(outgoing.commit)
        if not self._pushes or not self._credits:
            return None
        outgoing, layer, start, stop = self._pushes.popleft()
        outgoing.num_unpushed -= 1
        if outgoing.num_unpushed == 0 and outgoing.phase is Phase.DRAINING:
            self._commits.append(outgoing)
        slot = self._credits.popleft()
        self._sent_slots.add(slot)
        return Push(outgoing.request_id, outgoing.pages, layer, start, stop, slot)

    def chunk_frame(self, push: Push, payload_bytes: int, checksum: int) -> Chunk:
        reserve = self._live[push.request_id].reserve
        assert reserve is not None
        wire = self._wire
        return Chunk(
            request_id=push.request_id, generation=reserve.generation,
            capability=reserve.capability, fingerprint=wire.fingerprint, group=0,
            layer_start=push.layer, layer_stop=push.layer + 1, head_start=0,
            head_stop=wire.num_kv_heads, head_dim=wire.head_dim, head_dim_v=wire.head_dim_v,
            token_start=push.start, token_stop=push.stop, dtype=wire.dtype,
            scale_kind=wire.scale_kind, checksum_kind="crc32c", checksum=checksum,
            payload_bytes=payload_bytes, slot=push.slot,
        )  # fmt: skip

    def not_pushed(self, push: Push, message: str) -> list[Action]:
        """Packing failed before the chunk was sent: the slot is still ours, the request fails."""
        return [*self.credit(Credit(push.slot)), *self.fail(push.request_id, message)]

    def credit(self, credit: Credit) -> list[Action]:
        if credit.slot not in self._sent_slots:
            return [Refused(f"CREDIT for staging slot {credit.slot}, which holds no chunk of ours")]
        self._sent_slots.remove(credit.slot)
        self._credits.append(credit.slot)
        return []

    def ack(self, ack: Ack) -> list[Action]:
        outgoing = self._live.get(ack.request_id)
        if outgoing is None or outgoing.reserve is None:
            return []
        if outgoing.reserve.generation != ack.generation or outgoing.phase is not Phase.DRAINING:
            return [Refused(f"ACK for {ack.request_id}, which was not committed")]
        return [Dropped(ack.request_id), *self._end(outgoing)]

    def abort(self, abort: Abort) -> list[Action]:
        request_id = abort.request_id
        outgoing = self._live.get(request_id)
        if outgoing is None:
            early = self._early.get(request_id)
            if early is not None and early.generation == abort.generation:
                del self._early[request_id]
                self._refused.add(request_id)
            elif abort.generation == NO_GENERATION and not self._ungranted.take(request_id):
                self._refused.add(request_id)
            return []
        generation = outgoing.reserve.generation if outgoing.reserve else NO_GENERATION
        if abort.generation != generation:
            return []
        return [Dropped(outgoing.request_id), *self._end(outgoing)]

    def finished(self, request_id: str) -> list[Action]:
        """The first token ended the request: D need not decode."""
        return self._give_up(request_id, None, "finished")

    def cancel(self, request_id: str) -> list[Action]:
        return self._give_up(request_id, Cancelled(request_id), "cancelled")

    def fail(self, request_id: str, message: str) -> list[Action]:
        return self._give_up(request_id, Failed(request_id, message), message)

    def _give_up(self, request_id: str, answer: Action | None, reason: str) -> list[Action]:
        outgoing = self._live.get(request_id)
        if outgoing is None:
            return []
        actions: list[Action] = [answer] if answer else []
        if outgoing.reserve is None:
            self._ungranted.add(request_id)
        else:
            actions.append(_abort(request_id, outgoing.reserve.generation, reason))
        return actions + self._end(outgoing)

    def _end(self, outgoing: _Outgoing) -> list[Action]:
        del self._live[outgoing.request_id]
        if outgoing in self._granted:
            self._granted.remove(outgoing)
        if outgoing in self._commits:
            self._commits.remove(outgoing)
        self._pushes = deque(entry for entry in self._pushes if entry[0] is not outgoing)
        if outgoing.phase is Phase.DRAINING:
            self._allocator.end_lease(outgoing.pages)
        else:
            self._allocator.free(outgoing.pages)
        outgoing.phase = Phase.GONE
        return self._admit()

    def _admit(self) -> list[Action]:
        actions: list[Action] = []
        while self._granted and self._num_pages(self._granted[0]) <= self._allocator.num_free:
            outgoing = self._granted.popleft()
            outgoing.phase = Phase.PREFILLING
            outgoing.pages = self._allocator.alloc(self._num_pages(outgoing))
            actions.append(Begin(outgoing.request_id, outgoing.pages))
        return actions

    def _num_pages(self, outgoing: _Outgoing) -> int:
        return -(-len(outgoing.token_ids) // self._page_size)


def _abort(request_id: str, generation: int, reason: str) -> Send:
    return Send(Abort(request_id, generation, reason[:256]))
