"""Compiling ahead: what is launched is compiled once, what fails is named, and nothing else is lost.

Whatever compiles runs in a process of its own, without the interpreter that these tests switch on.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pagewire.bench import forks, tune
from pagewire.bench.standby import Compiler

pytest.importorskip("triton")


def _environment(cache: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "PAGEWIRE_"))}
    path = os.pathsep.join(p for p in sys.path if p)
    return {**kept, "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}


def _run(cache: Path, *command: str) -> subprocess.CompletedProcess:
    done = [sys.executable, *command]
    return subprocess.run(done, env=_environment(cache), capture_output=True, text=True, timeout=200)


def test_what_a_case_launches_is_compiled_once(tmp_path):
    command = ("-m", "pagewire.bench.ahead", "--json", "--jobs", "2", "--only", "^merge", "smoke")
    done = _run(tmp_path, *command)
    assert done.returncode == 0, done.stdout + done.stderr
    first = json.loads(done.stdout)
    assert first["compilations"] == 1 < first["launches"] and first["failed"] == {}
    assert 0 < first["longest"] <= first["cpu_seconds"]
    assert list(tmp_path.glob("*/_merge_two_kernel.cubin"))
    entries = len(list(tmp_path.iterdir()))
    again = json.loads(_run(tmp_path, *command).stdout)
    assert again["longest"] < first["longest"] and len(list(tmp_path.iterdir())) == entries


_TWO = """
import json
from pagewire.bench import ahead, tune
from pagewire.bench.cases import Merge
ahead.activate(90)
target = tune.targets(["prefill"], 90)[0]
bad = target.table[target.key]._replace(BLOCK_N=48)
wanted = ahead.of_candidate(target, bad)[:1] + [ahead.Item("fine", Merge(2, 16, 4, 64))]
print(json.dumps(ahead.compile_all(wanted, 90, 2)._asdict()))
"""


def test_what_does_not_compile_is_named_and_the_rest_is_compiled(tmp_path):
    done = _run(tmp_path, "-c", _TWO)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["failed"] and all("48" in name for name in report["failed"]), report
    assert all(why for why in report["failed"].values())
    assert list(tmp_path.glob("*/_merge_two_kernel.cubin"))


def test_the_standby_answers_per_candidate(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
    target = tune.targets(["prefill"], 90)[0]
    present = target.table[target.key]
    with Compiler(90) as compiler:
        wrong = [present._replace(BLOCK_N=n) for n in (48, 24)]
        errors = compiler.compile("prefill", target.key, wrong, 60)
        assert len(errors) == 2 and all(errors)
        assert "time" in compiler.compile("prefill", target.key, [present], 0.0)[0]
        compiler._process.kill()
        with pytest.raises(RuntimeError, match="ended"):
            compiler.compile("prefill", target.key, [present], 1.0)


_PEER = """
import triton
import triton.language as tl
from vllm.platforms import current_platform


@triton.jit
def _peers_kernel(x, N: tl.constexpr):
    tl.store(x + tl.arange(0, N), 0.0)


def unified_attention(out, block_table):
    assert current_platform.has_device_capability(90)
    _peers_kernel[(1,)](out, 16)
"""


@pytest.mark.parametrize(("suite", "expected"), [("smoke", 1), ("contact", 0)])
def test_a_peer_in_triton_is_compiled_where_it_is_timed(suite, expected, tmp_path, monkeypatch):
    (tmp_path / "triton_attention_helpers.py").write_text("")
    (tmp_path / "triton_unified_attention.py").write_text(_PEER)
    arguments = ("--json", "--jobs", "2", "--only", "^decode .* fp32$", suite)
    environment = {**_environment(tmp_path / "cache"), "PAGEWIRE_PEER_VLLM_TRITON": str(tmp_path)}
    command = [sys.executable, "-m", "pagewire.bench.ahead", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "cache").glob("*/_peers_kernel.cubin"))) == expected
    assert list((tmp_path / "cache").glob("*/_decode_kernel.cubin"))


def test_a_peer_that_fails_is_named_and_ours_is_compiled(tmp_path):
    (tmp_path / "triton_attention_helpers.py").write_text("")
    (tmp_path / "triton_unified_attention.py").write_text(
        "def unified_attention(out): raise ValueError('another version')\n"
    )
    arguments = ("--json", "--jobs", "2", "--only", "^decode .* fp32$", "smoke")
    environment = {**_environment(tmp_path / "cache"), "PAGEWIRE_PEER_VLLM_TRITON": str(tmp_path)}
    command = [sys.executable, "-m", "pagewire.bench.ahead", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1, done.stdout + done.stderr
    (name,) = json.loads(done.stdout)["failed"]
    assert name.startswith("a call of decode 2q1s40") and list((tmp_path / "cache").glob("*/_decode_kernel.cubin"))


_KEYS = """
from triton.runtime.jit import JITFunction
from pagewire import registry
next(b for b in registry.BACKENDS if b.name == "triton").load()
import sys
functions = [f for name, module in sys.modules.items() if name.startswith("pagewire.kernels.")
             for f in vars(module).values() if isinstance(f, JITFunction)]
assert len(functions) > 30
for f in functions:
    assert f.hash is not None, f
    for name in f.fn.__code__.co_names:
        callee = f.__globals__.get(name)
        if isinstance(callee, JITFunction):
            assert callee.used_global_vals.keys() <= f.used_global_vals.keys(), (f, callee)
"""


def test_every_key_is_settled_before_the_first_launch(tmp_path):
    done = _run(tmp_path, "-c", _KEYS)
    assert done.returncode == 0, done.stderr


def _fail() -> None:
    raise ValueError("on purpose\nsecond line")


def test_a_task_takes_nothing_with_it(tmp_path):
    tasks = [
        lambda: (tmp_path / "a").touch(),
        _fail,
        lambda: os.kill(os.getpid(), signal.SIGKILL),
        lambda: time.sleep(60),
        lambda: (tmp_path / "b").touch(),
    ]
    started = time.monotonic()
    done = forks.run_all(tasks, 2, started + 2)
    assert time.monotonic() - started < 10
    errors = [d and d.error for d in done]
    assert errors == ["", "ValueError: on purpose", "died of SIGKILL", "cut off by the time limit", ""]
    assert (tmp_path / "a").exists() and (tmp_path / "b").exists()


def test_the_cost_of_a_task_holds_the_programs_it_ran():
    burn = "n = 0\nwhile n < 3_000_000: n += 1"
    task = lambda: subprocess.run([sys.executable, "-c", burn], check=True)  # noqa: E731
    (done,) = forks.run_all([task], 1)
    assert done is not None and done.error == "" and done.cpu_seconds > 0.02


def test_what_the_time_does_not_reach_is_not_started(tmp_path):
    done = forks.run_all([(tmp_path / "a").touch], 1, time.monotonic() - 1)
    assert done == [None] and not (tmp_path / "a").exists()
