"""The sweep's search, the row it prints, and that the table is left as it was."""

import pytest
import torch

from pagewire.bench import tune
from pagewire.bench.arena import Arena
from pagewire.bench.attention import AttentionWork
from pagewire.bench.cases import Attention
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
    assert found == best and gain == 1.5
    assert len(set(tried)) == len(tried) and start not in tried


def test_search_keeps_the_present_row_when_nothing_is_better():
    start = KernelConfig(16, 64, 4, 3, 2)
    assert tune.search(start, tune._CHOICES["decode"], lambda config: 0.9) == (start, 1.0)


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

    work = Watching(case, Arena("cpu", 1 << 16, 1 << 28))
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
