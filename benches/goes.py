"""What the three goes of a campaign do: lists of steps, in the order of what a short go should not miss.

A go is what one loan of a machine allows: 15 minutes in all, the machine's start and idling included, which is why
everything that can be done without it is done before (benches/README.md, "The campaign").
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from steps import State, Step

ROOT = Path(__file__).resolve().parents[1]
SECONDS = {1: 290, 2: 240, 3: 200}  # of a go
DRY = 4  # times as long may a dry run take
FAULT = 3  # the suite's exit status when a contender has taken the device with it: it goes on behind that case
# no flex: its compilations cost a minute
PEERS = "sdpa-dense,sdpa-cudnn,flashinfer-cc,flashinfer-tc,flashinfer-fa2,flash_attn3,vllm-triton,index-select,memcpy"
# what runs on the device; neither compile-only tests nor those of the emulation, the bench and this file
TESTS = (
    "tests/ops",
    "tests/cuda/test_attention_cuda.py",
    "tests/cuda/test_poison.py",
    "tests/kernels/test_attention_corners.py",
    "tests/kernels/test_tables.py",
)
PROFILED = {  # step -> backend, case: what each kernel is up against, from its own counters
    "ncu-decode-triton": ("triton", "decode 32q1s4k H32/8 D128 P16 bf16"),
    "ncu-decode-cuda": ("cuda", "decode 32q1s4k H32/8 D128 P16 bf16"),
    "ncu-prefill": ("triton", "prefill q8k H32/8 D128 P16 bf16"),
    "ncu-pack": ("cuda", "pack 2kt L32 H8>1 D128 P16 NHD bf16"),
}
_AHEAD = ("env", "PAGEWIRE_HOPPER=2")  # with what is not the default
_OF_AHEAD = "^(prefill|mixed)"
_SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "WarpStateStats", "InstructionStats")


@dataclass(frozen=True)
class Plan:
    """How a campaign was asked to run, and what is there."""

    out: Path
    scratch: Path
    peers: Path | None
    objects: Path | None
    dry: bool  # every step at its smallest, on a CPU
    red: tuple[str, ...]  # tests that the last go left red
    cores: int
    python: str = sys.executable

    @property
    def device(self) -> str:
        return "cpu" if self.dry or self.no_gpu else "cuda"

    @property
    def no_gpu(self) -> str | None:
        if self.dry:
            return "a dry run uses no GPU"
        return None if shutil.which("nvidia-smi") else "no nvidia-smi: there is no GPU here"

    @property
    def site(self) -> Path:
        """Where the peers are unpacked to."""
        return self.scratch / "site"


def steps(go: int, plan: Plan) -> list[tuple[Step, ...]]:
    """Groups of steps; those of a group run side by side, one group after the other."""
    quick = _quick(go, plan)
    goes: dict[int, list[Step | tuple[Step, ...]]] = {
        1: [_setup(go, plan), (_info(plan), _smoke(plan)), quick, _tests(plan), *_profiles(plan)],
        2: [_setup(go, plan), _red(plan), _hopper(plan), _tune(plan), quick],
        3: [_setup(go, plan), quick, _hopper(plan), _racecheck(plan), _plot(go, plan)],
    }
    groups = [group if isinstance(group, tuple) else (group,) for group in goes[go]]
    if plan.dry:  # on a machine that has other things to do
        groups = [tuple(replace(s, seconds=DRY * s.seconds) for s in group) for group in groups]
    return groups


def _setup(go: int, plan: Plan) -> tuple[Step, ...]:
    """Side by side: what a bare machine lacks."""
    build = ["csrc/build_cuda.py", "--arch", "native"]
    build += ["--objects", str(plan.objects)] if plan.objects else []
    suites = {1: ("contact", "quick"), 2: ("quick", "tune"), 3: ("quick", "smoke")}[go]
    ahead = ["-m", "pagewire.bench.ahead", "--jobs", str(max(1, plan.cores - 3))]
    ahead += ["--only", "^merge", "smoke"] if plan.dry else ["--arch", _arch(), *suites]
    unpack = ("benches/peers.py", str(plan.peers), str(plan.site))
    no_peers = None if plan.peers else "no --peers bundle was given"
    hopper = ("-m", "pagewire.bench.ahead", "--jobs", "3", "--arch", _arch(), "--only", _OF_AHEAD, "quick")
    no_hopper = plan.no_gpu or _no_triton()
    return (
        *((Step("hopper-ahead", (*_AHEAD, plan.python, *hopper), 38, no_hopper, always=True),) if go > 1 else ()),
        Step("peers", (plan.python, *unpack), 30, no_peers, always=True),
        Step("build", (plan.python, *build), 30, _no_build(plan), always=True),
        Step("host", (plan.python, "csrc/build_host.py"), 30, _no_host(plan), always=True),
        Step("ahead", (plan.python, *ahead), 38, _no_triton(), always=True),
    )


def _info(plan: Plan) -> Step:
    return Step("info", (plan.python, "-m", "pagewire", "info"), 20, tail=40)


def _smoke(plan: Plan) -> Step:
    least = ("--backends", "cpu", "--ops", "decode,append", "--only", "D64", "--seconds", "110")
    chosen = least if plan.dry else ("--seconds", "26")
    command = ("benches/smoke.py", "--device", plan.device, "--jobs", str(plan.cores), *chosen)
    missing = None if plan.dry else plan.no_gpu
    return Step("smoke", (plan.python, *command), 30, missing, tail=120)


def _quick(go: int, plan: Plan) -> Step:
    """The quick suite into a file of its go's own, for a little less than the step's seconds."""
    seconds = 60  # an H200 took 39 to 41 for all cases and peers
    least = ("--suite", "smoke", "--minutes", "0.5", "--threads", "1")
    suite = ("--suite", "quick", "--minutes", f"{(seconds - 10) / 60:.2f}", "--peers", PEERS)
    csv = ("--csv", str(plan.out / f"quick-{go}.csv"))
    command = (*_bench(plan), *(least if plan.dry else suite), *csv)
    return Step("quick", command, seconds, restart=FAULT, tail=300)


def _bench(plan: Plan) -> tuple[str, ...]:
    return (plan.python, "-m", "pagewire", "bench", "--device", plan.device)


def _tests(plan: Plan) -> Step:
    """Every worker takes what is next: a worker that sees a CUDA fault ends (tests/cuda_fault.py)."""
    chosen = ("tests/bench/test_cases.py",) if plan.dry else TESTS
    return Step("tests", (*_pytest(plan), *chosen), 105, _no_pytest(), tail=400)


def _pytest(plan: Plan) -> tuple[str, ...]:
    workers = ("-n", str(plan.cores), "--dist", "load") if has("xdist") and not plan.dry else ()
    # named: what is red is the next go's, even if this one is cut off
    return (plan.python, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", "-p", "named", *workers)


def _red(plan: Plan) -> Step:
    missing = _no_pytest() or (None if plan.red else "no test was red")
    return Step("red", (*_pytest(plan), *plan.red), 40, missing, tail=200)


def _profiles(plan: Plan) -> list[Step]:
    """Clocks as they are: the figures are shares of what the device does just then."""
    ncu = shutil.which("ncu")
    no_ncu = plan.no_gpu or (None if ncu else "ncu is not on the PATH")
    flags = ("--profile-from-start", "off", "--clock-control", "none", "--launch-count", "2")
    sections = tuple(word for name in _SECTIONS for word in ("--section", name))
    profiler = (ncu or "ncu", *flags, *sections, plan.python, "-m", "pagewire.bench.one")
    return [
        Step(name, (*profiler, *what), 14, no_ncu or _no_backend(what[0], plan), tail=150)
        for name, what in PROFILED.items()
    ]


def _hopper(plan: Plan) -> Step:
    """What has to be asked for, checked and timed on the suite's cases beside FlashAttention."""
    chosen = ("--suite", "quick", "--only", _OF_AHEAD, "--peers", "flash_attn3", "--minutes", "0.45")
    missing = plan.no_gpu or _no_backend("triton", plan)
    return Step("hopper", (*_AHEAD, *_bench(plan), *chosen), 32, missing, tail=60)


