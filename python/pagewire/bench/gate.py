"""The regression gate: ratios to peers within one run, against ratios that a person recorded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pagewire.bench.machine import Machine
from pagewire.bench.rows import Row

LOSS = 0.25  # a case may lose this share of its recorded ratio
PEERS = "sdpa,index-select,torch"  # in every torch: the ratios mean the same on every machine

Record = tuple[dict[str, str], dict[str, dict[str, float]]]  # machine fields, ratios


@dataclass(frozen=True)
class Loss:
    case: str
    peer: str
    recorded: float
    now: float | None  # None: the case was not timed

    def __str__(self) -> str:
        now = "not timed" if self.now is None else f"{self.now:.2f}x"
        return f"{self.case}: {now} against {self.peer}, recorded {self.recorded:.2f}x"


def ratios(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Case -> peer -> the peer's time over the fastest of ours, of the cases that were timed."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if not row.ours and row.status == "ok" and row.ratio > 0:
            found.setdefault(row.case, {})[row.contender] = row.ratio
    return found


def record(path: Path, rows: Sequence[Row], machine: Machine) -> int:
    """Writes the ratios of a run beside the machine and commit; returns how many."""
    found = ratios(rows)
    rounded = {case: {p: round(r, 3) for p, r in peers.items()} for case, peers in sorted(found.items())}
    path.write_text(json.dumps({"machine": machine._asdict(), "ratios": rounded}, indent=1) + "\n")
    return sum(map(len, found.values()))


def load(path: Path) -> Record:
    """What `record` wrote.

    Raises:
        FileNotFoundError, ValueError: no record, or another kind of file.
    """
    content = json.loads(path.read_text())
    if not isinstance(content, dict) or set(content) != {"machine", "ratios"}:
        raise ValueError(f"{path}: expected an object of machine and ratios, as --record writes it")
    return content["machine"], content["ratios"]


def losses(recorded: dict[str, dict[str, float]], rows: Sequence[Row]) -> list[Loss]:
    """Cases below their record by more than LOSS, and recorded cases that this run did not time."""
    now = ratios(rows)
    found = []
    for case, peers in recorded.items():
        for peer, ratio in peers.items():
            current = now.get(case, {}).get(peer)
            if current is None or current < (1 - LOSS) * ratio:
                found.append(Loss(case, peer, ratio, current))
    return found


def better(first: Sequence[Row], again: Sequence[Row]) -> list[Row]:
    """Rows of two runs, per case and peer the higher ratio: a neighbour's noise only ever takes away."""
    best = {(r.case, r.contender): r for r in first}
    for row in again:
        old = best.get((row.case, row.contender))
        if old is None or row.ratio > old.ratio:
            best[row.case, row.contender] = row
    return list(best.values())
