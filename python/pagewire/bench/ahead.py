"""Compiles ahead what suites and sweeps will launch, without a device: python -m pagewire.bench.ahead quick tune

Every call a case makes is walked with tensors that hold nothing; each distinct compilation then runs in a process of
its own and leaves its result, kernel and C launcher, in Triton's cache (TRITON_CACHE_DIR), where the real launch finds
it. No device is looked for: it can run before one is at hand, and beside one that is timing nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.nvidia import driver as nvidia
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from pagewire import registry
from pagewire.bench import forks, machine, suites, tune
from pagewire.bench.cases import Case
from pagewire.bench.pretend import Blank, NoDevice, call_each, gpu, prepared, triton_peers
from pagewire.bench.suite import _first_line
from pagewire.kernels.tuning import KernelConfig, Key

STEPS = (*suites.SUITES, "tune")
# the longest first, so that no long one is left alone at the end
_LONGEST = ("_prefill_kernel", "_decode_kernel", "_convert_kernel")


class Item(NamedTuple):
    """A walk through calls: a case, or a case under a candidate row of the tuning table."""

    name: str
    case: Case
    target: tune.Target | None = None
    config: KernelConfig | None = None
    peers: bool = False  # timed beside it

    @contextmanager
    def table(self) -> Iterator[None]:
        """The tuning table as the item wants it."""
        if self.target is None or self.config is None:
            yield
            return
        with tune.row(self.target, self.config):
            yield


class Work(NamedTuple):
    """One distinct compilation: who needs it first, and how to do it."""

    kernel: str
    needed_by: str
    compile: Callable[[], Any]


class Report(NamedTuple):
    launches: int
    compilations: int
    cpu_seconds: float
    wall_seconds: float
    longest: float  # CPU seconds of one compilation: no number of cores makes it shorter
    failed: dict[str, str]  # "kernel of item" -> why


def items(step: str, arch: int, candidates: int, only: re.Pattern[str] | None = None) -> list[Item]:
    """What a suite or the sweep walks through.

    Args:
        candidates: of the sweep's first pass, in the order in which it tries them.
    """
    if step == "tune":
        tried = tune.first_candidates(tune.KERNELS, arch, candidates)
        found = [item for target, config in tried for item in of_candidate(target, config)]
    else:
        peers = step != "contact"  # which is ours alone
        found = [Item(case.id, case, peers=peers) for case in suites.cases(step, "cuda")]
    return [item for item in found if only is None or only.search(item.name)]


def of_candidate(target: tune.Target, config: KernelConfig) -> list[Item]:
    return [Item(f"{target.kernel} {tuple(config)} {c.id}", c, target, config) for c in target.cases]


def walk(wanted: Iterable[Item], arch: int) -> tuple[int, list[Work], dict[str, str]]:
    """(launches, distinct compilations in the order of first need, calls that failed and why); nothing is compiled."""
    launches = 0
    failed: dict[str, str] = {}
    found: dict[tuple[str, str], Work] = {}
    original = JITFunction.run

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        nonlocal launches
        launches += 1

        def compile() -> Any:
            triton.knobs.runtime.jit_cache_hook = None
            return original(self, *args, grid=grid, warmup=True, **options)

        def note(*, key: str, **told: Any) -> bool:
            work = Work(self.__name__, item.name, compile)
            found.setdefault((self.__name__, key), work)
            return True  # do not compile

        triton.knobs.runtime.jit_cache_hook = note
        original(self, *args, grid=grid, warmup=True, **options)

    JITFunction.run = run
    try:
        # one memory a walk, as a suite has: cases take their caches from the same memory
        memory = Blank("meta")
        with gpu(arch), torch.inference_mode():
            for item in wanted:
                try:
                    with item.table():
                        work, ours = prepared(item.case, memory)
                        call_each(work, ours)
                        for peer in triton_peers(work) if item.peers else ():
                            call_each(work, peer)
                except Exception as error:  # of one call: the others are compiled
                    failed[f"a call of {item.name}"] = _first_line(error)
    finally:
        JITFunction.run = original
        triton.knobs.runtime.jit_cache_hook = None
    return launches, list(found.values()), failed


def compile_all(wanted: Sequence[Item], arch: int, jobs: int, seconds: float | None = None) -> Report:
    """Compiles what the items launch, `jobs` at a time, for at most `seconds`."""
    started, cpu = time.monotonic(), time.process_time()
    launches, works, failed = walk(wanted, arch)
    walked = time.process_time() - cpu
    works.sort(key=lambda w: _LONGEST.index(w.kernel) if w.kernel in _LONGEST else len(_LONGEST))
    tasks = [partial(_compile, work) for work in works]
    stop = float("inf") if seconds is None else started + seconds
    results = forks.run_all(tasks, jobs, stop)
    for work, result in zip(works, results, strict=True):
        error = "not started in time" if result is None else result.error
        if error:
            failed[f"{work.kernel} of {work.needed_by}"] = error
    costs = [result.cpu_seconds for result in results if result is not None]
    return Report(
        launches, len(works), walked + sum(costs), time.monotonic() - started, max(costs, default=0.0), failed
    )


def _compile(work: Work) -> None:
    kernel = work.compile()
    if driver.active.utils is not None:
        nvidia.CudaLauncher(kernel.src, kernel.metadata)  # Triton 3.6: a C file per signature


def activate(arch: int) -> str:
    """Makes the device that is not there Triton's. Returns what cannot be built ahead here, or ""."""
    try:
        nvidia.libcuda_dirs()
    except (AssertionError, OSError):
        driver.set_active(NoDevice(arch))
        return "no libcuda.so.1 here: Triton's C launchers are left to the first launch"
    driver.set_active(NoDevice(arch, nvidia.CudaUtils()))
    return ""


