"""`--tune`: tries tile shapes of the Triton kernels and prints rows for the tuning table. A person commits them.

One field after another is varied around the present row, each candidate checked, then timed in turn with the present
row on the same cold buffers. A field's candidates are compiled side by side before the first of them is timed. The
library never does this by itself: its table is data.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Hashable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice, product, zip_longest
from typing import Any

import torch

from pagewire.bench import machine as machines
from pagewire.bench.attention import AttentionWork
from pagewire.bench.cases import Attention
from pagewire.bench.cold_memory import ColdMemory
from pagewire.bench.standby import Compiler
from pagewire.bench.timing import Clock, interleave
from pagewire.bench.work import Contender, DoesNotFit
from pagewire.kernels import hopper, tuning
from pagewire.kernels.tuning import KernelConfig, Key
from pagewire.registry import backends

KERNELS = ("decode", "prefill")
MINUTES = 5.0  # of a sweep
CANDIDATES = 40  # compiled ahead: the first pass over the first row of 16 and of 8 bit of each kernel
_SECONDS = 0.3  # of timing per candidate and case
_WORTH = 1.02  # a row is proposed when it is this much faster: less is noise
_CHOICES: dict[str, dict[str, tuple[int, ...]]] = {
    "decode": {
        "BLOCK_N": (16, 32, 64, 128),
        "num_stages": (2, 3, 4, 5, 6),
        "num_warps": (2, 4, 8),
        "programs_per_processor": (1, 2, 3, 4),
        "dependent_merge": (False, True),
    },
    "prefill": {"BLOCK_M": (64, 128), "BLOCK_N": (32, 64, 128), "num_stages": (2, 3, 4), "num_warps": (4, 8)},
}
# what one field at a time does not reach, since wide tiles fit only with fewer stages: (kernel, operands, head_dim)
_TOGETHER: dict[tuple[str, str, int], tuple[dict[str, int], ...]] = {
    ("prefill", "16", 128): ({"BLOCK_M": 128, "BLOCK_N": 128, "num_stages": 2},),
    ("decode", "16x8", 128): ({"BLOCK_N": 64, "num_stages": 4, "programs_per_processor": 3},),
}


class DeviceLost(RuntimeError):
    """A candidate has taken the device with it; the message names it."""


@dataclass(frozen=True)
class Target:
    """One row of the table and the cases that speak for it."""

    kernel: str
    key: Key
    cases: tuple[Attention, ...]

    @property
    def table(self) -> MutableMapping[Key, KernelConfig]:
        return tuning.DECODE if self.kernel == "decode" else tuning.PREFILL

    @property
    def choices(self) -> dict[str, tuple[int, ...]]:
        return {k: v for k, v in _CHOICES[self.kernel].items() if k != "dependent_merge" or self.key.arch >= 90}

    @property
    def together(self) -> tuple[dict[str, int], ...]:
        return _TOGETHER.get((self.kernel, self.key.operands, self.key.head_dim), ())


def targets(kernels: Sequence[str], arch: int) -> list[Target]:
    """The rows worth a sweep on an architecture, those of the most common models first, the kernels in turn."""
    rows = (_targets(kernel, arch) for kernel in kernels)
    return [target for turn in zip_longest(*rows) for target in turn if target is not None]


def _targets(kernel: str, arch: int) -> list[Target]:
    found = []
    kv_dtypes = (None, torch.float8_e4m3fn)
    batches: tuple[tuple[str, ...], ...] = (("q8k", "4q2k", "q1ks4k"),)
    if kernel == "decode":  # 16, 32 and 64 packed rows at 4 query heads to a kv head
        batches = (("32q1s4k", "q1s16k", "8q1s2k"), ("32q8s4k",), ("32q16s4k",))
    for batch, head_dim, kv_dtype in product(batches, (128, 64, 256), kv_dtypes):
        cases = tuple(Attention("tune", b, head_dim=head_dim, kv_dtype=kv_dtype) for b in batch)
        found.append(Target(kernel, key_of(kernel, cases[0], arch), cases))
    return found


def first_candidates(kernels: Sequence[str], arch: int, limit: int) -> list[tuple[Target, KernelConfig]]:
    """The first `limit` candidates that a sweep tries while no row has been beaten."""

    def of(target: Target) -> Iterator[tuple[Target, KernelConfig]]:
        seen: list[KernelConfig] = []

        def lost(config: KernelConfig) -> None:
            seen.append(config)

        search(target.table[target.key], target.choices, lost, 1, target.together)
        yield from ((target, config) for config in seen)

    return list(islice(chain.from_iterable(map(of, targets(kernels, arch))), limit))


def key_of(kernel: str, case: Attention, arch: int) -> Key:
    sizes = case.dtype.itemsize, case.stored.itemsize
    problem = tuning.Traits(arch, case.head_dim, *sizes, case.page_size)
    rows = max(r.q_len for r in case.requests) * case.heads[0] // case.heads[1]
    return tuning.key(problem, rows if kernel == "decode" else 0)


def search(
    start: KernelConfig,
    choices: dict[str, tuple[int, ...]],
    speedup: Callable[[KernelConfig], float | None],
    passes: int = 2,
    together: Sequence[dict[str, int]] = (),
    prepare: Callable[[list[KernelConfig]], None] = lambda candidates: None,
) -> tuple[KernelConfig, float]:
    """(best, its speedup over `start`): per field the best value, the others held, until nothing changes.

    Args:
        speedup: over `start`; None for a candidate that does not compile, does not fit or is wrong.
        together: fields that are replaced at once, tried before the single ones.
        prepare: gets the candidates that `speedup` is asked for next.
    """
    best, gain = start, 1.0
    tried = {start}
    groups: list[list[dict[str, Any]]] = [
        list(together),
        *([{name: v} for v in values] for name, values in choices.items()),
    ]
    for _ in range(passes):
        before = best
        for group in groups:
            candidates = [best._replace(**fields) for fields in group]
            candidates = [c for c in dict.fromkeys(candidates) if c not in tried]
            tried.update(candidates)
            if candidates:
                prepare(candidates)
            for candidate in candidates:
                found = speedup(candidate)
                if found is not None and found > gain:
                    best, gain = candidate, found
        if best == before:
            break
    return best, gain


@contextmanager
def row(target: Target, config: KernelConfig) -> Iterator[None]:
    """The table with another row, for as long as the block runs, and the kernels that it is for."""
    before = target.table[target.key], tuning.variant
    switch = os.environ.get(hopper.SWITCH)
    os.environ[hopper.SWITCH] = "0"
    _use(target, config, (target.key, config))
    try:
        yield
    finally:
        _use(target, *before)
        if switch is None:
            del os.environ[hopper.SWITCH]
        else:
            os.environ[hopper.SWITCH] = switch


def _use(target: Target, config: KernelConfig, variant: Hashable) -> None:
    target.table[target.key], tuning.variant = config, variant


def compare(
    target: Target, config: KernelConfig, works: Sequence[AttentionWork], clock: Clock, backend: str
) -> tuple[list[float], list[float]]:
    """µs per case of the present row and of `config`.

    Raises:
        ValueError: the candidate's result is wrong; whatever its compilation raises.
    """
    present = target.table[target.key]
    old, new = [], []
    for work in works:
        ours = work.ours(backend)

        def use(row_config: KernelConfig) -> Callable[[int], None]:
            return lambda copy: _use(target, row_config, (target.key, row_config))

        with row(target, config):
            verdict = work.check(ours)
            if not verdict.ok:
                raise ValueError(f"wrong: {verdict.reason}")
            pair = [Contender("present", ours.call, use(present)), Contender("candidate", ours.call, use(config))]
            times = interleave(clock, pair, work.copies, _SECONDS)
        old.append(times["present"].median)
        new.append(times["candidate"].median)
    return old, new


def _tune(target: Target, memory: ColdMemory, clock: Clock, stop: float, compiler: Compiler) -> str:
    """The line to print for a row: a proposal with its evidence, or why the present one stays."""
    try:
        works = [AttentionWork(case, memory) for case in target.cases]
    except DoesNotFit as error:
        return f"    # {target.key}: skipped, {error}"
    present = target.table[target.key]
    evidence: dict[KernelConfig, str] = {}
    refused: dict[KernelConfig, str] = {}

    def prepare(candidates: list[KernelConfig]) -> None:
        left = stop - time.perf_counter()
        if left > 0:
            errors = compiler.compile(target.kernel, target.key, candidates, left)
            refused.update({c: e for c, e in zip(candidates, errors, strict=True) if e})

    def speedup(config: KernelConfig) -> float | None:
        if time.perf_counter() > stop:
            return None
        if config in refused:
            print(f"    # {tuple(config)}: {refused[config]}", flush=True)
            return None
        try:
            old, new = compare(target, config, works, clock, "triton")
        except Exception as error:
            text = (str(error).strip().splitlines() or [""])[0][:100]
            if clock.lost():  # no later candidate could be timed
                raise DeviceLost(f"{tuple(config)}: {type(error).__name__}: {text}") from error
            print(f"    # {tuple(config)}: {type(error).__name__}: {text}", flush=True)
            return None
        gain = math.exp(sum(math.log(a / b) for a, b in zip(old, new, strict=True)) / len(old))
        pairs = zip(target.cases, old, new, strict=True)
        evidence[config] = ", ".join(f"{c.batch} {a:.1f} -> {b:.1f} µs" for c, a, b in pairs)
        print(f"    # {tuple(config)}: {gain:.3f}x ({evidence[config]})", flush=True)
        return gain

    best, gain = search(present, target.choices, speedup, together=target.together, prepare=prepare)
    cut = ", cut off by the minutes" if time.perf_counter() > stop else ""
    if gain < _WORTH:
        return f"    # {_shown(target.key)}: {tuple(present)} stays, best {gain:.3f}x{cut}"
    return f"    {_shown(target.key)}: {_shown(best)},  # {gain:.2f}x of {tuple(present)}: {evidence[best]}{cut}"


def _shown(value: Key | KernelConfig) -> str:
    """As a line of the table is written: defaults at the end are left out."""
    values = list(value)
    while values and values[-1] == value._field_defaults.get(value._fields[len(values) - 1]):
        values.pop()
    fields = [f'"{v}"' if isinstance(v, str) else str(v) for v in values]
    return f"{type(value).__name__}({', '.join(fields)})"


def main(kernels: str, device: str, minutes: float) -> int:
    names = kernels.split(",")
    if set(names) - set(KERNELS):
        print(f"pagewire bench --tune: expected some of {', '.join(KERNELS)}, got {kernels!r}")
        return 2
    if device == "cpu":
        print(
            "pagewire bench --tune: nothing to tune on a CPU: the table holds tile shapes of the Triton kernels on "
            "sm_80 and sm_90, which a CPU only interprets",
            file=sys.stderr,
        )
        return 1
    reason = backends(device)["triton"]
    if reason is not None:
        print(f"pagewire bench --tune: {reason}", file=sys.stderr)
        return 1
    stop = time.perf_counter() + 60 * minutes
    found = machines.describe(device)
    clock = Clock(device)
    memory = ColdMemory(device, machines.cold_bytes(device), machines.free_bytes(device) // 2)
    major, minor = torch.cuda.get_device_capability()
    print(f"# {found.device}, {found.clocks}, triton {found.triton}, {found.commit}, {found.date}")
    arch = 10 * major + minor
    with torch.inference_mode(), Compiler(arch) as compiler:
        for target in targets(names, arch):
            if time.perf_counter() > stop:
                print(f"    # {_shown(target.key)}: not reached in {minutes:g} minutes")
                continue
            print(f"    # {target.kernel} {_shown(target.key)}", flush=True)
            try:
                print(_tune(target, memory, clock, stop, compiler), flush=True)
            except DeviceLost as lost:
                print(f"    # {_shown(target.key)}: a CUDA fault ends the sweep at {lost}", flush=True)
                return 3
    return 0
