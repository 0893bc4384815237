"""What the shared cases leave out: corners that only a kernel with tiles, strides and device-side scheduling has."""

import math

import pytest
import torch

import cases
import pagewire as pw
import tolerance
from cases import Attention, bf16


def run(case: Attention, device, **changed) -> None:
    call = cases.build(case, device)
    call.kwargs.update(changed)
    out, lse = call.run("triton")
    tolerance.check(call, out, lse)


@pytest.fixture(autouse=True)
def runs(device):
    reason = pw.backends(device.type)["triton"]
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("q_lens", [None, (2, 9)], ids=["decode", "prefill"])
@pytest.mark.parametrize("softmax_scale", [-0.7, 0.0])
def test_scale_of_any_sign(softmax_scale, q_lens, device):
    """The kernels multiply after the maximum, which only a positive scale keeps in order."""
    run(Attention((20, 9), q_lens, dtype=bf16, head_dim=16), device, softmax_scale=softmax_scale)


@pytest.mark.parametrize("q_lens", [None, (3, 2)], ids=["decode", "prefill"])
def test_group_of_several_row_tiles(q_lens, device):
    run(Attention((40, 21), q_lens, heads=(80, 1), head_dim=16), device)


@pytest.mark.parametrize("q_lens", [None, (2, 9)], ids=["decode", "prefill"])
def test_strided_indices(q_lens, device):
    call = cases.build(Attention((40, 9), q_lens, head_dim=16), device)
    args = list(call.args)
    args[3] = torch.cat([args[3], args[3]], 1)[:, : args[3].shape[1]]
    args[4] = torch.stack([args[4], args[4]], 1)[:, 0]
    assert args[3].stride(0) != args[3].shape[1] and args[4].stride(0) == 2
    call.args = tuple(args)
    tolerance.check(call, *call.run("triton"))


@pytest.mark.parametrize("q_lens", [None, (1, 6)], ids=["decode", "prefill"])
def test_cache_without_pages(q_lens, device):
    """Every page id is out of range: rows come out empty, the fault is recorded."""
    call = cases.build(Attention((20, 9), q_lens, head_dim=16), device)
    q, k, v, *rest = call.args
    call.args = (q, k[:0], v[:0], *rest)
    out, lse = call.run("triton")
    assert not out.any() and torch.equal(lse, torch.full_like(lse, -torch.inf))
    with pytest.raises(pw.BadIndexError, match="page_table\\[1, 0\\]"):
        pw.check_errors()


@pytest.mark.parametrize("q_lens", [None, (2,)], ids=["decode", "prefill"])
def test_split_size_that_no_tile_divides(q_lens, device):
    run(Attention((95,), q_lens, head_dim=16, split_size=21, window=(70, -1), page_size=5), device)


def test_more_requests_than_a_program_scans_at_once(device):
    lens = tuple(3 * i % 23 for i in range(18))
    run(Attention(lens, heads=(1, 1), head_dim=16), device)
    run(Attention(lens, tuple(i % 3 for i in range(18)), heads=(1, 1), head_dim=16, max_q_len=2), device)


def test_transposed_lse(device):
    call = cases.build(Attention((20, 9), (2, 9), head_dim=16), device)
    expected, lse = call.run("triton")
    transposed = torch.full((lse.shape[1], lse.shape[0]), torch.nan, device=device).T
    out, got = call.run("triton", lse=transposed)
    assert got is transposed and torch.equal(out, expected) and torch.equal(got, lse)


@pytest.mark.parametrize("q_lens", [None, (2,)], ids=["decode", "prefill"])
@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_faint_weight_beside_a_row_of_zeros(stored, q_lens, device):
    """Weights meet 8-bit values in fp16: what is left of one 2^30 times lighter than the heaviest is not nothing."""
    rows = 1 if q_lens is None else 2
    q = torch.ones(rows, 1, 16, dtype=bf16, device=device)
    k = torch.zeros(1, 16, 1, 16, device=device)
    k[0, 0] = 1.0  # a logit of 30 ln 2, the others 0
    v = torch.ones(1, 16, 1, 16, device=device)
    v[0, 0] = 0.0
    table = torch.zeros(1, 1, dtype=torch.int32, device=device)
    lens = torch.full_like(table[0], 16)
    scale = 30 * math.log(2) / 16
    unscaled = dict(k_scale=1.0, v_scale=1.0, backend="triton")
    args = (q, k.to(stored), v.to(stored), table, lens)
    if q_lens is None:
        out = pw.decode(*args, softmax_scale=scale, **unscaled)
    else:
        starts = torch.tensor([0, rows], dtype=torch.int32, device=device)
        out = pw.prefill(*args, starts, max_q_len=rows, causal=False, softmax_scale=scale, **unscaled)
    assert torch.allclose(out.float(), torch.full_like(out, 15 * 2.0**-30).float(), rtol=2**-7, atol=0)


@pytest.mark.parametrize("dtype", [bf16, torch.float16])
def test_logits_whose_rounding_exceeds_fp16(dtype, device):
    """At 2^26 a logit is known to within 4: the heaviest weight must not become an infinity of fp16."""
    q = torch.full((1, 1, 16), 2.0**7, dtype=dtype, device=device)
    stored = torch.float8_e5m2 if dtype == bf16 else dtype
    k = torch.full((1, 16, 1, 16), 2.0**15, device=device).to(stored)
    v = torch.ones(1, 16, 1, 16, device=device).to(stored)
    table = torch.zeros(1, 1, dtype=torch.int32, device=device)
    lens = torch.full_like(table[0], 16)
    out = pw.decode(q, k, v, table, lens, softmax_scale=0.7, k_scale=1.0, v_scale=1.0, backend="triton")
    assert torch.equal(out, torch.ones_like(out))
