"""The command end to end on tiny cases, and that nothing red is ever timed."""

import csv
import time
from dataclasses import replace

import pytest
import torch

import pagewire as pw
from pagewire.bench import cli, peers, rows, suite, suites
from pagewire.bench.attention import AttentionWork
from pagewire.bench.cases import Append, Attention, Merge, Pack
from pagewire.bench.cold_memory import ColdMemory
from pagewire.bench.movement import AppendWork, MergeWork, PackWork
from pagewire.bench.timing import Clock
from pagewire.bench.work import Contender, DoesNotFit
from pagewire.errors import BackendError


@pytest.fixture(autouse=True)
def threads():
    """The command sets torch's number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _run(*arguments) -> int:
    fixed = ["--suite", "smoke", "--device", "cpu", "--threads", "1"]
    return cli.main([*fixed, *map(str, arguments)])


def test_the_smoke_suite_is_green_and_restartable(tmp_path, capsys):
    path = tmp_path / "smoke.csv"
    assert _run("--csv", path) == 0
    printed = capsys.readouterr().out
    found = [row for row, _ in rows.read(path)]
    cases = suites.cases("smoke", "cpu")
    for case in cases:
        mine = [r for r in found if r.case == case.id and r.ours]
        assert [r.status for r in mine] == ["ok"], case.id
        assert mine[0].contender != "triton"  # the interpreter, which these tests switch on
        assert mine[0].us > 0 and mine[0].p20_us <= mine[0].us <= mine[0].p80_us
        assert mine[0].roof_pct > 0 and mine[0].roof_gbps > 0
        assert [r for r in found if r.case == case.id and not r.ours and r.ratio > 0], "no peer"
        assert sum(line.startswith(case.id) for line in printed.splitlines()) == 1
    assert "roof: copy" in printed and "geomean decode" in printed
    with path.open(newline="") as file:
        line = next(csv.DictReader(file))
    assert all(line[name] for name in ("device", "clocks", "torch", "pagewire", "commit", "date"))

    assert _run("--csv", path) == 0  # nothing is left to do
    assert len(list(rows.read(path))) == len(found)


def test_a_wrong_result_of_ours_is_red_and_not_timed(monkeypatch, capsys):
    honest = pw.decode

    def zeroed(*args, out, **keywords):
        return honest(*args, out=out, **keywords).zero_()

    monkeypatch.setattr(pw, "decode", zeroed)
    assert _run("--only", "^decode.*fp32", "--peers", "sdpa") == 1
    printed = capsys.readouterr().out
    assert "wrong: request 0" in printed and "RED, not timed" in printed
    assert " GB/s " not in printed.split("backend")[1].split("geomean")[0]


def test_an_unwritten_result_is_red(monkeypatch, capsys):
    monkeypatch.setattr(pw, "prefill", lambda *args, out, **keywords: out)
    assert _run("--only", "^prefill", "--peers", "none") == 1
    assert "NaN or inf" in capsys.readouterr().out


def test_a_wrong_peer_is_named_and_not_timed(monkeypatch, capsys, tmp_path):
    def wrong(work):
        return Contender("sdpa", lambda copy: torch.ones_like(work.q))

    (sdpa,) = (p for p in peers.all_peers() if p.name == "sdpa")
    monkeypatch.setattr(cli.peers, "chosen", lambda names, device: (replace(sdpa, prepare=wrong),))
    path = tmp_path / "x.csv"
    assert _run("--only", "^decode.*fp32", "--csv", path) == 0
    assert "WRONG" in capsys.readouterr().out
    (row,) = (r for r, _ in rows.read(path) if r.contender == "sdpa")
    assert row.status == "wrong" and row.us == 0 and row.error > 0.1


@pytest.mark.parametrize(
    ("case", "kind", "spoil"),
    [
        (Append(9, 2, 64, dtype=torch.float32), AppendWork, "append_kv"),
        (Pack("pack", 9, 1, 2, 2, 64, dtype=torch.float32), PackWork, "pack_kv"),
        (Pack("unpack", 9, 1, 2, 2, 64, dtype=torch.float32), PackWork, "unpack_kv"),
        (Merge(2, 4, 2, 64, torch.float32), MergeWork, "merge_state"),
    ],
    ids=lambda x: getattr(x, "id", None),
)
def test_moves_that_do_nothing_are_caught(case, kind, spoil, monkeypatch):
    work = kind(case, ColdMemory("cpu", 1 << 16, 1 << 28))
    assert work.copies > 1
    honest = work.ours("reference")
    prepared: list[int] = []
    assert work.check(replace(honest, before=prepared.append)).ok and prepared == [0]
    monkeypatch.setattr(pw, spoil, lambda *args, **keywords: None)
    assert not work.check(work.ours("reference")).ok


def test_rows_in_the_middle_of_a_prompt_are_checked():
    case = Attention("x", "1q300s400_2q1s5", (4, 2), 64, 16, torch.float32)
    work = AttentionWork(case, ColdMemory("cpu", 1 << 16, 1 << 28))
    honest = work.ours("reference")
    assert work.check(honest).ok

    def spoiled(copy: int) -> torch.Tensor:
        out = honest.call(copy).clone()
        out[160, -1] += 1e-2
        return out

    verdict = work.check(Contender("reference", spoiled))
    assert not verdict.ok and "150:182" in verdict.reason


def test_page_tables_are_permuted_disjoint_and_in_range():
    case = Attention("x", "2q1s40_1q1s100", (4, 2), 64, 16, torch.float32)
    work = AttentionWork(case, ColdMemory("cpu", 1 << 20, 1 << 28))
    used = []
    for table in work.page_tables:
        for row, request in zip(table, case.requests, strict=True):
            used += row[: -(-request.seq_len // 16)].tolist()
    assert len(set(used)) == len(used) == work.k_cache.shape[0]
    assert sorted(used) == list(range(len(used))) and used != sorted(used)
    assert work.copies * case.cold_bytes >= 1 << 20


def test_a_case_that_does_not_fit_is_skipped_with_both_figures():
    with pytest.raises(DoesNotFit, match=r"needs 1\.0 GiB, 0\.0 GiB are free"):
        AttentionWork(Attention("x", "8q1s32k"), ColdMemory("cpu", 1 << 20, 1 << 20))


def test_minutes_that_are_over_name_what_is_left(capsys):
    cases = suites.cases("smoke", "cpu")
    settings = suite.Settings("smoke", "cpu", 0.0, ())
    result = suite.run(settings, cases)
    assert result.late == [case.id for case in cases] and not result.rows
    assert cases[0].id in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--peers", "sdpa,nobody"), "nobody"),
        (("--only", "("), "unterminated"),
        (("--check", "/nonexistent.json"), "does not exist"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(arguments, message, capsys):
    assert _run(*arguments) != 0
    assert message in capsys.readouterr().err


def test_device_cuda_is_refused_without_one(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    assert cli.main(["--device", "cuda"]) == 1
    assert "no CUDA device" in capsys.readouterr().err


def test_tuning_on_a_cpu_says_why_not(capsys):
    assert cli.main(["--tune", "decode", "--device", "cpu"]) == 1
    assert "nothing to tune on a CPU" in capsys.readouterr().err


_TWO = ("--backend", "reference", "--backend", "cpu", "--peers", "sdpa")
_DECODE = "decode 2q1s40 H4/2 D64 P16 fp32"


@pytest.fixture
def two() -> None:
    """Two backends of ours: a GPU's situation, on a CPU."""
    reason = pw.backends("cpu")["cpu"]
    if reason is not None:
        pytest.skip(reason)


