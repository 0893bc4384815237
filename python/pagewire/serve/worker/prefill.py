"""P: prefills what D has granted, pushes each layer's KV at once, sends the first token."""

from collections import deque

from pagewire.serve.channel import Channel, ChannelClosed
from pagewire.serve.messages import Failed, Finished, Submit
from pagewire.serve.worker.engine import Engine, PromptChunk, RequestState
from pagewire.serve.worker.steps import Prefilling, describe
from pagewire.serve.worker.timeline import now_us
from pagewire.serve.worker.worker import Ending, Worker
from pagewire.transfer.codec import ConnectionLost
from pagewire.transfer.frames import Abort, Ack, Credit, Frame, Reserve
from pagewire.transfer.handoff import Action, Begin, Cancelled, Dropped, Push, Refused, RequestFailed, Send
from pagewire.transfer.packing import Packing
from pagewire.transfer.sender import Sender
from pagewire.transfer.shm import Arena


class PrefillWorker(Worker):
    role = "prefill"

    def __init__(self, engine: Engine, front: Channel, peer: Channel, packing: Packing, arena: Arena) -> None:
        """Raises ValueError when the arena's staging slots are too small for this model."""
        super().__init__(engine, front)
        self._peer = peer
        self._packing = packing
        self._arena = arena
        self._sender = Sender(
            engine.allocator, engine.config.page_size, packing.wire, arena.num_staging_slots, arena.staging_slot_bytes,
            now_ms=lambda: now_us() // 1000,
        )  # fmt: skip
        self._submits: dict[str, tuple[Submit, int]] = {}  # with the time it came
        self._requests: dict[str, RequestState] = {}  # that own pages, the unacknowledged included
        self._prefilling = Prefilling(self)
        self._frames: deque[Frame | Refused] = deque()  # arrived during a forward, for after it

    def submit(self, submit: Submit) -> None:
        self._submits.setdefault(submit.request_id, (submit, now_us()))
        problem = self.engine.problem(submit)
        self._do(self._sender.submit(submit.request_id, tuple(submit.token_ids), problem))
        if submit.request_id not in self._sender.request_ids():
            self._submits.pop(submit.request_id, None)

    def cancel(self, request_id: str) -> None:
        self._do(self._sender.cancel(request_id))

    def on_peer(self, frame: Frame | Refused) -> None:
        match frame:
            case Reserve():
                self._do(self._sender.reserve(frame))
            case Credit():
                self._do(self._sender.credit(frame))
            case Ack():
                self._acked(self._requests.get(frame.request_id))
                self._do(self._sender.ack(frame))
            case Abort():
                self._do(self._sender.abort(frame))
            case Refused():
                self._do([frame])
            case _:
                self._do([Refused(f"D sent {type(frame).__name__}, which only P sends")])
        self._push()

    def step(self) -> bool:
        while self._frames:
            self.on_peer(self._frames.popleft())
        self._do(self._sender.tick())
        if not self._prefilling.requests:
            return False
        for request, ending in self._prefilling.step(self._on_layer):
            self._computed(request, ending)
        self._push()
        return True

    def num_running_waiting(self) -> tuple[int, int]:
        return len(self._prefilling.requests), self._sender.num_waiting

    def request_ids(self) -> list[str]:
        return self._sender.request_ids()

    def _on_layer(self, layer: int, chunks: list[PromptChunk]) -> None:
        for chunk in chunks:
            if chunk.request.id in self._requests:
                self._sender.layer_ready(chunk.request.id, layer, chunk.start, chunk.stop)
        self._peer.flush()
        for frame in self._poll():
            # what begins or ends a request waits until no forward touches its pages
            if isinstance(frame, Credit | Ack):
                self.on_peer(frame)
            else:
                self._frames.append(frame)
        self._push()

    def _poll(self) -> list[Frame]:
        """In the middle of a forward, which may raise what it likes but must not hide the end of the peer."""
        try:
            return self._peer.poll()
        except ConnectionLost as lost:
            raise ChannelClosed(f"{self._peer.name}: {lost}", self._peer) from lost

    def _computed(self, request: RequestState, ending: Ending | None) -> None:
        match ending:
            case Finished():
                self.answer(ending)
                self._do(self._sender.finished(request.id))
                self._forget(request.id)
            case Failed(_, message):
                self._do(self._sender.fail(request.id, message))
            case None:
                digests = self._packing.digests(request.pages, request.prompt_len) if self.config.verify_kv else ()
                self._do(self._sender.prefilled(request.id, request.output[0], digests))

    def _push(self) -> None:
        while (send := self._sender.next_send()) is not None:
            if isinstance(send, Send):
                self._peer.send(send.frame)
                continue
            try:
                self._push_one(send)
            except ChannelClosed:
                raise
            except Exception as error:
                self._do(self._sender.not_pushed(send, describe(error)))

    def _push_one(self, push: Push) -> None:
        start_us = now_us()
        out = self._arena.staging_slot(push.staging_slot)
        num_bytes, checksum = self._packing.pack(push.pages, push.layers, push.tokens, out)
        self._peer.send(self._sender.chunk_frame(push, num_bytes, checksum))
        request = self._requests[push.request_id]
        request.pushed_us = request.pushed_us or start_us
        request.pushed_bytes += num_bytes
        request.pack_us += now_us() - start_us
        self.timeline.add("push", start_us, None, request.id, layer=push.layers[0], bytes=num_bytes)

    def _acked(self, request: RequestState | None) -> None:
        if request is None or not request.computed_us:
            return
        end_us = now_us()
        args = {"bytes": request.pushed_bytes, "pack_us": request.pack_us}
        self.timeline.add("exposed", request.computed_us, end_us, request.id)
        self.timeline.add("transfer_total", request.pushed_us, end_us, request.id, **args)

    def _do(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Send(frame):
                    self._peer.send(frame)
                case Begin(request_id, pages):
                    request = RequestState(*self._submits[request_id], pages)
                    self._requests[request_id] = request
                    self._prefilling.requests.append(request)
                case RequestFailed(request_id, message):
                    self._forget(request_id)
                    self.answer(Failed(request_id, message))
                case Cancelled(request_id):
                    output = self._forget(request_id)
                    self.answer(Finished(request_id, "cancelled", len(output)))
                case Dropped(request_id):
                    self._forget(request_id)
                case Refused(reason):
                    self.timeline.add("refused", now_us(), reason=reason)

    def _forget(self, request_id: str) -> list[int]:
        """Returns the output it had."""
        self._submits.pop(request_id, None)
        request = self._requests.pop(request_id, None)
        if request in self._prefilling.requests:
            self._prefilling.requests.remove(request)
        return request.output if request else []
