"""Scales per token and head of any size: no overflow, no digits lost (bf16 queries may meet fp16 weights, too)."""

import pytest
import torch

import cases
import pagewire as pw
import tolerance
from cases import Attention, bf16, e4m3, e5m2, fp16, int8


def scaled(case, factors, device, backend):
    """The case with V's token scales multiplied by `factors` [num_slots], broadcast over pages."""
    call = cases.build(case, device, backend=backend)
    scale = call.kwargs["v_scale"]
    call.kwargs["v_scale"] = scale * factors.to(device).view(scale.shape[0], scale.shape[1], 1)
    return call


def check(call, out, lse):
    """Within what weights of q's dtype allow of the sum of |weight * value|."""
    expected, expected_lse = tolerance.evaluate(call, torch.float64)
    digits = 2e-3 if call.args[0].dtype == fp16 else 1e-2
    torch.testing.assert_close(lse.double().cpu(), expected_lse.cpu(), rtol=digits, atol=digits)
    allowed = digits * expected.abs().amax(-1, keepdim=True)
    wrong = (out.double().cpu() - expected.cpu()).abs() > allowed.cpu()
    assert not wrong.any(), (out[wrong], expected[wrong])


@pytest.mark.parametrize("kv_dtype", [e4m3, e5m2, int8], ids=cases.SHORT.get)
@pytest.mark.parametrize("q_lens", [None, (5,)], ids=["decode", "prefill"])
@pytest.mark.parametrize(
    ("dtype", "size"), [(fp16, 2.0**-20), (fp16, 1.0), (fp16, 2.0**12), (bf16, 2.0**-90), (bf16, 2.0**30)]
)
def test_scales_of_one_size(dtype, size, kv_dtype, q_lens, backend, device):
    case = Attention(
        (70,), q_lens, dtype=dtype, kv_dtype=kv_dtype, scale="token_head", max_q_len=16, out_dtype=torch.float32,
        head_dim=64,
    )  # fmt: skip
    call = cases.build(case, device, backend=backend)
    num_slots = call.args[1].shape[0] * case.page_size
    call = scaled(case, torch.full((num_slots,), size), device, backend)
    check(call, *call.run(backend))


@pytest.mark.parametrize("kv_dtype", [e4m3, e5m2, int8], ids=cases.SHORT.get)
@pytest.mark.parametrize("power", [-90, 116])
def test_k_scales_of_one_size(power, kv_dtype, backend, device):
    """Beside a softmax_scale that takes them back."""
    case = Attention((70,), dtype=bf16, kv_dtype=kv_dtype, scale="token_head", out_dtype=torch.float32, head_dim=64)
    call = cases.build(case, device, backend=backend)
    expected = call.run("reference")
    call.kwargs["k_scale"] = call.kwargs["k_scale"] * 2.0**power
    got = call.run(backend, softmax_scale=64**-0.5 * 2.0**-power)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kv_dtype", [e4m3, e5m2, int8], ids=cases.SHORT.get)
