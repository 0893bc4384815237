"""The campaign's dry run on a CPU, its resumption, and steps that fail or run over."""

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benches" / "campaign.py"


@pytest.fixture(scope="module")
def campaign():
    spec = importlib.util.spec_from_file_location("campaign", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["campaign"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["campaign"]


def _go(out: Path, *more: str) -> subprocess.CompletedProcess:
    # relative, as people write it: the steps run elsewhere
    command = [sys.executable, str(SCRIPT), "--out", os.path.relpath(out), "--dry-run", *more]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)


def test_a_dry_run_does_every_step_or_says_why_not_and_is_resumed(campaign, tmp_path):
    out = tmp_path / "out"
    done = _go(out)
    assert done.returncode == 0, done.stdout + done.stderr
    states = json.loads((out / "campaign.json").read_text())
    assert {n for n, s in states.items() if s["status"] == "done"} >= {"info", "quick", "tests"}
    for name, state in states.items():
        assert state["status"] == "done" or (state["status"] == "skipped" and state["reason"]), name
    assert "GPU" in states["memcheck"]["reason"] and "bundle" in states["peers"]["reason"]
    files = sorted(p.name for p in out.iterdir())
    assert set(files) <= set(campaign.FILES) and {"quick.csv", "summary.md", "campaign.log"} <= set(
        files
    )
    assert "roof: copy" in (out / "summary.md").read_text()
    size = (out / "campaign.log").stat().st_size

    elsewhere = tmp_path / "next"
    again = _go(elsewhere, "--resume", os.path.relpath(out), "--steps", "info,quick,tests")
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("in an earlier go") == 3
    assert (elsewhere / "campaign.log").stat().st_size == size


def _step(campaign, *command: str, minutes: float = 1.0, **more):
    return campaign.Step("x", (sys.executable, *command), minutes, **more)


def test_a_failing_step_is_failed_and_its_end_is_kept(campaign, tmp_path):
    step = _step(campaign, "-c", "print('why'); raise SystemExit(3)")
    state = campaign._run(step, tmp_path, dict(os.environ), time.monotonic() + 60)
    assert (state.status, state.reason, state.tail) == ("failed", "exit status 3", "why")


def test_a_step_that_runs_over_is_cut_with_all_it_started(campaign, tmp_path):
    code = (
        "import subprocess, time; child = subprocess.Popen(['sleep', '60']); "
        "print(child.pid, flush=True); time.sleep(60)"
    )
    step = _step(campaign, "-c", code, minutes=1 / 60, output="x.txt")
    started = time.monotonic()
    state = campaign._run(step, tmp_path, dict(os.environ), started + 100)
    assert state.status == "cut" and time.monotonic() - started < 20
    child = int((tmp_path / "x.txt").read_text().split()[0])
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or " Z " in Path(f"/proc/{child}/stat").read_text():
            break
        time.sleep(0.05)
    else:
        pytest.fail(f"process {child} of the step is still there")


def test_no_step_starts_in_the_last_seconds(campaign, tmp_path):
    state = campaign._run(_step(campaign, "-c", "1/0"), tmp_path, {}, time.monotonic() + 5)
    assert state.status == "cut" and not (tmp_path / "campaign.log").exists()


def test_a_long_log_keeps_its_ends(campaign, tmp_path, monkeypatch):
    monkeypatch.setattr(campaign, "LOG_BYTES", 100)
    log = tmp_path / "log"
    log.write_bytes(b"a" * 300 + b"z" * 300)
    campaign._trim(log)
    text = log.read_bytes()
    assert text.startswith(b"a" * 50) and text.endswith(b"z" * 50) and b"cut" in text
    assert len(text) < 200


def test_a_bundle_is_unpacked_and_what_is_absent_is_named(campaign, tmp_path, capsys):
    bundle, site = tmp_path / "bundle", tmp_path / "site"
    bundle.mkdir()
    (tmp_path / "peer.py").write_text("X = 1\n")
    with tarfile.open(bundle / "peer.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "peer.py", "peer/__init__.py")
    campaign.unpack(str(bundle), str(site))
    assert (site / "peer" / "__init__.py").read_text() == "X = 1\n"
    assert "no vllm_triton folder" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="not a folder"):
        campaign.unpack(str(tmp_path / "none"), str(site))
