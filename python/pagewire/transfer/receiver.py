"""D's side of the handoff, a pure state machine; see `handoff`."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from pagewire.allocator import PageAllocator
from pagewire.transfer.coverage import Coverage
from pagewire.transfer.frames import MAX_DEADLINE_MS, Abort, Ack, Block, Chunk, Commit, Credit, Held, Reserve
from pagewire.transfer.handoff import (
    NO_GENERATION,
    Action,
    Begin,
    Cancelled,
    Dropped,
    Phase,
    Refused,
    RequestFailed,
    Send,
    Share,
    Start,
    Unpack,
    Wire,
    abort_frame,
    mismatch,
    prompt_sha256,
)
from pagewire.transfer.shares import shares


@dataclass(eq=False)
class _Link:
    wire: Wire
    granted_staging: set[int]  # the peer's to write
    progress_ms: int  # when the peer last pushed or committed something that counts


@dataclass(eq=False)
class _Leg:
    """What comes for a request over one link."""

    blocks: tuple[Block, ...]
    reserve: Reserve | None = None  # once it was granted
    coverage: Coverage | None = None
    num_unpacking: int = 0
    commit: Commit | None = None  # also one that arrived while chunks were still being unpacked
    complete: bool = False  # committed, nothing is missing: the link is needed no more


@dataclass(eq=False)
class _Incoming:
    request_id: str
    token_ids: tuple[int, ...]
    num_pages: int  # besides the prefix's
    legs: dict[int, _Leg]
    num_cached: int
    pages: list[int]
    num_whole: int  # of the pages, in front: full of cached tokens, and never written
    phase: Phase = Phase.WAITING
    generation: int = NO_GENERATION
    granted_ms: int = 0

    @property
    def num_unpacking(self) -> int:
        return sum(leg.num_unpacking for leg in self.legs.values())


class Receiver:
    """D's side. `free + active + cached + leased == num_pages` holds after every call.

    Links come and go: `link` and `lost` say so; a frame of a link that is not there changes nothing.
    """

    def __init__(
        self,
        allocator: PageAllocator,
        page_size: int,
        held: tuple[Held, ...],
        *,
        vocab_size: int,
        max_waiting: int,
        timeout_ms: int,
        now_ms: Callable[[], int],
        new_capability: Callable[[], bytes],
    ) -> None:
        """held: what of a request's KV must be there before it runs, as in our HELLO."""
        self._allocator = allocator
        self._page_size = page_size
        self._held = held
        self._vocab_size = vocab_size
        self._max_waiting = max_waiting
        self._timeout_ms = min(timeout_ms, MAX_DEADLINE_MS)
        self._now_ms = now_ms
        self._new_capability = new_capability
        self._links: dict[int, _Link] = {}
        self._live: dict[str, _Incoming] = {}
        self._waiting: deque[_Incoming] = deque()
        self._unpacking: dict[tuple[int, int], _Incoming] = {}  # link, staging slot -> its chunk's owner
        self._generation = NO_GENERATION  # goes on from link to link

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def request_ids(self) -> list[str]:
        return list(self._live)

    def link(self, number: int, wire: Wire, num_staging_slots: int) -> None:
        """A peer is there; every one of its staging slots is its to write."""
        assert number not in self._links
        self._links[number] = _Link(wire, set(range(num_staging_slots)), self._now_ms())

    def lost(self, number: int) -> list[Action]:
        """The peer is gone, and with it what still needs it."""
        self._links.pop(number, None)
        dropped = [one for one in self._live.values() if number in one.legs and not one.legs[number].complete]
        actions: list[Action] = []
        for incoming in dropped:
            actions += [Dropped(incoming.request_id), *self._aborts(incoming, "another sender is gone")]
            self._free(incoming)
        return actions + self._admit()

    def submit(
        self, request_id: str, token_ids: tuple[int, ...], num_tokens: int, problem: str | None = None,
        *, links: tuple[int, ...] = (), num_cached: int = 0, prefix: tuple[int, ...] = (),
    ) -> list[Action]:  # fmt: skip
        """`num_tokens`: prompt and output together, all reserved before P may push.
        `problem`: why the request cannot run here, as the caller found.
        `links`: whose senders push it; () when D prefills it itself, and no peer hears of it.
        `prefix`: active pages with its first num_cached tokens; the caller's reference to each is the request's from
        now on, whatever comes of it.
        """
        if request_id in self._live:
            self._allocator.free(prefix)
            return [Refused(f"request {request_id} was submitted twice")]
        present = {number: self._links[number].wire.groups for number in links if number in self._links}
        num_whole = num_cached // self._page_size
        blocks: dict[int, tuple[Block, ...]] = dict.fromkeys(present, ())
        if not problem and len(present) == len(links):
            try:
                blocks = shares(self._held, present) if links else {}
                self._check_size(len(token_ids), num_tokens, num_cached, prefix)
            except ValueError as error:
                problem = str(error)
        legs = {number: _Leg(blocks[number]) for number in present}
        num_pages = -(-num_tokens // self._page_size) - len(prefix)
        incoming = _Incoming(request_id, token_ids, num_pages, legs, num_cached, list(prefix), num_whole)
        self._live[request_id] = incoming
        self._waiting.append(incoming)
        if len(present) < len(links):
            return self._give_up(request_id, Dropped(request_id), "another sender is gone")
        return self.fail(request_id, problem) if problem else self._admit()

    def chunk(self, number: int, chunk: Chunk) -> list[Action]:
        link = self._links.get(number)
        if link is None:
            return []
        if chunk.slot not in link.granted_staging:
            return [Refused(f"chunk in staging slot {chunk.slot}, which was not granted")]
        incoming, leg = self._receiving(number, chunk)
        if leg is None or incoming is None:
            # late: its request is gone; the staging slot's bytes are not looked at
            return [Send(Credit(chunk.slot), number)]
        problem = self._chunk_problem(chunk, link.wire, leg)
        if problem:
            return [Send(Credit(chunk.slot), number), *self.fail(incoming.request_id, f"CHUNK: {problem}")]
        assert leg.coverage is not None
        leg.coverage.add(chunk.block, chunk.tokens)
        link.progress_ms = self._now_ms()
        link.granted_staging.remove(chunk.slot)
        self._unpacking[number, chunk.slot] = incoming
        leg.num_unpacking += 1
        return [Unpack(number, chunk, incoming.pages)]

    def unpacked(self, unpack: Unpack, problem: str | None = None) -> list[Action]:
        """`problem` says why the payload is not in the pages."""
        number, slot = unpack.link, unpack.chunk.slot
        incoming = self._unpacking.pop((number, slot))
        leg = incoming.legs[number]
        leg.num_unpacking -= 1
        actions: list[Action] = []
        if number in self._links:
            self._links[number].granted_staging.add(slot)
            actions.append(Send(Credit(slot), number))
        if incoming.phase is Phase.GONE:
            if incoming.num_unpacking == 0:
                self._allocator.end_lease(incoming.pages[incoming.num_whole :])
                actions += self._admit()
        elif problem:
            actions += self.fail(incoming.request_id, problem)
        elif leg.commit and leg.num_unpacking == 0:
            actions += self._committed(number, incoming, leg, leg.commit)
        return actions

    def commit(self, number: int, commit: Commit) -> list[Action]:
        incoming, leg = self._receiving(number, commit)
        if leg is None or incoming is None:
            return [Refused(f"COMMIT for {commit.request_id}, which is not receiving")]
        self._links[number].progress_ms = self._now_ms()
        leg.commit = commit
        return [] if leg.num_unpacking else self._committed(number, incoming, leg, commit)

    def abort(self, number: int, abort: Abort) -> list[Action]:
        incoming = self._live.get(abort.request_id)
        leg = incoming.legs.get(number) if incoming else None
        if incoming is None or leg is None or leg.complete or abort.generation != incoming.generation:
            return []
        if incoming.phase is not Phase.RECEIVING:
            return []
        leg.complete = True  # nothing more from there, and nothing to tell it
        return self._give_up(abort.request_id, Dropped(abort.request_id), abort.reason)

    def cancel(self, request_id: str) -> list[Action]:
        return self._give_up(request_id, Cancelled(request_id), "cancelled")

    def fail(self, request_id: str, message: str) -> list[Action]:
        return self._give_up(request_id, RequestFailed(request_id, message), message)

    def release(self, request_id: str) -> list[Action]:
        """A running request has ended in good order."""
        incoming = self._live[request_id]
        assert incoming.phase is Phase.RUNNING, incoming.phase
        self._free(incoming)
        return self._admit()

    def tick(self) -> list[Action]:
        """Fails what was granted when neither that nor anything that counted from a peer it needs is recent."""
        oldest_ms = self._now_ms() - self._timeout_ms
        late = [
            incoming.request_id
            for incoming in self._live.values()
            if incoming.phase is Phase.RECEIVING and incoming.granted_ms <= oldest_ms
            and any(
                self._links[number].progress_ms <= oldest_ms
                for number, leg in incoming.legs.items() if not leg.complete
            )
        ]  # fmt: skip
        message = f"the KV did not arrive: nothing came from P within {self._timeout_ms} ms"
        return [action for request_id in late for action in self.fail(request_id, message)]

    def _check_size(self, prompt_len: int, num_tokens: int, num_cached: int, prefix: tuple[int, ...]) -> None:
        """Raises ValueError."""
        num_pages, num_of_prefix = -(-num_tokens // self._page_size), -(-num_cached // self._page_size)
        if num_pages > self._allocator.num_pages:
            raise ValueError(f"the request needs {num_pages} pages, D has {self._allocator.num_pages}")
        if len(self._waiting) >= self._max_waiting:
            raise ValueError(f"{self._max_waiting} requests are waiting for pages, no more are queued")
        if not 0 <= num_cached < prompt_len or len(prefix) != num_of_prefix:
            raise ValueError(f"{num_cached} of {prompt_len} tokens are cached, in {len(prefix)} pages")
        if num_cached % self._page_size and self._allocator.ref_count(prefix[-1]) > 1:
            raise ValueError(f"page {prefix[-1]} is to be written behind {num_cached} cached tokens, but shared")

    def _admit(self) -> list[Action]:
        actions: list[Action] = []
        while self._waiting and self._waiting[0].num_pages <= self._allocator.num_free:
            incoming = self._waiting.popleft()
            incoming.pages += self._allocator.alloc(incoming.num_pages)
            if incoming.legs:
                actions += self._grant(incoming)
            else:
                incoming.phase = Phase.RUNNING
                actions.append(Begin(incoming.request_id, incoming.pages))
        return actions

    def _grant(self, incoming: _Incoming) -> list[Action]:
        self._generation += 1
        incoming.phase = Phase.RECEIVING
        incoming.generation = self._generation
        incoming.granted_ms = self._now_ms()
        tokens = incoming.num_cached, len(incoming.token_ids)
        actions: list[Action] = []
        for number, leg in incoming.legs.items():
            leg.coverage = Coverage(leg.blocks, *tokens)
            leg.reserve = Reserve(
                incoming.request_id, self._generation, self._new_capability(), *tokens, self._timeout_ms, leg.blocks
            )
            actions.append(Send(leg.reserve, number))
        return actions

    def _receiving(self, number: int, frame: Chunk | Commit) -> tuple[_Incoming, _Leg] | tuple[None, None]:
        incoming = self._live.get(frame.request_id)
        leg = incoming.legs.get(number) if incoming else None
        if incoming is None or leg is None or leg.reserve is None or leg.commit is not None:
            return None, None
        if (frame.generation, frame.capability) != (leg.reserve.generation, leg.reserve.capability):
            return None, None
        return incoming, leg

    def _chunk_problem(self, chunk: Chunk, wire: Wire, leg: _Leg) -> str | None:
        assert leg.coverage is not None
        if chunk.group >= len(wire.groups):
            return f"group: expected less than {len(wire.groups)}, got {chunk.group}"
        if problem := mismatch(wire, chunk, ("fingerprint", "checksum_kind")):
            return problem
        if problem := mismatch(wire.groups[chunk.group], chunk, ("head_dim", "head_dim_v", "dtype", "scale_kind")):
            return problem
        expected_bytes = wire.block_bytes(chunk.block, chunk.token_stop - chunk.token_start)
        if chunk.payload_bytes != expected_bytes:
            return f"payload_bytes: expected {expected_bytes}, got {chunk.payload_bytes}"
        return leg.coverage.problem(chunk.block, chunk.tokens)

    def _committed(self, number: int, incoming: _Incoming, leg: _Leg, commit: Commit) -> list[Action]:
        """All that came over this link is in the pages."""
        assert leg.coverage is not None
        others = {other.commit.first_token for other in incoming.legs.values() if other.complete and other.commit}
        problem = None
        if commit.prompt_sha256 != prompt_sha256(incoming.token_ids):
            problem = "COMMIT: its hash is not that of the prompt's token ids"
        elif commit.first_token >= self._vocab_size:
            problem = f"COMMIT: first token {commit.first_token}, vocabulary of {self._vocab_size}"
        elif others - {commit.first_token}:
            problem = f"COMMIT: first token {commit.first_token}, another sender's {others.pop()}"
        elif not leg.coverage.complete:
            problem = "COMMIT: KV of some layer, head and token has not arrived"
        if problem:
            return self.fail(incoming.request_id, problem)
        leg.complete = True
        actions: list[Action] = [Send(Ack(incoming.request_id, incoming.generation), number)]
        if all(other.complete for other in incoming.legs.values()):
            incoming.phase = Phase.RUNNING
            came = [(number, leg.reserve, leg.commit) for number, leg in incoming.legs.items()]
            arrived = tuple(Share(at, reserve, commit) for at, reserve, commit in came if reserve and commit)
            actions.append(Start(incoming.request_id, incoming.pages, arrived))
        return actions

    def _give_up(self, request_id: str, answer: Action, reason: str) -> list[Action]:
        incoming = self._live.get(request_id)
        if incoming is None:
            return []
        actions = [answer, *self._aborts(incoming, reason)]
        self._free(incoming)
        return actions + self._admit()

    def _aborts(self, incoming: _Incoming, reason: str) -> list[Action]:
        """To every sender that still takes part."""
        return [
            abort_frame(number, incoming.request_id, incoming.generation, reason)
            for number, leg in incoming.legs.items()
            if number in self._links and not leg.complete
        ]

    def _free(self, incoming: _Incoming) -> None:
        del self._live[incoming.request_id]
        if incoming.phase is Phase.WAITING:
            self._waiting.remove(incoming)
        self._allocator.free(incoming.pages[: incoming.num_whole])
        # a payload on its way into these pages cannot be called back: leased until it is in
        written = incoming.pages[incoming.num_whole :]
        self._allocator.free(written, to="leased" if incoming.num_unpacking else "free")
        incoming.phase = Phase.GONE
