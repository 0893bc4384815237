"""The loop over cases: build, check, time beside the peers, print, write. Nothing is timed that has just been red.

An exception ends a contender's part of a case. A fault that stays with the CUDA context ends this process's work: it
says who and where, and the same command with --csv goes on after it.
"""

from __future__ import annotations

import gc
import re
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import pagewire as pw
from pagewire import registry
from pagewire.bench import machine as machines
from pagewire.bench import roof as roofs
from pagewire.bench import rows as csv_rows
from pagewire.bench.attention import AttentionWork
from pagewire.bench.cases import Append, Attention, Case, Pack
from pagewire.bench.cold_memory import ColdMemory
from pagewire.bench.movement import AppendWork, MergeWork, PackWork
from pagewire.bench.peers import Peer
from pagewire.bench.roof import Roof
from pagewire.bench.rows import Row
from pagewire.bench.table import Table
from pagewire.bench.timing import Clock, ContenderFailed, Times, interleave
from pagewire.bench.work import Contender, DoesNotFit, Verdict, Work
from pagewire.errors import BackendError

# seconds of timing per case where the suite's minutes allow it
_SECONDS = {"cpu": 2.0, "cuda": 0.4}
_SETUP_SHARE = 0.5  # of a case's time goes into memory, checks and compilation
MEMORY_SHARE = 0.45  # of what is free; peers hold copies of a case's K/V beside it
_HOST = ("cpu", "reference")  # no contenders on a GPU


@dataclass(frozen=True)
class Settings:
    suite: str
    device: str  # "cpu", "cuda"
    minutes: float
    peers: tuple[Peer, ...]
    # none: on a CPU the one the registry takes, on a GPU every one that is there
    backends: tuple[str, ...] = ()
    csv: Path | None = None
    faults: frozenset[tuple[str, str]] = frozenset()  # (case, contender) not to run again
    only: Callable[[Case], bool] = lambda case: True


@dataclass
class Result:
    rows: list[Row]
    machine: machines.Machine
    red: list[str]  # cases in which we were wrong or failed, and who
    late: list[str]  # cases the minutes did not reach
    # whose call took the CUDA context with it: nothing more runs in this process
    fault: Row | None = None


def run(settings: Settings, cases: Sequence[Case]) -> Result:
    """Prints the header, the roof, a line per case and the geometric means; writes the CSV as it goes."""
    started = time.perf_counter()
    clock = Clock(settings.device)
    machine = machines.describe(settings.device)
    smoke = settings.suite == "smoke"
    print(f"pagewire {machine.pagewire} at {machine.commit}, {machine.date}")
    print(f"{machine.device} ({machine.arch}), {machine.threads} threads, clocks: {machine.clocks}")
    print(f"python {machine.python}, torch {machine.torch}, triton {machine.triton}")
    roof = roofs.measure(clock, smoke=smoke)
    print(f"roof: {roof}")
    backends = _present_backends(settings)
    peers = _present(settings)
    cold = 1 << 20 if smoke else machines.cold_bytes(settings.device)
    limit = int(MEMORY_SHARE * machines.free_bytes(settings.device))
    memory = ColdMemory(settings.device, cold, limit)
    print(
        f"cold after {cold >> 20} MiB; at most {limit >> 20} MiB of tensors; {settings.minutes:g} minutes "
        f"for {len(cases)} cases"
    )
    table = Table({case.op: [p.name for p in peers if case.op in p.ops] for case in cases})
    result = Result([], machine, [], [])
    stop = started + 60 * settings.minutes
    for at, case in enumerate(cases):
        left = stop - time.perf_counter()
        if left < 0:
            result.late.append(case.id)
            continue
        seconds = min(0.05 if smoke else _SECONDS[settings.device], _SETUP_SHARE * left / (len(cases) - at))
        case_rows = _case(settings, case, backends, peers, memory, clock, roof, seconds)
        table.case(case_rows, case.op)
        result.rows += case_rows
        result.red += [f"{case.id} ({name})" for name in _red(case_rows, case, backends, settings)]
        result.fault = next((r for r in case_rows if r.faulted), None)
        if settings.csv is not None:
            # a case that a fault cut short has no other row: the next run times its other contenders
            written = case_rows if result.fault is None else [result.fault]
            csv_rows.append(settings.csv, written, machine)
        if result.fault is not None:
            break
        gc.collect()
    print()
    table.summary()
    if not smoke and result.fault is None:
        _compare_roofs(roof, roofs.measure(clock))
    _last_words(result, settings.minutes, time.perf_counter() - started)
    return result


