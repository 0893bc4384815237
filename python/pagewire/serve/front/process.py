"""One life of a model process, as the front sees it: started, heard, told to end, buried."""

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Callable

import msgspec

from pagewire.serve.channel import AsyncChannel
from pagewire.serve.config import EXIT_BAD_CONFIG, WorkerConfig
from pagewire.serve.messages import Gauges, Ready, Shutdown, WorkerMessage
from pagewire.transfer.channel import ChannelClosed

WORKER_COMMAND = (sys.executable, "-m", "pagewire.serve.worker")
EXIT_TIMEOUT_S = 3.0  # from Shutdown, or from the end of its channel, to the process's end
BEATING_S = 5.0  # /health believes a process that was heard within this
MAX_LINE = 4096  # bytes of a line of its stderr that are passed on


class WorkerProcess:
    """The process, the channel to it, and what is known of its health."""

    def __init__(self, role: str, process: asyncio.subprocess.Process, channel: AsyncChannel) -> None:
        self.role = role
        self.process = process
        self.channel = channel
        self.ready: Ready | None = None
        self.last_words = ""
        self.started = self._heard = self._progressed = time.monotonic()
        self._progress = -1
        self._killed_for = ""

    @classmethod
    async def spawn(cls, role: str, config: WorkerConfig) -> "WorkerProcess":
        """Raises OSError."""
        threads = str(config.num_threads)
        env = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            args = ["--role", role, "--config-json", msgspec.json.encode(config).decode()]
            try:
                process = await asyncio.create_subprocess_exec(
                    *WORKER_COMMAND,
                    *args,
                    "--control-fd",
                    str(theirs.fileno()),
                    pass_fds=[theirs.fileno()],
                    env=env,
                    stdin=asyncio.subprocess.DEVNULL,
                    stderr=asyncio.subprocess.PIPE,
                    start_new_session=True,  # Ctrl-C reaches us alone; we tell them
                )
            except OSError:
                ours.close()
                raise
        return cls(role, process, await AsyncChannel.open(ours))

    async def live(self, on_message: Callable[["WorkerProcess", WorkerMessage], None]) -> None:
        """Until its channel or the process ends; nothing of it is left then."""
        stderr = asyncio.ensure_future(self._read_stderr())
        try:
            async for message in self.channel:
                self._hear(message)
                on_message(self, message)
        except (ChannelClosed, msgspec.MsgspecError) as error:
            self.last_words = f"sent a frame that does not parse: {error}"
        finally:
            await self._bury(stderr)

    async def _bury(self, stderr: "asyncio.Future[None]") -> None:
        ended = asyncio.ensure_future(self.process.wait())
        await asyncio.wait([ended], timeout=EXIT_TIMEOUT_S)
        if self.process.returncode is None:
            self.process.kill()
            await ended
        await asyncio.wait([stderr], timeout=EXIT_TIMEOUT_S)
        stderr.cancel()
        await self.channel.close()

    def end(self) -> None:
        """Asks it to end, or kills it while it reads nothing because it loads the model."""
        if self.ready:
            self.channel.send(Shutdown())
            asyncio.get_running_loop().call_later(EXIT_TIMEOUT_S, self._kill)
        else:
            self._kill()

    @property
    def beating(self) -> bool:
        now = time.monotonic()
        return self.ready is not None and now - min(self._heard, self._progressed) < BEATING_S

    def kill_if_late(self, start_timeout_s: float, worker_timeout_s: float) -> None:
        now = time.monotonic()
        if self.ready is None and now - self.started > start_timeout_s:
            self._kill_for(f"was not ready within {start_timeout_s:g} s")
        elif self.ready and now - min(self._heard, self._progressed) > worker_timeout_s:
            # who beat until just now and has stood still for long works on nothing
            silent = now - self._heard > worker_timeout_s / 2
            self._kill_for(f"{'said nothing' if silent else 'came no further'} for {worker_timeout_s:g} s")

    def obituary(self) -> str:
        code = self.process.returncode
        if code == EXIT_BAD_CONFIG and self.ready is None and self.last_words:
            return self.last_words
        how = f"exited with code {code}"
        if code is not None and code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        if self._killed_for:
            how = f"{self._killed_for} and was killed"
        why = f": {self.last_words}" if self.ready is None and self.last_words else ""
        return f"the {self.role} process (pid {self.process.pid}) {how}{why}"

    def _hear(self, message: WorkerMessage) -> None:
        self._heard = time.monotonic()
        match message:
            case Ready():
                self.ready = message
                self._progressed = self._heard
            case Gauges(progress=progress, num_running=num_running):
                if progress != self._progress or num_running == 0:
                    self._progressed = self._heard
                self._progress = progress

    def _kill_for(self, why: str) -> None:
        if not self._killed_for:
            self._killed_for = why
            self._kill()

    def _kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()

    async def _read_stderr(self) -> None:
        """Passes on what the process says once it is up; before that, it is why it did not start."""
        assert self.process.stderr is not None
        held = b""
        while data := await self.process.stderr.read(1 << 16):
            *lines, held = (held + data).split(b"\n")
            held = held[-MAX_LINE:]
            for line in lines:
                self._said(line)
        self._said(held)

    def _said(self, line: bytes) -> None:
        self.last_words = line[:MAX_LINE].decode(errors="replace").strip() or self.last_words
        if self.ready is not None and line.strip():
            print(f"[{self.role}] {self.last_words}", file=sys.stderr, flush=True)