def _read(path) -> dict[str, dict[str, rows.Row]]:
    found: dict[str, dict[str, rows.Row]] = {}
    for row, _ in rows.read(path):
        assert row.contender not in found.setdefault(row.case, {})
        found[row.case][row.contender] = row
    return found


def _spoil(monkeypatch, backend: str, spoil, group: str = "") -> None:
    """`spoil(honest, copy)` is called instead of `honest.call(copy)`, in attention cases of `group`, or all."""
    honest = AttentionWork.ours

    def ours(work, name):
        contender = honest(work, name)
        if name != backend or group not in ("", work.case.group):
            return contender
        return replace(contender, call=lambda copy: spoil(contender, copy))

    monkeypatch.setattr(AttentionWork, "ours", ours)


def test_every_backend_of_a_gpu_is_ours_and_who_is_missing_is_said(monkeypatch, capsys):
    reasons = {"triton": None, "cuda": "it is not built", "cpu": "no", "reference": None}
    monkeypatch.setattr(pw, "backends", lambda device: reasons)
    assert suite.ours("cuda") == {"triton": None, "cuda": "it is not built"}
    assert suite.ours("cuda", ["reference"]) == {"reference": None}
    assert suite.ours("cpu") == {}
    settings = suite.Settings("smoke", "cuda", 1.0, ())
    assert suite._present_backends(settings) == ("triton",)
    assert capsys.readouterr().out == "backend cuda skipped: it is not built\n"
    reasons["cuda"] = None
    assert suite._present_backends(settings) == ("triton", "cuda")
    assert suite._present_backends(replace(settings, device="cpu")) == ()


