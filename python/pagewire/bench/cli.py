"""`python -m pagewire bench`: the command line."""

from __future__ import annotations

import argparse
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import torch

from pagewire import registry
from pagewire.bench import gate, machine, peers, rows, suite, suites, tune
from pagewire.bench.cases import Case

_EPILOG = """Every case is checked against the reference before it is timed. The column of a peer is its time over ours:
above 1 we are faster. `-`: skipped, with the reason below the line. docs/tuning/README.md explains how to read it."""

_FAULT = 3  # the exit status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "pagewire bench", description="Correctness first, then time, beside the roof and the peers.", epilog=_EPILOG
    )
    add = parser.add_argument
    add("--suite", choices=suites.SUITES, default="quick")
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    add("--csv", type=Path, metavar="FILE", help="add a row per case and contender; cases already there are skipped")
    add("--minutes", type=float, help="stop after this long, naming what is left; default by suite and device")
    add("--only", metavar="REGEX", help="cases whose id matches, e.g. '^decode.*P16'")
    add("--peers", metavar="NAMES", help="comma separated, none, or all")
    names = [b.name for b in registry.BACKENDS]
    add(
        "--backend",
        action="append",
        choices=names,
        help="default: on a CPU the registry's choice, on a GPU every one that runs there; may be repeated",
    )
    add("--threads", type=int, help="CPU threads; default: every core this process may use")
    add("--list", action="store_true", help="print the cases and the peers, time nothing")
    add("--tune", metavar="KERNELS", help="decode,prefill: propose rows for the tuning table")
    add("--record", type=Path, metavar="FILE", help="write this run's ratios for --check")
    add("--check", type=Path, metavar="FILE", help="fail where a ratio is more than 25 %% below the recorded one")
    return parser


def main(argv: list[str]) -> int:
    """The exit status of `pagewire bench`.

    0: everything checked green; 1: a red case, a loss against the record, or a refused request; 2: bad arguments;
    3: a CUDA fault ended this process's work, and the same command with --csv goes on with the next case. 3 comes
    before 1: nothing is recorded or compared.
    """
    args = _parser().parse_args(argv)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        return _say("--device cuda: torch sees no CUDA device here")
    torch.set_num_threads(args.threads or machine.cores())
    if args.tune is not None:
        return tune.main(args.tune, device, args.minutes or 5.0)
    gated = args.record or args.check
    try:
        chosen = peers.chosen(args.peers or (gate.PEERS if gated else None), device)
        recorded = gate.load(args.check) if args.check else None
        wanted = re.compile(args.only) if args.only else None
    except (ValueError, re.error) as error:
        return _say(str(error), 2)
    except FileNotFoundError:
        return _say(f"--check: {args.check} does not exist; --record {args.check} writes one")
    cases = [c for c in suites.cases(args.suite, device) if wanted is None or wanted.search(c.id)]
    if recorded is not None:
        cases = [c for c in cases if c.id in recorded[1]]
    if args.list:
        return _list(cases, chosen, device)
    reasons = suite.ours(device, args.backend or ())
    refused = [f"backend {name}: {why}" for name, why in reasons.items() if why is not None]
    if refused and len(refused) == len(reasons):
        return _say("; ".join(refused))
    faults: frozenset[tuple[str, str]] = frozenset()
    if args.csv is not None and args.csv.exists():
        cases, faults = _not_in(args.csv, cases)
    minutes = args.minutes or _minutes(args.suite, device, bool(gated))
    backends = tuple(args.backend or ())
    settings = suite.Settings(args.suite, device, minutes, chosen, backends, args.csv, faults)
    with torch.inference_mode():
        result = suite.run(settings, cases)
        if result.fault is not None:
            return _ended(device)
        code = 1 if result.red or (args.backend and refused) else 0
        if args.record:
            count = gate.record(args.record, result.rows, result.machine)
            print(f"{count} ratios in {args.record}")
        if recorded is not None:
            code = max(code, _check(settings, cases, recorded, result, wanted is not None))
    return code


def _minutes(name: str, device: str, gated: bool) -> float:
    """A gate waits for its last case: one that was not timed would count as lost."""
    return suites.MINUTES[name, device] * (4 if gated else 1)


def _check(
    settings: suite.Settings, cases: list[Case], recorded: gate.Record, result: suite.Result, filtered: bool
) -> int:
    """Cases that lost are measured once more before they count."""
    machine_fields, ratios = recorded
    if machine_fields["device"] != result.machine.device:
        print(f"note: the ratios were recorded on {machine_fields['device']}")
    ids = {c.id for c in cases}
    if filtered:
        ratios = {case: peers for case, peers in ratios.items() if case in ids}
    lost = gate.losses(ratios, result.rows)
    again = [c for c in cases if c.id in {loss.case for loss in lost}]
    all_rows = result.rows
    if again:
        print(f"\n{len(again)} cases lost; measured once more:")
        second = suite.run(replace(settings, csv=None), again)
        all_rows = gate.better(all_rows, second.rows)
        lost = gate.losses(ratios, all_rows)
    for loss in lost:
        print(f"LOST {loss}")
    at = machine_fields["commit"]
    count = sum(map(len, ratios.values()))
    print(f"bench-check: {count - len(lost)} of {count} ratios hold, recorded at {at}, {machine_fields['date']}")
    return 1 if lost else 0


def _not_in(path: Path, cases: list[Case]) -> tuple[list[Case], frozenset[tuple[str, str]]]:
    """A run that was cut off goes on where it stopped: (cases that are not done, who ended a process in which).

    A case of which only faults are known comes after the new ones, for those of its contenders that did not fault.
    """
    written = [row for row, _ in rows.read(path)]
    faults = frozenset((row.case, row.contender) for row in written if row.faulted)
    done = {row.case for row in written if not row.faulted}
    faulted = {case for case, _ in faults}
    left = [c for c in cases if c.id not in done]
    if len(left) < len(cases):
        print(f"{len(cases) - len(left)} of {len(cases)} cases are already in {path}")
    return sorted(left, key=lambda c: c.id in faulted), faults


def _ended(device: str) -> int:
    """After a fault destructors that call CUDA abort the interpreter's end: the status would not be ours."""
    if device == "cuda":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_FAULT)
    return _FAULT


def _list(cases: list[Case], chosen: tuple[peers.Peer, ...], device: str) -> int:
    for case in cases:
        print(f"{case.id:<52} {case.bytes / 2**20:>9.1f} MiB {case.flops / 1e9:>10.1f} GFLOP")
    for peer in chosen:
        print(f"peer {peer.name:<16} {peer.missing(device) or 'runs here'}")
    return 0


def _say(text: str, code: int = 1) -> int:
    print(f"pagewire bench: {text}", file=sys.stderr)
    return code