@pytest.mark.parametrize("order", ["up", "down", "mixed"])
@pytest.mark.parametrize("split_size", [None, 32])
def test_scales_of_many_sizes(order, split_size, kv_dtype, backend, device):
    case = Attention(
        (150,), dtype=fp16, kv_dtype=kv_dtype, scale="token_head", out_dtype=torch.float32, head_dim=64,
        split_size=split_size,
    )  # fmt: skip
    call = cases.build(case, device, backend=backend)
    table, num_pages = call.args[3][0], call.args[1].shape[0]
    token = torch.arange(150)
    power = {"up": token / 15, "down": 10 - token / 15, "mixed": (token * 7) % 11}[order].float()
    factors = torch.ones(num_pages * case.page_size)
    pages = table.cpu()[token // case.page_size].long()
    factors[pages * case.page_size + token % case.page_size] = 2.0 ** (power.round() - 5)
    call = scaled(case, factors, device, backend)
    check(call, *call.run(backend))


@pytest.mark.parametrize("kv_dtype", [e4m3, e5m2, int8], ids=cases.SHORT.get)
@pytest.mark.parametrize("amax", [1e-3, 1.0, 60000.0])
def test_an_empty_row_beside_others(amax, kv_dtype, backend, device):
    """Its scale is 1 by the quantising rule, whatever the others' are."""
    g = torch.Generator().manual_seed(0)
    k, v = (torch.randn(40, 1, 64, generator=g).to(device, fp16) for _ in range(2))
    v = (v * (amax / v.abs().max())).half()
    v[3] = 0
    q = (k[3:4] * 2).repeat(1, 2, 1)  # token 3 has the largest logit
    cache = pw.PagedKVCache.allocate(
        num_layers=1, num_pages=5, page_size=8, num_kv_heads=1, head_dim=64, dtype=kv_dtype, device=device,
        scale="token_head",
    )  # fmt: skip
    slots = torch.arange(40, device=device)
    scales = {"k_scale": cache.k_scale[0], "v_scale": cache.v_scale[0]}
    pw.append_kv(k, v, cache.k[0], cache.v[0], slots, **scales, backend=backend)
    assert cache.v_scale[0][0, 3, 0] == 1
    table = torch.arange(5, dtype=torch.int32, device=device)[None]
    lens = torch.tensor([40], dtype=torch.int32, device=device)
    out = torch.empty(1, 2, 64, device=device)
    pw.decode(q, cache.k[0], cache.v[0], table, lens, **scales, out=out, backend=backend)
    stored_k, stored_v = (
        c.view(40, 64).double() * s.view(40, 1).double()
        for c, s in ((cache.k[0], cache.k_scale[0]), (cache.v[0], cache.v_scale[0]))
    )
    weights = (q[0].double() @ stored_k.T / 64**0.5).softmax(-1)
    allowed = 2e-3 * (weights @ stored_v.abs())
    assert ((out[0].double() - weights @ stored_v).abs() <= allowed + 1e-12).all()


@pytest.mark.parametrize("scale", [float("inf"), float("nan")])
@pytest.mark.parametrize("q_lens", [None, (5,), (30,)], ids=["decode", "short", "prefill"])
@pytest.mark.parametrize("kv_dtype", [e4m3, int8], ids=cases.SHORT.get)
def test_a_scale_that_is_not_finite_counts_however_light_its_key_is(kv_dtype, q_lens, scale, backend, device):
    """Where a row sees the key: its weight may be 0, and 0 times infinity is no number."""
    case = Attention(
        (40,), q_lens, dtype=bf16, kv_dtype=kv_dtype, scale="token_head", alibi=1, head_dim=64, heads=(2, 1)
    )
    call = cases.build(case, device, backend=backend)
    call.kwargs["alibi_slopes"].fill_(100.0)
    page = int(call.args[3][0, 0])
    call.kwargs["v_scale"][page, 2] = scale
    out, _ = call.run(backend)
    assert not out.isfinite().any()
    call.kwargs["window_size"] = (1, 0)  # none of the rows sees it
    out, _ = call.run(backend)
    assert out.isfinite().all()


@pytest.mark.parametrize("cap", [1e-2, 1.0, 50.0, 1e3, 1e5, 1e8])
@pytest.mark.parametrize("q_lens", [None, (9,)], ids=["decode", "prefill"])
def test_soft_caps_of_any_size(cap, q_lens, backend, device):
    """A large one changes nothing: tanh(x) is x near 0, where 1 - 2 / (exp(2 x) + 1) would cancel."""
    dtype = bf16 if backend == "cuda" else torch.float32
    case = Attention((45,), q_lens, dtype=dtype, softcap=cap, max_q_len=16, head_dim=64, out_dtype=torch.float32)
    call = cases.build(case, device, backend=backend)
    _, lse = call.run(backend)
    _, expected = tolerance.evaluate(call, torch.float64)
    torch.testing.assert_close(lse.double().cpu(), expected.cpu(), rtol=3e-6, atol=3e-6)
