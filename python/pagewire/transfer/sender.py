"""P's side of the handoff, a pure state machine; see `handoff`."""

from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from pagewire.allocator import PageAllocator
from pagewire.transfer.frames import Abort, Ack, Chunk, Commit, Credit, Reserve
from pagewire.transfer.grouping import Grouping
from pagewire.transfer.handoff import (
    NO_GENERATION,
    Action,
    Begin,
    Cancelled,
    Dropped,
    Phase,
    Push,
    Refused,
    RequestFailed,
    Send,
    Wire,
    abort_frame,
    prompt_sha256,
)
from pagewire.transfer.shares import intersection

MAX_REMEMBERED = 4096  # request ids of which only one side has heard


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


class _Link:
    """D, its staging slots, and what of us waits for them."""

    def __init__(self, wire: Wire, num_staging_slots: int, staging_slot_bytes: int, now_ms: int) -> None:
        self.wire = wire
        self.progress_ms = now_ms  # when a frame was last sent, or a slot or a request given back
        self.credits = list(range(num_staging_slots))  # a stack: the slot used last is still in a cache
        self.sent_staging: set[int] = set()  # or being written
        self.unpushed: Grouping[_Outgoing] = Grouping(staging_slot_bytes, wire.packed_bytes)
        self.early: dict[str, Reserve] = {}  # RESERVE that overtook its Submit
        # each entry is consumed by what it waits for:
        self.ungranted = _Remembered()  # ended here; D's RESERVE or refusal is still on its way
        self.refused = _Remembered()  # refused by D; the front's Submit is still on its way


@dataclass(eq=False)
class _Leg:
    """What leaves of a request over one link."""

    reserve: Reserve | None = None
    num_pushing: int = 0
    acked: bool = False  # the link is needed no more


@dataclass(eq=False)
class _Outgoing:
    request_id: str
    token_ids: tuple[int, ...]
    legs: dict[int, _Leg]
    phase: Phase = Phase.WAITING
    since_ms: int = 0  # last granted, or when it was all computed
    pages: list[int] = field(default_factory=list)
    commits: dict[int, Commit] = field(default_factory=dict)  # to be sent, once nothing is to be pushed over the link

    @property
    def num_pushing(self) -> int:
        return sum(leg.num_pushing for leg in self.legs.values())


