"""What the shared cases leave out: corners that only a kernel with tiles, strides and device-side scheduling has."""

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
