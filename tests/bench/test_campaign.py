"""The campaign's three goes dry on a CPU, their resumption, what is missing, and steps that fail or run over."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest

BENCHES = Path(__file__).parents[2] / "benches"


@pytest.fixture(scope="module")
def benches():
    """(goes, steps, peers): the campaign's modules, which import each other by name."""
    sys.path.insert(0, str(BENCHES))
    try:
        yield [importlib.import_module(name) for name in ("goes", "steps", "peers")]
    finally:
        sys.path.remove(str(BENCHES))
        for name in ("goes", "steps", "peers"):
            sys.modules.pop(name, None)


def _go(number: int, out: Path, *more: str, **env: str) -> subprocess.CompletedProcess:
    # relative, as people write it: the steps run elsewhere
    command = [sys.executable, str(BENCHES / "campaign.py"), "--go", str(number), "--out", os.path.relpath(out)]
    command += ["--dry-run", "--scratch", str(out.parent / "scratch"), *more]
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env={**kept, **env})


def _states(out: Path) -> dict:
    return json.loads((out / "campaign.json").read_text())


@pytest.mark.timeout(900)
def test_three_dry_goes_do_every_step_or_say_why_not_and_are_resumed(tmp_path):
    out = tmp_path / "out"
    done = _go(1, out)
    assert done.returncode == 0, done.stdout + done.stderr + (out / "campaign.log").read_text()
    states = _states(out)
    expected = {"info", "ahead", "smoke", "quick", "tests"}
    assert {n for n, s in states.items() if s["status"] == "done"} == {f"1 {n}" for n in expected}
    for name, state in states.items():
        assert state["status"] == "done" or (state["status"] == "skipped" and state["reason"]), name
    assert "GPU" in states["1 ncu-pack"]["reason"] and "bundle" in states["1 peers"]["reason"]
    assert "roof: copy" in (out / "summary.md").read_text()

    # the same go again: what is done stays done, but for what a bare machine lacks
    again = _go(1, out)
    assert again.returncode == 0 and again.stdout.count("done earlier in this go") == 4

    elsewhere = tmp_path / "next"
    second = _go(2, elsewhere, "--resume", os.path.relpath(out))
    assert second.returncode == 0, second.stdout + second.stderr
    states = _states(elsewhere)
    assert states["2 red"]["reason"] == "no test was red" and "GPU" in states["2 tune"]["reason"]
    third = _go(3, elsewhere)
    assert third.returncode == 0, third.stdout + third.stderr
    states = _states(elsewhere)
    assert {states[f"{go} quick"]["status"] for go in (1, 2, 3)} == {"done"}
    assert states["3 plot"]["status"] in ("done", "skipped")
    files = {p.name for p in elsewhere.iterdir()}
    assert len(files) <= 8 and {f"quick-{go}.csv" for go in (1, 2, 3)} < files
    assert {"summary.md", "campaign.log", "campaign.json"} < files


def test_a_go_ends_with_its_seconds_and_is_continued(tmp_path):
    out = tmp_path / "out"
    started = time.monotonic()
    cut = _go(1, out, "--steps", "info,quick,tests", "--seconds", "6")
    assert time.monotonic() - started < 40 and cut.returncode == 0
    left = cut.stdout.rpartition("to be continued ")[2]  # how far it came is the machine's affair
    assert "tests" in left and "nothing" not in left, cut.stdout
    done = _go(1, out, "--steps", "info,quick,tests")
    assert done.returncode == 0 and "to be continued nothing" in done.stdout


def test_a_bad_go_is_refused(tmp_path):
    done = _go(4, tmp_path / "out")
    assert done.returncode == 2 and "--go" in done.stderr and "1, 2, 3" in done.stderr
    for flag in ("--steps", "--again"):
        done = _go(1, tmp_path / "out", flag, "info red")
        assert done.returncode == 2 and "ahead,info,smoke" in done.stderr and "got info red" in done.stderr
    done = _go(1, tmp_path / "out", "--resume", str(tmp_path / "nowhere"))
    assert done.returncode == 2 and "nowhere without a campaign.json" in done.stderr
    (tmp_path / "out" / "campaign.json").write_text('{"1 info": {"stat')
    done = _go(1, tmp_path / "out", "--steps", "info")
    assert done.returncode == 1 and "campaign.json is not what a go leaves" in done.stderr


