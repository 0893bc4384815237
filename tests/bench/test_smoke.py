"""The first contact with a machine: every row gets its line, whatever happens to a process."""

import importlib.util
import time
from pathlib import Path

import pytest

from pagewire.bench import suites
from pagewire.bench.cases import Append, Attention, Merge, Pack

BENCHES = Path(__file__).parents[2] / "benches"


@pytest.fixture
def smoke():
    spec = importlib.util.spec_from_file_location("smoke", BENCHES / "smoke.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_suite_has_every_op_on_every_row():
    cases = suites.cases("contact", "cuda")
    assert cases == suites.cases("contact", "cpu")
    rows = len(suites._CONTACT)
    for kind, count in ((Attention, 4 * rows), (Append, rows), (Pack, 2 * rows)):
        assert sum(isinstance(c, kind) for c in cases) == count
    assert {c.num_states for c in cases if isinstance(c, Merge)} == {2, 3}
    attention = [c for c in cases if isinstance(c, Attention)]
    assert {c.op for c in attention} == {"decode", "prefill"}
    # what the CUDA backend takes: at most 16 query rows a request
    short = [c for c in attention if c.op == "prefill" and max(r.q_len for r in c.requests) <= 16]
    assert len(short) == rows


def test_each_case_has_a_line_and_a_refusal_is_not_red(smoke, capsys):
    arguments = ["--device", "cpu", "--jobs", "2", "--ops", "merge,graph", "--only", "3x50t.*D128"]
    assert smoke.main([*arguments, "--backends", "cpu,reference", "--seconds", "100"]) == 0
    printed = capsys.readouterr().out
    cases = [c.id for c in suites.cases("contact", "cpu") if "3x50t" in c.id and "D128" in c.id]
    for case in cases:
        lines = [line for line in printed.splitlines() if case in line]
        assert len(lines) == 2 and all(line.startswith("ok ") for line in lines)
    assert printed.count("no CUDA graphs on a CPU") == 2
    assert "0 RED" in printed.splitlines()[-1]


def test_a_backend_that_cannot_run_is_refused_with_its_reason(smoke, capsys, monkeypatch):
    monkeypatch.setenv("PAGEWIRE_EMULATE_CUDA", "0")
    arguments = ["--device", "cpu", "--ops", "merge", "--only", "3x50t.*fp32", "--backends", "cuda"]
    assert smoke.main([*arguments, "--seconds", "100"]) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("-- ") and "PAGEWIRE_EMULATE_CUDA" in line


# stands in for smoke.py in the children: case b kills its process, d of "append" hangs, d of "merge" is wrong
_SPOILED = """
import json, os, signal, sys, time
op, first = sys.argv[sys.argv.index("--one") + 2 :][:2]
for number, case in list(enumerate("abcde"))[int(first) :]:
    print(json.dumps({"starts": case, "number": number, "of": 5}), flush=True)
    if case == "b":
        print("why it died", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    if case == "d" and op == "append":
        time.sleep(1000)
    print("somebody else prints", flush=True)
    wrong = case == "d"
    print(json.dumps({"mark": "RED" if wrong else "ok", "case": case, "text": "told"}), flush=True)
"""


def test_a_process_that_dies_or_hangs_is_named_and_the_rest_goes_on(smoke, capsys, tmp_path):
    spoiled = tmp_path / "spoiled.py"
    spoiled.write_text(_SPOILED)
    smoke.__file__ = str(spoiled)
    arguments = ["--device", "cpu", "--backends", "cpu", "--ops", "append,merge", "--jobs", "2"]
    started = time.monotonic()
    assert smoke.main([*arguments, "--seconds", "5"]) == 1
    assert time.monotonic() - started < 15
    lines = [line.split(maxsplit=4) for line in capsys.readouterr().out.splitlines()]
    by_op = {op: [line for line in lines if line[2] == op] for op in ("append", "merge")}
    assert [(line[0], line[3]) for line in by_op["merge"]] == [
        ("ok", "a"), ("RED", "b"), ("ok", "c"), ("RED", "d"), ("ok", "e")
    ]  # fmt: skip
    assert [(line[0], line[3]) for line in by_op["append"]] == [
        ("ok", "a"), ("RED", "b"), ("ok", "c"), ("RED", "d"), ("RED", "1")
    ]  # fmt: skip
    (died, hung, left) = (line for line in by_op["append"] if line[0] == "RED")
    assert "died with -11 why it died" in died[4] and "still at it" in hung[4]
    assert left[4].strip() == "more not reached in time"
    assert "5 ok, 0 refused, 5 RED" in " ".join(lines[-1])


def test_what_is_not_started_in_time_is_red(smoke, capsys):
    assert smoke.main(["--device", "cpu", "--backends", "cpu", "--ops", "merge", "--seconds", "-1"]) == 1
    assert "RED cpu" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        smoke.main(["--ops", "merge,nothing"])
