"""What P, D and the colocated process share: the channel to the front, emitting tokens, reporting."""

from abc import ABC, abstractmethod

from pagewire.serve.channel import Channel
from pagewire.serve.messages import Cancel, Events, Failed, Finished, FrontMessage, Gauges, Ready, Role, Submit, Token
from pagewire.serve.worker.engine import Engine, RequestState
from pagewire.serve.worker.timeline import Timeline, now_us
from pagewire.transfer.frames import Frame
from pagewire.transfer.handoff import Refused

REPORT_US = 50_000  # events and gauges travel at most this often
GAUGES_US = 1_000_000  # and unchanged gauges at least this often

Ending = Finished | Failed  # the last word on a request


class Worker(ABC):
    """One model process's behaviour: messages in, one unit of work per `step`."""

    role: Role

    def __init__(self, engine: Engine, front: Channel) -> None:
        self.engine = engine
        self.config = engine.config
        self.timeline = Timeline(self.role)
        self._front = front
        self._reported_us = 0
        self._gauges_us = 0
        self._gauges: Gauges | None = None

    @abstractmethod
    def submit(self, submit: Submit) -> None: ...

    @abstractmethod
    def cancel(self, request_id: str) -> None: ...

    @abstractmethod
    def step(self) -> bool:
        """Does one unit of work; False if there is none."""

    @abstractmethod
    def num_running_waiting(self) -> tuple[int, int]: ...

    @abstractmethod
    def request_ids(self) -> list[str]: ...

    def on_peer(self, frame: Frame | Refused) -> None:
        raise AssertionError(f"{self.role} has no peer")

    def on_front(self, message: FrontMessage) -> None:
        match message:
            case Submit():
                self.submit(message)
            case Cancel(request_id):
                self.cancel(request_id)

    def send_ready(self, pid: int) -> None:
        model, config = self.engine.model.config, self.config
        pool_tokens = config.num_pages * config.page_size
        self._front.send(Ready(self.role, pid, model.name, model.max_context, pool_tokens, model.vocab_size))

    def emit(self, request: RequestState, token_id: int | None) -> Ending | None:
        """Tells the front of the token; how the request ends with it, or None: it goes on."""
        if token_id is None:
            return Failed(request.id, "the model gave NaN")
        if token_id in request.submit.stop_token_ids:
            return Finished(request.id, "stop", len(request.output))
        request.output.append(token_id)
        self._front.send(Token(request.id, len(request.output) - 1, token_id))
        if len(request.output) >= request.submit.max_tokens:
            return Finished(request.id, "length", len(request.output))
        return None

    def answer(self, ending: Ending) -> None:
        self._front.send(ending)

    def fail_all(self, message: str) -> None:
        """The process cannot go on: tell the front, without tidying up."""
        for request_id in self.request_ids():
            self.answer(Failed(request_id, message))

    def report(self) -> float:
        """Sends events and gauges that are due; returns after how many seconds to call again."""
        now = now_us()
        if now - self._reported_us < REPORT_US:
            return (self._reported_us + REPORT_US - now) / 1e6
        self._reported_us = now
        if events := self.timeline.take():
            self._front.send(Events(events))
        num_running, num_waiting = self.num_running_waiting()
        allocator = self.engine.allocator
        pages: dict[str, int] = {state: n for state, n in allocator.counts().items()}
        pages["total"] = allocator.num_pages
        gauges = Gauges(self.role, pages, num_running, num_waiting)
        if gauges != self._gauges or now - self._gauges_us >= GAUGES_US:
            self._front.send(gauges)
            self._gauges, self._gauges_us = gauges, now
        return GAUGES_US / 1e6
