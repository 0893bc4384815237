"""Tasks in processes of their own: one that raises, dies or hangs is named, and takes nothing else with it."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

_POLL = 0.005  # seconds


class Done(NamedTuple):
    cpu_seconds: float  # of the task and of the programs it ran
    error: str  # "" or the first line of what ended it


def run_all(tasks: Sequence[Callable[[], None]], jobs: int, stop: float = math.inf) -> list[Done | None]:
    """Each task in a fork of this process, `jobs` at a time, in order; its result by number, None if not started.

    Args:
        stop: `time.monotonic()` at which running tasks are killed and the others not started.
    """
    done: list[Done | None] = [None] * len(tasks)
    live: dict[int, tuple[int, int]] = {}  # pid -> (number, reading end of its error)
    waiting = list(range(len(tasks)))[::-1]
    while waiting or live:
        late = time.monotonic() > stop
        if late:
            waiting.clear()
            for pid in live:
                os.kill(pid, signal.SIGKILL)
        while waiting and len(live) < jobs:
            number = waiting.pop()
            pid, reader = _start(tasks[number])
            live[pid] = number, reader
        ended = [found for found in (os.wait4(pid, os.WNOHANG) for pid in live) if found[0]]
        for pid, status, usage in ended:
            number, reader = live.pop(pid)
            with os.fdopen(reader, errors="replace") as file:
                error = file.read()
            if status and not error:
                error = "cut off by the time limit" if late else _death(status)
            done[number] = Done(usage.ru_utime + usage.ru_stime, error)
        if not ended:
            time.sleep(_POLL)
    return done


def _start(task: Callable[[], None]) -> tuple[int, int]:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader
    code = 1
    try:
        task()
        code = 0
    except BaseException as error:
        text = str(error).strip().splitlines() or [""]
        os.write(writer, f"{type(error).__name__}: {text[0][:400]}".encode())
    finally:
        os._exit(code)  # neither buffers nor exit handlers of the parent are the child's
    raise AssertionError("not reached")


def _death(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"died of {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