def _red(rows: Sequence[Row], case: Case, backends: Sequence[str], settings: Settings) -> list[str]:
    """Ours that were wrong or failed in a case, now or before this process."""
    found = [r.contender for r in rows if r.ours and r.status in ("wrong", "failed")]
    return found + [n for n in backends if (case.id, n) in settings.faults]


def ours(device: str, asked: Sequence[str] = ()) -> dict[str, str | None]:
    """The backends to time, each with None or why it cannot run here.

    Args:
        asked: by name; else every one on a GPU, and none on a CPU, where the registry takes one for each case.
    """
    every = [b.name for b in registry.BACKENDS if device == "cuda" and b.name not in _HOST]
    reasons = pw.backends(device)
    return {name: reasons[name] for name in asked or every}


def _present_backends(settings: Settings) -> tuple[str, ...]:
    """Ours that can run here; the others are named with their reason."""
    found = ours(settings.device, settings.backends)
    for name, reason in found.items():
        if reason is not None:
            print(f"backend {name} skipped: {reason}")
    return tuple(name for name, reason in found.items() if reason is None)


def _present(settings: Settings) -> list[Peer]:
    """Peers that can run here; the others are named with their reason."""
    found = []
    for peer in settings.peers:
        reason = peer.missing(settings.device)
        if reason is None:
            found.append(peer)
        else:
            print(f"peer {peer.name} skipped: {reason}")
    return found


def _work(case: Case, memory: ColdMemory) -> Work:
    if isinstance(case, Attention):
        return AttentionWork(case, memory)
    if isinstance(case, Append):
        return AppendWork(case, memory)
    return PackWork(case, memory) if isinstance(case, Pack) else MergeWork(case, memory)


def _case(
    settings: Settings,
    case: Case,
    backends: Sequence[str],
    peers: Sequence[Peer],
    memory: ColdMemory,
    clock: Clock,
    roof: Roof,
    seconds: float,
) -> list[Row]:
    """The rows of one case; the roof's rates are in every one of them. After a row that faulted there is no other."""
    backends = backends or (_backend(case, settings.device),)

    def row(name: str, ours: bool, status: str, reason: str = "", **figures: Any) -> Row:
        return Row(
            settings.suite, case.group, case.id, name, ours, status, reason, bytes=case.bytes, flops=case.flops,
            roof_gbps=roof.memory(case.roof, settings.device), roof_tflops=roof.compute(case.dtype),
            **figures,
        )  # fmt: skip

    try:
        work = _work(case, memory)
    except (DoesNotFit, torch.OutOfMemoryError, MemoryError) as error:
        return [row(name, True, "skipped", _first_line(error)) for name in backends]
    found: list[Row] = []
    ready: list[tuple[Contender, Verdict]] = []
    for name, ours, prepare in _contenders(work, backends, peers):
        if (case.id, name) in settings.faults:
            found.append(row(name, ours, "skipped", "it ended an earlier process with a CUDA fault"))
            continue
        contender, verdict = _checked(work, prepare)
        if contender is not None and verdict.ok:
            ready.append((contender, verdict))
            continue
        status = "failed" if contender is None else "wrong"
        reason = verdict.reason
        if reason.startswith(_REFUSED):
            status, reason = "skipped", reason.removeprefix(_REFUSED)
        elif contender is None and clock.lost():
            return [*found, row(name, ours, status, csv_rows.FAULT + reason)]
        found.append(row(name, ours, status, reason, error=verdict.error))
    times: dict[str, Times] = {}
    while not times and any(contender.name in backends for contender, _ in ready):
        try:
            times = interleave(clock, [contender for contender, _ in ready], work.copies, seconds)
        except ContenderFailed as failure:
            name, reason = failure.name, _first_line(failure.__cause__ or failure)
            if clock.lost():
                return [*found, row(name, name in backends, "failed", csv_rows.FAULT + reason)]
            found.append(row(name, name in backends, "failed", reason))
            ready = [(c, v) for c, v in ready if c.name != name]
    mine = min((times[name].median for name in backends if name in times), default=0.0)
    for contender, verdict in ready:
        ours = contender.name in backends
        if not times:
            found.append(row(contender.name, ours, "skipped", "nothing of ours to compare with"))
            continue
        figures = _figures(times[contender.name], case, roof, settings.device, mine)
        checked = row(contender.name, ours, "ok", error=verdict.error, **figures)
        found.append(replace(checked, version=contender.version))
    return found


