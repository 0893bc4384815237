"""Rehearses a go on a GPU without one: does any timed step wait for a compilation? python benches/rehearse.py

Everything is compiled ahead into an empty cache, as on the machine; then a fresh process walks each step through our
launchers and Triton's own C launcher over a stand-in libcuda. Launches are counted, nothing is computed, and what was
not in the cache is named. One line a step:

- compilations: ahead, those done; elsewhere, those waited for, kernels and C files: there must be none.
- host µs: CPU time per launch of a call that is made again, on this machine.
- s there: a model, not a measurement. Ahead: its CPU seconds here over --cores, at least the longest compilation. A
  timed step: its CPU seconds here and the timing it gives itself (cases times suite's or candidates times tune's
  seconds; contact, the smoke's, is only checked). Checks against the reference, the device's memory and the peers' own
  set-up are not in it. Tests: the compilations they need beyond the cache, at the mean cost of those done ahead.
- limit s: of the campaign's step (goes.py).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import goes
import peers
from standin import driver as standin

ROOT = Path(__file__).resolve().parents[1]
_AHEAD_LIMIT = 38.0  # seconds, of the step that sets a machine up
_CALLS = 10  # made again per case, for the host's time


@dataclass(frozen=True)
class Line:
    """A step. compilations: done ahead, or waited for. here, there, limit: seconds."""

    step: str
    launches: int
    compilations: int
    host_us: float | None
    here: float
    there: float
    limit: float

    def __str__(self) -> str:
        host = "" if self.host_us is None else f"{self.host_us:.1f}"
        over = "  OVER" if self.there > self.limit else ""
        return (
            f"{self.step:<14} {self.launches:>8} {self.compilations:>12} {host:>8} {self.here:>8.1f} "
            f"{self.there:>8.1f} {self.limit:>8.0f}{over}"
        )


_HEAD = f"{'step':<14} {'launches':>8} {'compilations':>12} {'host µs':>8} {'s here':>8} {'s there':>8} {'limit s':>8}"


def rehearse(
    steps: Sequence[str], jobs: int, cores: int, candidates: int, only: str = "", bundle: Path | None = None
) -> int:
    """How many things are wrong: compilations that a timed step waits for, calls that fail. Prints as it goes.

    Args:
        steps: suites, "tune", or "tests". only: of their cases, those whose name matches. bundle: of peers, of which
            vllm_triton/ is walked too.
    """
    print(f"{_HEAD}   ({cores} cores there)", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        standin.build(folder)
        environment = _environment(folder)
        if bundle is not None:
            environment |= peers.environment(bundle.resolve(), folder)
        chosen = ["--candidates", str(candidates), *(["--only", only] if only else [])]
        run = Rehearsal(environment, jobs, cores, chosen)
        suites = [step for step in steps if step != "tests"]
        for step in suites:
            run.ahead(step)
        for step in suites:
            run.walk(step)
        if "tests" in steps:
            run.tests()
    run.summary()
    return run.wrong


_AHEAD = ("-m", "pagewire.bench.ahead")


class Rehearsal:
    """The lines as they are found, and what is wrong."""

    def __init__(self, environment: dict[str, str], jobs: int, cores: int, chosen: list[str]) -> None:
        self.environment, self.jobs, self.cores, self.chosen = environment, jobs, cores, chosen
        self.wrong = 0
        self.there: dict[str, float] = {}  # step of the campaign -> seconds
        self._cpu, self._compilations = 0.0, 0

    def ahead(self, step: str) -> None:
        told = self._told(*_AHEAD, "--json", "--jobs", str(self.jobs), *self.chosen, step)
        self._cpu += told["cpu_seconds"]
        self._compilations += told["compilations"]
        there = max(told["cpu_seconds"] / self.cores, told["longest"])
        self.there["ahead"] = self.there.get("ahead", 0.0) + there
        name = f"ahead {step}"
        self._print(name, told["launches"], told["compilations"], None, told["wall_seconds"], there, _AHEAD_LIMIT)
        for of, why in told["failed"].items():
            print(f"    not compiled: {of}: {why}", flush=True)
            self.wrong += step != "tune"  # a candidate may be too much for the compiler

    def walk(self, step: str) -> None:
        told = self._told(str(Path(__file__).resolve()), "--walk", step, *self.chosen)
        there = self.there[_NAMES.get(step, step)] = told["cpu_seconds"] + told["timing_seconds"]
        waited = told["kernels"] + [f"{told['files']} C files"] * bool(told["files"])
        count = len(told["kernels"]) + told["files"]
        self._print(step, told["launches"], count, told["host_us"], told["seconds"], there, _limit(step))
        for text in waited:
            print(f"    waited for {text}", flush=True)
        for text in told["failed"]:
            print(f"    failed: {text}", flush=True)
        self.wrong += len(waited) + (len(told["failed"]) if step != "tune" else 0)

    def tests(self) -> None:
        """What the kernels' tests would compile beyond the cache: counted, not compiled ahead."""
        started = time.perf_counter()
        paths = [self.environment["PYTHONPATH"], str(Path(__file__).parent)]
        plugins = ("-p", "standin.count_plugin", "-p", "no:cacheprovider")
        told = _json(
            ["-m", "pytest", "-q", *plugins, "-m", "not slow", "tests/ops"],
            {**self.environment, "PYTHONPATH": os.pathsep.join(paths)},
        )
        here, count = time.perf_counter() - started, told["compilations"]
        there = self.there["tests"] = count * self._cpu / max(self._compilations, 1) / self.cores
        self._print("tests/ops", told["launches"], count, None, here, there, _limit("tests"))

    def summary(self) -> None:
        """The goes, a step with its seconds there, or with its bound (<) where none are known; ahead: of all suites
        together, more than any one go needs."""
        for go, seconds in goes.SECONDS.items():
            total, shown = 0.0, []
            for group in goes.steps(go, _PLAN):
                total += max(self.there.get(s.name, s.seconds) for s in group)
                shown.append(" | ".join(self._shown(s.name, s.seconds) for s in group))
            print(f"go {go}: {total:.0f} of {seconds} s: {', '.join(shown)}", flush=True)

    def _shown(self, name: str, bound: float) -> str:
        known = self.there.get(name)
        return f"{name} <{bound:.0f}" if known is None else f"{name} {known:.0f}"

    def _told(self, *command: str) -> dict[str, Any]:
        return _json(command, self.environment)

    def _print(self, *fields: Any) -> None:
        print(Line(*fields), flush=True)


