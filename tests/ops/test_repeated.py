"""The calls that follow the first of their kind: what is remembered of it must suit other tensors of the same look."""

import pytest
import torch

import cases
import pagewire as pw
import tolerance
from cases import bf16, e4m3


@pytest.mark.parametrize("scale", [None, "token_head"])
@pytest.mark.parametrize("q_lens", [None, (3, 1)], ids=["decode", "prefill"])
def test_attention(q_lens, scale, backend, device):
    case = cases.Attention((70, 33), q_lens, heads=(8, 2), dtype=bf16, kv_dtype=e4m3 if scale else None, scale=scale)
    calls = [cases.build(case, device, seed, backend) for seed in range(4)]
    results = [call.run(backend) for call in calls]
    for call, (out, lse) in zip(calls, results, strict=True):
        tolerance.check(call, out, lse)


@pytest.mark.parametrize("dtype", [bf16, e4m3], ids=cases.SHORT.get)
def test_moves(dtype, backend, device):
    """Each through a cache, a buffer and another cache of its own."""
    made = []
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        k, v = (torch.randn(9, 2, 64, generator=g).to(device, bf16) for _ in range(2))
        a, b = (
            pw.PagedKVCache.allocate(
                num_layers=2,
                num_pages=6,
                page_size=4,
                num_kv_heads=2,
                head_dim=64,
                dtype=dtype,
                device=device,
                scale="token_head" if dtype == e4m3 else "none",
            )
            for _ in range(2)
        )
        slots, others = (torch.randperm(24, generator=g)[:9].to(device) for _ in range(2))
        for layer in range(2):
            scales = {"k_scale": a.k_scale[layer], "v_scale": a.v_scale[layer]} if dtype == e4m3 else {}
            pw.append_kv(k + layer, v - layer, a.k[layer], a.v[layer], slots, backend=backend, **scales)
        pw.unpack_kv(pw.pack_kv(a, slots, backend=backend), b, others, backend=backend)
        made.append((k, v, b, others))
    for k, v, cache, slots in made:
        for layer in range(2):
            for given, of, scales in ((k + layer, cache.k, cache.k_scale), (v - layer, cache.v, cache.v_scale)):
                found = of[layer].flatten(0, 1)[slots].float()
                if dtype == e4m3:
                    found *= scales[layer].flatten(0, 1)[slots][..., None]
                torch.testing.assert_close(found, given.float(), rtol=2**-4 if dtype == e4m3 else 0, atol=0.01)


def test_merge(backend, device):
    made = []
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        outs, lses = torch.randn(2, 7, 3, 64, generator=g).to(device), torch.randn(2, 7, 3, generator=g).to(device)
        made.append((outs, lses, pw.merge_state(outs[0], lses[0], outs[1], lses[1], backend=backend)[0]))
    for outs, lses, out in made:
        expected = (lses.softmax(0)[..., None] * outs).sum(0)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
