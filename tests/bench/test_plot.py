"""Pictures from a small CSV."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pagewire.bench import rows
from pagewire.bench.machine import describe
from pagewire.bench.rows import Row

ROOT = Path(__file__).parents[2]


@pytest.fixture
def plot():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install 'pagewire[bench]')")
    spec = importlib.util.spec_from_file_location("bench_plot", ROOT / "benches" / "plot.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_plot"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bench_plot"]


def _rows() -> list[Row]:
    figures = {"bytes": 1 << 20, "roof_gbps": 30.0, "roof_tflops": 0.2, "us": 50.0, "roof_pct": 70.0}
    return [
        Row("quick", "decode", "decode a", "cpu", True, "ok", flops=1 << 22, tflops=0.08, **figures),
        Row("quick", "decode", "decode a", "sdpa", False, "ok", flops=1 << 22, tflops=0.02, ratio=4.0, **figures),
        Row("quick", "decode", "decode a", "flex", False, "skipped", "no"),
        Row("quick", "pack", "pack b", "cpu", True, "ok", **figures),
        Row("quick", "pack", "pack b", "index-select", False, "ok", ratio=0.4, **figures),
    ]


def test_rows_survive_the_file(tmp_path):
    path = tmp_path / "x.csv"
    machine = describe("cpu")
    rows.append(path, _rows()[:2], machine)
    rows.append(path, _rows()[2:], machine)
    read = list(rows.read(path))
    assert [row for row, _ in read] == _rows()
    assert all(fields["commit"] == machine.commit for _, fields in read)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="missing"):
        list(rows.read(path))


def test_a_roofline_and_a_heat_map_are_drawn(plot, tmp_path):
    path = tmp_path / "x.csv"
    rows.append(path, _rows(), describe("cpu"))
    assert plot.main([str(path), "--out", str(tmp_path)]) == 0
    for name in ("roofline.png", "ratios.png"):
        picture = (tmp_path / name).read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 5000, name


def test_moves_alone_are_drawn_too(plot, tmp_path):
    path = tmp_path / "x.csv"
    rows.append(path, _rows()[3:], describe("cpu"))
    assert plot.main([str(path), "--out", str(tmp_path)]) == 0


def test_nothing_timed_is_said(plot, tmp_path, capsys):
    path = tmp_path / "x.csv"
    rows.append(path, _rows()[2:3], describe("cpu"))
    assert plot.main([str(path), "--out", str(tmp_path)]) == 1
    assert "no timed rows" in capsys.readouterr().err


def test_two_backends_of_ours_are_told_apart(plot, tmp_path, monkeypatch):
    """A bar each, marks of their own, and ratios to the faster one, as the rows have them."""
    both = []
    for row in _rows():
        both.append(row)
        if row.ours:
            both.append(replace(row, contender="cuda", us=25.0, roof_pct=90.0))
    figures = []
    monkeypatch.setattr(plot.plt, "close", figures.append)
    plot.roofline(both, "", tmp_path / "a.png")
    left, right = figures[0].axes
    labels = [text.get_text() for text in left.get_legend().get_texts()]
    assert labels == ["decode cpu", "decode cuda"]
    marks = {line.get_label(): line for line in left.lines if line.get_label() in labels}
    assert len({line.get_fillstyle() for line in marks.values()}) == 2
    bars = dict(zip((x.get_text() for x in right.get_yticklabels()), right.patches, strict=True))
    assert {name: bar.get_width() for name, bar in bars.items()} == {"pack b cpu": 70.0, "pack b cuda": 90.0}
    plot.ratios(both, "", tmp_path / "b.png")
    texts = [text.get_text() for text in figures[1].axes[0].texts]
    assert texts == ["4.00", "0.40"]
