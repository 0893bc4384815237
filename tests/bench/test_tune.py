"""The sweep's search, the row it prints, and that the table is left as it was."""

import time

import pytest
import torch

from pagewire.bench import tune
from pagewire.bench.attention import AttentionWork
from pagewire.bench.cases import Attention
from pagewire.bench.cold_memory import ColdMemory
from pagewire.bench.timing import Clock
from pagewire.kernels import tuning
from pagewire.kernels.tuning import KernelConfig, Key


def _key(kernel: str = "decode") -> Key:
    return tune.key_of(kernel, Attention("x", "2q1s40"), 90)


def test_targets_are_rows_of_the_table():
    for kernel in tune.KERNELS:
        found = tune.targets([kernel], 90)
        assert found and len({t.key for t in found}) == len(found)
        for target in found:
            assert target.key in target.table
            assert {tune.key_of(kernel, case, 90) for case in target.cases} == {target.key}
            fields = set(target.table[target.key]._fields)
            assert set(tune._CHOICES[kernel]) <= fields


def test_search_walks_to_the_best_and_steps_over_what_fails():
    start = KernelConfig(16, 64, 4, 3, 2)
    best = KernelConfig(16, 128, 8, 5, 1)
    tried = []

    def speedup(config: KernelConfig) -> float | None:
        tried.append(config)
        if config.num_stages == 6:  # does not fit
            return None
        return 1 + sum(0.1 for a, b in zip(config, best, strict=True) if a == b)

    found, gain = tune.search(start, tune._CHOICES["decode"], speedup)
    assert found == best and gain == 1.6
    assert len(set(tried)) == len(tried) and start not in tried


def test_search_keeps_the_present_row_when_nothing_is_better():
    start = KernelConfig(16, 64, 4, 3, 2)
    assert tune.search(start, tune._CHOICES["decode"], lambda config: 0.9) == (start, 1.0)


def test_search_prepares_a_field_before_it_asks_for_it():
    start = KernelConfig(16, 64, 4, 3, 2)
    together = ({"BLOCK_N": 64, "num_stages": 4}, {"BLOCK_N": 64})  # the second is the start itself
    prepared, asked = [], []

    def speedup(config: KernelConfig) -> float:
        assert config in prepared[-1]
        asked.append(config)
        return 1.0 + (config.BLOCK_N == 32)

    found, _ = tune.search(start, tune._CHOICES["decode"], speedup, together=together, prepare=prepared.append)
    assert prepared[0] == [start._replace(num_stages=4)] and all(prepared)
    assert [c for group in prepared for c in group] == asked
    assert found == start._replace(BLOCK_N=32)
    assert {c.BLOCK_N for group in prepared[2:] for c in group} == {32}


def test_the_first_candidates_are_those_a_sweep_tries_first():
    found = tune.first_candidates(tune.KERNELS, 90, tune.CANDIDATES)
    assert len(set(found)) == len(found) == tune.CANDIDATES
    rows = list(dict.fromkeys((t.kernel, t.key) for t, _ in found))
    assert rows == [(t.kernel, t.key) for t in tune.targets(tune.KERNELS, 90)][:4]
    for target, config in found:
        assert config != target.table[target.key]
    configs = {(t.kernel, t.key.operands, tuple(c)[:5]) for t, c in found}
    assert ("prefill", "16", (128, 128, 8, 2, 1)) in configs
    assert ("decode", "16x8", (16, 64, 4, 4, 3)) in configs


def test_what_did_not_compile_is_not_timed(monkeypatch, capsys):
    case = Attention("x", "2q1s40", (4, 2), 128, 16, torch.bfloat16)
    target = tune.Target("decode", _key(), (case,))
    present = tuning.DECODE[target.key]
    timed = []

    class Compilers:
        def compile(self, kernel, key, configs, seconds):
            assert (kernel, key) == ("decode", target.key) and seconds > 0
            assert not set(configs) & set(timed)
            return ["too wide" if c.BLOCK_N == 128 else "" for c in configs]

    def compare(of, config, works, clock, backend):
        timed.append(config)
        return [1.0], [2.0]

    monkeypatch.setattr(tune, "compare", compare)
    memory = ColdMemory("cpu", 1 << 16, 1 << 28)
    line = tune._tune(target, memory, Clock("cpu"), time.perf_counter() + 60, Compilers())
    assert "stays" in line
    assert timed and all(c.BLOCK_N != 128 for c in timed)
    assert f"{tuple(present._replace(BLOCK_N=128))}: too wide" in capsys.readouterr().out


