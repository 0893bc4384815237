"""What the model processes share: the channel to the front, the links to the other ones, requests, beats."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from pagewire.net.channel import Channel
from pagewire.serve.messages import Cancel, Events, Failed, Finished, Gauges, Linked, Pair, Ready, Submit, Token
from pagewire.serve.worker.engine import Engine, PromptChunk, RequestState
from pagewire.serve.worker.peers import Link, Peers
from pagewire.serve.worker.steps import Ending, Prefilling
from pagewire.serve.worker.timeline import Timeline, now_us
from pagewire.transfer.actions import Action, Begin, Cancelled, Dropped, Refused, RequestFailed, Send
from pagewire.transfer.frames import Frame
from pagewire.transfer.handoff import Machine

REPORT_US = 50_000  # events and gauges travel at most this often
BEAT_US = 500_000  # and unchanged gauges at least this often
EVENTS_A_REPORT = 256


class Worker(ABC):
    """One model process's behaviour: messages and frames in, one unit of work per `step`."""

    def __init__(self, engine: Engine, front: Channel, role: str, peers: Peers | None, machine: Machine[Any]) -> None:
        self.role = role
        self.engine = engine
        self.config = engine.config
        self.timeline = Timeline()
        self.peers = peers
        self._machine = machine
        self.prefilling = Prefilling(self)
        self.batches = [self.prefilling.requests]  # the lists of requests that steps work on
        self.requests: dict[str, RequestState] = {}  # that own pages
        self._submits: dict[str, tuple[Submit, int]] = {}  # with the time it came
        self.front = front
        self._progress = 0
        self._reported_us = 0
        self._beat_us = 0
        self._gauges: Gauges | None = None

    @abstractmethod
    def admit(self, submit: Submit) -> list[Action]:
        """Hands the request to the machine of this side."""

    @abstractmethod
    def step(self) -> bool:
        """Does one unit of work; False if there is none."""

    @abstractmethod
    def linked(self, link: Link) -> None:
        """Raises ValueError when its staging arena does not suit."""

    def on_frame(self, number: int, frame: Frame) -> None:
        """number: of its link."""
        self.do(self._machine.frame(number, frame))

    def on_front(self, message: Submit | Cancel | Pair) -> None:
        match message:
            case Submit(request_id, link=link):
                if link and (self.peers is None or link not in self.peers.links):
                    return  # the front hears of the loss
                self._submits.setdefault(request_id, (message, now_us()))
                self.do(self.admit(message), retry=False)
            case Cancel(request_id):
                self.do(self._machine.cancel(request_id))
            case Pair() if self.peers:
                self.peers.pair(message)

    def on_peers(self) -> None:
        """A turn's worth of the links: their ends, their beginnings, and what came over them."""
        if self.peers is None:
            return
        for loss in self.peers.losses():
            self.do(self._machine.lost(loss.link))
            self.front.send(loss)
        for link in self.peers.join():
            try:
                self.linked(link)
            except ValueError as error:
                self.peers.drop(link.number, str(error))
            else:
                self.front.send(Linked(link.number))
        while self.peers.refusals:
            self.do([Refused(self.peers.refusals.popleft())])
        for number, frame in self.peers.poll():
            self._progress += 1
            self.on_frame(number, frame)

    def on_layer(self, layer: int, chunks: Sequence[PromptChunk] = ()) -> None:
        """In the middle of a forward, behind each layer; `chunks`: of prompts."""
        self._progress += 1
        self.report()

    def do(self, actions: list[Action], *, retry: bool = True) -> None:
        """retry: another attempt may do better than a request that failed with these."""
        for action in actions:
            match action:
                case Send(frame, link) if self.peers:
                    self.peers.send(link, frame)
                case Begin(request_id, pages):
                    request = self.requests[request_id] = RequestState(*self._submits[request_id], pages)
                    self.prefilling.requests.append(request)
                case RequestFailed(request_id, message):
                    self.forget(request_id)
                    self.front.send(Failed(request_id, message, retry))
                case Cancelled(request_id):
                    self.front.send(Finished(request_id, "cancelled", len(self.forget(request_id))))
                case Dropped(request_id):
                    self.forget(request_id)
                case Refused(reason):
                    self.timeline.add("refused", now_us(), reason=reason)
                case _:
                    self.carry_out(action)

    def carry_out(self, action: Action) -> None:
        """What only one of the sides does."""
        raise AssertionError(f"{self.role}: {action}")

    def end(self, request: RequestState, ending: Ending, released: Callable[[str], list[Action]]) -> None:
        """released: tells the machine of this side that the request has ended in good order."""
        if isinstance(ending, Failed):
            self.do(self._machine.fail(request.id, ending.message), retry=False)
        else:
            self.forget(request.id)
            self.front.send(ending)
            self.do(released(request.id))

    def forget(self, request_id: str) -> list[int]:
        """Returns the output it had."""
        self._submits.pop(request_id, None)
        request = self.requests.pop(request_id, None)
        for batch in self.batches:
            if request in batch:
                batch.remove(request)
        return request.output if request else []

    def send_ready(self, pid: int) -> None:
        model, config, peers = self.engine.model.config, self.config, self.peers
        ids = (peers.incarnation, peers.address, self.engine.fingerprint.hex()) if peers else ("", "", "")
        self.front.send(Ready(
            self.role, pid, model.name, model.max_context, config.num_pages * config.page_size, model.vocab_size,
            *ids, now_us(),
        ))  # fmt: skip

    def emit(self, request: RequestState, token_id: int | None) -> Ending | None:
        """Tells the front of the token; how the request ends with it, or None: it goes on."""
        if token_id is None:
            return Failed(request.id, "the model gave NaN or infinity")
        if token_id in request.submit.stop_token_ids:
            return Finished(request.id, "stop", len(request.output))
        request.output.append(token_id)
        self.front.send(Token(request.id, len(request.output) - 1, token_id))
        if len(request.output) >= request.submit.max_tokens:
            return Finished(request.id, "length", len(request.output))
        return None

    def report(self) -> float:
        """Sends events and gauges that are due; returns after how many seconds to call again."""
        now = now_us()
        if now - self._reported_us < REPORT_US:
            return (self._reported_us + REPORT_US - now) / 1e6
        self.front.flush()
        if self.front.wants_write:  # it does not read: what it has not read yet is news enough
            return BEAT_US / 1e6
        self._reported_us = now
        if events := self.timeline.take(EVENTS_A_REPORT):
            self.front.send(Events(events))
        allocator = self.engine.allocator
        pages = {str(state): n for state, n in allocator.counts().items()} | {"total": allocator.num_pages}
        gauges = Gauges(pages, sum(map(len, self.batches)), self._machine.num_waiting)
        if gauges != self._gauges or now - self._beat_us >= BEAT_US:
            self.front.send(msgspec.structs.replace(gauges, progress=self._progress))
            self._gauges, self._beat_us = gauges, now
        return (REPORT_US if self.timeline else max(0, self._beat_us + BEAT_US - now)) / 1e6
