"""P: prefills what D has granted, pushes each layer's KV at once, sends the first token."""

from collections import deque

from pagewire.serve.messages import Failed, Finished, Submit
from pagewire.serve.worker.engine import Engine, PromptChunk, RequestState
from pagewire.serve.worker.peer import MAX_FRAMES, Peer
from pagewire.serve.worker.steps import Ending, describe
from pagewire.serve.worker.timeline import now_us
from pagewire.serve.worker.worker import Worker
from pagewire.transfer.channel import Channel
from pagewire.transfer.frames import Abort, Ack, Commit, Credit, Frame, Reserve
from pagewire.transfer.handoff import Action, Push, Refused, Send
from pagewire.transfer.sender import Sender
from pagewire.transfer.transport import Staging

MAX_HELD_FRAMES = 4 * MAX_FRAMES  # that arrived during a forward; the rest waits in the socket


class PrefillWorker(Worker):
    def __init__(self, engine: Engine, front: Channel, peer: Peer) -> None:
        super().__init__(engine, front, "prefill", peer)
        self._peer = peer
        self._arena: Staging | None = None
        self._sender: Sender | None = None  # of the link
        self._frames: deque[Frame] = deque()  # arrived during a forward, for after it

    def admit(self, submit: Submit) -> list[Action]:
        if self._sender is None:
            return []  # of no link at all: not for us
        actions = self._sender.submit(submit.request_id, tuple(submit.token_ids), self.engine.problem(submit))
        if submit.request_id not in self._sender.request_ids():
            self._submits.pop(submit.request_id, None)
        return actions

    def cancel(self, request_id: str) -> None:
        if self._sender is not None:
            self.do(self._sender.cancel(request_id))

    def linked(self, arena: Staging) -> None:
        self._sender = Sender(
            self.engine.allocator, self.config.page_size, self._peer.packing.wire, arena.num_staging_slots,
            arena.staging_slot_bytes, now_ms=lambda: now_us() // 1000,
        )  # fmt: skip
        self._arena = arena

    def unlinked(self) -> None:
        assert self._sender is not None
        self.do(self._sender.lost())
        self._sender = self._arena = None
        self._frames.clear()

    def on_frame(self, frame: Frame) -> None:
        if self._sender is None:
            return
        match frame:
            case Reserve():
                self.do(self._sender.reserve(frame))
            case Credit():
                self.do(self._sender.credit(frame))
            case Ack():
                self._acked(self.requests.get(frame.request_id))
                self.do(self._sender.ack(frame))
            case Abort():
                self.do(self._sender.abort(frame))
            case _:
                self.do([Refused(f"D sent {type(frame).__name__}, which only P sends")])
        self._push()

    def step(self) -> bool:
        while self._frames:
            self.on_frame(self._frames.popleft())
        if self._sender is not None:
            self.do(self._sender.tick())
        if not self.prefilling.requests:
            return False
        for request, ending in self.prefilling.step():
            self._computed(request, ending)
        self._push()
        return True

    def num_running_waiting(self) -> tuple[int, int]:
        return len(self.prefilling.requests), self._sender.num_waiting if self._sender else 0

    def on_layer(self, layer: int, chunks: list[PromptChunk]) -> None:
        super().on_layer(layer, chunks)
        assert self._sender is not None
        for chunk in chunks:
            if chunk.request.id in self.requests:
                self._sender.layer_ready(chunk.request.id, layer, chunk.start, chunk.stop)
        for frame in self._peer.poll() if len(self._frames) < MAX_HELD_FRAMES else ():
            # what begins or ends a request waits until no forward touches its pages
            if isinstance(frame, Credit | Ack):
                self.on_frame(frame)
            else:
                self._frames.append(frame)
        self._push()

    def _computed(self, request: RequestState, ending: Ending | None) -> None:
        assert self._sender is not None
        match ending:
            case Finished():
                self.answer(ending)
                self.do(self._sender.finished(request.id))
                self.forget(request.id)
            case Failed(_, message):
                self.do(self._sender.fail(request.id, message), retry=False)
            case None:
                digests = self._peer.packing.digests(request.pages, request.prompt_len) if self.config.verify_kv else ()
                self.do(self._sender.prefilled(request.id, request.output[0], digests))

    def _push(self) -> None:
        while self._sender is not None and self._peer.link and (send := self._sender.next_send()) is not None:
            if isinstance(send, Send):
                if isinstance(send.frame, Commit):
                    self.requests[send.frame.request_id].committed_us = now_us()
                self._peer.send(send.frame)
                continue
            try:
                self._push_one(self._sender, send)
            except Exception as error:
                self.do(self._sender.not_pushed(send, describe(error)))

    def _push_one(self, sender: Sender, push: Push) -> None:
        assert self._arena is not None
        start_us = now_us()
        out = self._arena.staging_slot(push.staging_slot)
        num_bytes, checksum = self._peer.packing.pack(push.pages, push.layers, push.tokens, out)
        self._peer.send(sender.chunk_frame(push, num_bytes, checksum))
        request = self.requests[push.request_id]
        request.pushed_us = request.pushed_us or start_us
        request.pushed_bytes += num_bytes
        request.pack_us += now_us() - start_us
        self.timeline.add("push", start_us, None, request.id, layer=push.layers[0], bytes=num_bytes)

    def _acked(self, request: RequestState | None) -> None:
        if request is None or not request.committed_us:
            return
        end_us = now_us()
        args = {"bytes": request.pushed_bytes, "pack_us": request.pack_us}
        self.timeline.add("transfer_late", request.computed_us, request.committed_us, request.id)
        self.timeline.add("join_wait", request.committed_us, end_us, request.id)
        self.timeline.add("transfer_total", request.pushed_us, end_us, request.id, **args)
