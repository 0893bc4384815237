"""Starts P and D (or one colocated process), carries messages, and restarts the pair when either dies."""

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Callable

import msgspec

from pagewire.serve.channel import AsyncChannel, ChannelClosed
from pagewire.serve.config import EXIT_BAD_CONFIG, EXIT_PEER_LOST, WorkerConfig
from pagewire.serve.front.openai import server_error
from pagewire.serve.front.output import Output
from pagewire.serve.messages import Cancel, Events, Failed, Finished, Gauges, Ready, Shutdown, Token, WorkerMessage

WORKER_COMMAND = (sys.executable, "-m", "pagewire.serve.worker")
START_TIMEOUT_S = 600.0  # from spawn to Ready; the first Triton compilations are in it
EXIT_TIMEOUT_S = 3.0  # from Shutdown, or from a start that failed, to the process's end
LINGER_S = 0.5  # from one process's end to the other's, which has nothing left to do
MAX_RESTARTS = 5  # in a row; a pair that was up for STABLE_S starts the count again
STABLE_S = 30.0
BACKOFF_S = 0.25  # doubles with every restart in a row


class WorkerProcess:
    """One model process and the channel to it."""

    def __init__(self, role: str, process: asyncio.subprocess.Process, channel: AsyncChannel) -> None:
        self.role = role
        self.process = process
        self.channel = channel
        self.ready: Ready | None = None
        self.last_words = ""

    async def read_stderr(self) -> None:
        """Passes on what the process says once it is up; before that, it is why it did not start."""
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.last_words = line.decode(errors="replace").strip() or self.last_words
            if self.ready is not None:
                print(f"[{self.role}] {self.last_words}", file=sys.stderr, flush=True)

    def obituary(self) -> str:
        code = self.process.returncode
        if code == EXIT_BAD_CONFIG and self.ready is None and self.last_words:
            return self.last_words
        how = "closed its channel" if code is None else f"exited with code {code}"
        if code is not None and code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        why = f": {self.last_words}" if self.ready is None and self.last_words else ""
        return f"the {self.role} process (pid {self.process.pid}) {how}{why}"


