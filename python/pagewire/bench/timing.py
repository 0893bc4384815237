"""Interleaved timing: every contender in every round, on cold buffers. CUDA events on a GPU, a wall clock on a CPU."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from pagewire.bench.work import Contender

MIN_ROUNDS, MAX_ROUNDS = 5, 60
# OpenMP's threads spin for about 10 ms after a parallel region before they sleep
_SETTLE = 0.015
_SHORT_US = 5e3  # shorter calls are timed several to a turn, after one that wakes the threads
_CALLS = 3
# of the host over the stream, beside what its last launch took
_HEAD_START_US = 60.0


@dataclass
class Times:
    """µs per call: on the device, and of the host until the call returned."""

    device_us: list[float] = field(default_factory=list)
    host_us: list[float] = field(default_factory=list)

    def quantile(self, fraction: float) -> float:
        ordered = sorted(self.device_us)
        return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))]

    @property
    def median(self) -> float:
        return _median(self.device_us)

    @property
    def host(self) -> float:
        return _median(self.host_us)


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


class ContenderFailed(Exception):
    """A contender that was checked green raised while it was timed; the cause is the exception's."""

    def __init__(self, name: str, cause: Exception) -> None:
        super().__init__(f"{name}: {type(cause).__name__}: {cause}")
        self.name = name


class Clock:
    """Times one call. On a GPU the stream is kept busy while the host launches, so that launch gaps stay out."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._cycles_per_us = _cycles_per_us()

    def time(self, call: Callable[[], object], host_us: float = 0.0, syncs: bool = False) -> tuple[float, float]:
        """(device µs, host µs). `host_us`: what the host needed last time. `syncs`: the call waits for the device,
        so a busy stream would hide its host time; then wall time counts."""
        if self.device == "cpu" or syncs:
            self.synchronize()
            start = time.perf_counter()
            call()
            launched = time.perf_counter()
            self.synchronize()
            return (time.perf_counter() - start) * 1e6, (launched - start) * 1e6
        first, last = self._events
        torch.cuda._sleep(int((1.5 * min(host_us, 5e3) + _HEAD_START_US) * self._cycles_per_us))
        first.record()
        start = time.perf_counter()
        call()
        launched = time.perf_counter()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) * 1e3, (launched - start) * 1e6

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def lost(self) -> bool:
        """Whether the device takes nothing more from this process: a fault stays with a CUDA context. Asked after an
        exception, which has by then reported any error that does not stay."""
        try:
            self.synchronize()
        except Exception:
            return True
        return False


def _cycles_per_us() -> float:
    """How long the device's sleep really is: measured, since it counts cycles of a clock that moves."""
    cycles = 2_000_000
    torch.cuda._sleep(cycles)
    torch.cuda.synchronize()
    start = time.perf_counter()
    torch.cuda._sleep(cycles)
    torch.cuda.synchronize()
    return cycles / ((time.perf_counter() - start) * 1e6)


def interleave(clock: Clock, contenders: Sequence[Contender], copies: int, seconds: float) -> dict[str, Times]:
    """Times of every contender: at least MIN_ROUNDS turns each, then for its share of `seconds`, at most MAX_ROUNDS.

    Each call takes the next of `copies` sets of buffers, whoever called before, so none is touched again before all
    others were; each round starts with another contender.

    Raises:
        ContenderFailed: naming who raised, its exception as the cause.
    """
    times = {c.name: Times() for c in contenders}
    spent = {c.name: 0.0 for c in contenders}
    share = seconds / max(len(contenders), 1)
    copy = itertools.cycle(range(copies))
    pace = {}
    for contender in contenders:
        warm = Times()
        for _ in range(1 if clock.device == "cpu" else 3):
            _once(clock, contender, next(copy), warm)
        pace[contender.name] = warm.device_us[-1]
    for turn in range(MAX_ROUNDS):
        late = [c for c in contenders if _continues(turn, spent[c.name], share)]
        if not late:
            break
        for at in range(len(late)):
            contender = late[(at + turn) % len(late)]
            start = time.perf_counter()
            if clock.device == "cpu":
                _turn(clock, contender, copy, times[contender.name], pace[contender.name] < _SHORT_US)
            else:
                _once(clock, contender, next(copy), times[contender.name])
            spent[contender.name] += time.perf_counter() - start
    return times


def _continues(turn: int, spent: float, share: float) -> bool:
    """A contender far over its share stops after two rounds: it is slow, and that is known by then."""
    return spent < share or (turn < MIN_ROUNDS and (turn < 2 or spent < 4 * share))


def _turn(clock: Clock, contender: Contender, copy: Iterator[int], times: Times, short: bool) -> None:
    """A CPU's turn: wait until the threads of whoever ran before have stopped spinning, wake our own, then time."""
    time.sleep(_SETTLE)
    if short:
        _once(clock, contender, next(copy), Times())
    for _ in range(_CALLS if short else 1):
        _once(clock, contender, next(copy), times)


def _once(clock: Clock, contender: Contender, copy: int, times: Times) -> None:
    last = times.host_us[-1] if times.host_us else 200.0
    try:
        if contender.before is not None:
            contender.before(copy)
            clock.synchronize()
        device_us, host_us = clock.time(lambda: contender.call(copy), last, contender.syncs)
    except Exception as error:
        raise ContenderFailed(contender.name, error) from error
    times.device_us.append(device_us)
    times.host_us.append(host_us)
