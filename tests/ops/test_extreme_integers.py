"""Integers mean what they say, whatever their size: as "unbounded" people pass 2**31, sys.maxsize and more."""

import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cases
import pagewire as pw
from cases import Attention, fp16
from pagewire.flash_attn import flash_attn_varlen_func

HUGE = (2**30 - 1, 2**30, 2**31 - 1, 2**31, 2**32 + 3, 2**40, sys.maxsize, 2**63, 2**64, 2**100)
INTEGERS = st.one_of(st.sampled_from([*HUGE, *(-n for n in HUGE), -1, 0, 1, 2, 7]), st.integers(-(2**70), 2**70))
SHAPES = {
    "decode": Attention((37, 9), dtype=fp16, head_dim=16),
    "causal": Attention((37, 9), (12, 9), dtype=fp16, head_dim=16, max_q_len=16),
    "more rows than keys": Attention((5,), (12,), dtype=fp16, head_dim=16, max_q_len=16),
    "not causal": Attention((5, 30), (12, 4), causal=False, dtype=fp16, head_dim=16, max_q_len=16),
}


def bounded(n: int) -> int:
    """The same window in numbers of the test's own size."""
    return -1 if n < 0 else min(n, 1000)


@pytest.mark.parametrize("name", SHAPES)
def test_windows_and_splits(name, backend, device):
    call = cases.build(SHAPES[name], device, backend=backend)

    @settings(
        max_examples=5 if backend == "triton" else 30, deadline=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(INTEGERS, INTEGERS, st.one_of(st.none(), INTEGERS.map(abs).filter(bool)))
    def check(left, right, split_size):
        small = None if split_size is None else min(split_size, 1000)
        expected = call.run("reference", window_size=(bounded(left), bounded(right)))
        got = call.run(backend, window_size=(left, right), split_size=split_size)
        again = call.run(backend, window_size=(bounded(left), bounded(right)), split_size=small)
        for a, b, exact in zip(got, again, expected, strict=True):
            assert torch.equal(a, b)
            torch.testing.assert_close(a, exact, rtol=1e-2, atol=1e-2)

    check()


@pytest.mark.parametrize("most", HUGE)
def test_row_bounds(most, backend, device):
    if backend == "cuda":
        pytest.skip("the cuda backend takes only a promise of at most 16 rows")
    call = cases.build(SHAPES["causal"], device, backend=backend)
    for a, b in zip(
        call.run(backend, max_q_len=most), call.run(backend, max_q_len=12), strict=True
    ):  # of another kernel, with other tiles
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("most", HUGE)
def test_bounds_of_the_drop_in(most, device):
    q, k = torch.randn(5, 2, 16, device=device), torch.randn(9, 2, 16, device=device)
    cu = torch.tensor([0, 3, 5], dtype=torch.int32, device=device)
    cu_k = torch.tensor([0, 5, 9], dtype=torch.int32, device=device)
    kw = {"causal": True, "window_size": (2, most)}
    got = flash_attn_varlen_func(q, k, k, cu, cu_k, most, most, **kw)
    expected = flash_attn_varlen_func(q, k, k, cu, cu_k, 3, 5, causal=True, window_size=(2, -1))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("slot", [-(2**63), -(2**31) - 1, -(2**31), -1, 2**31 - 1, 2**31, 2**63 - 1])
def test_slots(slot, backend, device):
    """A negative one is skipped, one past the end reported; nothing else is written."""
    k = torch.randn(2, 2, 16, device=device)
    caches = [torch.zeros(4, 4, 2, 16, device=device) for _ in range(2)]
    for dtype in (torch.int64, torch.int32):
        if dtype == torch.int32 and not -(2**31) <= slot < 2**31:
            continue
        slots = torch.tensor([slot, 3], dtype=dtype, device=device)
        try:
            pw.append_kv(k, k + 1, *caches, slots, backend=backend)
            pw.check_errors()
            assert slot < 0
        except pw.BadIndexError:
            assert slot >= 0
        written = caches[0].flatten(0, 1).abs().amax((1, 2)).nonzero().flatten().tolist()
        assert written in ([3], [])
    pack = pw.PagedKVCache(caches[:1], caches[1:])
    with pytest.raises(pw.BadIndexError):
        pw.pack_kv(pack, torch.tensor([slot, 3], device=device), backend=backend)
        pw.check_errors()


@pytest.mark.parametrize("length", [-(2**31), -1, 2**30, 2**31 - 1])
def test_lengths(length, backend, device):
    call = cases.build(SHAPES["decode"], device, backend=backend)
    call.args[4][0] = length
    with pytest.raises(pw.BadIndexError, match=r"seq_lens\[0\]"):
        call.run(backend)
        pw.check_errors()


def test_page_ids_past_32_bits_stay_out_of_range():
    table = pw.page_table_from_csr(torch.tensor([0, 3]), torch.tensor([2**32 + 1, -(2**33), 5]))
    assert table.tolist() == [[2**31 - 1, -1, 5]]
