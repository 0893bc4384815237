"""One case of the suites on one backend, for a profiler: `python -m pagewire.bench.one BACKEND CASE`.

    ncu --profile-from-start off python -m pagewire.bench.one cuda 'decode 32q1s4k H32/8 D128 P16 bf16'

A warm-up call, which compiles, then calls on cold buffers with nothing else between the profiler's start and stop. The
result is not checked here: `pagewire bench` does that.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys

import torch

from pagewire import registry
from pagewire.bench import machine, suite, suites
from pagewire.bench.cases import Case
from pagewire.bench.cold_memory import ColdMemory
from pagewire.bench.work import Contender, DoesNotFit
from pagewire.errors import BackendError

# the stream sleeps while the calls are queued, about 1 ms for each: launch gaps stay out of the events' times
_CYCLES_PER_CALL = 2_000_000


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("pagewire.bench.one", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("backend", choices=[b.name for b in registry.BACKENDS])
    add("case", metavar="CASE", help="an id as `pagewire bench --list` prints it, or a regex")
    add("--calls", type=int, default=10)
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    return parser


def main(argv: list[str] | None = None) -> int:
    """0: the calls were made; 1: the machine or the backend does not take them; 2: bad arguments, or not one case."""
    args = _parser().parse_args(argv)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        return _say("--device cuda: torch sees no CUDA device here", 1)
    if args.calls < 1:
        return _say(f"--calls: expected at least 1, got {args.calls}", 2)
    try:
        case = find(args.case, device)
    except (ValueError, re.error) as error:
        return _say(str(error), 2)
    try:
        with torch.inference_mode():
            median_us = run(args.backend, case, device, args.calls)
    except (BackendError, DoesNotFit) as error:
        return _say(str(error), 1)
    time = "" if median_us is None else f", median {median_us:.1f} µs of {args.calls} calls"
    print(f"{case.id} on {args.backend}: {case.bytes} bytes{time}")
    return 0


def find(text: str, device: str) -> Case:
    """The one case of all suites whose id is `text`, else matches it.

    Raises:
        ValueError: none or several, which are named.
    """
    cases = {case.id: case for name in suites.SUITES for case in suites.cases(name, device)}
    if text in cases:
        return cases[text]
    matches = [case for name, case in cases.items() if re.search(text, name)]
    if len(matches) != 1:
        names = "".join(f"\n  {case.id}" for case in matches)
        raise ValueError(f"{text!r}: expected one case, {len(matches)} match{names}")
    return matches[0]


def run(backend: str, case: Case, device: str, calls: int) -> float | None:
    """Median µs of the calls by CUDA events; None on a CPU."""
    limit = int(suite.MEMORY_SHARE * machine.free_bytes(device))
    work = suite._work(case, ColdMemory(device, machine.cold_bytes(device), limit))
    contender = work.ours(backend)
    contender.once(0)
    # copy 0 is warm; with one set of buffers there is no other
    copies = [(1 + at) % work.copies for at in range(calls)]
    if device == "cuda":
        return profiled(contender, copies)
    for copy in copies:
        contender.once(copy)
    return None


def profiled(contender: Contender, copies: list[int]) -> float:
    """Median µs. What the stream does before the profiler starts is not profiled."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in copies]
    torch.cuda.synchronize()
    torch.cuda._sleep(_CYCLES_PER_CALL * len(copies))
    torch.cuda.cudart().cudaProfilerStart()
    for copy, (first, last) in zip(copies, events, strict=True):
        first.record()
        contender.once(copy)
        last.record()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()
    times: list[float] = [first.elapsed_time(last) * 1e3 for first, last in events]
    return statistics.median(times)


def _say(text: str, code: int) -> int:
    print(f"pagewire.bench.one: {text}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