_REFUSED = "refused: "
_PUBLIC = {"append": "append_kv", "pack": "pack_kv", "unpack": "unpack_kv", "merge": "merge_state"}


def _contenders(
    work: Work, backends: Sequence[str], peers: Sequence[Peer]
) -> list[tuple[str, bool, Callable[[], Contender]]]:
    found: list[tuple[str, bool, Callable[[], Contender]]] = []
    for name in backends:
        found.append((name, True, partial(work.ours, name)))
    for peer in peers:
        if work.case.op in peer.ops:
            found.append((peer.name, False, partial(_of_peer, peer, work)))
    return found


def _of_peer(peer: Peer, work: Work) -> Contender:
    reason = peer.refuses(work.case)
    if reason is not None:
        raise _Refused(reason)
    return peer.prepare(work)


class _Refused(Exception):
    """A peer does not take the case."""


def _reason(error: BackendError) -> str:
    """Why a backend named by us does not take a call, without the words that say which and what."""
    line = str(error).splitlines()[0]
    return re.sub(r"^backend='\w+' refuses this \w+: ", "", line)


def _checked(work: Work, prepare: Callable[[], Contender]) -> tuple[Contender | None, Verdict]:
    """An exception of a contender ends that contender, not the suite."""
    try:
        contender = prepare()
        verdict = work.check(contender)
        pw.check_errors()
        return contender, verdict
    except _Refused as refusal:
        return None, Verdict(False, 0.0, f"{_REFUSED}{refusal}")
    except BackendError as refusal:
        return None, Verdict(False, 0.0, f"{_REFUSED}{_reason(refusal)}")
    except Exception as error:
        return None, Verdict(False, 0.0, _first_line(error))


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160] if text else ''}"


def _backend(case: Case, device: str) -> str:
    """The backend the registry takes for the case."""
    op = _PUBLIC.get(case.op, case.op)
    kv_dtype = case.stored if isinstance(case, Attention | Append) else case.dtype
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        told = pw.explain(op, device=device, dtype=case.dtype, kv_dtype=kv_dtype, head_dim=case.head_dim)
    for line in told.splitlines()[1:]:
        name, reason = line.removeprefix("->").split(maxsplit=1)
        # on a CPU Triton is interpreted and CUDA emulated, if anything: nothing to time
        if reason == "takes it" and not (device == "cpu" and name in ("triton", "cuda")):
            return name
    raise BackendError(told)


def _figures(times: Times, case: Case, roof: Roof, device: str, mine: float) -> dict[str, Any]:
    us = times.median
    floor = roof.time_us(case.bytes, case.flops, case.roof, case.dtype, device)
    return {
        "us": us,
        "p20_us": times.quantile(0.2),
        "p80_us": times.quantile(0.8),
        "host_us": times.host,
        "rounds": len(times.device_us),
        "gbps": case.bytes / us / 1e3,
        "tflops": case.flops / us / 1e6,
        "roof_pct": 100 * floor / us,
        "ratio": us / mine if mine else 0.0,
    }


def _compare_roofs(before: Roof, after: Roof) -> None:
    """A roof that moved during the run means the machine was not ours alone: the figures say less."""
    for name, first, second in (
        ("copy", before.copy_gbps, after.copy_gbps),
        ("read", before.read_gbps, after.read_gbps),
    ):
        change = second / first - 1
        if abs(change) > 0.1:
            print(f"the {name} roof moved by {100 * change:+.0f} %: the machine was busy, repeat it")
    print(f"roof at the end: {after}")


def _last_words(result: Result, minutes: float, seconds: float) -> None:
    if result.late:
        print(f"skipped, the {minutes:g} minutes were over: {'; '.join(result.late)}")
    if result.red:
        print(f"RED, not timed: {'; '.join(result.red)}")
    print(f"{len(result.rows)} rows in {seconds:.0f} s")
    if result.fault is not None:
        print(
            f"CUDA FAULT of {result.fault.contender} in {result.fault.case}: nothing more runs in this process; "
            "the same command with --csv goes on with the next case",
            flush=True,
        )
