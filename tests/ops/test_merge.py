"""merge_state and merge_states against the fp64 formula."""

import pytest
import torch

import cases
import pagewire as pw
from cases import bf16, fp16, fp32


def states(n, dtype, device, head_dim=64, tokens=7, heads=3):
    g = torch.Generator().manual_seed(3)
    outs = torch.randn(n, tokens, heads, head_dim, generator=g).to(device, dtype)
    lses = 5 * torch.randn(n, tokens, heads, generator=g)
    lses[0, 0] = -torch.inf
    lses[-1, 1] = torch.inf  # another library's empty
    lses[:, 2] = -torch.inf
    outs[0, 0] = torch.nan  # what an empty state holds does not matter
    return outs, lses.to(device)


def exact(outs, lses):
    lses = lses.double().masked_fill(lses == torch.inf, -torch.inf)
    outs = torch.where((lses == -torch.inf)[..., None], 0.0, outs.double())
    weights = lses.softmax(0).nan_to_num(0.0)
    return (weights[..., None] * outs).sum(0), lses.logsumexp(0)


@pytest.mark.parametrize("head_dim", [16, 80, 256])
@pytest.mark.parametrize("dtype", [bf16, fp16, fp32], ids=cases.SHORT.get)
@pytest.mark.parametrize("n", [1, 2, 5])
def test_merge(n, dtype, head_dim, backend, device):
    outs, lses = states(n, dtype, device, head_dim)
    expected_out, expected_lse = exact(outs, lses)
    results = [pw.merge_states(outs, lses, backend=backend)]
    if n == 2:
        results.append(pw.merge_state(outs[0], lses[0], outs[1], lses[1], backend=backend))
    eps = {bf16: 2**-8, fp16: 2**-11, fp32: 1e-6}[dtype]
    for out, lse in results:
        assert out.dtype == dtype and lse.dtype == fp32
        torch.testing.assert_close(out.double(), expected_out, rtol=eps, atol=eps)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-6)


def test_merge_in_place(backend, device):
    outs, lses = states(2, fp32, device)
    a, s = outs[0].clone(), lses[0].clone()
    expected = pw.merge_state(a.clone(), s.clone(), outs[1], lses[1], backend=backend)
    out, lse = pw.merge_state(a, s, outs[1], lses[1], out=a, lse=s, backend=backend)
    assert out is a and lse is s
    assert torch.equal(a, expected[0]) and torch.equal(s, expected[1])


def test_merge_into_strided_fp32(backend, device):
    outs, lses = states(3, bf16, device)
    out = cases.gaps(7, 3, 64, dtype=fp32, device=device, on=True).fill_(torch.nan)
    lse = torch.full((7, 3), torch.nan, device=device)
    pw.merge_states(outs, lses, out=out, lse=lse, backend=backend)
    expected_out, expected_lse = exact(outs, lses)
    torch.testing.assert_close(out.double(), expected_out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n, tokens", [(0, 4), (2, 0)])
def test_nothing_to_merge(n, tokens, backend, device):
    outs, lses = (torch.ones(n, tokens, 2, 16, device=device), torch.ones(n, tokens, 2, device=device))
    out, lse = pw.merge_states(outs, lses, backend=backend)
    assert not out.any() and bool((lse == -torch.inf).all())
