"""D: grants pages, takes the KV that P pushes or computes it, then decodes every running request in one batch.

Without a peer it is the colocated process: the baseline.
"""

import hashlib
import secrets
import time

from pagewire.serve.messages import Failed, Submit
from pagewire.serve.worker.engine import Engine, RequestState
from pagewire.serve.worker.peer import Peer
from pagewire.serve.worker.steps import Decoding, Ending, describe
from pagewire.serve.worker.timeline import now_us
from pagewire.serve.worker.worker import Worker
from pagewire.transfer.channel import Channel
from pagewire.transfer.frames import Abort, Chunk, Commit, Frame
from pagewire.transfer.handoff import Action, Refused, Start, Unpack, Wire
from pagewire.transfer.receiver import Receiver
from pagewire.transfer.transport import Staging


class DecodeWorker(Worker):
    def __init__(self, engine: Engine, front: Channel, wire: Wire, peer: Peer | None) -> None:
        super().__init__(engine, front, "decode" if peer else "colocated", peer)
        self._arena: Staging | None = None
        self._decoding = Decoding(self)
        self.batches.append(self._decoding.requests)
        self._receiver = Receiver(
            engine.allocator, engine.config.page_size, wire,
            vocab_size=engine.model.config.vocab_size, max_waiting=engine.config.max_waiting,
            timeout_ms=engine.config.handoff_timeout_ms,
            now_ms=lambda: int(time.monotonic() * 1000),
            new_capability=lambda: secrets.token_bytes(16),
        )  # fmt: skip

    def admit(self, submit: Submit) -> list[Action]:
        num_tokens = len(submit.token_ids) + submit.max_tokens
        problem, local = self.engine.problem(submit), submit.link == 0
        return self._receiver.submit(submit.request_id, tuple(submit.token_ids), num_tokens, problem, local=local)

    def cancel(self, request_id: str) -> None:
        self.do(self._receiver.cancel(request_id))

    def linked(self, arena: Staging) -> None:
        self._arena = arena
        assert self.peer is not None
        self.do(self._receiver.link(arena.num_staging_slots, self.peer.packing.wire))

    def unlinked(self) -> None:
        self._arena = None
        self.do(self._receiver.lost())

    def on_frame(self, frame: Frame) -> None:
        match frame:
            case Chunk():
                self.do(self._receiver.chunk(frame))
            case Commit():
                self.do(self._receiver.commit(frame))
            case Abort():
                self.do(self._receiver.abort(frame))
            case _:
                self.do([Refused(f"P sent {type(frame).__name__}, which only D sends")])

    def step(self) -> bool:
        """A chunk of prompts, then a token for everything that runs."""
        self.do(self._receiver.tick())
        worked = bool(self.prefilling.requests or self._decoding.requests)
        if self.prefilling.requests:
            for request, ending in self.prefilling.step():
                if ending:
                    self._end(request, ending)
                else:
                    self._decoding.requests.append(request)
        if self._decoding.requests:
            for request, ending in self._decoding.step():
                self._end(request, ending)
        return worked

    def num_running_waiting(self) -> tuple[int, int]:
        return len(self.prefilling.requests) + len(self._decoding.requests), self._receiver.num_waiting

    def carry_out(self, action: Action) -> None:
        match action:
            case Unpack(chunk, pages):
                self.do(self._receiver.unpacked(chunk, self._unpack(chunk, pages)))
            case Start(request_id, pages, commit):
                self._start(request_id, pages, commit)
            case _:
                super().carry_out(action)

    def _end(self, request: RequestState, ending: Ending) -> None:
        if isinstance(ending, Failed):
            self.do(self._receiver.fail(request.id, ending.message), retry=False)
        else:
            self.forget(request.id)
            self.answer(ending)
            self.do(self._receiver.release(request.id))

    def _unpack(self, chunk: Chunk, pages: list[int]) -> str | None:
        """Returns why the payload is not in the pages."""
        assert self._arena is not None and self.peer is not None
        start_us = now_us()
        try:
            problem = self.peer.packing.unpack(chunk, pages, self._arena.staging_slot(chunk.slot))
        except Exception as error:
            problem = describe(error)
        if problem:
            return problem
        args = {"layer": chunk.layer_start, "bytes": chunk.payload_bytes}
        self.timeline.add("unpack", start_us, None, chunk.request_id, **args)
        return None

    def _start(self, request_id: str, pages: list[int], commit: Commit) -> None:
        submit, submitted_us = self._submits[request_id]
        if commit.digests and not self._same_digests(submit, pages, commit):
            self.do(self._receiver.fail(request_id, "D's KV differs from P's"), retry=False)
            return
        request = RequestState(submit, submitted_us, pages, output=[commit.first_token])
        request.computed_us = now_us()
        self.requests[request_id] = request
        self._decoding.requests.append(request)

    def _same_digests(self, submit: Submit, pages: list[int], commit: Commit) -> bool:
        start_us = now_us()
        assert self.peer is not None
        ours = self.peer.packing.digests(pages, len(submit.token_ids))
        p_sha256, d_sha256 = (hashlib.sha256(b"".join(digests)).hexdigest() for digests in (commit.digests, ours))
        equal = p_sha256 == d_sha256
        self.timeline.add(
            "kv_verify", start_us, None, submit.request_id, p_sha256=p_sha256, d_sha256=d_sha256, equal=int(equal)
        )
        return equal
