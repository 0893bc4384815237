"""D's side of the handoff, a pure state machine; see `handoff`."""

from collections.abc import Callable

from pagewire.allocator import PageAllocator
from pagewire.transfer.actions import Action, Begin, Dropped, Refused, Send, Share, Start, Unpack
from pagewire.transfer.coverage import Coverage
from pagewire.transfer.frames import MAX_DEADLINE_MS, Abort, Ack, Chunk, Commit, Credit, Held, Reserve
from pagewire.transfer.handoff import NO_GENERATION, Leg, Link, Machine, Phase, Request, Wire, mismatch, prompt_sha256
from pagewire.transfer.shares import shares


class _Link(Link, eq=False, kw_only=True):
    granted_staging: set[int]  # the peer's to write


class Receiver(Machine[_Link]):
    """D's side."""

    sides = "D", "P"
    other = "sender"
    late = "the KV did not arrive: nothing came from P"

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
        super().__init__(allocator, page_size, now_ms)
        self._takes |= {Chunk: self.chunk, Commit: self.commit}
        self._held = held
        self._vocab_size = vocab_size
        self._max_waiting = max_waiting
        self._timeout_ms = min(timeout_ms, MAX_DEADLINE_MS)
        self._new_capability = new_capability
        self._generation = NO_GENERATION  # goes on from link to link

    def link(self, number: int, wire: Wire, num_staging_slots: int) -> None:
        """A peer is there; every one of its staging slots is its to write."""
        assert number not in self._links
        self._links[number] = _Link(wire=wire, progress_ms=self._now_ms(), granted_staging={*range(num_staging_slots)})

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
        incoming = self._live[request_id] = Request(
            request_id, token_ids, {number: Leg() for number in present},
            num_pages=-(-num_tokens // self._page_size) - len(prefix), pages=list(prefix), num_cached=num_cached,
        )  # fmt: skip
        if len(present) < len(links):
            return self._give_up(request_id, Dropped(request_id), "another sender is gone")
        try:
            if problem:
                raise ValueError(problem)
            for number, blocks in shares(self._held, present).items() if links else ():
                incoming.legs[number].blocks = blocks
            self._check_size(len(token_ids), num_tokens, num_cached, prefix)
        except ValueError as error:
            return self.fail(request_id, str(error))
        self._waiting.append(incoming)
        return self._admit()

    def chunk(self, number: int, chunk: Chunk) -> list[Action]:
        link = self._links[number]
        if chunk.slot not in link.granted_staging:
            return [Refused(f"chunk in staging slot {chunk.slot}, which was not granted")]
        incoming, leg = self._receiving(number, chunk)
        if leg is None or incoming is None:
            # late: its request is gone; the staging slot's bytes are not looked at
            return [Send(Credit(chunk.slot), number)]
        if problem := self._chunk_problem(chunk, link.wire, leg.coverage):
            return [Send(Credit(chunk.slot), number), *self.fail(incoming.request_id, f"CHUNK: {problem}")]
        leg.coverage.add(chunk.block, chunk.tokens)
        self._progressed(number)
        link.granted_staging.remove(chunk.slot)
        self._moving[number, chunk.slot] = incoming
        return [Unpack(number, chunk, incoming.pages)]

    def unpacked(self, unpack: Unpack, problem: str | None = None) -> list[Action]:
        """`problem` says why the payload is not in the pages."""
        number, slot = unpack.link, unpack.chunk.slot
        incoming = self._end_move(number, slot)
        actions: list[Action] = []
        if number in self._links:
            self._links[number].granted_staging.add(slot)
            actions.append(Send(Credit(slot), number))
        if incoming.phase is Phase.GONE:
            actions += self._admit()
        elif problem:
            actions += self.fail(incoming.request_id, problem)
        else:
            actions += self._committed(number, incoming, incoming.legs[number])
        return actions

    def commit(self, number: int, commit: Commit) -> list[Action]:
        incoming, leg = self._receiving(number, commit)
        if leg is None or incoming is None:
            return [Refused(f"COMMIT for {commit.request_id}, which is not receiving")]
        self._progressed(number)
        leg.commit = commit
        return self._committed(number, incoming, leg)

    def abort(self, number: int, abort: Abort) -> list[Action]:
        return super().abort(number, abort) if abort.generation != NO_GENERATION else []

    def release(self, request_id: str) -> list[Action]:
        """A running request has ended in good order."""
        phase = self._live[request_id].phase
        assert phase is Phase.RUNNING, phase
        return self._give_up(request_id, None, "released")

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

    def _admitted(self, request: Request) -> list[Action]:
        if not request.legs:
            request.phase = Phase.RUNNING
            return [Begin(request.request_id, request.pages)]
        self._generation += 1
        request.phase = Phase.RECEIVING
        request.since_ms = self._now_ms()
        tokens = request.num_cached, len(request.token_ids)
        for leg in request.legs.values():
            leg.coverage = Coverage(leg.blocks, *tokens)
            leg.reserve = Reserve(
                request.request_id, self._generation, self._new_capability(), *tokens, self._timeout_ms, leg.blocks
            )
        return [Send(leg.reserve, number) for number, leg in request.legs.items() if leg.reserve]

    def _receiving(self, number: int, frame: Chunk | Commit) -> tuple[Request | None, Leg | None]:
        incoming, leg = self._find(number, frame.request_id)
        reserve = leg.reserve if leg and leg.commit is None else None
        granted = reserve and (reserve.generation, reserve.capability)
        return incoming, leg if granted == (frame.generation, frame.capability) else None

    def _chunk_problem(self, chunk: Chunk, wire: Wire, coverage: Coverage) -> str | None:
        if chunk.group >= len(wire.groups):
            return f"group: expected less than {len(wire.groups)}, got {chunk.group}"
        of_group = "head_dim", "head_dim_v", "dtype", "scale_kind"
        problem = mismatch(wire, chunk, ("fingerprint", "checksum_kind"))
        if problem := problem or mismatch(wire.groups[chunk.group], chunk, of_group):
            return problem
        expected_bytes = wire.block_bytes(chunk.block, chunk.token_stop - chunk.token_start)
        if chunk.payload_bytes != expected_bytes:
            return f"payload_bytes: expected {expected_bytes}, got {chunk.payload_bytes}"
        return coverage.problem(chunk.block, chunk.tokens)

    def _committed(self, number: int, incoming: Request, leg: Leg) -> list[Action]:
        """Once all that came over this link is in the pages."""
        commit = leg.commit
        if commit is None or self._is_moving(number, incoming):
            return []
        others = {other.commit.first_token for other in incoming.legs.values() if other.over and other.commit}
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
        leg.over = True
        actions: list[Action] = [Send(Ack(incoming.request_id, commit.generation), number)]
        if all(other.over for other in incoming.legs.values()):
            incoming.phase = Phase.RUNNING
            legs = incoming.legs.items()
            arrived = tuple(Share(at, of.reserve, of.commit) for at, of in legs if of.reserve and of.commit)
            actions.append(Start(incoming.request_id, incoming.pages, arrived))
        return actions