def test_peers_are_held_against_the_fastest_of_ours(two, monkeypatch, tmp_path, capsys):
    def slow(honest, copy):
        time.sleep(0.01)
        return honest.call(copy)

    _spoil(monkeypatch, "reference", slow)
    path = tmp_path / "x.csv"
    assert _run("--only", f"^{_DECODE}$", "--csv", path, *_TWO) == 0
    found = _read(path)[_DECODE]
    assert {r.contender for r in found.values() if r.ours} == {"reference", "cpu"}
    for row in found.values():
        assert row.ratio == pytest.approx(row.us / found["cpu"].us, rel=1e-4)
    assert found["reference"].ratio > 2 > 1 == found["cpu"].ratio
    printed = capsys.readouterr().out.splitlines()
    for name in ("reference", "cpu"):
        (line,) = (x for x in printed if x.startswith(_DECODE) and x.split()[6] == name)
        ratio = f"{found['sdpa'].us / found[name].us:.2f}x"
        assert line.endswith(f" {ratio}")
        assert [x for x in printed if x.startswith(f"geomean decode {name}: sdpa {ratio} ")]
    assert [x for x in printed if x.startswith(f"geomean decode best of ours: sdpa {ratio} ")]


def test_a_refusal_is_a_skipped_row_with_its_reason(two, monkeypatch, tmp_path, capsys):
    """The words are the registry's own."""
    monkeypatch.delenv("PAGEWIRE_EMULATE_CUDA", raising=False)
    other = AttentionWork(Attention("x", "q1"), ColdMemory("cpu", 1 << 16, 1 << 28)).ours("cuda")
    _spoil(monkeypatch, "cpu", lambda honest, copy: other.call(copy))
    path = tmp_path / "x.csv"
    assert _run("--only", f"^{_DECODE}$", "--csv", path, *_TWO) == 0
    found = _read(path)[_DECODE]
    assert found["cpu"].status == "skipped" and found["reference"].status == "ok"
    assert found["cpu"].reason == pw.backends("cpu")["cuda"]
    assert found["sdpa"].ratio == pytest.approx(found["sdpa"].us / found["reference"].us, rel=1e-4)
    assert "RED" not in capsys.readouterr().out


def test_a_case_that_all_of_ours_refuse_is_listed(two, monkeypatch, tmp_path, capsys):
    def refuse(honest, copy):
        raise BackendError("backend='cuda' refuses this decode: its head is too wide\nand more")

    for name in ("cpu", "reference"):
        _spoil(monkeypatch, name, refuse)
    path = tmp_path / "x.csv"
    assert _run("--only", f"^{_DECODE}$", "--csv", path, *_TWO) == 0
    found = _read(path)[_DECODE]
    assert {r.status for r in found.values()} == {"skipped"} and len(found) == 3
    printed = capsys.readouterr().out
    assert printed.count("skipped: its head is too wide\n") == 2 and "and more" not in printed
    assert sum(line.startswith(_DECODE) for line in printed.splitlines()) == 2
    assert _run("--only", f"^{_DECODE}$", "--csv", path, *_TWO) == 0
    assert "1 of 1 cases are already" in capsys.readouterr().out


