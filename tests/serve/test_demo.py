"""`make demo`, which needs the default model."""

import json
import subprocess
import sys

import pytest

from pagewire.serve.model import ModelError, default_model_path
from serve.http_server import ROOT, environment


@pytest.mark.slow
def test_demo(tmp_path):
    try:
        default_model_path()
    except ModelError as error:
        pytest.skip(str(error))
    result = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "demo.py")],
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
    assert json.loads((tmp_path / "demo-out" / "trace.json").read_text())["traceEvents"]
