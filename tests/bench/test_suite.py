"""The command end to end on tiny cases, and that nothing red is ever timed."""

import csv
from dataclasses import replace

import pytest
import torch

import pagewire as pw
from pagewire.bench import cli, peers, rows, suite, suites
from pagewire.bench.arena import Arena
from pagewire.bench.attention import AttentionWork
from pagewire.bench.cases import Append, Attention, Merge, Pack
from pagewire.bench.movement import AppendWork, MergeWork, PackWork
from pagewire.bench.work import Contender, DoesNotFit


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
    work = kind(case, Arena("cpu", 1 << 16, 1 << 28))
    assert work.copies > 1
    honest = work.ours("reference")
    assert work.check(honest).ok
    monkeypatch.setattr(pw, spoil, lambda *args, **keywords: None)
    assert not work.check(work.ours("reference")).ok


def test_rows_in_the_middle_of_a_prompt_are_checked():
    case = Attention("x", "1q300s400_2q1s5", (4, 2), 64, 16, torch.float32)
    work = AttentionWork(case, Arena("cpu", 1 << 16, 1 << 28))
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
    work = AttentionWork(case, Arena("cpu", 1 << 20, 1 << 28))
    used = []
    for table in work.page_tables:
        for row, request in zip(table, case.requests, strict=True):
            used += row[: -(-request.seq_len // 16)].tolist()
    assert len(set(used)) == len(used) == work.k_cache.shape[0]
    assert sorted(used) == list(range(len(used))) and used != sorted(used)
    assert work.copies * case.cold_bytes >= 1 << 20


def test_a_case_that_does_not_fit_is_skipped_with_both_figures():
    with pytest.raises(DoesNotFit, match=r"needs 1\.0 GiB, 0\.0 GiB are free"):
        AttentionWork(Attention("x", "8q1s32k"), Arena("cpu", 1 << 20, 1 << 20))


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