@pytest.mark.parametrize("when", ["checked", "timed"])
def test_who_fails_is_red_and_takes_nobody_along(two, when, monkeypatch, tmp_path, capsys):
    def fail(honest, copy):
        if when == "checked" or copy > 2:
            raise RuntimeError("out of resources\nwith a long story")
        return honest.call(copy)

    _spoil(monkeypatch, "reference", fail, group="decode")
    path = tmp_path / "x.csv"
    assert _run("--only", "^(decode|prefill).*fp32", "--csv", path, *_TWO) == 1
    found = _read(path)
    statuses = {name: row.status for name, row in found[_DECODE].items()}
    assert statuses == {"reference": "failed", "cpu": "ok", "sdpa": "ok"}
    assert found[_DECODE]["reference"].reason == "RuntimeError: out of resources"
    assert found[_DECODE]["sdpa"].ratio > 0 and found[_DECODE]["cpu"].ratio == 1
    others = [row for case, by in found.items() if case != _DECODE for row in by.values()]
    assert len(others) == 3 and {row.status for row in others} == {"ok"}
    assert f"RED, not timed: {_DECODE} (reference)\n" in capsys.readouterr().out


def test_a_peer_that_fails_while_it_is_timed_is_not_red(monkeypatch, tmp_path):
    def prepare(work):
        honest = sdpa.prepare(work)

        def call(copy):
            if copy:
                raise RuntimeError("no")
            return honest.call(copy)

        return replace(honest, call=call)

    (sdpa,) = (p for p in peers.all_peers() if p.name == "sdpa")
    failing = (replace(sdpa, prepare=prepare),)
    monkeypatch.setattr(cli.peers, "chosen", lambda names, device: failing)
    path = tmp_path / "x.csv"
    assert _run("--only", f"^{_DECODE}$", "--csv", path) == 0
    found = _read(path)[_DECODE]
    assert (found["sdpa"].status, found["sdpa"].reason) == ("failed", "RuntimeError: no")
    assert [row.status for row in found.values() if row.ours] == ["ok"]


class Device:
    """A device that a fault takes away: from then on synchronising fails, as it does on a GPU."""

    def __init__(self, monkeypatch) -> None:
        self.lost = False
        self.calls: list[str] = []
        monkeypatch.setattr(Clock, "synchronize", lambda clock: self.synchronise())

    def synchronise(self) -> None:
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def faults(self, when: str):
        def call(honest, copy):
            self.synchronise()
            self.calls.append(honest.name)
            if when == "checked" or copy > 2:
                self.lost = True
            result = honest.call(copy)
            if when == "checked":  # reading the result is where it shows
                self.synchronise()
            return result

        return call


@pytest.mark.parametrize("when", ["checked", "timed"])
def test_a_cuda_fault_ends_the_process_and_the_next_one_goes_on(two, when, monkeypatch, tmp_path, capsys):
    device = Device(monkeypatch)
    _spoil(monkeypatch, "reference", device.faults(when), group="prefill")
    path = tmp_path / "x.csv"
    only = ("--only", "^(decode|prefill|mixed).*fp32", "--csv", path, *_TWO)
    cases = [c.id for c in suites.cases("smoke", "cpu") if c.op in ("decode", "prefill")]
    first, faulty, last = (c for c in cases if c.endswith("fp32"))

    assert _run(*only) == 3
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].startswith(f"CUDA FAULT of reference in {faulty}: ")
    found = _read(path)
    assert list(found) == [first, faulty] and {r.status for r in found[first].values()} == {"ok"}
    (row,) = found[faulty].values()
    assert (row.contender, row.status, row.ours) == ("reference", "failed", True)
    assert row.reason.startswith("CUDA fault: RuntimeError: CUDA error: an illegal memory access")

    device.lost = False  # another process
    device.calls.clear()
    assert _run(*only) == 1  # what faulted is red
    printed = capsys.readouterr().out
    assert "1 of 3 cases are already in" in printed and "(reference)" in printed
    lines = [line for line in printed.splitlines() if line.startswith((first, faulty, last))]
    assert [line.startswith(faulty) for line in lines] == [False, False, True, True]
    assert not device.calls
    again = [row for row, _ in rows.read(path)]
    assert {r.contender for r in again if r.case == last and r.status == "ok"} >= {"cpu", "sdpa"}
    statuses = [(r.contender, r.status) for r in again if r.case == faulty]
    assert statuses == [("reference", "failed"), ("reference", "skipped"), ("cpu", "ok"), ("sdpa", "ok")]

    assert _run(*only) == 0  # nothing is left to do
    assert len(list(rows.read(path))) == len(again)


