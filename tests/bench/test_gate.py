"""The regression gate: 25 %, missing cases, and the second chance."""

import json

import torch

from pagewire.bench import cli, gate
from pagewire.bench.machine import describe
from pagewire.bench.rows import Row


def _row(case: str, peer: str, ratio: float, status: str = "ok") -> Row:
    return Row("quick", "decode", case, peer, False, status, ratio=ratio)


def test_a_case_may_lose_a_quarter_and_no_more(tmp_path):
    path = tmp_path / "ratios.json"
    machine = describe("cpu")
    assert gate.record(path, [_row("a", "sdpa", 4.0), _row("b", "sdpa", 2.0)], machine) == 2
    fields, recorded = gate.load(path)
    assert fields == {k: v for k, v in machine._asdict().items()} and fields["commit"]
    assert gate.losses(recorded, [_row("a", "sdpa", 3.01), _row("b", "sdpa", 9.0)]) == []
    (lost,) = gate.losses(recorded, [_row("a", "sdpa", 2.99), _row("b", "sdpa", 2.0)])
    assert (lost.case, lost.now) == ("a", 2.99)
    assert "2.99x against sdpa, recorded 4.00x" in str(lost)


def test_a_recorded_case_that_was_not_timed_is_lost():
    recorded = {"a": {"sdpa": 2.0}}
    (lost,) = gate.losses(recorded, [_row("a", "sdpa", 0.0, "failed")])
    assert lost.now is None and "not timed" in str(lost)


def test_rows_of_ours_are_no_ratios():
    """Two of ours: a peer's ratio is to the fastest of them, and theirs to each other are nobody's record."""
    ours = [
        Row("quick", "decode", "a", name, True, "ok", ratio=ratio) for name, ratio in (("triton", 1.0), ("cuda", 1.6))
    ]
    found = [*ours, _row("a", "sdpa", 2.0)]
    assert gate.ratios(found) == {"a": {"sdpa": 2.0}}
    assert gate.losses({"a": {"sdpa": 2.0}}, found) == []
    assert gate.ratios(gate.better(found, [*ours, _row("a", "sdpa", 2.5)])) == {"a": {"sdpa": 2.5}}


def test_the_better_of_two_runs_counts():
    best = gate.better([_row("a", "sdpa", 1.0), _row("b", "sdpa", 3.0)], [_row("a", "sdpa", 2.0)])
    assert gate.ratios(best) == {"a": {"sdpa": 2.0}, "b": {"sdpa": 3.0}}


def test_the_command_records_checks_and_fails(tmp_path, capsys):
    path = tmp_path / "ratios.json"
    fixed = ["--suite", "smoke", "--device", "cpu", "--threads", "1", "--only", "^merge"]
    threads = torch.get_num_threads()
    try:
        assert cli.main([*fixed, "--record", str(path)]) == 0
        content = json.loads(path.read_text())
        ((case, ratios),) = content["ratios"].items()
        assert set(ratios) == {"torch"}
        content["ratios"][case]["torch"] = 1e-6
        path.write_text(json.dumps(content))
        assert cli.main([*fixed, "--check", str(path)]) == 0
        assert "1 of 1 ratios hold" in capsys.readouterr().out
        content["ratios"][case]["torch"] = 1e6
        path.write_text(json.dumps(content))
        assert cli.main([*fixed, "--check", str(path)]) == 1
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert f"LOST {case}" in printed and "measured once more" in printed
