"""Keeps P and D (or one colocated process) alive, each for itself, and joins them anew whenever one was started."""

import asyncio
import sys
import time
from collections.abc import Callable
from typing import Any

import msgspec

from pagewire.serve.config import EXIT_BAD_CONFIG, WorkerConfig
from pagewire.serve.front.openai import server_error
from pagewire.serve.front.output import Output
from pagewire.serve.front.process import WorkerProcess
from pagewire.serve.front.routing import Routing
from pagewire.serve.messages import Events, Gauges, Linked, Pair, Ready, Unlinked, WorkerMessage

WATCH_S = 0.1  # between two looks at the clocks
STABLE_S = 30.0  # a process that was up for so long starts its backoff again
BACKOFF_S = 0.25  # doubles with every restart in a row
MAX_BACKOFF_S = 10.0
PAIRING_S = 5.0  # from both processes' Ready to their link; meanwhile requests wait for it
MAX_MISSES = 3  # failed starts, or failed links, in a row: then nobody is made to wait for another one

_STARTING = "the model processes are starting"


class Supervisor:
    """`run()` keeps the processes; `submit()` and `cancel()` hand requests to those that are up.

    A request outlives its processes: `Routing` hands it to others, with what it has emitted.
    """

    def __init__(
        self,
        config: WorkerConfig,
        *,
        colocated: bool,
        recover: bool,
        on_events: Callable[[Events], None],
        on_gauges: Callable[[Gauges], None],
        forget: Callable[[str], None],
    ) -> None:
        self.roles = ("colocated",) if colocated else ("decode", "prefill")
        self.workers: dict[str, WorkerProcess] = {}  # that live
        self.limits: Ready | None = None  # the smaller of both for every limit; None: never was a whole pair
        self.num_restarts = 0
        self.routing = Routing(recover)
        self._config = config
        self._on_events, self._on_gauges, self._forget = on_events, on_gauges, forget
        self._stopping = asyncio.Event()
        self._closed = ""  # why no request is taken any more
        self._broken = ""  # why the process that decodes cannot be started again
        self._misfit: asyncio.Future[str | None] | None = None  # why P and D were never joined
        self._misses = 0  # links in a row that ended before they stood
        self._link = 0  # the number of the latest attempt to join P and D
        self._linked: set[str] = set()  # roles that have said so of it

    @property
    def reason(self) -> str | None:
        """Why not every part of the server beats; None: a whole pair does."""
        missing = [role for role in self.roles if role not in self.workers or not self.workers[role].beating]
        if self._closed or self.limits is None:
            return self._closed or _STARTING
        if missing:
            return self._broken or f"the {' and the '.join(missing)} process does not answer or is restarting"
        return None if self._whole else "the processes are being joined"

    def submit(self, output: Output) -> None:
        """Raises ApiError 503 while no process is there for it and none is expected."""
        if why := self._closed or self._broken or ("" if self.limits else _STARTING):
            raise server_error(why)
        self.routing.submit(output)

    def cancel(self, request_id: str) -> None:
        self.routing.cancel(request_id)

    @property
    def draining(self) -> bool:
        return self._closed != ""

    def drain(self) -> None:
        """No new requests; those that run go on."""
        self._closed = "the server is shutting down"

    def stop(self) -> None:
        """Fails what is in flight and ends `run()`."""
        self.drain()
        self._stopping.set()
        self.routing.fail_all(self._closed)

    async def run(self) -> str | None:
        """Until `stop()`, or returns why it cannot go on: only a first start is not retried."""
        keepers = [asyncio.ensure_future(self._keep(role)) for role in self.roles]
        watch = asyncio.ensure_future(self._watch())
        stopped = asyncio.ensure_future(self._sleep(None))
        self._misfit = asyncio.get_running_loop().create_future()
        ends: list[asyncio.Future[Any]] = [*keepers, stopped, self._misfit]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            return next((reason for end in ends if end.done() and (reason := end.result())), None)
        finally:
            self._stopping.set()
            watch.cancel()
            for worker in self.workers.values():
                worker.end()
            await asyncio.wait(keepers)
            self.routing.fail_all(self._closed or "the server has ended")

    async def _keep(self, role: str) -> str | None:
        """One life of the role's process after the other, until `stop()`; returns why its first start failed."""
        in_a_row = num_unready = 0
        while not self._stopping.is_set():
            started, was_ready, hopeless = time.monotonic(), False, False
            try:
                worker = await WorkerProcess.spawn(role, self._config)
            except OSError as error:
                reason = f"the {role} process cannot be started: {error}"
            else:
                self.workers[role] = worker
                if self._stopping.is_set():
                    worker.end()
                await worker.live(self._receive)
                del self.workers[role]
                was_ready, reason = worker.ready is not None, worker.obituary()
                hopeless = worker.process.returncode == EXIT_BAD_CONFIG
            if self._stopping.is_set():
                return None
            if self.limits is None and not was_ready:
                return reason
            self.num_restarts += 1
            print(f"pagewire: {reason}; restarting", file=sys.stderr, flush=True)
            num_unready = 0 if was_ready else num_unready + 1
            self._on_end(role, reason, broken=not was_ready and (hopeless or num_unready >= MAX_MISSES))
            in_a_row = 1 if time.monotonic() - started > STABLE_S else in_a_row + 1
            await self._sleep(_backoff_s(in_a_row))
        return None

    async def _sleep(self, seconds: float | None) -> None:
        """Until `stop()`, at most."""
        try:
            await asyncio.wait_for(self._stopping.wait(), seconds)
        except asyncio.TimeoutError:  # noqa: UP041 (on 3.10 it is not the builtin)
            pass

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            for worker in list(self.workers.values()):
                worker.kill_if_late(self._config.start_timeout_s, self._config.worker_timeout_s)

    def _on_end(self, role: str, reason: str, *, broken: bool) -> None:
        self._forget(role)
        self._unlink()
        if role == "prefill":
            self.routing.prefill_lost(reason)
            self._serve_alone()
            return
        self.routing.decode_lost(reason)
        if broken:  # it will be tried again, but nobody should wait for that
            self._broken = reason
            self.routing.fail_all(reason)

    def _receive(self, worker: WorkerProcess, message: WorkerMessage) -> None:
        match message:
            case Events():
                self._on_events(message)
            case Gauges():
                self._on_gauges(message)
            case Ready():
                self._on_ready(worker)
            case Linked(number):
                if number == self._link:
                    self._linked.add(worker.role)
                    if self._whole:
                        self._on_whole()
            case Unlinked(number, reason):
                if number == self._link:
                    self._on_unlinked(reason)
            case _:
                self.routing.receive(worker, message)

    def _on_ready(self, worker: WorkerProcess) -> None:
        if worker.role != "prefill":
            self._broken = ""
        if len(self.roles) == 1:
            self._on_whole()
        elif not self._pair(self._link):
            self._serve_alone()

    @property
    def _whole(self) -> bool:
        return len(self.roles) == 1 or len(self._linked) == 2

    def _pair(self, after: int) -> bool:
        """Tells P and D of each other, if both are there and nothing was done since `after`; whether they were told."""
        decode, prefill = (self.workers.get(role) for role in self.roles)
        if after != self._link or not (decode and decode.ready and prefill and prefill.ready):
            return False
        self._unlink()
        decode.channel.send(Pair(self._link, prefill.ready.incarnation, ""))
        prefill.channel.send(Pair(self._link, decode.ready.incarnation, decode.ready.address))
        asyncio.get_running_loop().call_later(PAIRING_S, self._serve_alone, self._link)
        return True

    def _unlink(self) -> None:
        """What is said of the link from here on is void."""
        self._link += 1
        self._linked.clear()

    def _serve_alone(self, number: int | None = None) -> None:
        """D does not wait for P any more, unless `number` is not the link that it waits for."""
        decode = self.workers.get("decode")
        if number in (None, self._link) and not self._whole and self.limits and decode and decode.ready:
            self.routing.up(decode, None, 0)

    def _on_whole(self) -> None:
        ready = [worker.ready for worker in self.workers.values() if worker.ready is not None]
        if self.limits is None:
            print("pagewire: ready", flush=True)
        self.limits = msgspec.structs.replace(
            ready[0], **{name: min(getattr(r, name) for r in ready) for name in _LIMITS}
        )
        self._misses = 0
        self.routing.up(self.workers[self.roles[0]], self.workers.get("prefill"), self._link)

    def _on_unlinked(self, reason: str) -> None:
        self._misses += not self._whole
        if self.limits is None and self._misses >= MAX_MISSES and self._misfit:
            if not self._misfit.done():
                self._misfit.set_result(reason)  # two processes that do not fit each other
            return
        print(f"pagewire: {reason}; joining the processes anew", file=sys.stderr, flush=True)
        self._unlink()
        self.routing.prefill_lost(reason)
        self._serve_alone()
        asyncio.get_running_loop().call_later(_backoff_s(self._misses), self._pair, self._link)


def _backoff_s(in_a_row: int) -> float:
    return min(BACKOFF_S * 2.0 ** min(in_a_row, 10), MAX_BACKOFF_S)


_LIMITS = ("max_context", "pool_tokens", "vocab_size")