def _tune(plan: Plan) -> Step:
    command = (*_bench(plan), "--tune", "decode,prefill", "--minutes", "1.1")
    missing = plan.no_gpu and f"tuning: {plan.no_gpu}" or _no_backend("triton", plan)
    return Step("tune", command, 70, missing, tail=200)


def _racecheck(plan: Plan) -> Step:
    tool = shutil.which("compute-sanitizer")
    missing = plan.no_gpu or (None if tool else "compute-sanitizer is not on the PATH")
    smallest = (*_bench(plan), "--suite", "smoke", "--peers", "none", "--minutes", "0.6")
    command = (tool or "compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "9", *smallest)
    return Step("racecheck", command, 50, missing, tail=30)


def _plot(go: int, plan: Plan) -> Step:
    files = [str(plan.out / f"quick-{n}.csv") for n in range(1, go + 1)]
    missing = None if has("matplotlib") else "matplotlib is not installed (pip install 'pagewire[bench]')"
    command = (plan.python, "benches/plot.py", *files, "--out", str(plan.out))
    return Step("plot", command, 20, missing, always=True)


def red_tests(states: dict[str, State]) -> tuple[str, ...]:
    """The node ids that were named in the go before."""
    tail = "\n".join(states[name].tail for name in ("1 tests", "2 red") if name in states)
    names = [line.split(" - ")[0].split(maxsplit=1) for line in tail.splitlines()]
    found = [words[1] for words in names if len(words) == 2 and words[0] in ("FAILED", "ERROR")]
    return tuple(dict.fromkeys(found))


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _no_pytest() -> str | None:
    return None if has("pytest") else "pytest is not installed"


def _no_triton() -> str | None:
    return None if has("triton") else "triton is not installed: nothing is compiled ahead, and nothing of it runs"


def _no_backend(name: str, plan: Plan) -> str | None:
    """The cuda backend is there once its step has built it."""
    if name == "cuda":
        reason = _no_build(plan)
        return None if reason is None or has("pagewire._cuda") else reason
    return None if has("triton") else "triton is not installed"


def _no_build(plan: Plan) -> str | None:
    if plan.no_gpu:
        return f"nothing is built: {plan.no_gpu}"
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    if not (os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")):
        return "no nvcc on the PATH or in CUDA_HOME: the cuda backend is left out"
    return None if has("pybind11") else "pybind11 is not installed: the cuda backend is left out"


def _no_host(plan: Plan) -> str | None:
    if plan.no_gpu:
        return f"nothing is built: {plan.no_gpu}"
    if not shutil.which(os.environ.get("CXX", "c++").split()[0]):
        return "no C++ compiler on the PATH or in CXX: repeated calls go through Triton, which takes longer"
    return None if has("pybind11") else "pybind11 is not installed: repeated calls go through Triton"


def _arch() -> str:
    """Of the first GPU; 90 where nvidia-smi does not say."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader", "-i", "0"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "90"
    return told.split()[0].replace(".", "") if told.split() else "90"
