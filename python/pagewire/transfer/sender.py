"""P's side of the handoff, a pure state machine; see `handoff`."""

from collections import OrderedDict, deque
from collections.abc import Callable
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


@dataclass(eq=False)
class _Outgoing:
    request_id: str
    token_ids: tuple[int, ...]
    phase: Phase = Phase.WAITING
    reserve: Reserve | None = None
    granted_ms: int = 0
    pages: list[int] = field(default_factory=list)
    commit: Commit | None = None


class Sender:
    """P's side of one connection. It holds no more requests than D queues or admits: D aborts what it refuses."""

    def __init__(
        self, allocator: PageAllocator, page_size: int, wire: Wire, num_staging_slots: int, staging_slot_bytes: int,
        *, now_ms: Callable[[], int],
    ) -> None:  # fmt: skip
        """Raises ValueError when a staging slot cannot hold one token of one layer."""
        token_bytes = wire.packed_bytes(1, wire.num_kv_heads, 1)
        if staging_slot_bytes < token_bytes:
            raise ValueError(
                f"slot_bytes: expected at least {token_bytes} (one token of one layer), got {staging_slot_bytes}"
            )
        self._allocator = allocator
        self._page_size = page_size
        self._wire = wire
        self._now_ms = now_ms
        self._progress_ms = now_ms()  # when a layer was last computed, a frame sent, a slot or a request given back
        self._credits = list(range(num_staging_slots))  # a stack: the slot used last is still in a cache
        self._sent_staging: set[int] = set()
        self._live: dict[str, _Outgoing] = {}
        self._granted: deque[_Outgoing] = deque()  # waiting for pages of ours
        self._early: dict[str, Reserve] = {}  # RESERVE that overtook its Submit
        # each entry is consumed by what it waits for:
        self._ungranted = _Remembered()  # ended here; D's RESERVE or refusal is still on its way
        self._refused = _Remembered()  # refused by D; the front's Submit is still on its way
        self._unpushed: Grouping[_Outgoing] = Grouping(
            wire.num_layers, staging_slot_bytes // token_bytes, staging_slot_bytes,
            lambda layers, tokens: wire.packed_bytes(layers, wire.num_kv_heads, tokens),
        )  # fmt: skip
        self._commits: deque[_Outgoing] = deque()

    @property
    def num_waiting(self) -> int:
        return sum(outgoing.phase is Phase.WAITING for outgoing in self._live.values())

    def request_ids(self) -> list[str]:
        return list(self._live)

    def submit(self, request_id: str, token_ids: tuple[int, ...], problem: str | None = None) -> list[Action]:
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
        if self._ungranted.take(request_id) or (outgoing is None and len(self._early) >= MAX_REMEMBERED):
            return [abort_frame(request_id, reserve.generation, "not known here any more")]
        if outgoing is None:
            self._early[request_id] = reserve
            return []
        if outgoing.reserve is not None:
            return [Refused(f"RESERVE for {request_id}, which has one")]
        outgoing.reserve = reserve
        outgoing.granted_ms = self._now_ms()
        if reserve.num_tokens != len(outgoing.token_ids):
            return self.fail(
                request_id, f"RESERVE: expected {len(outgoing.token_ids)} tokens, got {reserve.num_tokens}"
            )
        self._granted.append(outgoing)
        return self._admit()

    def layer_ready(self, request_id: str, layer: int, start: int, stop: int) -> None:
        """Tokens [start, stop) of the layer are in our cache; `next_send` says when they leave."""
        outgoing = self._live[request_id]
        assert outgoing.reserve is not None
        self._progress_ms = self._now_ms()
        self._unpushed.add(outgoing, layer, max(start, outgoing.reserve.num_cached), stop)

    def prefilled(self, request_id: str, first_token: int, digests: tuple[bytes, ...] = ()) -> list[Action]:
        """The last forward is over: only the transfer needs the pages now."""
        outgoing = self._live[request_id]
        assert outgoing.phase is Phase.PREFILLING and outgoing.reserve is not None
        outgoing.phase = Phase.DRAINING
        self._allocator.free(outgoing.pages, to="leased")
        reserve = outgoing.reserve
        outgoing.commit = Commit(
            request_id, reserve.generation, reserve.capability, first_token,
            prompt_sha256(outgoing.token_ids), digests,
        )  # fmt: skip
        if not self._unpushed.holds(outgoing):
            self._commits.append(outgoing)
        return []

    def next_send(self) -> Push | Send | None:
        """The next chunk or COMMIT that may leave now. A failed Push is answered `not_pushed`."""
        if self._commits:
            outgoing = self._commits.popleft()
            assert outgoing.commit is not None
            self._progress_ms = self._now_ms()
            return Send(outgoing.commit)
        group = self._unpushed.take(idle=not self._sent_staging) if self._credits else None
        if group is None:
            return None
        outgoing = group.owner
        if outgoing.phase is Phase.DRAINING and not self._unpushed.holds(outgoing):
            self._commits.append(outgoing)
        staging_slot = self._credits.pop()
        self._sent_staging.add(staging_slot)
        self._progress_ms = self._now_ms()
        return Push(outgoing.request_id, outgoing.pages, group.layers, group.tokens, staging_slot)

    def chunk_frame(self, push: Push, payload_bytes: int, checksum: int) -> Chunk:
        reserve = self._live[push.request_id].reserve
        assert reserve is not None
        wire = self._wire
        return Chunk(
            request_id=push.request_id, generation=reserve.generation,
            capability=reserve.capability, fingerprint=wire.fingerprint, group=0,
            layer_start=push.layers[0], layer_stop=push.layers[1], head_start=0,
            head_stop=wire.num_kv_heads, head_dim=wire.head_dim, head_dim_v=wire.head_dim_v,
            token_start=push.tokens[0], token_stop=push.tokens[1], dtype=wire.dtype,
            scale_kind=wire.scale_kind, checksum_kind="crc32c", checksum=checksum,
            payload_bytes=payload_bytes, slot=push.staging_slot,
        )  # fmt: skip

    def not_pushed(self, push: Push, message: str) -> list[Action]:
        """Packing failed before the chunk was sent: the staging slot is still ours, the request fails."""
        return [*self.credit(Credit(push.staging_slot)), *self.fail(push.request_id, message)]

    def credit(self, credit: Credit) -> list[Action]:
        if credit.slot not in self._sent_staging:
            return [Refused(f"CREDIT for staging slot {credit.slot}, which holds no chunk of ours")]
        self._progress_ms = self._now_ms()
        self._sent_staging.remove(credit.slot)
        self._credits.append(credit.slot)
        return []

    def ack(self, ack: Ack) -> list[Action]:
        outgoing = self._live.get(ack.request_id)
        if outgoing is None or outgoing.reserve is None:
            return []
        if outgoing.reserve.generation != ack.generation or outgoing.phase is not Phase.DRAINING:
            return [Refused(f"ACK for {ack.request_id}, which was not committed")]
        self._progress_ms = self._now_ms()
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
        return self._give_up(request_id, RequestFailed(request_id, message), message)

    def tick(self) -> list[Action]:
        """Fails what was granted when neither that nor any progress is within its `deadline_ms`."""
        actions: list[Action] = []
        for outgoing in list(self._live.values()):
            idle_ms = self._now_ms() - max(outgoing.granted_ms, self._progress_ms)
            if outgoing.reserve and idle_ms >= outgoing.reserve.deadline_ms:
                message = (
                    f"the KV did not leave: nothing moved between P and D within {outgoing.reserve.deadline_ms} ms"
                )
                actions += self.fail(outgoing.request_id, message)
        return actions

    def lost(self) -> list[Action]:
        """D is gone, and with it all that was for it; this Sender is not used again."""
        dropped = list(self._live.values())
        for outgoing in dropped:
            self._free(outgoing)
        return [Dropped(outgoing.request_id) for outgoing in dropped]

    def _give_up(self, request_id: str, answer: Action | None, reason: str) -> list[Action]:
        outgoing = self._live.get(request_id)
        if outgoing is None:
            return []
        actions: list[Action] = [answer] if answer else []
        if outgoing.reserve is None:
            self._ungranted.add(request_id)
        else:
            actions.append(abort_frame(request_id, outgoing.reserve.generation, reason))
        return actions + self._end(outgoing)

    def _end(self, outgoing: _Outgoing) -> list[Action]:
        self._free(outgoing)
        return self._admit()

    def _free(self, outgoing: _Outgoing) -> None:
        del self._live[outgoing.request_id]
        if outgoing in self._granted:
            self._granted.remove(outgoing)
        if outgoing in self._commits:
            self._commits.remove(outgoing)
        self._unpushed.drop(outgoing)
        if outgoing.phase is Phase.DRAINING:
            self._allocator.end_lease(outgoing.pages)
        else:
            self._allocator.free(outgoing.pages)
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