_NAMES = {"contact": "smoke"}  # suite -> the campaign's step that runs it, where their names differ
_PLAN = goes.Plan(Path(os.devnull), Path(os.devnull), None, None, False, (), 16)


def _limit(step: str) -> float:
    """Seconds that a go of the campaign has for it, or the suite for itself."""
    name = _NAMES.get(step, step)
    planned = [s for go in goes.SECONDS for g in goes.steps(go, _PLAN) for s in g if s.name == name]
    if planned and step != "smoke":
        return planned[0].seconds
    from pagewire.bench import suites

    return 60 * suites.MINUTES[step, "cuda"]


def _environment(folder: Path) -> dict[str, str]:
    """An empty cache, the stand-in's libcuda and no interpreter."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "PAGEWIRE_"))}
    path = os.pathsep.join(p for p in (str(ROOT / "python"), os.environ.get("PYTHONPATH", "")) if p)
    added = {"TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    return {**kept, **added, **standin.environment(folder)}


def _json(command: Sequence[str], environment: dict[str, str]) -> dict[str, Any]:
    """The last line a Python process prints; its exit status may say that something in there failed."""
    done = subprocess.run([sys.executable, *command], env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    lines = done.stdout.splitlines()
    if not lines:
        raise SystemExit(f"rehearse: {' '.join(command)} ended with {done.returncode}")
    return json.loads(lines[-1])


def walk(step: str, candidates: int, only: re.Pattern | None) -> dict[str, Any]:
    """Every call of a step in this process, as its timing loop makes them; what had to be compiled, and the cost."""
    import torch
    import triton

    from pagewire.bench import ahead, pretend, suite, tune

    launches = standin.activate()
    cache = Path(os.environ["TRITON_CACHE_DIR"])
    kernels: list[str] = []
    failed: list[str] = []
    unfit: set[tuple[Any, Any]] = set()  # candidates: what fails for a case fails for the next

    def listen(*, src: Any, cache_hit: bool, **told: Any) -> None:
        if not cache_hit:
            kernels.append(f"{src.name} of {item.name}")

    triton.knobs.compilation.listener = listen
    memory = pretend.Blank("cpu")  # memory with addresses, as a device's would have
    entries = len(os.listdir(cache)) if cache.exists() else 0
    started, cpu, again, calls = time.perf_counter(), time.process_time(), 0.0, 0
    items = ahead.items(step, 90, candidates, only)
    with pretend.gpu(90), torch.inference_mode():
        for item in items:
            if item.config is not None and (item.target, item.config) in unfit:
                continue
            with item.table():
                try:
                    work, ours = pretend.prepared(item.case, memory)
                    for contender in (ours, *(pretend.triton_peers(work) if item.peers else ())):
                        pretend.call_each(work, contender)
                except Exception as error:
                    failed.append(f"{item.name}: {type(error).__name__}: {error}".splitlines()[0])
                    unfit.add((item.target, item.config))
                    continue
                before, at = launches(), time.process_time()
                for turn in range(_CALLS):
                    ours.call(turn % work.copies)
                again += time.process_time() - at
                calls += launches() - before
    timing = {"contact": 0.0, "tune": tune._SECONDS}.get(step, suite._SECONDS["cuda"])
    new = (len(os.listdir(cache)) if cache.exists() else 0) - entries
    return {
        "launches": launches(),
        "kernels": kernels,
        "files": new - len(kernels),
        "failed": failed,
        "host_us": 1e6 * again / max(calls, 1),
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
        "timing_seconds": timing * len(items),
    }


def main() -> int:
    parser = argparse.ArgumentParser("rehearse", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add(
        "--suites",
        default="contact,quick,tune",
        help="comma separated; tune is the sweep, tests counts what tests/ops would compile",
    )
    add("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="compilations at a time")
    add("--cores", type=int, default=16, help="of the machine that the seconds are predicted for")
    add("--candidates", type=int, default=38, help="of the sweep's first pass")
    add("--only", default="", metavar="REGEX", help="cases and candidates whose name matches")
    add("--peers", type=Path, metavar="BUNDLE", help="walk vLLM's Triton kernels in it too")
    add("--walk", metavar="STEP", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.walk:
        only = re.compile(args.only) if args.only else None
        print(json.dumps(walk(args.walk, args.candidates, only)), flush=True)
        return 0
    steps = args.suites.split(",")
    wrong = rehearse(steps, args.jobs, args.cores, args.candidates, args.only, args.peers)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
