"""The whole campaign on a machine with a GPU, no network and minutes at a time: python benches/campaign.py --out DIR

It works from a plain source tree. Every step has a limit of its own and leaves its figures as it goes; what was done is
not done again when the same folder (or a copy of it, --resume) is given to the next go. benches/README.md explains the
files. Nothing but the standard library is needed to start it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOG_BYTES = 12 << 20  # machines that hand files back have limits: the middle of a longer log goes
FILES = (
    "campaign.json", "campaign.log", "summary.md", "quick.csv", "full.csv", "tune.txt", "roofline.png", "ratios.png",
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One command. missing: why it cannot run here, or None. minutes: its limit. tail: lines for the summary."""

    name: str
    command: tuple[str, ...]
    minutes: float
    missing: str | None = None
    output: str | None = None  # a file that gets the command's output besides the log
    tail: int = 12
    always: bool = False  # repeated in every go: it is short, and reads what the others left


@dataclass
class State:
    """What happened to a step: done, failed, cut (the minutes were over: the next go continues it) or skipped."""

    status: str
    reason: str = ""
    seconds: float = 0.0
    tail: str = ""


def main() -> int:
    options = _options()
    stop = time.monotonic() + 60 * options.minutes
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    if options.resume is not None and options.resume != out:
        for name in FILES:
            if (options.resume / name).exists():
                shutil.copyfile(options.resume / name, out / name)
    states = _load(out)
    environment = _environment(options, out)
    for step in _steps(options, out):
        if options.steps and step.name not in options.steps:
            continue
        before = states.get(step.name)
        finished = before is not None and before.status in ("done", "failed")
        if before is not None and finished and not step.always and step.name not in options.again:
            print(f"{step.name}: {before.status} in an earlier go")
            continue
        states[step.name] = _run(step, out, environment, stop)
        state = states[step.name]
        print(f"{step.name}: {state.status} {state.reason} ({state.seconds:.0f} s)", flush=True)
        _save(out, states)
    _trim(out / "campaign.log")
    wrong = [name for name, state in states.items() if state.status == "failed"]
    cut = [name for name, state in states.items() if state.status == "cut"]
    print(f"{out}: failed {wrong or 'nothing'}, to be continued {cut or 'nothing'}")
    return 1 if wrong else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser("campaign", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for everything: at most 8 files")
    add("--resume", type=Path, help="an earlier go's folder, if it is not --out itself")
    add("--minutes", type=float, default=9.0, help="of this go")
    add("--peers", type=Path, help="bundle of peers to unpack (benches/README.md)")
    add("--scratch", type=Path, default=Path("/tmp/pagewire-campaign"), help="where it is unpacked")
    add("--tune", default="decode,prefill", help="kernels to tune; empty for none")
    add("--steps", type=lambda text: text.split(","), default=[], help="only these steps")
    add(
        "--again", type=lambda text: text.split(","), default=[], help="repeat these finished steps"
    )
    add("--commit", default="", help="what the CSV says where there is no git")
    add(
        "--dry-run",
        action="store_true",
        help="every step at its smallest, on a CPU; nothing is built",
    )
    options = parser.parse_args()
    for name in ("out", "resume", "peers", "scratch"):  # the steps run in the source tree
        given = getattr(options, name)
        setattr(options, name, given.resolve() if given is not None else None)
    return options


def _steps(options: argparse.Namespace, out: Path) -> list[Step]:
    """In order of what a short go should not miss: a step that is cut does not keep the later ones from the next go."""
    python, dry = sys.executable, options.dry_run
    gpu = None if dry or shutil.which("nvidia-smi") else "no nvidia-smi: there is no GPU here"
    no_gpu = "a dry run uses no GPU" if dry else gpu
    device = "cpu" if dry or gpu else "cuda"
    bench = (python, "-m", "pagewire", "bench", "--device", device)
    smallest = ("--suite", "smoke", "--minutes", "0.5", "--threads", "1")
    quick = smallest if dry else ("--suite", "quick")
    tests = (
        ("tests/bench/test_cases.py",)
        if dry
        else (
            "tests/ops",
            "tests/cuda/test_attention_cuda.py",
            "tests/core",
            "tests/kernels",
            "tests/bench",
        )
    )
    workers = ("-n", "4") if _has("xdist") and not dry else ()
    sanitizer = shutil.which("compute-sanitizer")
    sanitized = (*bench, *smallest, "--peers", "none")
    no_sanitizer = no_gpu or (None if sanitizer else "compute-sanitizer is not on the PATH")
    tuned = options.tune or "none"
    return [
        Step("info", (python, "-m", "pagewire", "info"), 2, tail=30),
        Step("peers", _unpack_command(options), 3, None if options.peers else "no --peers bundle was given"),
        Step("build", (python, "setup.py", "build_ext", "--inplace"), 5, _no_build(dry)),
        Step("quick", (*bench, *quick, "--csv", str(out / "quick.csv")), 4, tail=200),
        Step(
            "tests",
            (python, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", *workers, *tests),
            6,
            None if _has("pytest") else "pytest is not installed",
        ),
        Step(
            "memcheck",
            (sanitizer or "", "--tool", "memcheck", "--error-exitcode", "9", *sanitized),
            3,
            no_sanitizer,
        ),
        Step(
            "racecheck",
            (sanitizer or "", "--tool", "racecheck", "--error-exitcode", "9", *sanitized),
            3,
            no_sanitizer,
        ),
        Step(
            "tune",
            (*bench, "--tune", tuned, "--minutes", "6"),
            7,
            "no kernel was named with --tune" if not options.tune else no_gpu and f"tuning: {no_gpu}",
            "tune.txt",
            tail=100,
        ),
        Step(
            "full",
            (*bench, "--suite", "full", "--minutes", "8", "--csv", str(out / "full.csv")),
            9,
            no_gpu and f"the full suite: {no_gpu}",
            tail=400,
        ),
        Step(
            "plot",
            (python, "benches/plot.py", *(str(out / n) for n in ("quick.csv", "full.csv")), "--out", str(out)),
            2,
            None if _has("matplotlib") else "matplotlib is not installed (pip install 'pagewire[bench]')",
            always=True,
        ),
    ]  # fmt: skip


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _no_build(dry: bool) -> str | None:
    if dry:
        return "a dry run builds nothing"
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        return "no C++ compiler is on the PATH"
    return (
        None
        if _has("pybind11") and _has("setuptools")
        else "pybind11 or setuptools is not installed"
    )


def _environment(options: argparse.Namespace, out: Path) -> dict[str, str]:
    """The source tree first, then the unpacked peers, whether this go unpacks them or an earlier one did."""
    site = options.scratch / "site"
    paths = [str(ROOT / "python"), str(site), os.environ.get("PYTHONPATH", "")]
    added = {"PYTHONPATH": os.pathsep.join(p for p in paths if p), "PYTHONUNBUFFERED": "1"}
    if options.commit:
        added["PAGEWIRE_COMMIT"] = options.commit
    if options.peers is not None:
        added["PAGEWIRE_PEER_FA3"] = str(site / "fa3.so")
        added["PAGEWIRE_PEER_VLLM_TRITON"] = str(options.peers / "vllm_triton")
        added["FLASHINFER_DISABLE_JIT"] = (
            "1"  # prebuilt modules only: a compilation would eat the minutes
        )
    return {**os.environ, **added}


def _unpack_command(options: argparse.Namespace) -> tuple[str, ...]:
    """This file again, as a step like the others, so that its failure is one too."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import campaign; campaign.unpack(*sys.argv[2:])"
    where = (str(options.peers), str(options.scratch / "site"))
    return (sys.executable, "-c", code, str(Path(__file__).resolve().parent), *where)


def unpack(bundle: str, site: str) -> None:
    """Wheels, `*.tar.xz` and `fa3.so.xz` of a bundle into one folder on the Python path; what is absent is named."""
    source, target = Path(bundle), Path(site)
    if not source.is_dir():
        raise SystemExit(f"--peers: {source} is not a folder")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for path in sorted(source.glob("*.tar.xz")):
        with tarfile.open(path) as archive:
            archive.extractall(target, filter="data")
        print(f"unpacked {path.name}")
    for path in sorted(source.glob("*.whl")):
        with zipfile.ZipFile(path) as wheel:
            wheel.extractall(target)
        print(f"unpacked {path.name}")
    for path in sorted(source.glob("*.so.xz")):
        with lzma.open(path) as packed, (target / path.name.removesuffix(".xz")).open("wb") as file:
            shutil.copyfileobj(packed, file)
        print(f"unpacked {path.name}")
    if not (source / "vllm_triton").is_dir():
        print("no vllm_triton folder in the bundle: that peer will be skipped")


def _run(step: Step, out: Path, environment: dict[str, str], stop: float) -> State:
    left = stop - time.monotonic()
    if step.missing is not None:
        return State("skipped", step.missing)
    if left < 20:
        return State("cut", "no minutes left in this go")
    limit = min(60 * step.minutes, left - 10)
    started = time.monotonic()
    with (out / "campaign.log").open("ab") as log:
        log.write(f"\n===== {step.name}: {' '.join(step.command)}\n".encode())
        log.flush()
        at = log.tell()
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )  # fmt: skip
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    seconds = time.monotonic() - started
    text = (out / "campaign.log").read_bytes()[at:].decode(errors="replace")
    if step.output is not None:
        with (out / step.output).open("a") as file:
            file.write(text)
    tail = "\n".join(text.splitlines()[-step.tail :])
    if code is None:
        return State("cut", f"stopped after {limit:.0f} s", seconds, tail)
    return State("done" if code == 0 else "failed", f"exit status {code}", seconds, tail)


def _end(process: subprocess.Popen) -> None:
    """The step's own process group, if anything of it is left."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        if number == signal.SIGTERM:
            _wait(lambda: process.poll() is not None, 5.0)
    process.wait()


def _wait(over: Callable[[], bool], seconds: float) -> None:
    stop = time.monotonic() + seconds
    while not over() and time.monotonic() < stop:
        time.sleep(0.05)


def _load(out: Path) -> dict[str, State]:
    path = out / "campaign.json"
    if not path.exists():
        return {}
    return {name: State(**state) for name, state in json.loads(path.read_text()).items()}


def _save(out: Path, states: dict[str, State]) -> None:
    path = out / "campaign.json"
    path.with_suffix(".new").write_text(
        json.dumps({n: asdict(s) for n, s in states.items()}, indent=1)
    )
    os.replace(path.with_suffix(".new"), path)
    lines = ["# Campaign", "", "| step | status | seconds | |", "|---|---|---|---|"]
    lines += [f"| {n} | {s.status} | {s.seconds:.0f} | {s.reason} |" for n, s in states.items()]
    for name, state in states.items():
        if state.tail:
            lines += ["", f"## {name}", "", "```text", state.tail, "```"]
    (out / "summary.md").write_text("\n".join(lines) + "\n")


def _trim(log: Path) -> None:
    text = log.read_bytes() if log.exists() else b""
    if len(text) > LOG_BYTES:
        half = LOG_BYTES // 2
        log.write_bytes(text[:half] + b"\n[... the middle was cut ...]\n" + text[-half:])


if __name__ == "__main__":
    sys.exit(main())
