"""Merges of every way through the kernels: two states and many, rows that are aligned and that are not."""

import pytest
import torch

import cases
import pagewire as pw
from cases import bf16, fp16, fp32

EPS = {bf16: 2**-8, fp16: 2**-11, fp32: 1e-6}


@pytest.fixture(autouse=True)
def cuda(device):
    reason = pw.backends(device.type)["cuda"]
    if reason is not None:
        pytest.skip(reason)


def exact(outs, lses):
    lses = lses.double().masked_fill(lses == torch.inf, -torch.inf)
    outs = torch.where((lses == -torch.inf)[..., None], 0.0, outs.double())
    top = lses.nan_to_num(-torch.inf).amax(0)
    weights = (lses - top.nan_to_num(neginf=0.0)).exp()
    total = weights.sum(0)
    out = (weights[..., None] * outs).sum(0) / total[..., None]
    return out.masked_fill((total == 0)[..., None], 0.0), top + total.log()


def states(n, width, dtype, device, *, gap=0, tokens=9, heads=3):
    """Rows end in `gap` elements of someone else's; empty states hold NaN."""
    g = torch.Generator().manual_seed(n)
    outs = torch.randn(n, tokens, heads, width + gap, generator=g).to(device, dtype)[..., gap:]
    lses = (5 * torch.randn(n, tokens, heads, generator=g)).to(device)
    lses[:, 0] = -torch.inf
    lses[::2, 1], outs[::2, 1] = torch.inf, torch.nan
    lses[1::2, 2], outs[1::2, 2] = -torch.inf, torch.nan
    lses[0, 3, 0] = torch.nan
    lses[1:, 4] = -torch.inf
    lses[:, 5] = 88.5
    lses[0, 6] = -1e30
    return outs, lses


# bf16: 4 chunks of 8 elements a lane of two states, one of many; 33 and 70 states are more than a row's lanes
@pytest.mark.parametrize("gap", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("width", [8, 81, 128, 576, 1288])
@pytest.mark.parametrize("dtype", [bf16, fp16, fp32], ids=cases.SHORT.get)
@pytest.mark.parametrize("n", [1, 2, 3, 5, 33, 70])
def test_merge(n, dtype, width, gap, device):
    if n > 5 and width > 128:
        pytest.skip("the same way as 128 wide ones")
    outs, lses = states(n, width, dtype, device, gap=gap)
    kept = lses.clone()
    expected_out, expected_lse = exact(outs, lses)
    for out_dtype in {dtype, fp32}:
        out = cases.gaps(9, 3, width, dtype=out_dtype, device=device, on=True).fill_(torch.nan)
        lse = torch.full((9, 3), 7.0, device=device)
        if n == 2:
            pw.merge_state(outs[0], lses[0], outs[1], lses[1], out=out, lse=lse, backend="cuda")
        else:
            pw.merge_states(outs, lses, out=out, lse=lse, backend="cuda")
        eps = max(EPS[out_dtype], 2e-6)
        torch.testing.assert_close(out.double(), expected_out, rtol=eps, atol=eps, equal_nan=True)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert torch.equal(lses.nan_to_num(3.0), kept.nan_to_num(3.0))


@pytest.mark.parametrize("onto", [0, 1, 2])
@pytest.mark.parametrize("n", [2, 3])
def test_out_and_lse_may_be_one_of_the_states(n, onto, device):
    if onto >= n:
        pytest.skip("no such state")
    outs, lses = states(n, 128, bf16, device)
    expected = pw.merge_states(outs.clone(), lses.clone(), backend="cuda")
    out, lse = pw.merge_states(outs, lses, out=outs[onto], lse=lses[onto], backend="cuda")
    assert torch.equal(out.nan_to_num(3.0), expected[0].nan_to_num(3.0))
    assert torch.equal(lse.nan_to_num(3.0), expected[1].nan_to_num(3.0))


def test_two_states_merge_alike_from_one_tensor_and_from_two(device):
    outs, lses = states(2, 128, bf16, device)
    a = pw.merge_states(outs, lses, backend="cuda")
    b = pw.merge_state(outs[0].clone(), lses[0].clone(), outs[1].clone(), lses[1].clone(), backend="cuda")
    assert torch.equal(a[0].nan_to_num(3.0), b[0].nan_to_num(3.0)) and torch.equal(
        a[1].nan_to_num(3), b[1].nan_to_num(3)
    )
