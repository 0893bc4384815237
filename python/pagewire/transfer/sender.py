"""P's side of the handoff, a pure state machine; see `handoff`."""

from collections import deque
from collections.abc import Callable, Mapping

from pagewire.allocator import PageAllocator
from pagewire.transfer.actions import Action, Begin, Dropped, Push, Refused, Send
from pagewire.transfer.frames import Abort, Ack, Chunk, Commit, Credit, Reserve
from pagewire.transfer.grouping import Grouping
from pagewire.transfer.handoff import NO_GENERATION, Leg, Link, Machine, Phase, Request, Wire, prompt_sha256
from pagewire.transfer.shares import common

MAX_REMEMBERED = 4096  # request ids of which only one side has heard


class _Link(Link, eq=False, kw_only=True):
    """D, its staging slots, and what of us waits for them."""

    credits: list[int]  # a stack: the slot used last is still in a cache
    sent_staging: set[int] = set()  # or being written
    unpushed: Grouping[Request]
    early: dict[str, Reserve] = {}  # RESERVE that overtook its Submit
    # each entry is consumed by what it waits for; the last MAX_REMEMBERED, in order:
    ungranted: dict[str, bool] = {}  # ended here; D's RESERVE or refusal is still on its way
    refused: dict[str, bool] = {}  # refused by D; the front's Submit is still on its way