class Supervisor:
    """`run()` keeps one pair alive; `submit()` and `cancel()` talk to the pair that is up now."""

    def __init__(
        self,
        config: WorkerConfig,
        *,
        colocated: bool,
        on_events: Callable[[Events], None],
        on_gauges: Callable[[Gauges], None],
    ) -> None:
        self.roles = ("colocated",) if colocated else ("decode", "prefill")
        self.workers: list[WorkerProcess] = []
        self.outputs: dict[str, Output] = {}
        self.pair: Ready | None = None  # the smaller of both for every limit; None: nothing can answer
        self.reason = "the model processes are starting"  # why `pair` is None
        self.num_restarts = 0
        self._config = config
        self._on_events = on_events
        self._on_gauges = on_gauges
        self._stopping = asyncio.Event()

    def submit(self, output: Output) -> None:
        """Raises ApiError 503 while there is no pair. D comes first: it reserves before P writes."""
        if self.pair is None:
            raise server_error(self.reason)
        self.outputs[output.submit.request_id] = output
        for worker in self.workers:
            worker.channel.send(output.submit)

    def cancel(self, request_id: str) -> None:
        if self.outputs.pop(request_id, None) is not None:
            for worker in self.workers:
                worker.channel.send(Cancel(request_id))

    def stop(self) -> None:
        """Fails what is in flight and ends `run()`."""
        self._stopping.set()
        self.reason = "the server is shutting down"
        self._fail_all(self.reason)

    async def run(self) -> str | None:
        """Until `stop()`, or returns why it cannot go on. A first start is not retried."""
        in_a_row = 0
        while True:
            start = time.monotonic()
            try:
                was_ready, reason = await self._run_pair()
            except OSError as error:
                was_ready, reason = False, f"a model process cannot be started: {error}"
            if self._stopping.is_set():
                return None
            if self.num_restarts == 0 and not was_ready:
                return reason
            in_a_row = 1 if time.monotonic() - start > STABLE_S else in_a_row + 1
            if in_a_row > MAX_RESTARTS:
                return f"gave up after {MAX_RESTARTS} restarts in a row: {reason}"
            self.num_restarts += 1
            print(f"pagewire: {reason}; restarting", file=sys.stderr, flush=True)
            try:
                await asyncio.wait_for(self._stopping.wait(), BACKOFF_S * 2**in_a_row)
            except asyncio.TimeoutError:  # noqa: UP041 (on 3.10 it is not the builtin)
                pass

    async def _run_pair(self) -> tuple[bool, str]:
        """One life of the pair: (was it ever ready, what ended it). No process outlives this call."""
        stopping = asyncio.ensure_future(self._stopping.wait())
        timer = asyncio.get_running_loop().call_later(START_TIMEOUT_S, self._kill_unready)
        tasks: list[asyncio.Future[None] | asyncio.Future[int]] = []
        try:
            await self._spawn()
            readers = [asyncio.ensure_future(self._read(worker)) for worker in self.workers]
            tasks += readers
            tasks += [asyncio.ensure_future(worker.read_stderr()) for worker in self.workers]
            await asyncio.wait([*readers, stopping], return_when=asyncio.FIRST_COMPLETED)
            was_ready, self.pair = self.pair is not None, None
            if not self._stopping.is_set():
                self.reason = "the model processes are restarting"
            gone = [w for w, task in zip(self.workers, readers, strict=True) if task.done()]
            for worker in self.workers:
                if worker.ready:
                    worker.channel.send(Shutdown())
                elif worker not in gone:
                    worker.process.kill()  # it reads nothing while it loads the model
            exits = [asyncio.ensure_future(worker.process.wait()) for worker in self.workers]
            tasks += exits
            await asyncio.wait(exits, timeout=LINGER_S if gone and was_ready else EXIT_TIMEOUT_S)
            # one that left because its peer was gone is not to blame
            to_blame = min(
                gone or self.workers, key=lambda worker: worker.process.returncode in (None, 0, EXIT_PEER_LOST)
            )
            self._fail_all(f"{to_blame.obituary()} while it served this request")
        finally:
            timer.cancel()
            stopping.cancel()
            for worker in self.workers:
                if worker.process.returncode is None:
                    worker.process.kill()
                await worker.channel.close()
            if tasks:
                await asyncio.wait(tasks, timeout=EXIT_TIMEOUT_S)
            self._fail_all(self.reason)
            self.workers = []
        return was_ready, to_blame.obituary()

    async def _spawn(self) -> None:
        """D and P get one end each of a socket pair to each other, and one end each of one to us."""
        config = msgspec.json.encode(self._config).decode()
        threads = str(self._config.num_threads)
        env = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        peers: list[socket.socket] = []
        if len(self.roles) == 2:
            peers = list(socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM))
        for i, role in enumerate(self.roles):
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            with theirs:
                args = ["--role", role, "--config-json", config, "--control-fd", str(theirs.fileno())]
                fds = [theirs.fileno()]
                if peers:
                    args += ["--peer-fd", str(peers[i].fileno())]
                    fds.append(peers[i].fileno())
                process = await asyncio.create_subprocess_exec(
                    *WORKER_COMMAND,
                    *args,
                    pass_fds=fds,
                    env=env,
                    stdin=asyncio.subprocess.DEVNULL,
                    stderr=asyncio.subprocess.PIPE,
                    start_new_session=True,  # Ctrl-C reaches us alone; we tell them
                )
            self.workers.append(WorkerProcess(role, process, await AsyncChannel.open(ours)))
        for peer in peers:
            peer.close()

    def _kill_unready(self) -> None:
        if self.pair is None:
            for worker in self.workers:
                worker.process.kill()

    async def _read(self, worker: WorkerProcess) -> None:
        """Ends when the channel does."""
        try:
            async for message in worker.channel:
                self._receive(worker, message)
        except (ChannelClosed, msgspec.MsgspecError) as error:
            worker.last_words = f"sent a frame that does not parse: {error}"

    def _receive(self, worker: WorkerProcess, message: WorkerMessage) -> None:
        match message:
            case Token(request_id, index, token_id):
                if output := self.outputs.get(request_id):
                    output.on_token(index, token_id)
                    self._forget_ended(output)
            case Finished(request_id, reason, num_tokens):
                if output := self.outputs.get(request_id):
                    output.on_finished(reason, num_tokens)
                    self._forget_ended(output)
            case Failed(request_id, text):
                output = self.outputs.get(request_id)
                if output and self.pair:  # while a pair goes down, the reason comes with its end
                    output.fail(server_error(text, status=500, code="request_failed"))
                    self.cancel(request_id)
            case Events():
                self._on_events(message)
            case Gauges():
                self._on_gauges(message)
            case Ready():
                worker.ready = message
                self._maybe_up()

    def _maybe_up(self) -> None:
        ready = [worker.ready for worker in self.workers if worker.ready is not None]
        if len(ready) < len(self.roles):
            return
        self.pair = msgspec.structs.replace(
            ready[0],
            max_context=min(r.max_context for r in ready),
            pool_tokens=min(r.pool_tokens for r in ready),
            vocab_size=min(r.vocab_size for r in ready),
        )
        print("pagewire: ready", flush=True)

    def _forget_ended(self, output: Output) -> None:
        if output.outcome:
            self.outputs.pop(output.submit.request_id, None)

    def _fail_all(self, reason: str) -> None:
        outputs, self.outputs = self.outputs, {}
        for output in outputs.values():
            output.fail(server_error(reason))