def test_a_fault_of_the_device_ends_the_sweep_and_names_the_candidate(monkeypatch, capsys):
    """Timed after it, every candidate would fail and the row seem to stay."""

    class Compilers:
        __init__ = __exit__ = lambda *given: None

        def __enter__(self):
            return self

        def compile(self, kernel, key, configs, seconds):
            return [""] * len(configs)

    class Lost(Clock):
        def __init__(self, device):
            super().__init__("cpu")

        def lost(self):
            return True

    timed = []

    def compare(of, config, works, clock, backend):
        timed.append(config)
        raise RuntimeError("CUDA error 700")

    monkeypatch.setattr(tune, "Compiler", Compilers)
    monkeypatch.setattr(tune, "Clock", Lost)
    monkeypatch.setattr(tune, "compare", compare)
    monkeypatch.setattr(tune, "backends", lambda device: {"triton": None})
    monkeypatch.setattr(tune, "ColdMemory", lambda *given: ColdMemory("cpu", 1 << 16, 1 << 28))
    monkeypatch.setattr(tune.machines, "cold_bytes", lambda device: 0)
    monkeypatch.setattr(tune.machines, "free_bytes", lambda device: 0)
    here = tune.machines.describe("cpu")
    monkeypatch.setattr(tune.machines, "describe", lambda device: here)
    monkeypatch.setattr(tune.torch.cuda, "get_device_capability", lambda: (9, 0))
    assert tune.main("decode", "cuda", 1.0) == 3
    assert len(timed) == 1 and f"a CUDA fault ends the sweep at {tuple(timed[0])}" in capsys.readouterr().out


def test_without_triton_nothing_is_tuned(monkeypatch, capsys):
    monkeypatch.setattr(tune, "backends", lambda device: {"triton": "triton is not installed"})
    assert tune.main("decode", "cuda", 1.0) == 1
    assert "triton is not installed" in capsys.readouterr().err


def test_a_comparison_runs_both_rows_and_puts_the_table_back(monkeypatch):
    monkeypatch.setattr(tune, "_SECONDS", 0.0)
    case = Attention("x", "2q1s40", (4, 2), 128, 16, torch.bfloat16)
    target = tune.Target("decode", _key(), (case,))
    present = tuning.DECODE[target.key]
    candidate = present._replace(BLOCK_N=16, num_stages=2)
    seen = set()

    class Watching(AttentionWork):
        def ours(self, backend):
            honest = super().ours(backend)

            def call(copy: int) -> torch.Tensor:
                seen.add(tuning.DECODE[target.key])
                return honest.call(copy)

            return tune.Contender(backend, call)

    work = Watching(case, ColdMemory("cpu", 1 << 16, 1 << 28))
    old, new = tune.compare(target, candidate, [work], Clock("cpu"), "reference")
    assert len(old) == len(new) == 1 and min(*old, *new) > 0
    assert seen == {present, candidate}
    assert tuning.DECODE[target.key] == present


def test_a_failure_puts_the_table_back():
    target = tune.Target("decode", _key(), ())
    present = tuning.DECODE[target.key]
    candidate = present._replace(BLOCK_N=16)
    with pytest.raises(ValueError, match="wrong"), tune.row(target, candidate):
        assert tuning.DECODE[target.key] == candidate
        raise ValueError("wrong")
    assert tuning.DECODE[target.key] == present


def test_a_proposal_reads_as_a_line_of_the_table():
    shown = f"{tune._shown(_key())}: {tune._shown(KernelConfig(16, 64, 4, 3, 2))}"
    assert shown == 'Key(90, "16", 128, 16): KernelConfig(16, 64, 4, 3, 2)'
    assert eval(f"{{{shown}}}", {"Key": Key, "KernelConfig": KernelConfig})
    assert tune._shown(Key(90, "16", 128, 0, 64)) == 'Key(90, "16", 128, 0, 64)'
    assert tune._shown(KernelConfig(64, 32, 8, 3)) == "KernelConfig(64, 32, 8, 3)"
