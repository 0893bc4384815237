"""The geometric means: per backend, and of the best of ours where there are several."""

from pagewire.bench.rows import Row
from pagewire.bench.table import Table


def _row(case: str, name: str, us: float, ours: bool = True) -> Row:
    status = "ok" if us else "skipped"
    return Row("quick", "decode", case, name, ours, status, "" if us else "no", us=us)


def _printed(capsys, *cases: list[Row]) -> list[str]:
    table = Table({"decode": ["sdpa"]})
    for rows in cases:
        table.case(rows, "decode")
    capsys.readouterr()
    table.summary()
    return capsys.readouterr().out.splitlines()


def test_means_are_kept_apart(capsys):
    printed = _printed(
        capsys,
        [_row("a", "triton", 10), _row("a", "cuda", 0), _row("a", "sdpa", 20, ours=False)],
        [_row("b", "triton", 10), _row("b", "cuda", 5), _row("b", "sdpa", 40, ours=False)],
        [_row("c", "triton", 10), _row("c", "cuda", 5), _row("c", "sdpa", 0, ours=False)],
    )
    assert printed == [
        "geomean decode triton: sdpa 2.83x (2.00 to 4.00, n=2)",
        "geomean decode cuda: sdpa 8.00x (8.00 to 8.00, n=1)",
        "geomean decode best of ours: sdpa 4.00x (2.00 to 8.00, n=2)",
    ]


def test_one_backend_is_its_own_best(capsys):
    rows = [_row("a", "cpu", 10), _row("a", "sdpa", 20, ours=False)]
    assert _printed(capsys, rows) == ["geomean decode cpu: sdpa 2.00x (2.00 to 2.00, n=1)"]
    assert _printed(capsys, rows[:1]) == []