class Sender:
    """P's side. `free + active + cached + leased == num_pages` holds after every call.

    It holds no more requests than D queues or admits: D aborts what it refuses. Links come and go: `link` and `lost`
    say so; a frame of a link that is not there changes nothing.
    """

    def __init__(self, allocator: PageAllocator, page_size: int, *, now_ms: Callable[[], int]) -> None:
        self._allocator = allocator
        self._page_size = page_size
        self._now_ms = now_ms
        self._progress_ms = now_ms()  # when anything moved at all
        self._links: dict[int, _Link] = {}  # the one that sent last is the last
        self._live: dict[str, _Outgoing] = {}
        self._granted: deque[_Outgoing] = deque()  # waiting for pages of ours
        self._commits: deque[tuple[int, _Outgoing]] = deque()
        self._pushing: dict[tuple[int, int], _Outgoing] = {}  # link, staging slot -> whose pages a push reads

    @property
    def num_waiting(self) -> int:
        return sum(outgoing.phase is Phase.WAITING for outgoing in self._live.values())

    def request_ids(self) -> list[str]:
        return list(self._live)

    def reserves(self, request_id: str) -> dict[int, Reserve]:
        """What was granted over which link."""
        return {number: leg.reserve for number, leg in self._live[request_id].legs.items() if leg.reserve}

    def link(self, number: int, wire: Wire, num_staging_slots: int, staging_slot_bytes: int) -> None:
        """A D is there. Raises ValueError when a staging slot cannot hold one token of one layer."""
        assert number not in self._links
        token_bytes = max(wire.packed_bytes(g, 1, of.head_stop - of.head_start, 1) for g, of in enumerate(wire.groups))
        if staging_slot_bytes < token_bytes:
            raise ValueError(
                f"slot_bytes: expected at least {token_bytes} (one token of one layer), got {staging_slot_bytes}"
            )
        self._links[number] = _Link(wire, num_staging_slots, staging_slot_bytes, self._now_ms())

    def lost(self, number: int) -> list[Action]:
        """The D is gone, and with it what still needs it."""
        self._links.pop(number, None)
        dropped = [one for one in self._live.values() if number in one.legs and not one.legs[number].acked]
        actions: list[Action] = []
        for outgoing in dropped:
            actions += [Dropped(outgoing.request_id), *self._aborts(outgoing, "another receiver is gone")]
            self._free(outgoing)
        return actions + self._admit()

    def submit(
        self, request_id: str, token_ids: tuple[int, ...], links: tuple[int, ...], problem: str | None = None
    ) -> list[Action]:
        """`links`: of every D that is to have it. `problem`: why it cannot run here, as the caller found."""
        if request_id in self._live:
            return [Refused(f"request {request_id} was submitted twice")]
        present = {number: self._links[number] for number in links if number in self._links}
        early = {number: link.early.pop(request_id, None) for number, link in present.items()}
        legs = {number: _Leg(reserve) for number, reserve in early.items()}
        outgoing = self._live[request_id] = _Outgoing(request_id, token_ids, legs, since_ms=self._now_ms())
        refused = [number for number, link in present.items() if link.refused.take(request_id)]
        for number in refused:
            legs[number].acked = True
        num_pages = self._num_pages(outgoing)
        if refused or not links or len(present) < len(links):
            return self._give_up(request_id, Dropped(request_id), "another receiver is gone")
        if not problem and num_pages > self._allocator.num_pages:
            problem = f"the prompt needs {num_pages} pages, P has {self._allocator.num_pages}"
        for number, reserve in early.items():
            problem = problem or (self._reserve_problem(number, outgoing, reserve) if reserve else None)
        return self.fail(request_id, problem) if problem else self._grant(outgoing)

    def reserve(self, number: int, reserve: Reserve) -> list[Action]:
        link, request_id = self._links.get(number), reserve.request_id
        if link is None:
            return []
        outgoing = self._live.get(request_id)
        if link.ungranted.take(request_id) or (outgoing is None and len(link.early) >= MAX_REMEMBERED):
            return [abort_frame(number, request_id, reserve.generation, "not known here any more")]
        if outgoing is None:
            link.early[request_id] = reserve
            return []
        leg = outgoing.legs.get(number)
        if leg is None or leg.reserve is not None:
            return [Refused(f"RESERVE for {request_id}, which {'has one' if leg else 'is for other links'}")]
        leg.reserve = reserve
        problem = self._reserve_problem(number, outgoing, reserve)
        return self.fail(request_id, problem) if problem else self._grant(outgoing)

    def layer_ready(self, request_id: str, layer: int, start: int, stop: int, group: int = 0) -> None:
        """Tokens [start, stop) of the layer are in our cache; `next_send` says when they leave."""
        outgoing = self._live[request_id]
        self._progress_ms = self._now_ms()
        for number, leg in outgoing.legs.items():
            reserve = leg.reserve
            assert reserve is not None
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
            outgoing.commits[number] = commit
            self._drained(number, outgoing)
        return []

    def next_send(self) -> Push | Send | None:
        """The next chunk or COMMIT that may leave now. A Push is answered `pushed` or `not_pushed`."""
        if self._commits:
            number, outgoing = self._commits.popleft()
            self._moved(self._links[number])
            return Send(outgoing.commits.pop(number), number)
        for number, link in list(self._links.items()):
            piece = link.unpushed.take(idle=not link.sent_staging) if link.credits else None
            if piece is None:
                continue
            self._links[number] = self._links.pop(number)  # the others first, next time
            self._moved(link)
            staging_slot = link.credits.pop()
            link.sent_staging.add(staging_slot)
            outgoing = self._pushing[number, staging_slot] = piece.owner
            outgoing.legs[number].num_pushing += 1
            return Push(outgoing.request_id, number, outgoing.pages, piece.block, piece.tokens, staging_slot)
        return None

    def pushed(self, push: Push, payload_bytes: int, checksum: int) -> list[Action]:
        """It is in its staging slot: the CHUNK, unless nobody wants it any more."""
        outgoing = self._pushing[push.link, push.staging_slot]
        if outgoing.phase is Phase.GONE:
            return self._not_sent(push)
        reserve, wire = outgoing.legs[push.link].reserve, self._links[push.link].wire
        assert reserve is not None
        block, of = push.block, wire.groups[push.block.group]
        chunk = Chunk(
            request_id=push.request_id, generation=reserve.generation,
            capability=reserve.capability, fingerprint=wire.fingerprint, group=block.group,
            layer_start=block.layer_start, layer_stop=block.layer_stop, head_start=block.head_start,
            head_stop=block.head_stop, head_dim=of.head_dim, head_dim_v=of.head_dim_v,
            token_start=push.tokens[0], token_stop=push.tokens[1], dtype=of.dtype,
            scale_kind=of.scale_kind, checksum_kind=wire.checksum_kind, checksum=checksum,
            payload_bytes=payload_bytes, slot=push.staging_slot,
        )  # fmt: skip
        self._moved(self._links[push.link])
        del self._pushing[push.link, push.staging_slot]
        outgoing.legs[push.link].num_pushing -= 1
        self._drained(push.link, outgoing)
        return [Send(chunk, push.link)]

    def not_pushed(self, push: Push, message: str) -> list[Action]:
        """Packing failed before the chunk was sent: the staging slot is still ours, the request fails."""
        outgoing = self._pushing[push.link, push.staging_slot]
        failed = self.fail(push.request_id, message) if outgoing.phase is not Phase.GONE else []
        return [*failed, *self._not_sent(push)]

    def credit(self, number: int, credit: Credit) -> list[Action]:
        link = self._links.get(number)
        if link is None:
            return []
        if credit.slot not in link.sent_staging or (number, credit.slot) in self._pushing:
            return [Refused(f"CREDIT for staging slot {credit.slot}, which holds no chunk of ours")]
        self._moved(link)
        link.sent_staging.remove(credit.slot)
        link.credits.append(credit.slot)
        return []

    def ack(self, number: int, ack: Ack) -> list[Action]:
        outgoing = self._live.get(ack.request_id)
        leg = outgoing.legs.get(number) if outgoing else None
        if outgoing is None or leg is None or leg.reserve is None or number not in self._links:
            return []
        sent = outgoing.phase is Phase.DRAINING and number not in outgoing.commits
        if leg.reserve.generation != ack.generation or not sent or leg.acked:
            return [Refused(f"ACK for {ack.request_id}, which was not committed")]
        self._moved(self._links[number])
        leg.acked = True
        if not all(leg.acked for leg in outgoing.legs.values()):
            return []
        self._free(outgoing)
        return [Dropped(ack.request_id), *self._admit()]

    def abort(self, number: int, abort: Abort) -> list[Action]:
        link, request_id = self._links.get(number), abort.request_id
        if link is None:
            return []
        outgoing = self._live.get(request_id)
        leg = outgoing.legs.get(number) if outgoing else None
        if outgoing is None:
            early = link.early.get(request_id)
            if early is not None and early.generation == abort.generation:
                del link.early[request_id]
                link.refused.add(request_id)
            elif abort.generation == NO_GENERATION and not link.ungranted.take(request_id):
                link.refused.add(request_id)
            return []
        if leg is None or leg.acked or abort.generation != (leg.reserve.generation if leg.reserve else NO_GENERATION):
            return []
        leg.acked = True  # there is nothing to tell it
        return self._give_up(request_id, Dropped(request_id), abort.reason)

    def finished(self, request_id: str) -> list[Action]:
        """The first token ended the request: D need not decode."""
        return self._give_up(request_id, None, "finished")

    def cancel(self, request_id: str) -> list[Action]:
        return self._give_up(request_id, Cancelled(request_id), "cancelled")

    def fail(self, request_id: str, message: str) -> list[Action]:
        return self._give_up(request_id, RequestFailed(request_id, message), message)

    def tick(self) -> list[Action]:
        """Fails what was granted when neither that nor any progress is within its `deadline_ms`: any at all, until it
        is computed, and then any over its link.
        """
        actions: list[Action] = []
        for outgoing in list(self._live.values()):
            for number, leg in outgoing.legs.items():
                if outgoing.phase is Phase.GONE or leg.reserve is None or leg.acked:
                    continue
                of_link = self._links[number].progress_ms
                progress_ms = of_link if outgoing.phase is Phase.DRAINING else self._progress_ms
                if self._now_ms() - max(outgoing.since_ms, progress_ms) >= leg.reserve.deadline_ms:
                    within = f"nothing moved between P and D within {leg.reserve.deadline_ms} ms"
                    actions += self.fail(outgoing.request_id, f"the KV did not leave: {within}")
        return actions

    def _moved(self, link: _Link) -> None:
        self._progress_ms = link.progress_ms = self._now_ms()

    def _reserve_problem(self, number: int, outgoing: _Outgoing, reserve: Reserve) -> str | None:
        if reserve.num_tokens != len(outgoing.token_ids):
            return f"RESERVE: expected {len(outgoing.token_ids)} tokens, got {reserve.num_tokens}"
        groups = self._links[number].wire.groups
        for block in reserve.blocks:
            held = groups[block.group] if block.group < len(groups) else None
            common = held and (intersection(block.layers, held.layers), intersection(block.heads, held.heads))
            if common != (block.layers, block.heads):
                return f"RESERVE: {block} is not of what both hold"
        return None

    def _grant(self, outgoing: _Outgoing) -> list[Action]:
        """Once every RESERVE is there, it waits for pages."""
        outgoing.since_ms = self._now_ms()
        if all(leg.reserve for leg in outgoing.legs.values()):
            self._granted.append(outgoing)
        return self._admit()

    def _drained(self, number: int, outgoing: _Outgoing) -> None:
        """Its COMMIT is next, if nothing is to be pushed before."""
        if number in outgoing.commits and not outgoing.legs[number].num_pushing:
            if not self._links[number].unpushed.holds(outgoing):
                self._commits.append((number, outgoing))

    def _not_sent(self, push: Push) -> list[Action]:
        """Of a request that is gone: the staging slot is still ours, and nothing reads the pages for it now."""
        outgoing = self._pushing.pop((push.link, push.staging_slot))
        outgoing.legs[push.link].num_pushing -= 1
        if push.link in self._links:
            self.credit(push.link, Credit(push.staging_slot))
        if outgoing.num_pushing:
            return []
        self._allocator.end_lease(outgoing.pages)
        return self._admit()

    def _give_up(self, request_id: str, answer: Action | None, reason: str) -> list[Action]:
        outgoing = self._live.get(request_id)
        if outgoing is None:
            return []
        told = self._aborts(outgoing, reason)
        self._free(outgoing)
        return [*([answer] if answer else []), *told, *self._admit()]

    def _aborts(self, outgoing: _Outgoing, reason: str) -> list[Action]:
        """To every D that still takes part; one whose RESERVE is on its way is told when it comes."""
        actions: list[Action] = []
        for number, leg in outgoing.legs.items():
            if leg.acked or number not in self._links:
                continue
            if leg.reserve is None:
                self._links[number].ungranted.add(outgoing.request_id)
            else:
                actions.append(abort_frame(number, outgoing.request_id, leg.reserve.generation, reason))
        return actions

    def _free(self, outgoing: _Outgoing) -> None:
        del self._live[outgoing.request_id]
        if outgoing in self._granted:
            self._granted.remove(outgoing)
        self._commits = deque(commit for commit in self._commits if commit[1] is not outgoing)
        for link in (self._links[number] for number in outgoing.legs if number in self._links):
            link.unpushed.drop(outgoing)
        # a push that reads these pages cannot be called back: leased until it is over
        if outgoing.phase is not Phase.DRAINING:
            self._allocator.free(outgoing.pages, to="leased" if outgoing.num_pushing else "free")
        elif not outgoing.num_pushing:
            self._allocator.end_lease(outgoing.pages)
        outgoing.phase = Phase.GONE

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