def test_a_go_that_is_resumed_twice_keeps_what_it_has_done(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert _go(1, first, "--steps", "info").returncode == 0
    for step, done in (("tune", {"2 tune"}), ("red", {"2 tune", "2 red"})):
        assert _go(2, second, "--resume", str(first), "--steps", step).returncode == 0
        assert set(_states(second)) == {"1 info"} | done


def _plan(goes, tmp_path, **fields):
    given = {"peers": None, "objects": None, "dry": False, "red": (), "cores": 16}
    return goes.Plan(out=tmp_path, scratch=tmp_path, **{**given, **fields})


def _all(goes, go: int, plan) -> dict:
    return {step.name: step for group in goes.steps(go, plan) for step in group}


def test_the_bounds_of_the_steps_fill_the_go_and_no_more(benches, tmp_path):
    """The slowest step of each group, one group after the other."""
    goes = benches[0]
    for go, seconds in goes.SECONDS.items():
        groups = goes.steps(go, _plan(goes, tmp_path))
        assert 0.9 * seconds <= sum(max(step.seconds for step in group) for group in groups) <= seconds


@pytest.fixture
def on_a_gpu(benches, monkeypatch):
    """A machine with everything; `.without(name)` takes a program or a module away."""
    goes = benches[0]
    gone: set[str] = set()
    monkeypatch.setattr(goes.shutil, "which", lambda name, path=None: None if name in gone else f"/usr/bin/{name}")
    monkeypatch.setattr(goes, "has", lambda module: module not in gone)
    monkeypatch.setattr(goes, "_arch", lambda: "90")
    for name in ("NVCC", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    return gone


NCU = ("ncu-decode-triton", "ncu-decode-cuda", "ncu-prefill", "ncu-pack")
MISSING = {  # without it, these steps are skipped, for that reason
    "nvcc": (("build", "ncu-decode-cuda", "ncu-pack"), "no nvcc"),
    "pybind11": (("build", "host", "ncu-decode-cuda", "ncu-pack"), "pybind11 is not installed"),
    "c++": (("host",), "no C++ compiler"),
    "triton": (
        ("ahead", "hopper-ahead", "hopper", "tune", "ncu-decode-triton", "ncu-prefill"),
        "triton is not installed",
    ),
    "pytest": (("tests",), "pytest is not installed"),
    "ncu": (NCU, "ncu is not on the PATH"),
    "compute-sanitizer": (("racecheck",), "compute-sanitizer is not on the PATH"),
    "matplotlib": (("plot",), "matplotlib is not installed"),
}


@pytest.mark.parametrize("name", MISSING)
def test_what_is_missing_skips_its_steps_and_no_other(name, benches, on_a_gpu, tmp_path):
    goes = benches[0]
    on_a_gpu.add("pagewire._cuda")  # the machine is bare
    skipped, words = MISSING[name]
    plan = _plan(goes, tmp_path, peers=tmp_path)

    def missing() -> dict:
        return {(go, n): s.missing for go in goes.SECONDS for n, s in _all(goes, go, plan).items() if n != "red"}

    assert set(missing().values()) == {None}
    on_a_gpu.add(name)
    after = missing()
    assert {n for (_, n), why in after.items() if why is not None} == set(skipped)
    assert all(why is None or words in why for why in after.values())


def test_a_cuda_backend_that_is_built_already_is_profiled_without_nvcc(benches, on_a_gpu, tmp_path):
    on_a_gpu.add("nvcc")
    assert _all(benches[0], 1, _plan(benches[0], tmp_path))["ncu-pack"].missing is None


def test_both_backends_are_timed_and_the_tests_use_every_core(benches, on_a_gpu, tmp_path):
    goes = benches[0]
    first = _all(goes, 1, _plan(goes, tmp_path))
    assert "--backend" not in first["quick"].command  # every GPU backend that is there
    assert first["quick"].restart == goes.FAULT and "flex" not in first["quick"].command
    tests = first["tests"].command
    assert tests[tests.index("-n") + 1] == "16"
    assert not any(word in " ".join(tests) for word in ("compile", "test_static", "tests/bench"))
    on_a_gpu.add("xdist")
    assert "-n" not in _all(goes, 1, _plan(goes, tmp_path))["tests"].command


def test_prebuilt_objects_and_the_devices_own_architecture(benches, on_a_gpu, tmp_path):
    goes = benches[0]
    build = _all(goes, 1, _plan(goes, tmp_path, objects=tmp_path / "o"))["build"].command
    assert build[build.index("--arch") + 1] == "native"
    assert build[build.index("--objects") + 1] == str(tmp_path / "o")


def test_red_tests_are_the_next_goes_first(benches, tmp_path):
    goes, steps, _ = benches
    tail = "FAILED tests/ops/test_a.py::test_x[cuda] - AssertionError: 1 - 2\nERROR tests/b.py::test_y\n2 failed"
    states = {"1 tests": steps.State("failed", tail=tail)}
    red = goes.red_tests(states)
    assert red == ("tests/ops/test_a.py::test_x[cuda]", "tests/b.py::test_y")
    assert _all(goes, 2, _plan(goes, tmp_path, red=red))["red"].command[-2:] == red


def test_red_tests_are_named_before_the_run_is_cut_off(benches, tmp_path):
    goes, steps, _ = benches
    text = "import os\ndef test_a():\n    assert 1 == 2\ndef test_b():\n    pass\ndef test_c():\n    os._exit(9)\n"
    (tmp_path / "test_x.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "named", "test_x.py"]
    env = {**os.environ, "PYTHONPATH": str(goes.ROOT / "benches")}
    ran = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert ran.returncode == 9 and "assert 1 == 2" in ran.stdout
    states = {"1 tests": steps.State("cut", tail=ran.stdout)}
    assert goes.red_tests(states) == ("test_x.py::test_a",)


# ------------------------------------------------------------------------------------------- steps


def _runner(steps, tmp_path, left: float = 100.0):
    log = steps.Log(tmp_path / "log")
    return steps.Runner(tmp_path, dict(os.environ), log, time.monotonic() + left)


def _run(steps, tmp_path, *command: str, seconds: float = 60.0, left: float = 100.0, **more):
    runner = _runner(steps, tmp_path, left)
    state = runner.run(steps.Step("x", (sys.executable, *command), seconds, **more))
    runner.log.close()
    return state


def test_a_failing_step_is_failed_and_its_end_is_kept(benches, tmp_path):
    state = _run(benches[1], tmp_path, "-c", "print('why'); raise SystemExit(3)")
    assert (state.status, state.reason, state.tail) == ("failed", "exit status 3", "why")


def test_a_step_that_runs_over_is_cut_with_all_it_started(benches, tmp_path):
    code = (
        "import subprocess, time; child = subprocess.Popen(['sleep', '60']); "
        "print(child.pid, flush=True); time.sleep(60)"
    )
    started = time.monotonic()
    state = _run(benches[1], tmp_path, "-c", code, seconds=1.5)
    assert state.status == "cut" and time.monotonic() - started < 20
    child = int(state.tail.split()[0])
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or " Z " in Path(f"/proc/{child}/stat").read_text():
            break
        time.sleep(0.05)
    else:
        pytest.fail(f"process {child} of the step is still there")


def test_a_campaign_that_is_ended_ends_its_steps_and_says_so(tmp_path):
    """A machine that is taken back: SIGTERM, and little time."""
    out = tmp_path / "out"
    command = [sys.executable, str(BENCHES / "campaign.py"), "--go", "1", "--out", str(out), "--dry-run"]
    command += ["--steps", "smoke,quick,tests", "--scratch", str(tmp_path / "scratch")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    stop = time.monotonic() + 60
    log = out / "campaign.log"
    while not (log.exists() and "smoke | $" in log.read_text()):
        assert time.monotonic() < stop
        time.sleep(0.05)
    process.terminate()
    printed, _ = process.communicate(timeout=30)
    assert {s["status"] for s in _states(out).values()} == {"cut"}, printed
    assert "to be continued ['smoke', 'quick', 'tests']" in printed
    for line in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout.splitlines():
        assert str(out) not in line


def test_lines_are_in_the_log_while_a_step_runs(benches, tmp_path):
    """A machine that is taken back in the middle leaves what was said until then."""
    steps = benches[1]
    runner = _runner(steps, tmp_path)
    code = (
        "import pathlib, time; print('first', flush=True)\n"
        "stop = time.monotonic() + 30\n"
        "while 'x | first' not in pathlib.Path('log').read_text():\n"
        "    assert time.monotonic() < stop\n"
    )
    state = runner.run(steps.Step("x", (sys.executable, "-c", code), 60))
    assert state.status == "done", state


def test_steps_of_a_group_run_side_by_side(benches, tmp_path):
    """Each waits for the other's file."""
    steps = benches[1]
    runner = _runner(steps, tmp_path)
    code = (
        "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch()\n"
        "stop = time.monotonic() + 30\n"
        "while not pathlib.Path(sys.argv[2]).exists(): assert time.monotonic() < stop\n"
    )
    pair = [steps.Step(name, (sys.executable, "-c", code, name, other), 40) for name, other in (("a", "b"), ("b", "a"))]
    ended = []
    states = runner.side_by_side(pair, lambda step, state: ended.append(step.name))
    assert {s.status for s in states.values()} == {"done"} and sorted(ended) == ["a", "b"]


def test_steps_that_end_at_once_are_told_one_at_a_time(benches, tmp_path):
    """What is told writes files: two skipped steps end in the same moment."""
    steps = benches[1]
    busy, overlaps = threading.Lock(), []

    def ended(step, state):
        if not busy.acquire(blocking=False):
            overlaps.append(step.name)
            return
        time.sleep(0.1)
        busy.release()

    skipped = [steps.Step(str(n), (), 1, missing="why") for n in range(4)]
    states = _runner(steps, tmp_path).side_by_side(skipped, ended)
    assert len(states) == 4 and not overlaps


def test_a_go_is_over_when_its_seconds_are(benches, tmp_path):
    """Also for a step that does not listen to SIGTERM."""
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    started = time.monotonic()
    state = _run(benches[1], tmp_path, "-c", code, left=8)
    assert state.status == "cut" and time.monotonic() - started < 9.5


def test_a_program_that_is_not_there_fails_its_step(benches, tmp_path):
    steps = benches[1]
    state = _runner(steps, tmp_path).run(steps.Step("x", ("/nowhere/ncu",), 10))
    assert state.status == "failed" and "/nowhere/ncu" in state.reason


def test_a_step_is_started_again_behind_a_fault(benches, tmp_path):
    code = "import pathlib; p = pathlib.Path('n'); n = len(p.read_text()) if p.exists() else 0; "
    code += "p.write_text('.' * (n + 1)); print(n); raise SystemExit(3 if n < 2 else 0)"
    state = _run(benches[1], tmp_path, "-c", code, restart=3)
    assert (state.status, state.tail) == ("done", "0\n1\n2")
    (tmp_path / "n").unlink()
    assert _run(benches[1], tmp_path, "-c", code).reason == "exit status 3"


def test_no_step_starts_in_the_last_seconds(benches, tmp_path):
    assert _run(benches[1], tmp_path, "-c", "1/0", left=2).status == "cut"
    assert (tmp_path / "log").read_text() == ""


def test_a_long_log_keeps_its_ends(benches, tmp_path, monkeypatch):
    steps = benches[1]
    monkeypatch.setattr(steps, "LOG_BYTES", 100)
    log = steps.Log(tmp_path / "log")
    for letter in "az":
        log.line(letter, letter * 300)
    log.close()
    text = (tmp_path / "log").read_text()
    assert text.startswith("a | aaa") and text.endswith("zzz\n") and "cut" in text
    assert len(text) < 200


# ------------------------------------------------------------------------------------------- peers


def test_a_bundle_is_unpacked_and_what_is_absent_is_named(benches, tmp_path, capsys):
    peers = benches[2]
    bundle, site = tmp_path / "bundle", tmp_path / "site"
    bundle.mkdir()
    (tmp_path / "peer.py").write_text("X = 1\n")
    with tarfile.open(bundle / "peer.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "peer.py", "peer/__init__.py")
    shutil.make_archive(str(tmp_path / "other"), "zip", tmp_path, "peer.py")
    shutil.move(tmp_path / "other.zip", bundle / "other-1-py3-none-any.whl")
    (bundle / "broken.so.xz").write_bytes(b"no library")
    broken = peers.unpack(bundle, site)
    assert len(broken) == 1 and broken[0].startswith(str(bundle / "broken.so.xz"))
    assert (site / "peer" / "__init__.py").read_text() == "X = 1\n" and (site / "peer.py").exists()
    assert "no vllm_triton folder" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["none", "broken"])
def test_a_bad_bundle_is_one_sentence(kind, tmp_path):
    bundle = tmp_path / kind
    if kind == "broken":
        bundle.mkdir()
        (bundle / "x.tar.xz").write_bytes(b"no archive")
    command = [sys.executable, str(BENCHES / "peers.py"), str(bundle), str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True)
    where = f"--peers: {bundle}" if kind == "none" else f"{bundle / 'x.tar.xz'}: "
    assert done.returncode == 1 and done.stderr.startswith(f"peers.py: {where}")
    assert done.stderr.count("\n") == 1