def _serve(arch: int, jobs: int) -> int:
    """Requests of `standby.Compiler` from stdin, an answer a line, until stdin ends."""
    for line in sys.stdin:
        request = json.loads(line)
        key = Key(*request["key"])
        (target,) = (t for t in tune.targets([request["kernel"]], arch) if t.key == key)
        answer = []
        wanted = []
        for values in request["configs"]:
            wanted += of_candidate(target, KernelConfig(*values))
        report = compile_all(wanted, arch, jobs, request["seconds"])
        for values in request["configs"]:
            mine = f" of {target.kernel} {tuple(values)} "
            answer.append(next((why for of, why in report.failed.items() if mine in of), ""))
        print(json.dumps({"errors": answer, "compilations": report.compilations}), flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("pagewire.bench.ahead", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("steps", nargs="*", metavar="STEP", help=f"some of {', '.join(STEPS)}")
    add("--arch", type=int, default=90, help="compute capability, 90 for sm_90")
    add("--jobs", type=int, default=machine.cores(), help="processes; default: the cores")
    add("--candidates", type=int, default=tune.CANDIDATES, help="of the sweep's first pass")
    add("--only", type=re.compile, metavar="REGEX", help="cases and candidates whose name matches")
    add("--json", action="store_true", help="a line of JSON per step instead of text")
    add("--serve", action="store_true", help="compile what standby.Compiler asks for")
    return parser


def main(argv: Sequence[str]) -> int:
    """0: all compiled; 1: something did not, and is named; 2: bad arguments."""
    parser = _parser()
    args = parser.parse_args(argv)
    unknown = set(args.steps) - set(STEPS)
    if unknown or not (args.steps or args.serve):
        parser.error(f"expected some of {', '.join(STEPS)}, got {' '.join(args.steps) or 'nothing'}")
    if registry.interpreting():
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing")
    missing = activate(args.arch)
    if missing:
        print(missing, file=sys.stderr)
    if args.serve:
        return _serve(args.arch, args.jobs)
    red = False
    for step in args.steps:
        wanted = items(step, args.arch, args.candidates, args.only)
        report = compile_all(wanted, args.arch, args.jobs)
        red |= bool(report.failed)
        if args.json:
            print(json.dumps({"step": step, **report._asdict()}), flush=True)
            continue
        print(
            f"{step:<8} {report.launches:>6} launches {report.compilations:>5} compilations "
            f"{report.cpu_seconds:>7.1f} CPU s {report.wall_seconds:>7.1f} s",
            flush=True,
        )
        for name, why in report.failed.items():
            print(f"    {name}: {why}", flush=True)
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
