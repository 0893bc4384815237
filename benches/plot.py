"""Pictures of a bench CSV: python benches/plot.py quick.csv [more.csv] --out DIR  ->  roofline.png, ratios.png"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

try:
    from pagewire.bench import rows as bench_rows
except ModuleNotFoundError:  # a plain source tree
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))
    from pagewire.bench import rows as bench_rows

Row = bench_rows.Row
_MARKS = "osD^vP*X"
_FILLS = ("full", "none", "left", "top")  # of our backends


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("plot", description=(__doc__ or "").split(":")[0])
    parser.add_argument("csv", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("."))
    args = parser.parse_args(argv)
    present = [path for path in args.csv if path.exists()]
    for path in args.csv:
        if path not in present:
            print(f"plot: {path} does not exist, left out", file=sys.stderr)
    found = [(row, machine) for path in present for row, machine in bench_rows.read(path)]
    timed = [row for row, _ in found if row.status == "ok" and row.us > 0]
    if not timed:
        print(f"plot: no timed rows in {', '.join(map(str, args.csv))}", file=sys.stderr)
        return 1
    machine = found[-1][1]
    title = f"{machine['device']}, pagewire {machine['commit']}, {machine['date'][:10]}"
    args.out.mkdir(parents=True, exist_ok=True)
    roofline(timed, title, args.out / "roofline.png")
    ratios(timed, title, args.out / "ratios.png")
    print(f"{args.out / 'roofline.png'}\n{args.out / 'ratios.png'}")
    return 0


def roofline(rows: Sequence[Row], title: str, path: Path) -> None:
    """Left: attention, rate over intensity under the roof measured in the same run. Right: moves, share of the roof.

    One of our backends: a mark per group. Several: each fills its marks in its own way, and has a bar of its own.
    """
    backends = list(dict.fromkeys(r.contender for r in rows if r.ours))
    several = len(backends) > 1
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.5), width_ratios=(3, 2))
    attention = [r for r in rows if r.flops]
    if attention:
        memory = float(np.median([r.roof_gbps for r in attention]))
        compute = float(np.median([r.roof_tflops for r in attention]))
        intensities = [r.flops / r.bytes for r in attention]
        x = np.geomspace(min(intensities) / 2, max(*intensities, 2e3 * compute / memory), 200)
        left.plot(x, np.minimum(x * memory / 1e3, compute), color="black", lw=1.5)
        left.annotate(f"{memory:.0f} GB/s", (x[20], x[20] * memory / 1e3), ha="right", va="bottom")
        left.annotate(f"{compute:.3g} TFLOP/s", (x[-1], compute), ha="right", va="bottom")
    for at, group in enumerate(dict.fromkeys(r.group for r in attention)):
        mark = _MARKS[at % len(_MARKS)]
        of_group = [r for r in attention if r.group == group]
        points(left, [r for r in of_group if not r.ours], mark, color="0.7", ms=4, zorder=2)
        for backend, fill in zip(backends, itertools.cycle(_FILLS), strict=False):
            mine = [r for r in of_group if r.ours and r.contender == backend]
            label = f"{group} {backend}" if several else group
            points(left, mine, mark, color=f"C{at}", ms=6, zorder=3, fillstyle=fill, label=label)
    left.set(xscale="log", yscale="log", xlabel="FLOP per byte that must move", ylabel="TFLOP/s")
    left.set_title("attention (grey: peers)")
    if attention:
        left.legend()
    left.grid(alpha=0.3, which="both")
    moves = [r for r in rows if not r.flops and r.ours][::-1]
    bars = [f"{r.case} {r.contender}" if several else r.case for r in moves]
    colours = [f"C{backends.index(r.contender)}" for r in moves]
    right.barh(bars, [r.roof_pct for r in moves], color=colours)
    right.axvline(100, color="black", lw=1)
    right.set_title("moves, % of the copy roof")
    right.tick_params(axis="y", labelsize=6)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def points(axes: Any, rows: Sequence[Row], mark: str, **style: Any) -> None:
    if rows:
        axes.plot([r.flops / r.bytes for r in rows], [r.tflops for r in rows], mark, ls="", **style)


def ratios(rows: Sequence[Row], title: str, path: Path) -> None:
    """Cases by peers: the peer's time over the fastest of ours. Blue: we are faster; white: not compared."""
    peers = list(dict.fromkeys(r.contender for r in rows if not r.ours))
    cases = list(dict.fromkeys(r.case for r in rows if not r.ours))
    values = np.full((max(len(cases), 1), max(len(peers), 1)), np.nan)
    for row in rows:
        if not row.ours and row.ratio > 0:
            values[cases.index(row.case), peers.index(row.contender)] = row.ratio
    size = (4.5 + 0.8 * len(peers), 1.6 + 0.2 * len(cases))
    figure, axes = plt.subplots(figsize=size)
    axes.imshow(np.log2(values), cmap="RdBu", vmin=-2, vmax=2, aspect="auto")
    axes.set_xticks(range(len(peers)), peers, rotation=40, ha="left")
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(cases)), cases, fontsize=6)
    for (y, x), value in np.ndenumerate(values):
        if np.isfinite(value):
            strong = abs(np.log2(value)) > 1.4
            text = f"{value:.2f}" if value < 10 else f"{value:.0f}"
            axes.text(x, y, text, ha="center", va="center", fontsize=6, color="w" if strong else "k")
    axes.set_xlabel(f"time of the peer over the fastest of ours\n{title}", fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
