"""Keeps the model processes, each for itself, and says which of them take requests."""

import asyncio
import contextlib
import sys
import time
from collections.abc import Awaitable, Callable, Mapping

import msgspec

from pagewire.net.channel import ChannelClosed
from pagewire.serve.config import WorkerConfig
from pagewire.serve.front.links import Links, backoff_s
from pagewire.serve.front.metrics import Metrics
from pagewire.serve.front.openai import server_error
from pagewire.serve.front.output import Output
from pagewire.serve.front.routing import Routing
from pagewire.serve.front.trace import EventLog
from pagewire.serve.front.worker import Worker
from pagewire.serve.messages import Events, Failed, Finished, Gauges, Linked, Ready, Token, Unlinked, WorkerMessage

WATCH_S = 0.1  # between two looks at the clocks
STABLE_S = 30.0  # a process that was up for so long starts its backoff again
MAX_MISSES = 3  # failed starts, or failed links, in a row: then nobody is made to wait for another one

_STARTING = "the model processes are starting"
Source = Callable[[], Awaitable[Worker]]


class Supervisor:
    """`run()` keeps the processes; `submit()` hands requests to those that are up.

    A request outlives its processes: `Routing` hands it to others, with what it has emitted.
    """

    def __init__(self, config: WorkerConfig, sources: Mapping[str, Source], recover: bool) -> None:
        """sources: by name, how one life of a process begins. "prefill", "decode" or "colocated" is one that we start:
        its first start must not fail. "prefill@HOST:PORT" is one that others start: it may be there later."""
        self.workers: dict[str, Worker] = {}  # that live
        self.limits: Ready | None = None  # the smallest of every limit; None: nobody ever took requests
        self.num_restarts = 0
        self._config = config
        self._sources = sources
        self._remote = any("@" in name for name in sources)
        self._links = Links(self._on_change, self._on_links_lost)
        self.routing = Routing(recover, self._links.of)
        self.metrics, self.events = Metrics(), EventLog()  # of what the processes report, and of requests
        self._stopping = asyncio.Event()
        self.closed = ""  # why no request is taken any more
        self._broken: dict[str, str] = {}  # who cannot be started or reached, and why
        self._fingerprint = ""  # of the first process's model
        self._misfit = ""  # why our P and D were never joined

    @property
    def reason(self) -> str | None:
        """Why no whole pair beats; None: one does."""
        if self.closed or self.limits is None:
            return self.closed or _STARTING
        if self._links.beating or (not self._names("prefill") and any(w.beating for w in self.workers.values())):
            return None
        missing = [name for name in self._sources if name not in self.workers or not self.workers[name].beating]
        if missing:
            return self._hopeless or f"the {' and the '.join(missing)} process does not answer or is restarting"
        return "the processes are being joined"

    def submit(self, output: Output) -> None:
        """Raises ApiError 503 while no process is there for it and none is expected."""
        if why := self.closed or self._hopeless or ("" if self.limits else _STARTING):
            raise server_error(why)
        self.routing.submit(output)

    def drain(self) -> None:
        """No new requests; those that run go on."""
        self.closed = "the server is shutting down"

    def stop(self) -> None:
        """Fails what is in flight and ends `run()`."""
        self.drain()
        self._stopping.set()
        self.routing.fail_all(self.closed)

    async def run(self) -> str | None:
        """Until `stop()`, or returns why it cannot go on: only a first start of our own is not retried."""
        keepers = [asyncio.ensure_future(self._keep(name)) for name in self._sources]
        watch, stopped = asyncio.ensure_future(self._watch()), asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait([*keepers, stopped], return_when=asyncio.FIRST_COMPLETED)
            return next((reason for end in keepers if end.done() and (reason := end.result())), self._misfit or None)
        finally:
            self._stopping.set()
            watch.cancel()
            for worker in self.workers.values():
                worker.end()
            await asyncio.wait(keepers)
            self.routing.fail_all(self.closed or "the server has ended")

    def _names(self, role: str) -> list[str]:
        return [name for name in self._sources if name.partition("@")[0] == role]

    @property
    def _hopeless(self) -> str:
        """Why nobody should wait for a process that decodes; "": there is one, or will be."""
        decodes = self._names("decode") or self._names("colocated")
        return self._broken[decodes[0]] if all(name in self._broken for name in decodes) else ""

    async def _keep(self, name: str) -> str | None:
        """One life of the process after the other, until `stop()`; returns why its first start failed."""
        in_a_row = num_unready = 0
        said = ""
        while not self._stopping.is_set():
            started, worker, was_ready = time.monotonic(), None, False
            try:
                worker = await self._sources[name]()
            except OSError as error:
                reason = f"the {name} process cannot be {'reached' if self._remote else 'started'}: {error}"
            else:
                self.workers[name] = worker
                if self._stopping.is_set():
                    worker.end()
                await worker.live(self._receive)
                del self.workers[name]
                was_ready, reason = worker.ready is not None, worker.obituary()
            if self._stopping.is_set():
                return None
            if self.limits is None and not was_ready and not self._remote:
                return reason
            self.num_restarts += was_ready or not self._remote
            num_unready = 0 if was_ready else num_unready + 1
            if reason != said or was_ready:
                print(f"pagewire: {reason}; {'trying again' if self._remote else 'restarting'}",
                      file=sys.stderr, flush=True)  # fmt: skip
            said = reason
            if not was_ready and (num_unready >= MAX_MISSES or (worker and worker.hopeless)):
                self._broken[name] = reason  # it will be tried again, but nobody should wait for that
            self._on_end(name, worker, reason)
            in_a_row = 1 if time.monotonic() - started > STABLE_S else in_a_row + 1
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), backoff_s(in_a_row))
        return None

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            for worker in list(self.workers.values()):
                worker.kill_if_late(self._config.start_timeout_s, self._config.worker_timeout_s)

    def _on_end(self, name: str, worker: Worker | None, reason: str) -> None:
        self.metrics.forget(name)
        if worker is not None:
            self._links.remove(worker, reason)
            self.routing.decode_lost(worker, reason)
        if self._hopeless:
            self.routing.fail_all(reason)

    def _receive(self, worker: Worker, message: WorkerMessage) -> None:
        match message:
            case Events(events):
                for event in map(worker.dated, events):
                    self.metrics.on_event(event)
                    self.events.add(event)
            case Gauges():
                self.metrics.on_gauges(worker.name, message)
            case Ready(fingerprint=fingerprint):
                self._fingerprint = self._fingerprint or fingerprint
                if fingerprint != self._fingerprint:
                    raise ChannelClosed(f"has another model: expected {self._fingerprint}, got {fingerprint}")
                self._broken.pop(worker.name, None)
                self._links.add(worker)
            case Linked() | Unlinked():
                self._links.receive(worker, message)
            case Token() | Finished() | Failed():
                self.routing.receive(worker, message)

    def _on_change(self, decode: Worker) -> None:
        """D takes requests, with the P's that it is joined with; but before the first pair nobody does, if there is
        to be one."""
        if self.limits is None:
            if self._names("prefill") and not self._links.of(decode) and not self._remote:
                return
            print("pagewire: ready", flush=True)
        ready = [worker.ready for worker in self.workers.values() if worker.ready is not None]
        smallest = {name: min(getattr(r, name) for r in ready) for name in ("max_context", "pool_tokens", "vocab_size")}
        self.limits = msgspec.structs.replace(ready[0], **smallest)
        self.routing.up(decode)

    def _on_links_lost(self, links: set[int], reason: str, misses: int | None) -> None:
        if self.limits is None and (misses or 0) >= MAX_MISSES and not self._remote:
            self._misfit = self._misfit or reason  # two processes that do not fit each other
            self._stopping.set()
            return
        if misses is not None:
            print(f"pagewire: {reason}; joining the processes anew", file=sys.stderr, flush=True)
        self.routing.links_lost(links, reason)
