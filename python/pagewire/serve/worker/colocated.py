"""P and D in one process over one pool, nothing transferred: the baseline."""

from collections import deque

from pagewire.serve.channel import Channel
from pagewire.serve.messages import Failed, Finished, Submit
from pagewire.serve.worker.engine import Engine, RequestState
from pagewire.serve.worker.steps import Decoding, Prefilling
from pagewire.serve.worker.timeline import now_us
from pagewire.serve.worker.worker import Ending, Worker


class ColocatedWorker(Worker):
    role = "colocated"

    def __init__(self, engine: Engine, front: Channel) -> None:
        super().__init__(engine, front)
        self._waiting: deque[RequestState] = deque()
        self._prefilling = Prefilling(self)
        self._decoding = Decoding(self)

    def submit(self, submit: Submit) -> None:
        num_pages = self._num_pages(submit)
        problem = self.engine.problem(submit)
        if not problem and num_pages > self.config.num_pages:
            problem = f"the request needs {num_pages} pages, the pool has {self.config.num_pages}"
        if not problem and len(self._waiting) >= self.config.max_waiting:
            problem = f"{len(self._waiting)} requests are waiting for pages, no more are queued"
        if problem:
            self.answer(Failed(submit.request_id, problem))
            return
        self._waiting.append(RequestState(submit, now_us(), []))
        self._admit()

    def cancel(self, request_id: str) -> None:
        for requests in (self._waiting, self._prefilling.requests, self._decoding.requests):
            for request in requests:
                if request.id == request_id:
                    requests.remove(request)
                    self._end(request, Finished(request_id, "cancelled", len(request.output)))
                    return

    def step(self) -> bool:
        """A chunk of prompts, then a token for everything that runs."""
        worked = bool(self._prefilling.requests or self._decoding.requests)
        if self._prefilling.requests:
            for request, ending in self._prefilling.step():
                if ending:
                    self._end(request, ending)
                else:
                    self._decoding.requests.append(request)
        if self._decoding.requests:
            for request, ending in self._decoding.step():
                self._end(request, ending)
        return worked

    def num_running_waiting(self) -> tuple[int, int]:
        num_running = len(self._prefilling.requests) + len(self._decoding.requests)
        return num_running, len(self._waiting)

    def request_ids(self) -> list[str]:
        running = (*self._prefilling.requests, *self._decoding.requests)
        return [request.id for request in (*self._waiting, *running)]

    def _end(self, request: RequestState, ending: Ending) -> None:
        self.answer(ending)
        self.engine.allocator.free(request.pages)
        self._admit()

    def _admit(self) -> None:
        allocator = self.engine.allocator
        while self._waiting and self._num_pages(self._waiting[0].submit) <= allocator.num_free:
            request = self._waiting.popleft()
            request.pages = allocator.alloc(self._num_pages(request.submit))
            self._prefilling.requests.append(request)

    def _num_pages(self, submit: Submit) -> int:
        return -(-(len(submit.token_ids) + submit.max_tokens) // self.config.page_size)
