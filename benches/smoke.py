"""Twenty seconds that say what runs: python benches/smoke.py [--device cuda] [--backends triton,cuda]

Every op on every kind of row once (the suite "contact"), checked and not timed, each (backend, op) in a process of its
own. A line as soon as it is known: ok, RED, or -- for what a backend refuses. A process that dies takes one case with
it, the next one goes on behind it; one that is still at it after --seconds is ended, and named.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OPS = ("decode", "prefill", "mixed", "append", "pack", "unpack", "merge", "graph")
_FAULT = 3  # a child's exit status: the device has left it in the middle of its cases
_REPLAYS = 3


# ------------------------------------------------------------------------------------------ the parent


class Smoke:
    """Runs the children and prints what they say. stop: `time.monotonic()` after which none is left."""

    def __init__(self, device: str, stop: float, only: str) -> None:
        self.device, self.stop, self.only = device, stop, only
        self.counts: Counter[str] = Counter()
        self._printing = threading.Lock()

    def run(self, backend: str, op: str) -> None:
        """All cases of an op on a backend, in as many processes as die on the way, and one."""
        first, of = 0, 1
        while first < of:
            if time.monotonic() > self.stop:
                text = f"{of - first} more not reached in time" if first else "not started in time"
                self._say("RED", backend, op, "", text)
                return
            said, death = self._child(backend, op, first)
            if death is None:
                return
            case = said.get("starts", "")
            self._say("RED", backend, op, case, death)
            if not case:  # it died before its cases: the next one would too
                return
            first, of = said["number"] + 1, said["of"]

    def _child(self, backend: str, op: str, first: int) -> tuple[dict[str, Any], str | None]:
        """(the last case that a process began, how the process died, or None)."""
        command = [sys.executable, "-W", "ignore", __file__, "--device", self.device]
        command += ["--one", backend, op, str(first), "--only", self.only]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment()
        )
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(max(self.stop - time.monotonic(), 0.0), end)
        timer.start()
        errors: list[str] = []
        drained = threading.Thread(target=lambda: errors.extend(_lines(process.stderr)))
        drained.start()
        begun: dict[str, Any] = {}
        for line in _lines(process.stdout):
            told = _told(line)
            if "starts" in told:
                begun = told
            elif told:
                self._say(told["mark"], backend, op, told["case"], told["text"])
        code = process.wait()
        timer.cancel()
        drained.join()
        if code == 0:
            return begun, None
        if late.is_set():
            return begun, "still at it when the time was over"
        last = next((text for text in reversed(errors) if text.strip()), "")
        return begun, f"its process died with {code} {last.strip()[:160]}".strip()

    def _say(self, mark: str, backend: str, op: str, case: str, text: str) -> None:
        with self._printing:
            self.counts[mark] += 1
            print(f"{mark:<3} {backend:<9} {op:<7} {case:<52} {text}", flush=True)


def _lines(stream: Any) -> Iterator[str]:
    with stream:
        yield from stream


def _told(line: str) -> dict[str, Any]:
    """What a child says; {} for what something else in it has printed."""
    try:
        told = json.loads(line)
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def _environment() -> dict[str, str]:
    path = os.pathsep.join(p for p in (str(ROOT / "python"), os.environ.get("PYTHONPATH", "")) if p)
    return {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path}


# ------------------------------------------------------------------------------------------ a child


def child(device: str, backend: str, op: str, first: int, only: str) -> int:
    """The cases of an op from number `first`, a line of JSON before and after each."""
    import re

    import torch

    from pagewire.bench import suites
    from pagewire.bench.cold_memory import ColdMemory

    groups = ("decode", "prefill") if op == "graph" else (op,)
    cases = [c for c in suites.cases("contact", device) if c.group in groups]
    cases = [c for c in cases if re.search(only, c.id)]
    if op == "graph":
        if device == "cpu":
            _tell("--", "", "there are no CUDA graphs on a CPU")
            return 0
        cases = [c for c in cases if c.head_dim == 128 and c.page_size >= 16]
    memory = ColdMemory(device, 1 << 20, 1 << 30)
    with torch.inference_mode():
        for number, case in enumerate(cases):
            if number < first:
                continue
            print(json.dumps({"starts": case.id, "number": number, "of": len(cases)}), flush=True)
            mark, text = _outcome(device, backend, case, memory, graph=op == "graph")
            if device == "cuda" and mark == "RED" and _lost():
                print(f"{text} (the device is lost to this process)", file=sys.stderr, flush=True)
                os._exit(_FAULT)  # destructors that call CUDA would abort
            _tell(mark, case.id, text)
    return 0


def _tell(mark: str, case: str, text: str) -> None:
    print(json.dumps({"mark": mark, "case": case, "text": text}), flush=True)


def _outcome(device: str, backend: str, case: Any, memory: Any, *, graph: bool) -> tuple[str, str]:
    """(ok, RED or --; the error and the seconds of the first call, or why not)."""
    from dataclasses import replace

    import pagewire as pw
    from pagewire.bench.suite import _first_line, _work
    from pagewire.errors import BackendError

    seconds: list[float] = []
    try:
        work = _work(case, memory)
        ours = work.ours(backend)

        def call(copy: int) -> Any:
            started = time.perf_counter()
            result = ours.call(copy)
            _synchronize(device)
            seconds.append(time.perf_counter() - started)
            return result

        verdict = work.check(replace(ours, call=call))
        pw.check_errors()
        if graph and verdict.ok:
            verdict = _replayed(ours)
            pw.check_errors()
    except BackendError as refusal:
        return "--", str(refusal).splitlines()[0]
    except Exception as error:
        return "RED", _first_line(error)
    figures = f"error {verdict.error:.1e}, first call {seconds[0]:.2f} s"
    return ("ok", figures) if verdict.ok else ("RED", f"{verdict.reason}; {figures}")


def _replayed(ours: Any) -> Any:
    """A call captured into a CUDA graph: every replay writes what the call itself wrote."""
    import torch

    from pagewire.bench.work import Verdict

    eager = ours.call(0).double()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ours.call(0)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = ours.call(0)
    worst = 0.0
    for _ in range(_REPLAYS):
        out.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        error = float((out.double() - eager).norm() / eager.norm())
        if not error <= 1e-3:  # NaN is not; partial sums may come in another order
            return Verdict(False, error, f"a replay differs by {error:.1e} from the call")
        worst = max(worst, error)
    return Verdict(True, worst)


def _synchronize(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def _lost() -> bool:
    """Whether an error stays with this process's CUDA context."""
    try:
        _synchronize("cuda")
    except Exception:
        return True
    return False


def main(argv: Sequence[str]) -> int:
    """0: nothing is RED; 1: something is."""
    parser = argparse.ArgumentParser("smoke", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--backends", default="triton,cuda", help="comma separated")
    add("--ops", default=",".join(OPS), help="comma separated")
    add("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes at a time")
    add("--seconds", type=float, default=60.0, help="for all of it")
    add("--only", default="", metavar="REGEX", help="cases whose id matches")
    add("--one", nargs=3, metavar=("BACKEND", "OP", "FIRST"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        backend, op, first = args.one
        return child(args.device, backend, op, int(first), args.only)
    unknown = set(args.ops.split(",")) - set(OPS)
    if unknown:
        parser.error(f"--ops: expected some of {', '.join(OPS)}, got {', '.join(sorted(unknown))}")
    started = time.monotonic()
    smoke = Smoke(args.device, started + args.seconds, args.only)
    todo = [(backend, op) for op in args.ops.split(",") for backend in args.backends.split(",")]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda both: smoke.run(*both), todo))  # an exception in there is ours
    n = smoke.counts
    seconds = time.monotonic() - started
    print(f"smoke: {n['ok']} ok, {n['--']} refused, {n['RED']} RED in {seconds:.1f} s")
    return 1 if n["RED"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