class Sender(Machine[_Link]):
    """P's side. It holds no more requests than D queues or admits: D aborts what it refuses."""

    sides = "P", "D"
    other = "receiver"
    late = "the KV did not leave: nothing moved between P and D"

    def __init__(self, allocator: PageAllocator, page_size: int, *, now_ms: Callable[[], int]) -> None:
        super().__init__(allocator, page_size, now_ms)
        self._takes |= {Reserve: self.reserve, Credit: self.credit, Ack: self.ack}
        self._commits: deque[tuple[int, Request]] = deque()

    def reserves(self, request_id: str) -> dict[int, Reserve]:
        """What was granted over which link."""
        return {number: leg.reserve for number, leg in self._live[request_id].legs.items() if leg.reserve}

    def link(self, number: int, wire: Wire, num_staging_slots: int, staging_slot_bytes: int) -> None:
        """A D is there. Raises ValueError when a staging slot cannot hold one token of one layer."""
        assert number not in self._links
        need = max(wire.packed_bytes(g, 1, of.head_stop - of.head_start, 1) for g, of in enumerate(wire.groups))
        if staging_slot_bytes < need:
            raise ValueError(f"slot_bytes: expected at least {need} (one token of one layer), got {staging_slot_bytes}")
        credits, unpushed = list(range(num_staging_slots)), Grouping[Request](staging_slot_bytes, wire.block_bytes)
        self._links[number] = _Link(wire=wire, progress_ms=self._now_ms(), credits=credits, unpushed=unpushed)

    def submit(
        self, request_id: str, token_ids: tuple[int, ...], links: tuple[int, ...], problem: str | None = None
    ) -> list[Action]:
        """`links`: of every D that is to have it. `problem`: why it cannot run here, as the caller found."""
        if request_id in self._live:
            return [Refused(f"request {request_id} was submitted twice")]
        present = {number: self._links[number] for number in links if number in self._links}
        legs = {
            number: Leg(link.early.pop(request_id, None), over=link.refused.pop(request_id, False))
            for number, link in present.items()
        }
        num_pages = -(-len(token_ids) // self._page_size)
        outgoing = self._live[request_id] = Request(request_id, token_ids, legs, num_pages)
        if not links or len(present) < len(links) or any(leg.over for leg in legs.values()):
            return self._give_up(request_id, Dropped(request_id), "another receiver is gone")
        if not problem and num_pages > self._allocator.num_pages:
            problem = f"the prompt needs {num_pages} pages, P has {self._allocator.num_pages}"
        return self._grant(outgoing, problem)

    def reserve(self, number: int, reserve: Reserve) -> list[Action]:
        link, request_id = self._links[number], reserve.request_id
        outgoing, leg = self._find(number, request_id)
        if link.ungranted.pop(request_id, False) or (outgoing is None and len(link.early) >= MAX_REMEMBERED):
            return [Send(Abort(request_id, reserve.generation, "not known here any more"), number)]
        if outgoing is None:
            link.early[request_id] = reserve
            return []
        if leg is None or leg.reserve is not None:
            return [Refused(f"RESERVE for {request_id}, which {'has one' if leg else 'is for other links'}")]
        leg.reserve = reserve
        return self._grant(outgoing)

    def layer_ready(self, request_id: str, layer: int, start: int, stop: int, group: int = 0) -> None:
        """Tokens [start, stop) of the layer are in our cache; `next_send` says when they leave."""
        outgoing = self._live[request_id]
        self._progress_ms = self._now_ms()
        for number, reserve in self.reserves(request_id).items():
            for block in reserve.blocks:
                if block.group == group and block.layer_start <= layer < block.layer_stop:
                    self._links[number].unpushed.add(outgoing, block, layer, max(start, reserve.num_cached), stop)

    def prefilled(
        self, request_id: str, first_token: int, digests: Mapping[int, tuple[bytes, ...]] | None = None
    ) -> list[Action]:
        """The last forward is over: only the transfer needs the pages now. `digests`: for each link."""
        outgoing = self._live[request_id]
        assert outgoing.phase is Phase.PREFILLING, outgoing.phase
        outgoing.phase = Phase.DRAINING
        outgoing.since_ms = self._now_ms()
        self._allocator.free(outgoing.pages, to="leased")
        sha256 = prompt_sha256(outgoing.token_ids)
        for number, reserve in self.reserves(request_id).items():
            of = (digests or {}).get(number, ())
            commit = Commit(request_id, reserve.generation, reserve.capability, first_token, sha256, of)
            outgoing.legs[number].commit = commit
            self._drained(number, outgoing)
        return []

    def next_send(self) -> Push | Send | None:
        """The next chunk or COMMIT that may leave now. A Push is answered `pushed` or `not_pushed`."""
        if self._commits:
            number, outgoing = self._commits.popleft()
            self._progressed(number)
            leg = outgoing.legs[number]
            commit, leg.commit = leg.commit, None
            assert commit is not None
            return Send(commit, number)
        for number, link in list(self._links.items()):
            if not link.credits or (piece := link.unpushed.take(idle=not link.sent_staging)) is None:
                continue
            self._links[number] = self._links.pop(number)  # the others first, next time
            self._progressed(number)
            staging_slot = link.credits.pop()
            link.sent_staging.add(staging_slot)
            outgoing, block, tokens = piece
            self._moving[number, staging_slot] = outgoing
            return Push(outgoing.request_id, number, outgoing.pages, block, tokens, staging_slot)
        return None

    def pushed(self, push: Push, payload_bytes: int, checksum: int) -> list[Action]:
        """It is in its staging slot: the CHUNK, unless nobody wants it any more."""
        outgoing = self._moving[push.link, push.staging_slot]
        if outgoing.phase is Phase.GONE:
            return self.not_pushed(push, "nobody wants it any more")
        reserve, wire = self.reserves(push.request_id)[push.link], self._links[push.link].wire
        block, of = push.block, wire.groups[push.block.group]
        chunk = Chunk(
            request_id=push.request_id, generation=reserve.generation, capability=reserve.capability,
            fingerprint=wire.fingerprint, group=block.group, layer_start=block.layer_start, layer_stop=block.layer_stop,
            head_start=block.head_start, head_stop=block.head_stop, head_dim=of.head_dim, head_dim_v=of.head_dim_v,
            token_start=push.tokens[0], token_stop=push.tokens[1], dtype=of.dtype, scale_kind=of.scale_kind,
            checksum_kind=wire.checksum_kind, checksum=checksum, payload_bytes=payload_bytes, slot=push.staging_slot,
        )  # fmt: skip
        self._progressed(push.link)
        self._end_move(push.link, push.staging_slot)
        self._drained(push.link, outgoing)
        return [Send(chunk, push.link)]

    def not_pushed(self, push: Push, message: str) -> list[Action]:
        """Nothing is sent and nothing reads the pages for it now: the request fails, unless it is gone already."""
        outgoing = self._moving[push.link, push.staging_slot]
        failed = self.fail(push.request_id, message) if outgoing.phase is not Phase.GONE else []
        self._end_move(push.link, push.staging_slot)
        self.frame(push.link, Credit(push.staging_slot))  # the staging slot is still ours
        return [*failed, *self._admit()]

    def credit(self, number: int, credit: Credit) -> list[Action]:
        link = self._links[number]
        if credit.slot not in link.sent_staging or (number, credit.slot) in self._moving:
            return [Refused(f"CREDIT for staging slot {credit.slot}, which holds no chunk of ours")]
        self._progressed(number)
        link.sent_staging.remove(credit.slot)
        link.credits.append(credit.slot)
        return []

    def ack(self, number: int, ack: Ack) -> list[Action]:
        outgoing, leg = self._find(number, ack.request_id)
        if outgoing is None or leg is None or leg.reserve is None:
            return []
        sent = outgoing.phase is Phase.DRAINING and leg.commit is None
        if leg.generation != ack.generation or not sent or leg.over:
            return [Refused(f"ACK for {ack.request_id}, which was not committed")]
        self._progressed(number)
        leg.over = True
        done = all(leg.over for leg in outgoing.legs.values())
        return self._give_up(ack.request_id, Dropped(ack.request_id), "over") if done else []

    def abort(self, number: int, abort: Abort) -> list[Action]:
        link, request_id = self._links[number], abort.request_id
        if request_id in self._live:
            return super().abort(number, abort)
        early = link.early.get(request_id)
        if early is not None and early.generation == abort.generation:
            del link.early[request_id]
        elif abort.generation != NO_GENERATION or link.ungranted.pop(request_id, False):
            return []
        _remember(link.refused, request_id)
        return []

    def finished(self, request_id: str) -> list[Action]:
        """The first token ended the request: D need not decode."""
        return self._give_up(request_id, None, "finished")

    def _reserve_problem(self, outgoing: Request) -> str | None:
        for number, reserve in self.reserves(outgoing.request_id).items():
            if reserve.num_tokens != len(outgoing.token_ids):
                return f"RESERVE: expected {len(outgoing.token_ids)} tokens, got {reserve.num_tokens}"
            groups = self._links[number].wire.groups
            for block in reserve.blocks:
                if block.group >= len(groups) or common(block, groups[block.group]) != (block.layers, block.heads):
                    return f"RESERVE: {block} is not of what both hold"
        return None

    def _grant(self, outgoing: Request, problem: str | None = None) -> list[Action]:
        """Once every RESERVE is there, it waits for pages."""
        if problem := problem or self._reserve_problem(outgoing):
            return self.fail(outgoing.request_id, problem)
        outgoing.since_ms = self._now_ms()
        if all(leg.reserve for leg in outgoing.legs.values()):
            self._waiting.append(outgoing)
        return self._admit()

    def _drained(self, number: int, outgoing: Request) -> None:
        """Its COMMIT is next, if nothing is to be pushed before."""
        leg = outgoing.legs[number]
        if leg.commit and not self._is_moving(number, outgoing) and not self._links[number].unpushed.holds(outgoing):
            self._commits.append((number, outgoing))

    def _end(self, request: Request, answer: Action | None, reason: str) -> list[Action]:
        for number, leg in request.legs.items():
            if leg.reserve is None and not leg.over and number in self._links:  # it is told when its RESERVE comes
                _remember(self._links[number].ungranted, request.request_id)
                leg.over = True
        self._commits = deque(commit for commit in self._commits if commit[1] is not request)
        for link in self._links.values():
            link.unpushed.drop(request)
        return super()._end(request, answer, reason)

    def _admitted(self, request: Request) -> list[Action]:
        request.phase = Phase.PREFILLING
        return [Begin(request.request_id, request.pages)]


def _remember(ids: dict[str, bool], request_id: str) -> None:
    ids[request_id] = True
    if len(ids) > MAX_REMEMBERED:
        del ids[next(iter(ids))]
