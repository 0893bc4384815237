"""One case for a profiler: which case is meant, how often it is called, and on which buffers."""

import pytest
import torch

import pagewire as pw
from pagewire.bench import one, suites
from pagewire.bench.work import Contender

_MERGE = "merge 2x16t H4 D64 fp32"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(one.machine, "cold_bytes", lambda device: 1 << 18)


def _main(*arguments: str) -> int:
    return one.main([*arguments, "--device", "cpu"])


def test_the_calls_walk_through_cold_buffers(monkeypatch, capsys):
    seen = []
    honest = pw.merge_state
    monkeypatch.setattr(
        pw, "merge_state", lambda *args, **keywords: seen.append(args[0].data_ptr()) or honest(*args, **keywords)
    )
    assert _main("reference", _MERGE, "--calls", "3") == 0
    assert len(seen) == 4 and len(set(seen)) == 4
    (case,) = (c for c in suites.cases("smoke", "cpu") if c.id == _MERGE)
    assert capsys.readouterr().out == f"{_MERGE} on reference: {case.bytes} bytes\n"


def test_exactly_one_case_is_meant(capsys):
    assert one.find("^merge 2x16t", "cpu").id == _MERGE
    for suite in suites.SUITES:
        for case in suites.cases(suite, "cuda"):
            assert one.find(case.id, "cuda") == case  # also where it is part of another id
    assert _main("reference", "^(merge 2x16t|decode 2q1s40)") == 2
    told = capsys.readouterr().err
    assert "expected one case, 3 match" in told and f"\n  {_MERGE}\n" in told + "\n"
    assert _main("reference", "nothing of the kind") == 2
    assert "expected one case, 0 match" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("reference", "("), 2, "unterminated"),
        (("reference", _MERGE, "--calls", "0"), 2, "at least 1, got 0"),
        (("cuda", _MERGE), 1, "only under PAGEWIRE_EMULATE_CUDA"),
    ],
)
def test_what_cannot_be_met_is_refused(arguments, status, message, monkeypatch, capsys):
    monkeypatch.delenv("PAGEWIRE_EMULATE_CUDA", raising=False)
    assert _main(*arguments) == status
    assert message in capsys.readouterr().err


def test_device_cuda_is_refused_without_one(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    assert one.main(["triton", _MERGE, "--device", "cuda"]) == 1
    assert "no CUDA device" in capsys.readouterr().err


def test_the_profiler_sees_the_calls_and_nothing_else(monkeypatch):
    told: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = len(told) ** 2
            told.append("event")

        def elapsed_time(self, last: "Event") -> float:
            return last.at - self.at

    class Runtime:
        cudaProfilerStart = staticmethod(lambda: told.append("start"))
        cudaProfilerStop = staticmethod(lambda: told.append("stop"))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Runtime)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: told.append("sleep"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: told.append("wait"))
    contender = Contender("x", lambda copy: told.append(f"call {copy}"))
    median_us = one.profiled(contender, [1, 2, 0])
    calls = [word for n in (1, 2, 0) for word in ("event", f"call {n}", "event")]
    assert told == ["wait", "sleep", "start", *calls, "wait", "stop"]
    assert median_us == 1e3 * (8**2 - 6**2)  # the second of the three
