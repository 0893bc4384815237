"""P: prefills what D has granted, pushes each layer's KV at once, sends the first token."""

from collections import deque
from collections.abc import Sequence

from pagewire.net.channel import Channel
from pagewire.serve.messages import Submit
from pagewire.serve.worker.engine import Engine, PromptChunk, RequestState
from pagewire.serve.worker.peers import MAX_FRAMES, Link, Peers
from pagewire.serve.worker.steps import describe
from pagewire.serve.worker.timeline import now_us
from pagewire.serve.worker.worker import Worker
from pagewire.transfer.actions import Action, Push, Send
from pagewire.transfer.codec import ConnectionLost
from pagewire.transfer.frames import Ack, Commit, Credit, Frame
from pagewire.transfer.sender import Sender

MAX_HELD_FRAMES = 4 * MAX_FRAMES  # that arrived during a forward; the rest waits in the socket


class PrefillWorker(Worker):
    def __init__(self, engine: Engine, front: Channel, peers: Peers) -> None:
        self._peers = peers
        self._sender = Sender(engine.allocator, engine.config.page_size, now_ms=lambda: now_us() // 1000)
        super().__init__(engine, front, "prefill", peers, self._sender)
        self._frames: deque[tuple[int, Frame]] = deque()  # arrived during a forward, for after it

    def admit(self, submit: Submit) -> list[Action]:
        if not submit.link:
            return []  # not for us
        problem, links = self.engine.problem(submit), (submit.link,)
        actions = self._sender.submit(submit.request_id, tuple(submit.token_ids), links, problem)
        if submit.request_id not in self._sender.request_ids():
            self._submits.pop(submit.request_id, None)
        return actions

    def linked(self, link: Link) -> None:
        staging = link.staging
        self._sender.link(link.number, link.packing.wire, staging.num_staging_slots, staging.staging_slot_bytes)

    def on_frame(self, number: int, frame: Frame) -> None:
        if isinstance(frame, Ack):
            self._acked(self.requests.get(frame.request_id))
        super().on_frame(number, frame)
        self._push()

    def step(self) -> bool:
        while self._frames:
            self.on_frame(*self._frames.popleft())
        self.do(self._sender.tick())
        if not self.prefilling.requests:
            return False
        for request, ending in self.prefilling.step():
            if ending:
                self.end(request, ending, self._sender.finished)
            else:
                self.do(self._sender.prefilled(request.id, request.output[0], self._digests(request)))
        self._push()
        return True

    def on_layer(self, layer: int, chunks: Sequence[PromptChunk] = ()) -> None:
        super().on_layer(layer, chunks)
        for chunk in chunks:
            if chunk.request.id in self.requests:
                self._sender.layer_ready(chunk.request.id, layer, chunk.start, chunk.stop)
        for number, frame in self._peers.poll() if len(self._frames) < MAX_HELD_FRAMES else ():
            # what begins or ends a request waits until no forward touches its pages
            if isinstance(frame, Credit | Ack):
                self.on_frame(number, frame)
            else:
                self._frames.append((number, frame))
        self._push()

    def _digests(self, request: RequestState) -> dict[int, tuple[bytes, ...]]:
        """By link, for D to compare, if asked to."""
        links, reserves = self._peers.links, self._sender.reserves(request.id) if self.config.verify_kv else {}
        return {n: links[n].digests(request.pages, of) for n, of in reserves.items() if n in links}

    def _push(self) -> None:
        while (send := self._sender.next_send()) is not None:
            if isinstance(send, Send):
                if isinstance(send.frame, Commit):
                    self.requests[send.frame.request_id].committed_us = now_us()
                self.do([send])
                continue
            try:
                if send.link not in self._peers.links:  # since this turn began
                    self.do(self._sender.lost(send.link))
                    raise ConnectionLost("the link is lost")
                self._push_one(send, self._peers.links[send.link])
            except Exception as error:
                self.do(self._sender.not_pushed(send, describe(error)))

    def _push_one(self, push: Push, link: Link) -> None:
        start_us = now_us()
        out = link.staging.staging_slot(push.staging_slot)
        num_bytes, checksum = link.packing.pack(push.pages, push.block, push.tokens, out)
        request = self.requests[push.request_id]
        self.do(self._sender.pushed(push, num_bytes, checksum))
        request.pushed_us = request.pushed_us or start_us
        request.pushed_bytes += num_bytes
        request.pack_us += now_us() - start_us
        self.timeline.add("push", start_us, None, request.id, layer=push.block.layer_start, bytes=num_bytes)

    def _acked(self, request: RequestState | None) -> None:
        if request is None or not request.committed_us:
            return
        end_us = now_us()
        args = {"bytes": request.pushed_bytes, "pack_us": request.pack_us}
        self.timeline.add("transfer_late", request.since_us, request.committed_us, request.id)
        self.timeline.add("join_wait", request.committed_us, end_us, request.id)
        self.timeline.add("transfer_total", request.pushed_us, end_us, request.id, **args)
