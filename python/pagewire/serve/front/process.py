"""A model process that we start, on this machine."""

import asyncio
import contextlib
import os
import signal
import socket
import sys

import anyio
import msgspec

from pagewire.serve.channel import AsyncChannel
from pagewire.serve.config import EXIT_BAD_CONFIG, WorkerConfig
from pagewire.serve.front.worker import Worker
from pagewire.serve.messages import Shutdown

WORKER_COMMAND = (sys.executable, "-m", "pagewire.serve.worker")
EXIT_TIMEOUT_S = 3.0  # from Shutdown, or from the end of its channel, to the process's end
MAX_LINE = 4096  # bytes of a line of its stderr that are passed on


def worker_command(role: str, config: WorkerConfig, *whence: str) -> list[str]:
    return [*WORKER_COMMAND, "--role", role, "--config-json", msgspec.json.encode(config).decode(), *whence]


def thread_environment(config: WorkerConfig) -> dict[str, str]:
    """Read by the libraries of a model process as they are loaded."""
    threads = str(config.num_threads)
    return os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}


class WorkerProcess(Worker):
    _stderr: asyncio.Future[None]

    def __init__(self, role: str, process: asyncio.subprocess.Process, channel: AsyncChannel) -> None:
        super().__init__(role, channel)
        self.process, self.pid = process, process.pid

    @classmethod
    async def spawn(cls, role: str, config: WorkerConfig) -> "WorkerProcess":
        """Raises OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    *worker_command(role, config, "--control-fd", str(theirs.fileno())),
                    pass_fds=[theirs.fileno()],
                    env=thread_environment(config),
                    stdin=asyncio.subprocess.DEVNULL,
                    stderr=asyncio.subprocess.PIPE,
                    start_new_session=True,  # Ctrl-C reaches us alone; we tell them
                )
            except OSError:
                ours.close()
                raise
        worker = cls(role, process, AsyncChannel(*await asyncio.open_unix_connection(sock=ours)))
        worker._stderr = asyncio.ensure_future(worker._read_stderr())
        return worker

    async def _bury(self) -> None:
        with anyio.move_on_after(EXIT_TIMEOUT_S):
            await self.process.wait()
        self._kill()
        self.hopeless = await self.process.wait() == EXIT_BAD_CONFIG
        await asyncio.wait([self._stderr], timeout=EXIT_TIMEOUT_S)
        self._stderr.cancel()
        await super()._bury()

    def end(self) -> None:
        """Asks it to end, or kills it while it reads nothing because it loads the model."""
        if self.ready:
            self.channel.send(Shutdown())
            asyncio.get_running_loop().call_later(EXIT_TIMEOUT_S, self._kill)
        else:
            self._kill()

    def obituary(self) -> str:
        code = self.process.returncode
        if self.hopeless and self.ready is None and self.last_words:
            return self.last_words
        how = f"exited with code {code}"
        if code is not None and code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        if self._killed_for:
            how = f"{self._killed_for} and was killed"
        why = f": {self.last_words}" if self.ready is None and self.last_words else ""
        return f"the {self.role} process (pid {self.pid}) {how}{why}"

    def _kill(self) -> None:
        if self.process.returncode is None:
            # asyncio's kill() polls first: it may reap one that has just ended behind the back of asyncio's watcher,
            # which then warns that the exit code is lost
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGKILL)

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
