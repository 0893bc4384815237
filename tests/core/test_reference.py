"""The oracle itself: against dense scaled_dot_product_attention, fp64 formulas written out once more, and corners."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import cases
import pagewire as pw
import tolerance
from pagewire.cache import nhd
from pagewire.quant import dequantise, quantise, token_head_scale
from pagewire.types import QUANT_MAX


def dense(call: cases.Call, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of request b as [num_kv_heads, seq_len, width] fp64, token by token through the page table."""
    _, k_cache, v_cache, table, seq_lens = call.args[:5]
    layout, size = call.case.layout, call.case.page_size
    result = []
    for cache in (k_cache, v_cache):
        pages = nhd(cache, layout)
        rows = [pages[int(table[b, t // size]), t % size] for t in range(int(seq_lens[b]))]
        result.append(torch.stack(rows, 1).double())
    return result[0], result[1]


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("causal", [True, False])
def test_agrees_with_dense_sdpa(causal, layout):
    case = cases.Attention((21, 37), (9, 37), heads=(6, 2), layout=layout, causal=causal)
    call = cases.build(case)
    out, _ = tolerance.evaluate(call, torch.float64)
    row = 0
    for b, (q_len, seq_len) in enumerate(zip(case.q_lens, case.seq_lens, strict=True)):
        k, v = dense(call, b)
        q = call.args[0][row : row + q_len].double().transpose(0, 1)
        mask = torch.ones(q_len, seq_len, dtype=torch.bool)
        if causal:
            mask = mask.tril(seq_len - q_len)
        expected = scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, enable_gqa=True)
        torch.testing.assert_close(out[row : row + q_len], expected[0].transpose(0, 1))
        row += q_len


def by_hand(q, k, v, position, *, scale, causal, window, softcap, slope, sink):
    """One query row of one head, straight from the written contract, in Python floats."""
    logits = {}
    for j in range(k.shape[0]):
        if causal and j > position:
            continue
        if window[0] >= 0 and j < position - window[0]:
            continue
        if window[1] >= 0 and j > position + window[1]:
            continue
        x = scale * float(q @ k[j])
        x = softcap * math.tanh(x / softcap) if softcap > 0 else x
        logits[j] = x - slope * abs(position - j)
    terms = list(logits.values()) + ([sink] if sink is not None else [])
    if not terms:
        return torch.zeros(v.shape[1], dtype=torch.float64), -math.inf
    lse = max(terms) + math.log(sum(math.exp(t - max(terms)) for t in terms))
    return sum((math.exp(x - lse) * v[j] for j, x in logits.items()), torch.zeros(v.shape[1], dtype=torch.float64)), lse


@pytest.mark.parametrize(
    "case",
    [
        cases.Attention((7, 12), (7, 5), head_dim=8, window=(3, -1)),
        cases.Attention((7, 12), (7, 5), head_dim=8, window=(2, 1), causal=False, sinks=True),
        cases.Attention((7, 3), (4, 6), head_dim=8, alibi=2, softcap=1.5, sinks=True),
        cases.Attention((7, 12), None, head_dim=8, alibi=1, window=(5, 0), head_dim_v=4),
        cases.Attention((0, 4), (2, 6), head_dim=8),
    ],
    ids=lambda c: c.id,
)
def test_agrees_with_the_contract_written_out(case):
    call = cases.build(case)
    out, lse = tolerance.evaluate(call, torch.float64)
    kw, group = call.kwargs, case.heads[0] // case.heads[1]
    row = 0
    for b, q_len in enumerate(case.q_lens or (1,) * len(case.seq_lens)):
        if case.seq_lens[b]:
            k, v = dense(call, b)
        else:
            k, v = (torch.zeros(case.heads[1], 0, w, dtype=torch.float64) for w in (8, case.head_dim_v or 8))
        for i in range(q_len):
            for h in range(case.heads[0]):
                slopes = kw.get("alibi_slopes")
                slope = 0.0 if slopes is None else float(slopes[h] if slopes.dim() == 1 else slopes[b, h])
                expected, expected_lse = by_hand(
                    call.args[0][row, h].double(), k[h // group], v[h // group], case.seq_lens[b] - q_len + i,
                    scale=8**-0.5, causal=case.causal and case.q_lens is not None, window=case.window,
                    softcap=case.softcap, slope=slope, sink=float(kw["sinks"][h]) if case.sinks else None,
                )  # fmt: skip
                torch.testing.assert_close(out[row, h], expected, rtol=1e-9, atol=1e-12)
                assert math.isclose(float(lse[row, h]), expected_lse, rel_tol=1e-9) or expected_lse == lse[row, h]
            row += 1


@pytest.mark.parametrize("kv_dtype", list(QUANT_MAX), ids=cases.SHORT.get)
@pytest.mark.parametrize("scale", ["float", "tensor", "head", "batch_head", "token_head"])
def test_scales_equal_attention_over_real_values(scale, kv_dtype):
    """A quantised cache with scales = a float cache that holds stored * scale."""
    case = cases.Attention((33, 9), (5, 9), kv_dtype=kv_dtype, scale=scale)
    call = cases.build(case)
    out, lse = tolerance.evaluate(call, torch.float64)
    for b, rows in enumerate((slice(0, 5), slice(5, 14))):
        real = []
        for cache, s in zip(call.args[1:3], (call.kwargs["k_scale"], call.kwargs["v_scale"]), strict=True):
            s = torch.as_tensor(s, dtype=torch.float64)
            s = {0: s, 1: s[..., None], 2: s[b][:, None] if s.dim() == 2 else s, 3: s[..., None]}[s.dim()]
            real.append(cache.double() * s)
        q, _, _, table, seq_lens, _ = call.args
        n = rows.stop - rows.start
        got = pw.prefill(
            q[rows].float(), real[0].float(), real[1].float(), table[b : b + 1], seq_lens[b : b + 1],
            torch.tensor([0, n], dtype=torch.int32), return_lse=True, backend="reference",
        )  # fmt: skip
        torch.testing.assert_close(got[0].double(), out[rows], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got[1].double(), lse[rows], rtol=1e-4, atol=1e-5)


def test_quantising_by_hand():
    x = torch.tensor([0.0, -0.0, 1.0, 17.0, 1e9, -1e9, torch.inf, torch.nan, 2.5, 3.5])
    assert quantise(x, 1.0, torch.int8).tolist() == [0, 0, 1, 17, 127, -127, 127, 0, 2, 4]
    e5m2 = quantise(x, 1.0, torch.float8_e5m2).float()
    assert e5m2[4:7].tolist() == [57344, -57344, 57344] and math.isnan(e5m2[7])
    e4m3 = quantise(x, 1.0, torch.float8_e4m3fn).float()
    assert e4m3[3:7].tolist() == [16, 448, -448, 448] and math.isnan(e4m3[7])
    assert math.copysign(1, e4m3[1]) == -1


@pytest.mark.parametrize("dtype", list(QUANT_MAX), ids=cases.SHORT.get)
def test_token_head_scale(dtype):
    x = torch.tensor([[3.0, -6.0], [0.0, 0.0], [torch.inf, 2.0], [torch.nan, 1e-45]])
    limit = QUANT_MAX[dtype]
    scale = token_head_scale(x, dtype)
    assert scale.tolist()[:3] == [float(torch.tensor(6.0) / limit), 1.0, float(torch.tensor(2.0) / limit)]
    assert scale[3] == 1.0  # 1e-45 / limit is 0 in fp32
    back = dequantise(quantise(x[0], scale[0], dtype), scale[0])
    assert abs(float(back[1]) + 6.0) < 1e-5


def test_merging_halves_is_the_whole():
    outs, lses = torch.randn(2, 5, 3, 16), torch.randn(2, 5, 3)
    out, lse = pw.merge_state(outs[0], lses[0], outs[1], lses[1], backend="reference")
    w = torch.softmax(lses.double(), 0)
    torch.testing.assert_close(out.double(), (w[..., None] * outs).sum(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.double(), lses.double().logsumexp(0), rtol=1e-6, atol=1e-6)
