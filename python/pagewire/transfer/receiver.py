"""D's side of the handoff, a pure state machine; see `handoff`."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from pagewire.allocator import PageAllocator
from pagewire.transfer.coverage import Coverage
from pagewire.transfer.frames import MAX_DEADLINE_MS, Abort, Ack, Chunk, Commit, Credit, Reserve
from pagewire.transfer.handoff import (
    CHUNK_FIELDS,
    NO_GENERATION,
    Action,
    Begin,
    Cancelled,
    Dropped,
    Phase,
    Refused,
    RequestFailed,
    Send,
    Start,
    Unpack,
    Wire,
    abort_frame,
    mismatch,
    prompt_sha256,
)


@dataclass(eq=False)
class _Incoming:
    request_id: str
    token_ids: tuple[int, ...]
    num_pages: int
    local: bool
    phase: Phase = Phase.WAITING
    pages: list[int] = field(default_factory=list)
    generation: int = NO_GENERATION
    capability: bytes = b""
    granted_ms: int = 0
    link: int = 0  # on which it was granted
    coverage: Coverage | None = None
    num_unpacking: int = 0
    commit: Commit | None = None  # arrived while chunks were still being unpacked


class Receiver:
    """D's side. `free + active + cached + leased == num_pages` holds after every call.

    Peers come and go: `link` and `lost` say so, and between them frames of one connection arrive.
    """

    def __init__(
        self,
        allocator: PageAllocator,
        page_size: int,
        wire: Wire,
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
        self._timeout_ms = min(timeout_ms, MAX_DEADLINE_MS)
        self._now_ms = now_ms
        self._new_capability = new_capability
        self._live: dict[str, _Incoming] = {}
        self._waiting: deque[_Incoming] = deque()
        self._linked = False
        self._link = 0  # counts peers
        self._progress_ms = 0  # when the peer last pushed or committed something that counts
        self._granted_staging: set[int] = set()  # the peer's to write
        # generation and staging slot of a chunk -> its owner; a lost peer's may overlap the next one's
        self._unpacking: dict[tuple[int, int], _Incoming] = {}
        self._generation = NO_GENERATION  # goes on from peer to peer

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def request_ids(self) -> list[str]:
        return list(self._live)

    def link(self, num_staging_slots: int, wire: Wire | None = None) -> list[Action]:
        """A peer is there; every staging slot is its to write. wire: negotiated, if it is not the one given before."""
        assert not self._linked
        self._wire = wire or self._wire
        self._linked = True
        self._link += 1
        self._granted_staging = set(range(num_staging_slots))
        return []

    def lost(self) -> list[Action]:
        """The peer is gone, and with it what waits for it or is received from it."""
        self._linked = False
        self._granted_staging.clear()
        dropped = [
            incoming for incoming in self._live.values() if not incoming.local and incoming.phase is not Phase.RUNNING
        ]
        for incoming in dropped:
            self._free(incoming)
        return [*(Dropped(incoming.request_id) for incoming in dropped), *self._admit()]

    def submit(
        self, request_id: str, token_ids: tuple[int, ...], num_tokens: int, problem: str | None = None,
        *, local: bool = False,
    ) -> list[Action]:  # fmt: skip
        """`num_tokens`: prompt and output together, all reserved before P may push.
        `problem`: why the request cannot run here, as the caller found.
        `local`: D prefills it itself, and no peer hears of it.
        """
        if request_id in self._live:
            return [Refused(f"request {request_id} was submitted twice")]
        if not local and not self._linked:
            return [Dropped(request_id)]
        num_pages = -(-num_tokens // self._page_size)
        if problem:
            pass
        elif num_pages > self._allocator.num_pages:
            problem = f"the request needs {num_pages} pages, D has {self._allocator.num_pages}"
        elif len(self._waiting) >= self._max_waiting:
            problem = f"{self._max_waiting} requests are waiting for pages, no more are queued"
        if problem:
            failed = RequestFailed(request_id, problem)
            return [failed] if local else [failed, abort_frame(request_id, NO_GENERATION, problem)]
        incoming = self._live[request_id] = _Incoming(request_id, token_ids, num_pages, local)
        self._waiting.append(incoming)
        return self._admit()

    def chunk(self, chunk: Chunk) -> list[Action]:
        if chunk.slot not in self._granted_staging:
            return [Refused(f"chunk in staging slot {chunk.slot}, which was not granted")]
        incoming = self._receiving(chunk)
        if incoming is None:
            # late: its request is gone; the staging slot's bytes are not looked at
            return [Send(Credit(chunk.slot))]
        assert incoming.coverage is not None
        problem = self._chunk_problem(chunk, incoming.coverage)
        if problem:
            return [Send(Credit(chunk.slot)), *self.fail(incoming.request_id, f"CHUNK: {problem}")]
        incoming.coverage.add(*chunk.block)
        self._progress_ms = self._now_ms()
        self._granted_staging.remove(chunk.slot)
        self._unpacking[chunk.generation, chunk.slot] = incoming
        incoming.num_unpacking += 1
        return [Unpack(chunk, incoming.pages)]

    def unpacked(self, chunk: Chunk, problem: str | None = None) -> list[Action]:
        """The answer to `Unpack`; `problem` says why the payload is not in the pages."""
        incoming = self._unpacking.pop((chunk.generation, chunk.slot))
        incoming.num_unpacking -= 1
        actions: list[Action] = []
        if self._linked and incoming.link == self._link:
            self._granted_staging.add(chunk.slot)
            actions.append(Send(Credit(chunk.slot)))
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
        self._progress_ms = self._now_ms()
        if incoming.num_unpacking:
            incoming.commit = commit
            return []
        assert incoming.coverage is not None
        problem = None
        if commit.prompt_sha256 != prompt_sha256(incoming.token_ids):
            problem = "COMMIT: its hash is not that of the prompt's token ids"
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
        if incoming is None or incoming.phase is not Phase.RECEIVING or abort.generation != incoming.generation:
            return []
        return [Dropped(incoming.request_id), *self._end(incoming)]

    def cancel(self, request_id: str) -> list[Action]:
        return self._give_up(request_id, Cancelled(request_id), "cancelled")

    def fail(self, request_id: str, message: str) -> list[Action]:
        return self._give_up(request_id, RequestFailed(request_id, message), message)

    def release(self, request_id: str) -> list[Action]:
        """A running request has ended in good order."""
        incoming = self._live[request_id]
        assert incoming.phase is Phase.RUNNING, incoming.phase
        return self._end(incoming)

    def tick(self) -> list[Action]:
        """Fails what was granted when neither that nor anything that counted from the peer is recent."""
        oldest_ms = self._now_ms() - self._timeout_ms
        late = [
            incoming.request_id
            for incoming in self._live.values()
            if incoming.phase is Phase.RECEIVING and max(incoming.granted_ms, self._progress_ms) <= oldest_ms
        ]
        message = f"the KV did not arrive: nothing came from P within {self._timeout_ms} ms"
        return [action for request_id in late for action in self.fail(request_id, message)]

    def _admit(self) -> list[Action]:
        actions: list[Action] = []
        while self._waiting and self._waiting[0].num_pages <= self._allocator.num_free:
            incoming = self._waiting.popleft()
            incoming.pages = self._allocator.alloc(incoming.num_pages)
            if incoming.local:
                incoming.phase = Phase.RUNNING
                actions.append(Begin(incoming.request_id, incoming.pages))
            else:
                actions.append(Send(self._grant(incoming)))
        return actions

    def _grant(self, incoming: _Incoming) -> Reserve:
        self._generation += 1
        incoming.phase = Phase.RECEIVING
        incoming.generation = self._generation
        incoming.capability = self._new_capability()
        incoming.granted_ms = self._now_ms()
        incoming.link = self._link
        num_tokens = len(incoming.token_ids)
        incoming.coverage = Coverage(self._wire.num_layers, self._wire.num_kv_heads, 0, num_tokens)
        return Reserve(incoming.request_id, self._generation, incoming.capability, 0, num_tokens, self._timeout_ms)

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

    def _chunk_problem(self, chunk: Chunk, coverage: Coverage) -> str | None:
        if problem := mismatch(self._wire, chunk, CHUNK_FIELDS):
            return problem
        if chunk.group != 0:
            return f"group: expected 0, got {chunk.group}"
        expected_bytes = self._wire.packed_bytes(*(stop - start for start, stop in chunk.block))
        if chunk.payload_bytes != expected_bytes:
            return f"payload_bytes: expected {expected_bytes}, got {chunk.payload_bytes}"
        return coverage.problem(*chunk.block)

    def _give_up(self, request_id: str, answer: Action, reason: str) -> list[Action]:
        incoming = self._live.get(request_id)
        if incoming is None:
            return []
        actions = [answer]
        if not incoming.local and incoming.phase is not Phase.RUNNING:
            actions.append(abort_frame(request_id, incoming.generation, reason))
        return actions + self._end(incoming)

    def _end(self, incoming: _Incoming) -> list[Action]:
        self._free(incoming)
        return self._admit()

    def _free(self, incoming: _Incoming) -> None:
        del self._live[incoming.request_id]
        if incoming.phase is Phase.WAITING:
            self._waiting.remove(incoming)
        # a payload on its way into these pages cannot be called back: leased until it is in
        self._allocator.free(incoming.pages, to="leased" if incoming.num_unpacking else "free")
        incoming.phase = Phase.GONE
