"""Commands with bounds: run alone or side by side, every line flushed, ended with all they started, remembered."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

LOG_BYTES = 12 << 20  # machines that hand files back have limits: the middle of a longer log goes
_LEAST = 5.0  # seconds left in a go below which nothing is started
_GRACE = 3.0  # from SIGTERM to SIGKILL
_KEPT = 400  # last lines of a step's output that the summary can show


@dataclass(frozen=True)
class Step:
    """One command.

    seconds: its bound. missing: why it cannot run here, or None. always: repeated in every go and every resumption,
    since a machine that was given back has forgotten it. restart: the exit status after which it is started again at
    once, as long as its seconds last. tail: lines of its output for the summary.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    missing: str | None = None
    always: bool = False
    restart: int | None = None
    tail: int = 12


@dataclass
class State:
    """What happened to a step: done, failed, cut (its seconds were over: goes on when resumed) or skipped."""

    status: str
    reason: str = ""
    seconds: float = 0.0
    tail: str = ""


class Log:
    """One file for the output of all steps, a line at a time, each with its step's name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("a", errors="replace")
        self._lock = threading.Lock()

    def line(self, name: str, text: str) -> None:
        with self._lock:
            self._file.write(f"{name} | {text}\n")
            self._file.flush()

    def close(self) -> None:
        self._file.close()
        text = self.path.read_bytes()
        if len(text) > LOG_BYTES:
            half = LOG_BYTES // 2
            self.path.write_bytes(text[:half] + b"\n[... the middle was cut ...]\n" + text[-half:])


class Runner:
    """Runs steps until `stop` (time.monotonic()), in `folder`, with `environment`."""

    def __init__(self, folder: Path, environment: Mapping[str, str], log: Log, stop: float) -> None:
        self.folder, self.environment, self.log, self.stop = folder, environment, log, stop
        self._live: set[subprocess.Popen] = set()
        self._aborted = False

    def abort(self) -> None:
        """Ends what runs and starts nothing more: every step is cut. For a signal handler."""
        self._aborted = True
        for process in list(self._live):
            _signal(process, signal.SIGTERM)

    def side_by_side(self, steps: Sequence[Step], ended: Callable[[Step, State], None]) -> dict[str, State]:
        """All at once; `ended` is told of each as it ends, of one at a time."""
        states: dict[str, State] = {}
        telling = threading.Lock()

        def one(step: Step) -> None:
            state = self.run(step)
            with telling:
                states[step.name] = state
                ended(step, state)

        threads = [threading.Thread(target=one, args=(step,)) for step in steps]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():  # a signal's handler runs between two waits, whichever thread the signal came to
                thread.join(0.2)
        return states

    def run(self, step: Step) -> State:
        if step.missing is not None:
            return State("skipped", step.missing)
        left = self.stop - time.monotonic()
        if left < _LEAST or self._aborted:
            return State("cut", "no seconds left in this go")
        limit = min(step.seconds, left - _GRACE)  # the go is over when its seconds are
        started = time.monotonic()
        lines: deque[str] = deque(maxlen=_KEPT)
        code = None
        while (left := limit - (time.monotonic() - started)) > 0:
            try:
                code = self._once(step, left, lines)
            except OSError as error:  # no such program
                return State("failed", str(error))
            if code is None or code != step.restart or self._aborted:
                break
        seconds = time.monotonic() - started
        tail = "\n".join(list(lines)[-step.tail :])
        if code is None or self._aborted:
            return State("cut", f"stopped after {seconds:.0f} s", seconds, tail)
        return State("done" if code == 0 else "failed", f"exit status {code}", seconds, tail)

    def _once(self, step: Step, limit: float, lines: deque[str]) -> int | None:
        """The exit status, or None if it had to be ended."""
        self.log.line(step.name, f"$ {' '.join(step.command)}")
        process = subprocess.Popen(
            step.command, cwd=self.folder, env=dict(self.environment), start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip

        def read() -> None:
            assert process.stdout is not None
            for text in process.stdout:
                lines.append(text.rstrip("\n"))
                self.log.line(step.name, lines[-1])

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        self._live.add(process)
        if self._aborted:  # between the last look and this one
            _signal(process, signal.SIGTERM)
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(process)
            self._live.remove(process)
            reader.join(_GRACE)


def _end(process: subprocess.Popen) -> None:
    """The step's own process group, if anything of it is left: asked first, then killed."""
    _signal(process, signal.SIGTERM)
    stop = time.monotonic() + _GRACE
    while _signal(process, 0) and time.monotonic() < stop:
        process.poll()
        time.sleep(0.05)
    _signal(process, signal.SIGKILL)
    process.wait()


def _signal(process: subprocess.Popen, number: int) -> bool:
    """Whether anything of the group was there."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    return True


def load(out: Path) -> dict[str, State]:
    path = out / "campaign.json"
    if not path.exists():
        return {}
    try:
        return {name: State(**state) for name, state in json.loads(path.read_text()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise SystemExit(f"campaign: {path} is not what a go leaves ({error}): move it away to start anew") from error


def save(out: Path, states: Mapping[str, State]) -> None:
    path = out / "campaign.json"
    new = path.with_suffix(".new")
    new.write_text(json.dumps({n: asdict(s) for n, s in states.items()}, indent=1))
    os.replace(new, path)
    lines = ["# Campaign", "", "| step | status | seconds | |", "|---|---|---|---|"]
    lines += [f"| {n} | {s.status} | {s.seconds:.0f} | {s.reason} |" for n, s in states.items()]
    for name, state in states.items():
        if state.tail:
            lines += ["", f"## {name}", "", "```text", state.tail, "```"]
    (out / "summary.md").write_text("\n".join(lines) + "\n")
