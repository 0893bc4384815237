"""D: grants pages, takes the KV that P pushes, then decodes every running request in one batch."""

import hashlib
import secrets
import time
from typing import Any

from pagewire.serve.channel import Channel
from pagewire.serve.engine import Engine, Request
from pagewire.serve.messages import Submit
from pagewire.serve.role import Role, describe
from pagewire.serve.timeline import now_us
from pagewire.transfer.frames import Abort, Chunk, Commit
from pagewire.transfer.handoff import (
    Action,
    Cancelled,
    Dropped,
    Failed,
    Receiver,
    Refused,
    Send,
    Start,
    Unpack,
)
from pagewire.transfer.packing import Packing, checksum_problem
from pagewire.transfer.shm import Arena


class Decoding:
    """The running requests and their decode step: D's and the colocated process's."""

    def __init__(self, role: Role) -> None:
        self._role = role
        self.running: list[Request] = []

    def step(self) -> list[tuple[Request, str]]:
        """One token for up to max_batch_size requests, first come first; those that ended, and why.

        A reason other than "stop" and "length" is a failure.
        """
        role, engine = self._role, self._role.engine
        batch = self.running[: role.config.max_batch_size]
        start_us = now_us()
        for request in batch:
            if not request.started_us:
                request.started_us = start_us
                role.timeline.add("queue_d", request.submitted_us, start_us, request.id)
        try:
            token_ids = engine.decode(batch)
        except Exception as error:
            return self._ended([(request, describe(error)) for request in batch])
        role.timeline.add("decode_step", start_us, batch_size=len(batch))
        ended = []
        for request, token_id in zip(batch, token_ids, strict=True):
            reason = "the model gave NaN" if token_id is None else role.emit(request, token_id)
            if reason:
                ended.append((request, reason))
        return self._ended(ended)

    def remove(self, request_id: str) -> Request | None:
        request = next((r for r in self.running if r.id == request_id), None)
        if request is not None:
            self.running.remove(request)
        return request

    def _ended(self, ended: list[tuple[Request, str]]) -> list[tuple[Request, str]]:
        for request, reason in ended:
            self.running.remove(request)
            self._role.timeline.add(
                "decode", request.started_us, None, request.id, tokens=len(request.output)
            )
            if reason in ("stop", "length"):
                self._role.engine.record_decode(request)
        return ended


class DecodeRole(Role):
    name = "decode"

    def __init__(
        self, engine: Engine, front: Channel, peer: Channel, packing: Packing, arena: Arena
    ) -> None:
        super().__init__(engine, front)
        self._peer = peer
        self._packing = packing
        self._arena = arena
        self._submits: dict[str, Submit] = {}
        self._decoding = Decoding(self)
        self._receiver = Receiver(
            engine.allocator, engine.config.page_size, packing.wire, arena.num_slots,
            vocab_size=engine.model.config.vocab_size, max_waiting=engine.config.max_waiting,
            timeout_ms=engine.config.handoff_timeout_ms,
            now_ms=lambda: int(time.monotonic() * 1000),
            new_capability=lambda: secrets.token_bytes(16),
        )  # fmt: skip

    def submit(self, submit: Submit) -> None:
        self._submits[submit.request_id] = submit
        num_tokens = len(submit.token_ids) + submit.max_tokens
        problem = self.engine.problem(submit)
        token_ids = tuple(submit.token_ids)
        self._do(self._receiver.submit(submit.request_id, token_ids, num_tokens, problem))

    def cancel(self, request_id: str) -> None:
        self._do(self._receiver.cancel(request_id))

    def on_peer(self, frame: Any) -> None:
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
        if not self._decoding.running:
            return False
        for request, reason in self._decoding.step():
            if reason in ("stop", "length"):
                self._submits.pop(request.id)
                self.send_finished(request.id, reason, len(request.output))
                self._do(self._receiver.release(request.id))
            else:
                self._do(self._receiver.fail(request.id, reason))
        return True

    def num_running_waiting(self) -> tuple[int, int]:
        return len(self._decoding.running), self._receiver.num_waiting

    def request_ids(self) -> list[str]:
        return self._receiver.request_ids()

    def _unpack(self, chunk: Chunk, pages: list[int]) -> str:
        start_us = now_us()
        if chunk.payload_bytes > self._arena.slot_bytes:
            return f"CHUNK: {chunk.payload_bytes} bytes in a slot of {self._arena.slot_bytes}"
        problem = checksum_problem(chunk, self._arena.read(chunk.slot, chunk.payload_bytes))
        if problem:
            return problem
        try:
            self._packing.unpack(chunk, pages, self._arena.slot(chunk.slot))
        except Exception as error:
            return describe(error)
        self.timeline.add("unpack", start_us, None, chunk.request_id, layer=chunk.layer_start,
                          bytes=chunk.payload_bytes)  # fmt: skip
        return ""

    def _start(self, request_id: str, pages: list[int], commit: Commit) -> list[Action]:
        start_us = now_us()
        if commit.digests:
            ours = self._packing.digests(pages, len(commit.token_ids))
            digests = [hashlib.sha256(b"".join(d)).hexdigest() for d in (commit.digests, ours)]
            equal = ours == commit.digests
            self.timeline.add("kv_verify", start_us, None, request_id, p_sha256=digests[0],
                              d_sha256=digests[1], equal=int(equal))  # fmt: skip
            if not equal:
                return self._receiver.fail(request_id, "D's KV differs from P's")
        request = Request(self._submits[request_id], pages, now_us(), output=[commit.first_token])
        request.num_computed = request.prompt_len
        self._decoding.running.append(request)
        return []

    def _do(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Send(frame):
                    self._peer.send(frame)
                case Unpack(chunk, pages):
                    self._do(self._receiver.unpacked(chunk, self._unpack(chunk, pages)))
                case Start(request_id, pages, commit):
                    self._do(self._start(request_id, pages, commit))
                case Failed(request_id, message):
                    self._forget(request_id)
                    self.send_failed(request_id, message)
                case Cancelled(request_id):
                    request = self._forget(request_id)
                    self.send_finished(
                        request_id, "cancelled", len(request.output) if request else 0
                    )
                case Dropped(request_id):
                    self._forget(request_id)
                case Refused(reason):
                    self.timeline.add("refused", now_us(), reason=reason)

    def _forget(self, request_id: str) -> Request | None:
        self._submits.pop(request_id, None)
        return self._decoding.remove(request_id)
