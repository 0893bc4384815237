"""D: grants pages, takes the KV that P pushes, then decodes every running request in one batch."""

import hashlib
import secrets
import time

from pagewire.serve.channel import Channel
from pagewire.serve.messages import Failed, Finished, Submit
from pagewire.serve.worker.engine import Engine, RequestState
from pagewire.serve.worker.steps import Decoding, describe
from pagewire.serve.worker.timeline import now_us
from pagewire.serve.worker.worker import Worker
from pagewire.transfer.frames import Abort, Chunk, Commit, Frame
from pagewire.transfer.handoff import Action, Cancelled, Dropped, Refused, RequestFailed, Send, Start, Unpack
from pagewire.transfer.packing import Packing
from pagewire.transfer.receiver import Receiver
from pagewire.transfer.shm import Arena


class DecodeWorker(Worker):
    role = "decode"

    def __init__(self, engine: Engine, front: Channel, peer: Channel, packing: Packing, arena: Arena) -> None:
        super().__init__(engine, front)
        self._peer = peer
        self._packing = packing
        self._arena = arena
        self._submits: dict[str, tuple[Submit, int]] = {}  # with the time it came
        self._decoding = Decoding(self)
        self._receiver = Receiver(
            engine.allocator, engine.config.page_size, packing.wire,
            vocab_size=engine.model.config.vocab_size, max_waiting=engine.config.max_waiting,
            timeout_ms=engine.config.handoff_timeout_ms,
            now_ms=lambda: int(time.monotonic() * 1000),
            new_capability=lambda: secrets.token_bytes(16),
        )  # fmt: skip
        self._receiver.link(arena.num_staging_slots)

    def submit(self, submit: Submit) -> None:
        self._submits.setdefault(submit.request_id, (submit, now_us()))
        num_tokens = len(submit.token_ids) + submit.max_tokens
        problem = self.engine.problem(submit)
        token_ids = tuple(submit.token_ids)
        self._do(self._receiver.submit(submit.request_id, token_ids, num_tokens, problem))

    def cancel(self, request_id: str) -> None:
        self._do(self._receiver.cancel(request_id))

    def on_peer(self, frame: Frame | Refused) -> None:
        match frame:
            case Chunk():
                self._do(self._receiver.chunk(frame))
            case Commit():
                self._do(self._receiver.commit(frame))
            case Abort():
                self._do(self._receiver.abort(frame))
            case Refused():
                self._do([frame])
            case _:
                self._do([Refused(f"P sent {type(frame).__name__}, which only D sends")])

    def step(self) -> bool:
        self._do(self._receiver.tick())
        if not self._decoding.requests:
            return False
        for request, ending in self._decoding.step():
            if isinstance(ending, Failed):
                self._do(self._receiver.fail(request.id, ending.message))
            else:
                self._forget(request.id)
                self.answer(ending)
                self._do(self._receiver.release(request.id))
        return True

    def num_running_waiting(self) -> tuple[int, int]:
        return len(self._decoding.requests), self._receiver.num_waiting

    def request_ids(self) -> list[str]:
        return self._receiver.request_ids()

    def _unpack(self, chunk: Chunk, pages: list[int]) -> str | None:
        """Returns why the payload is not in the pages."""
        start_us = now_us()
        try:
            problem = self._packing.unpack(chunk, pages, self._arena.staging_slot(chunk.slot))
        except Exception as error:
            problem = describe(error)
        if problem:
            return problem
        args = {"layer": chunk.layer_start, "bytes": chunk.payload_bytes}
        self.timeline.add("unpack", start_us, None, chunk.request_id, **args)
        return None

    def _start(self, request_id: str, pages: list[int], commit: Commit) -> None:
        if commit.digests and not self._same_digests(request_id, pages, commit):
            self._do(self._receiver.fail(request_id, "D's KV differs from P's"))
            return
        request = RequestState(*self._submits[request_id], pages, output=[commit.first_token])
        request.computed_us = now_us()
        self._decoding.requests.append(request)

    def _same_digests(self, request_id: str, pages: list[int], commit: Commit) -> bool:
        start_us = now_us()
        ours = self._packing.digests(pages, len(self._submits[request_id][0].token_ids))
        p_sha256, d_sha256 = (hashlib.sha256(b"".join(digests)).hexdigest() for digests in (commit.digests, ours))
        equal = p_sha256 == d_sha256
        self.timeline.add(
            "kv_verify", start_us, None, request_id, p_sha256=p_sha256, d_sha256=d_sha256, equal=int(equal)
        )
        return equal

    def _do(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Send(frame):
                    self._peer.send(frame)
                case Unpack(chunk, pages):
                    self._do(self._receiver.unpacked(chunk, self._unpack(chunk, pages)))
                case Start(request_id, pages, commit):
                    self._start(request_id, pages, commit)
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
        for request in self._decoding.requests:
            if request.id == request_id:
                self._decoding.requests.remove(request)
                return request.output
        return []
