"""One CSV row per case and contender; each carries the machine, so a file can be cut and joined without losing it."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pagewire.bench.machine import Machine

# how the reason of a row begins whose contender ended its process; nothing else of that case was timed then
FAULT = "CUDA fault: "


@dataclass(frozen=True)
class Row:
    suite: str
    group: str
    case: str
    contender: str
    ours: bool
    status: str  # ok, wrong (checked red, not timed), skipped, failed
    reason: str = ""
    us: float = 0.0  # median
    p20_us: float = 0.0
    p80_us: float = 0.0
    host_us: float = 0.0  # until the call returned
    rounds: int = 0
    bytes: int = 0  # what must move at least once
    flops: int = 0
    gbps: float = 0.0
    tflops: float = 0.0
    roof_pct: float = 0.0  # of the slower of moving and computing, at the rates below
    error: float = 0.0  # relative to fp64; moves: share of wrong bytes
    ratio: float = 0.0  # time over the fastest of ours in the case: a peer above 1 is slower than we are
    roof_gbps: float = 0.0
    roof_tflops: float = 0.0
    version: str = ""

    @property
    def faulted(self) -> bool:
        return self.status == "failed" and self.reason.startswith(FAULT)


FIELDS = (*(f.name for f in fields(Row)), *Machine._fields)


def append(path: Path, rows: list[Row], machine: Machine) -> None:
    """Adds rows, with a header when the file is new. Written case by case: a run that is cut off loses one case."""
    new = not path.exists() or path.stat().st_size == 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        for row in rows:
            values = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(row).items()}
            writer.writerow({**values, "ours": int(row.ours), **machine._asdict()})


def read(path: Path) -> Iterator[tuple[Row, dict[str, str]]]:
    """(row, machine fields) of every line.

    Raises:
        ValueError: a file with other columns.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = set(FIELDS) - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{path}: expected the columns of pagewire bench, {', '.join(sorted(missing))} missing")
        for line in reader:
            yield _row(line), {name: line[name] for name in Machine._fields}


def _row(line: dict[str, str]) -> Row:
    kinds: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str, "bool": lambda x: x == "1"}
    return Row(**{f.name: kinds[str(f.type)](line[f.name]) for f in fields(Row)})
