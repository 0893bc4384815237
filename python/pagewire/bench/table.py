"""The printed table: one aligned line per case and backend, a column per peer with its time over ours."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from pagewire.bench.rows import Row

_CASE = 50  # characters of a case's id
_BEST = "best of ours"
_MARKS = {"skipped": "-", "wrong": "WRONG", "failed": "failed"}


class Table:
    """Prints as it goes: a heading per group with the peers of its op, and each reason once, where it first applies."""

    def __init__(self, peers: Mapping[str, Sequence[str]]) -> None:
        self.peers = peers  # op -> names, from left to right
        self._group = ""
        self._told: set[tuple[str, str]] = set()
        self._ratios: dict[str, dict[str, dict[str, list[float]]]] = {}  # group -> whose -> peer

    def heading(self, group: str, op: str) -> None:
        if group == self._group:
            return
        self._group = group
        peers = "".join(f"{name:>{_width(name)}}" for name in self.peers[op])
        head = f"{'case':<{_CASE}} {'backend':<9}{'µs':>11}{'p20':>11}{'p80':>11}{'rate':>15}{'% roof':>8}"
        print(f"\n{head} |{peers}\n{'-' * (len(head) + 2 + len(peers))}", flush=True)

    def case(self, rows: Sequence[Row], op: str) -> None:
        """All rows of one case."""
        self.heading(rows[0].group, op)
        peers = {r.contender: r for r in rows if not r.ours}
        for row in (r for r in rows if r.ours):
            if row.status != "ok":
                print(f"{row.case:<{_CASE}} {row.contender:<9}{row.status}: {row.reason}", flush=True)
                continue
            line = (
                f"{row.case:<{_CASE}} {row.contender:<9}{row.us:>11.1f}{row.p20_us:>11.1f}{row.p80_us:>11.1f}"
                f"{rate(row):>15}{row.roof_pct:>7.0f}%"
            )
            columns = "".join(f"{_ratio(row, peers.get(name)):>{_width(name)}}" for name in self.peers[op])
            print(f"{line} |{columns}", flush=True)
            self._keep(row.contender, row, peers)
        timed = [r for r in rows if r.ours and r.status == "ok"]
        if timed:
            self._keep(_BEST, min(timed, key=lambda r: r.us), peers)
        for row in peers.values():
            self._tell(row)

    def _keep(self, whose: str, ours: Row, peers: Mapping[str, Row]) -> None:
        kept = self._ratios.setdefault(ours.group, {}).setdefault(whose, defaultdict(list))
        for name, peer in peers.items():
            if peer.status == "ok":
                kept[name].append(peer.us / ours.us)

    def _tell(self, row: Row) -> None:
        if row.status == "ok" or not row.reason or (row.contender, row.reason) in self._told:
            return
        self._told.add((row.contender, row.reason))
        print(f"    {row.contender} {row.status}: {row.reason}", flush=True)

    def summary(self) -> None:
        """Geometric mean of the ratios per group, backend and peer; of several backends the best in each case too."""
        for group, kept in self._ratios.items():
            backends = [whose for whose in kept if whose != _BEST]
            for whose in (*backends, _BEST) if len(backends) > 1 else backends:
                if kept[whose]:
                    means = "; ".join(map(_mean, kept[whose].items()))
                    print(f"geomean {group} {whose}: {means}")


def _ratio(ours: Row, peer: Row | None) -> str:
    if peer is None:
        return ""
    return f"{peer.us / ours.us:.2f}x" if peer.status == "ok" else _MARKS[peer.status]


def _mean(named: tuple[str, Sequence[float]]) -> str:
    name, ratios = named
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return f"{name} {mean:.2f}x ({min(ratios):.2f} to {max(ratios):.2f}, n={len(ratios)})"


def _width(name: str) -> int:
    return max(len(name), 7) + 2


def rate(row: Row) -> str:
    """In the unit of what bounds the case."""
    moving = row.bytes / row.roof_gbps / 1e3 if row.roof_gbps else math.inf
    computing = row.flops / row.roof_tflops / 1e6 if row.roof_tflops else 0.0
    if computing <= moving:
        return f"{row.gbps:.1f} GB/s"
    return f"{row.tflops:.1f} TFLOP/s" if row.roof_tflops > 10 else f"{1e3 * row.tflops:.1f} GFLOP/s"
