"""How long a scheduler takes to issue a loop: stall cycles and barriers from the machine code, latencies from here.

A model, not a measurement: right to about 25 %, and rather too fast. It leaves out what a taken branch costs, misses of
the instruction cache (a loop of 20 KiB and more does not fit the innermost), queues of the memory pipe, bank conflicts
and all of DRAM. What it says is where issue slots and latencies are the bound, and which of two codes is faster.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from machine_code.sass import NO_BARRIER, Instruction

ERROR = 0.25  # of a prediction, either way

# Cycles until the barrier falls that an instruction sets with its result. Assumed, not measured here: issue 15's static
# study (shared/cuda/evidence.md), which took them from what microbenchmarks of A100 and H100 print, to a few cycles.
LATENCY: Mapping[str, int] = {
    "LDS": 30, "LDSM": 33, "STS": 20, "LDGSTS": 20, "SHFL": 24, "MUFU": 26, "LDC": 30, "ULDC": 30, "S2R": 25,
    "I2F": 22, "F2I": 22, "F2F": 22, "F2FP": 14, "POPC": 18, "R2UR": 12, "VOTE": 10, "HMMA": 33, "STG": 20,
    "LDG": 300,  # a page table's entry, out of L2
    "ATOMG": 600,
}  # fmt: skip
OTHERWISE = 30
OPERANDS_READ = 14  # cycles until the barrier falls that says so

# Cycles an instruction keeps a pipe of its quarter of a multiprocessor: 32 lanes over the pipe's width (16 lanes of the
# memory pipe for 4-byte words with its port shared by two quarters, 4 of special functions, 16 of packed conversions).
PIPE: Mapping[str, tuple[str, float]] = {
    "MUFU": ("special", 8), "I2F": ("special", 8), "F2I": ("special", 8), "F2F": ("special", 8), "POPC": ("special", 8),
    "LDSM": ("memory", 8), "LDGSTS": ("memory", 8), "SHFL": ("memory", 4), "LDS": ("memory", 4), "STS": ("memory", 4),
    "F2FP": ("convert", 2), "LDC": ("constant", 1), "ULDC": ("constant", 1),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Processor:
    """What machine code of an architecture is timed for; from its maker's data sheet but for `hmma`."""

    name: str
    multiprocessors: int
    hertz: float
    hmma: float  # cycles of m16n8k16: 8 at A100's 256 products a cycle; mma.sync reaches 62 % of H100's 512

    def pipe(self, unit: str) -> tuple[str, float] | None:
        return ("tensor", self.hmma) if unit == "HMMA" else PIPE.get(unit)

    def bytes_per_second(self, bytes_: float, cycles: float, warps: float) -> float:
        """Of all schedulers, each with so many warps that take `cycles` for `bytes_`."""
        return bytes_ / cycles * warps * 4 * self.multiprocessors * self.hertz


PROCESSORS = {"sm_80": Processor("A100", 108, 1.41e9, 8.0), "sm_90a": Processor("H100", 132, 1.9e9, 6.5)}


@dataclasses.dataclass
class _Warp:
    at: int = 0  # in the way
    passes: int = 0
    ready: float = 0  # the cycle at which its next instruction may issue, but for barriers
    falls: list[float] = dataclasses.field(default_factory=lambda: [0.0] * 6)  # barrier -> cycle
    ends: list[float] = dataclasses.field(default_factory=list)  # of its passes


def cycles(way: Sequence[Instruction], num_warps: int, processor: Processor, num_passes: int = 12) -> float:
    """Of one pass through `way` by each of a scheduler's warps: the mean over passes once they are under way.

    The scheduler goes on with the warp it is at while that can issue and is no pass ahead, else with the one that is
    furthest behind.
    """
    warps = [_Warp(ready=37.0 * i) for i in range(num_warps)]  # started one after another
    pipes = [processor.pipe(instruction.unit) for instruction in way]
    busy: dict[str, float] = {}  # pipe -> cycle it is free again
    waits = [[b for b in range(6) if instruction.waits >> b & 1] for instruction in way]

    def earliest(warp: _Warp) -> float:
        pipe = pipes[warp.at]
        own = max([warp.ready, *(warp.falls[b] for b in waits[warp.at])])
        return max(own, busy.get(pipe[0], 0.0)) if pipe else own

    now, last = 0, warps[0]
    while (slowest := min(warp.passes for warp in warps)) < num_passes:
        when = [earliest(warp) for warp in warps]
        now = max(now, math.ceil(min(when)))
        able = [warp for warp, at in zip(warps, when, strict=True) if at <= now]
        stays = last in able and last.passes == slowest
        warp = last if stays else min(able, key=lambda w: (w.passes, w.at))
        instruction, pipe = way[warp.at], pipes[warp.at]
        if pipe:
            free = busy.get(pipe[0], 0.0)
            busy[pipe[0]] = (free if free > now - 1 else now) + pipe[1]  # half cycles add up
        for barrier, after in (
            (instruction.sets, LATENCY.get(instruction.unit, OTHERWISE)), (instruction.frees, OPERANDS_READ),
        ):  # fmt: skip
            if barrier < NO_BARRIER:
                warp.falls[barrier] = max(warp.falls[barrier], now + after)
        warp.ready, warp.at, last = now + max(instruction.stall, 1), warp.at + 1, warp
        if warp.at == len(way):
            warp.at, warp.passes = 0, warp.passes + 1
            warp.ends.append(now)
        now += 1
    first = num_passes // 3
    of_warps = [(warp.ends[num_passes - 1] - warp.ends[first]) / (num_passes - 1 - first) for warp in warps]
    return sum(of_warps) / num_warps


def ceiling(way: Sequence[Instruction], bytes_: int, warps: float, processor: Processor) -> tuple[float, float]:
    """(cycles a pass, bytes per second) where `warps` of a scheduler each move `bytes_` a pass. Below 1: some
    schedulers have none.
    """
    taken = cycles(way, max(1, round(warps)), processor)
    return taken, processor.bytes_per_second(bytes_, taken, warps)
