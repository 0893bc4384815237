"""The rehearsal without a GPU: what was compiled ahead is found by real launches, and what was not is counted."""

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
BENCHES = Path(__file__).parents[2] / "benches"


@pytest.fixture
def rehearse(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHES))
    spec = importlib.util.spec_from_file_location("rehearse", BENCHES / "rehearse.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "rehearse", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    for name in [n for n in sys.modules if n.split(".")[0] in ("standin", "goes", "steps")]:
        del sys.modules[name]


def test_what_was_not_compiled_ahead_is_waited_for(rehearse, tmp_path):
    rehearse.standin.build(tmp_path)
    environment = rehearse._environment(tmp_path)
    ahead = [*rehearse._AHEAD, "--json", "--only", "^merge", "smoke"]
    assert rehearse._json(ahead, environment)["compilations"] == 1
    walk = [rehearse.__file__, "--walk", "smoke", "--only", "^(merge|append)"]
    told = rehearse._json(walk, environment)
    assert [k.split(" of ")[0] for k in told["kernels"]] == ["_copy_kernel"]
    assert told["failed"] == [] and told["launches"] > 0 and told["host_us"] > 0


@pytest.mark.parametrize("only", ["^append .*e4m3", "^pack .*H8>2 D128 .*int8"])
def test_a_move_that_was_compiled_ahead_is_found(rehearse, tmp_path, only):
    rehearse.standin.build(tmp_path)
    environment = rehearse._environment(tmp_path)
    ahead = rehearse._json([*rehearse._AHEAD, "--json", "--only", only, "contact"], environment)
    assert ahead["failed"] == {} and ahead["compilations"] > 0
    told = rehearse._json([rehearse.__file__, "--walk", "contact", "--only", only], environment)
    assert told["kernels"] == [] and told["failed"] == [] and told["launches"] > 0


def test_a_step_that_waits_is_an_error(rehearse, monkeypatch, capsys):
    compiled = {"launches": 9, "compilations": 2, "cpu_seconds": 8.0, "wall_seconds": 4.0, "longest": 3.0, "failed": {}}
    walked = {
        "launches": 20, "kernels": [], "files": 0, "failed": [], "host_us": 5.0, "seconds": 1.0, "cpu_seconds": 1.0,
        "timing_seconds": 4.0,
    }  # fmt: skip
    told = {}

    def answer(command, environment):
        assert environment["TRITON_CACHE_DIR"] and "TRITON_INTERPRET" not in environment
        return {**walked, **told} if "--walk" in command else compiled

    monkeypatch.setattr(rehearse, "_json", answer)
    monkeypatch.setattr(rehearse.standin, "build", lambda folder: None)
    monkeypatch.setattr(rehearse, "_limit", lambda step: 3.0)
    assert rehearse.rehearse(["quick"], 2, 4, 10) == 0
    ahead, quick, *summary = capsys.readouterr().out.splitlines()[1:]
    assert ahead.split()[:4] == ["ahead", "quick", "9", "2"] and "3.0" in ahead  # 8 / 4 is less
    assert quick.split() == ["quick", "20", "0", "5.0", "1.0", "5.0", "3", "OVER"]
    first = summary[0]  # setting up is bound by what is not known, the suite takes its seconds
    assert (
        first.startswith("go 1: 226 of 290 s: peers <30 | build <30 | host <30 | ahead 3, ")
        and "quick 5, tests <105" in first
    )
    assert [line.split(":")[0] for line in summary] == ["go 1", "go 2", "go 3"]
    told.update(kernels=["_k of case"], files=2, failed=["case: why"])
    assert rehearse.rehearse(["quick"], 2, 4, 10) == 3
    printed = capsys.readouterr().out
    assert "waited for _k of case" in printed and "waited for 2 C files" in printed
    assert "failed: case: why" in printed


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_quick_suite_waits_for_nothing(rehearse):
    assert rehearse.rehearse(["contact", "quick"], 2, 16, 0) == 0


def test_the_limits_are_those_of_the_campaign(rehearse):
    steps = {s.name: s for go in (2, 1) for g in rehearse.goes.steps(go, _plan(rehearse)) for s in g}
    for step, named in (("contact", "smoke"), ("quick", "quick"), ("tune", "tune"), ("tests", "tests")):
        assert rehearse._limit(step) == steps[named].seconds
    assert rehearse._limit("full") == 480


def _plan(rehearse):
    return rehearse.goes.Plan(BENCHES, BENCHES, None, None, False, (), 16)
