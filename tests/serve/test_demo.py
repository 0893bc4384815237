"""`make demo`, which needs the default model."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from pagewire.serve.model.config import ModelError
from pagewire.serve.model.default import default_model_path
from serve.http_server import ROOT, environment


def recorded(demo, folder: Path, rows: np.ndarray):
    """A run with one answer whose logits are `rows`, of which the first came from P."""
    folder.mkdir()
    for phase, part in (("prefill", rows[:1]), ("decode", rows[1:])):
        save_file({"logits": np.ascontiguousarray(part, np.float32)}, folder / f"r.{phase}.safetensors")
    return demo.Run([demo.Answer("?", request_id="r")], {}, folder)


def test_kv_cost_is_over_the_steps_with_the_same_context(tmp_path, monkeypatch):
    """The third token is another: that step still counts, the next, after another context, does not."""
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    demo = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "demo", demo)  # dataclasses look it up
    spec.loader.exec_module(demo)
    exact = np.array([[2.0, 0], [2, 0], [1, 0], [5, 0], [5, 0]])
    narrow = np.array([[2.0, 0], [1, 0], [0, 1], [-90, 90]])
    cost = demo.kv_cost(recorded(demo, tmp_path / "a", exact), recorded(demo, tmp_path / "b", narrow), "int8")
    p, q = np.exp(exact[:3]), np.exp(narrow[:3])
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    divergence = (p * np.log(p / q)).sum(1)
    assert "over the 3 steps" in cost and "2 of 3 steps agree; 0 of 1 answers never part" in cost
    assert "max 1, mean 0.5\n" in cost
    assert f"mean {divergence.mean():.3g}, max {divergence.max():.3g}" in cost
    same = demo.kv_cost(*(recorded(demo, tmp_path / name, exact) for name in "cd"), "int8")
    assert "5 of 5 steps agree; 1 of 1 answers never part" in same and "max 0, mean 0\n" in same


@pytest.mark.slow
def test_demo(tmp_path):
    try:
        default_model_path()
    except ModelError as error:
        pytest.skip(str(error))
    result = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "demo.py"), "--kv-dtype", "int8"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "The capital of France is Paris." in result.stdout
    assert "equal P's bytes for all 5 requests" in result.stdout
    assert "Logits: two processes and one agree" in result.stdout
    assert "int8: KV: D's pages, packed again, equal P's bytes for all 5 requests" in result.stdout
    assert "What int8 caches cost against float ones" in result.stdout
    assert json.loads((tmp_path / "demo-out" / "trace.json").read_text())["traceEvents"]
