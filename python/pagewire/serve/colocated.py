"""P and D in one process over one pool, nothing transferred: the baseline."""

from collections import deque

from pagewire.serve.channel import Channel
from pagewire.serve.decode import Decoding
from pagewire.serve.engine import Engine, Request, next_chunks
from pagewire.serve.messages import Submit
from pagewire.serve.role import Role, describe
from pagewire.serve.timeline import now_us


class ColocatedRole(Role):
    name = "colocated"

    def __init__(self, engine: Engine, front: Channel) -> None:
        super().__init__(engine, front)
        self._waiting: deque[Request] = deque()
        self._prefilling: list[Request] = []
        self._decoding = Decoding(self)

    def submit(self, submit: Submit) -> None:
        num_pages = self._num_pages(submit)
        problem = self.engine.problem(submit)
        if not problem and num_pages > self.config.num_pages:
            problem = f"the request needs {num_pages} pages, the pool has {self.config.num_pages}"
        if not problem and len(self._waiting) >= self.config.max_waiting:
            problem = f"{len(self._waiting)} requests are waiting for pages, no more are queued"
        if problem:
            self.send_failed(submit.request_id, problem)
            return
        self._waiting.append(Request(submit, [], now_us()))
        self._admit()

    def cancel(self, request_id: str) -> None:
        for requests in (self._waiting, self._prefilling, self._decoding.running):
            for request in requests:
                if request.id == request_id:
                    requests.remove(request)
                    self.send_finished(request_id, "cancelled", len(request.output))
                    self._release(request)
                    return

    def step(self) -> bool:
        """A chunk of prompts, then a token for everything that runs."""
        worked = bool(self._prefilling or self._decoding.running)
        if self._prefilling:
            self._prefill()
        if self._decoding.running:
            for request, reason in self._decoding.step():
                self._end(request, reason)
        return worked

    def num_running_waiting(self) -> tuple[int, int]:
        return len(self._prefilling) + len(self._decoding.running), len(self._waiting)

    def request_ids(self) -> list[str]:
        return [r.id for r in (*self._waiting, *self._prefilling, *self._decoding.running)]

    def _prefill(self) -> None:
        chunks = next_chunks(self._prefilling, self.config.prefill_chunk)
        start_us = now_us()
        for chunk in chunks:
            request = chunk.request
            if not request.started_us:
                request.started_us = start_us
                self.timeline.add("queue_p", request.submitted_us, start_us, request.id)
        try:
            first_tokens = self.engine.prefill(chunks)
        except Exception as error:
            for chunk in chunks:
                self._prefilling.remove(chunk.request)
                self._end(chunk.request, describe(error))
            return
        for chunk in chunks:
            args = {"start": chunk.start, "stop": chunk.stop}
            self.timeline.add("prefill_chunk", start_us, None, chunk.request.id, **args)
        for request, token_id in first_tokens.items():
            self._prefilling.remove(request)
            end_us = now_us()
            self.timeline.add("prefill", request.started_us, end_us, request.id,
                              tokens=request.prompt_len)  # fmt: skip
            reason = "the model gave NaN" if token_id is None else self.emit(request, token_id)
            if reason:
                self._end(request, reason)
                continue
            request.submitted_us, request.started_us = end_us, 0  # of its decode phase now
            self._decoding.running.append(request)

    def _end(self, request: Request, reason: str) -> None:
        if reason in ("stop", "length"):
            self.send_finished(request.id, reason, len(request.output))
        else:
            self.send_failed(request.id, reason)
        self._release(request)

    def _release(self, request: Request) -> None:
        self.engine.allocator.free(request.pages)
        self._admit()

    def _admit(self) -> None:
        allocator = self.engine.allocator
        while self._waiting and self._num_pages(self._waiting[0].submit) <= allocator.num_free:
            request = self._waiting.popleft()
            request.pages = allocator.alloc(self._num_pages(request.submit))
            self._prefilling.append(request)

    def _num_pages(self, submit: Submit) -> int:
        return -(-(len(submit.token_ids) + submit.max_tokens) // self.config.page_size)