def test_a_peers_fault_ends_the_process_too(monkeypatch, tmp_path, capsys):
    device = Device(monkeypatch)
    (sdpa,) = (p for p in peers.all_peers() if p.name == "sdpa")

    def prepare(work):
        honest = sdpa.prepare(work)
        return replace(honest, call=lambda copy: device.faults("checked")(honest, copy))

    picky = replace(sdpa, name="picky", refuses=lambda case: "not this one")
    both = (picky, replace(sdpa, prepare=prepare))
    monkeypatch.setattr(cli.peers, "chosen", lambda names, device: both)
    path = tmp_path / "x.csv"
    only = ("--only", "^decode.*fp32", "--csv", path, "--backend", "reference")
    assert _run(*only) == 3
    assert f"CUDA FAULT of sdpa in {_DECODE}" in capsys.readouterr().out
    device.lost = False
    assert _run(*only) == 0  # nothing of ours is red
    statuses = [(r.contender, r.status) for r, _ in rows.read(path)]
    assert statuses == [("sdpa", "failed"), ("picky", "skipped"), ("sdpa", "skipped"), ("reference", "ok")]


def test_a_case_in_which_everybody_faulted_is_done(monkeypatch, tmp_path):
    device = Device(monkeypatch)
    _spoil(monkeypatch, "reference", device.faults("checked"))
    path = tmp_path / "x.csv"
    only = ("--only", f"^{_DECODE}$", "--csv", path, "--backend", "reference", "--peers", "none")
    assert _run(*only) == 3
    device.lost = False
    assert _run(*only) == 1
    assert [(r.status, r.us) for r, _ in rows.read(path)] == [("failed", 0.0), ("skipped", 0.0)]
    assert _run(*only) == 0


def test_nothing_is_recorded_after_a_fault(monkeypatch, tmp_path):
    device = Device(monkeypatch)
    _spoil(monkeypatch, "reference", device.faults("checked"))
    path = tmp_path / "x.json"
    assert _run("--only", _DECODE, "--backend", "reference", "--record", path) == 3
    assert not path.exists()


def test_a_process_that_lost_a_gpu_ends_without_destructors(monkeypatch):
    ended = []
    monkeypatch.setattr(cli.os, "_exit", ended.append)
    cli._ended("cuda")
    assert ended == [3]
    assert cli._ended("cpu") == 3 and ended == [3]


def test_a_backend_that_is_not_there_is_refused_by_name(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("PAGEWIRE_EMULATE_CUDA", raising=False)
    path = tmp_path / "x.csv"
    only = ("--only", f"^{_DECODE}$", "--csv", path, "--peers", "none")
    assert _run("--backend", "cuda", *only) == 1
    told = capsys.readouterr()
    reason = "runs on CPU tensors only under PAGEWIRE_EMULATE_CUDA=1"
    assert f"pagewire bench: backend cuda: {reason}" in told.err
    assert "roof" not in told.out and not path.exists()

    assert _run("--backend", "cuda", "--backend", "reference", *only) == 1
    told = capsys.readouterr()
    assert told.out.count(f"backend cuda skipped: {reason}") == 1
    assert {name: row.status for name, row in _read(path)[_DECODE].items()} == {"reference": "ok"}
