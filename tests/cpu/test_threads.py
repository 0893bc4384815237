"""The pool: any number of threads gives the same bits, callers do not disturb each other, a fork starts afresh."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

import cases

LONG = cases.Attention((3000, 5, 1200), heads=(8, 4), dtype=torch.bfloat16)
MIXED = cases.Attention((700, 40, 1100), (130, 1, 3), heads=(8, 4), dtype=torch.float32)
TILES = replace(MIXED, dtype=torch.bfloat16)


@pytest.mark.parametrize("case", [LONG, MIXED, TILES], ids=lambda c: c.id)
def test_thread_count_does_not_change_a_bit(case, monkeypatch):
    call = cases.build(case)
    monkeypatch.setenv("PAGEWIRE_CPU_THREADS", "1")
    out, lse = call.run("cpu")
    for threads in ("2", "3", "8"):
        monkeypatch.setenv("PAGEWIRE_CPU_THREADS", threads)
        again_out, again_lse = call.run("cpu")
        assert torch.equal(out, again_out) and torch.equal(lse, again_lse), threads


def test_a_request_does_not_see_its_batch():
    """Without split_size, too: the parts of a request depend on nothing but the request."""
    call = cases.build(LONG)
    out, lse = call.run("cpu")
    q, k, v, table, seq_lens = call.args
    for b in range(len(LONG.seq_lens)):
        call.args = (q[b : b + 1], k, v, table[b : b + 1], seq_lens[b : b + 1])
        alone_out, alone_lse = call.run("cpu")
        assert torch.equal(alone_out[0], out[b]) and torch.equal(alone_lse[0], lse[b])


@pytest.mark.parametrize("case", [MIXED, TILES], ids=lambda c: c.id)
def test_a_request_of_many_rows_does_not_see_its_batch(case):
    call = cases.build(case)
    out, lse = call.run("cpu")
    q, k, v, table, seq_lens, cu_seqlens_q = call.args
    for b, q_len in enumerate(case.q_lens):
        rows = slice(cu_seqlens_q[b], cu_seqlens_q[b + 1])
        one = torch.tensor([0, q_len], dtype=torch.int32)
        call.args = (q[rows], k, v, table[b : b + 1], seq_lens[b : b + 1], one)
        alone_out, alone_lse = call.run("cpu")
        assert torch.equal(alone_out, out[rows]) and torch.equal(alone_lse, lse[rows])


def test_several_callers_at_once(monkeypatch):
    monkeypatch.setenv("PAGEWIRE_CPU_THREADS", "3")
    calls = [cases.build(LONG, seed=1), cases.build(TILES, seed=2)]
    expected = [call.run("cpu") for call in calls]
    with ThreadPoolExecutor(6) as pool:
        results = [pool.submit(calls[i % 2].run, "cpu") for i in range(24)]
        for i, result in enumerate(results):
            for got, want in zip(result.result(timeout=60), expected[i % 2], strict=True):
                assert torch.equal(got, want)


def test_fork(monkeypatch):
    """The child has none of its parent's threads and must not wait for them."""
    monkeypatch.setenv("PAGEWIRE_CPU_THREADS", "3")
    call = cases.build(LONG)
    expected, _ = call.run("cpu")
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        out, _ = call.run("cpu")
        os._exit(0 if bool((out == expected).all()) else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0, f"status {status:#x} (0xe: it hung until the alarm)"
