"""Work of size zero on every op: nothing is read, and everything that is to be written still is."""

import pytest
import torch

import cases
import pagewire as pw
from cases import Attention, fp16, fp32, int8


def int32(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


@pytest.mark.parametrize("out_of", ["new", "buffer"])
@pytest.mark.parametrize("scale", ["tensor", "head", "token_head"])
@pytest.mark.parametrize("dtype", [None, fp32, torch.float8_e5m2], ids=["bytes", "fp32", "e5m2"])
def test_packing_no_slots_writes_the_scales_of_tensors_and_heads(scale, dtype, out_of, backend, device):
    cache = pw.PagedKVCache.allocate(
        num_layers=2, num_pages=2, page_size=4, num_kv_heads=3, head_dim=8, dtype=int8, device=device, scale=scale
    )
    for i, s in enumerate((*cache.k_scale, *cache.v_scale)):
        s.copy_(torch.arange(s.numel(), device=device).view(s.shape) + 10 * i + 1)
    none = torch.empty(0, dtype=torch.int64, device=device)
    out = torch.full((128,), 0x41, dtype=torch.uint8, device=device) if out_of == "buffer" else None
    for heads in ((0, 3), (1, 2)):
        packed = pw.pack_kv(cache, none, heads=heads, dtype=dtype, out=out, backend=backend)
        assert packed.shape.num_tokens == 0
        if packed.scale_kind in ("tensor", "head"):
            for got, scales in ((packed.k_scale, cache.k_scale), (packed.v_scale, cache.v_scale)):
                expected = torch.stack([s if s.dim() == 0 else s[slice(*heads)] for s in scales])
                assert torch.equal(got, expected)
        before = [t.clone() for t in cache.k]
        pw.unpack_kv(packed, cache, none, heads=heads, backend=backend)
        assert all(map(torch.equal, before, cache.k))


@pytest.mark.parametrize("num_pages", [0, 3])
@pytest.mark.parametrize("width", [0, 2])
@pytest.mark.parametrize("batch", [0, 2])
def test_attention_over_nothing(batch, width, num_pages, backend, device):
    """No requests, no columns in the table, no pages: rows without keys."""
    caches = [torch.full((num_pages, 4, 2, 16), torch.nan, dtype=fp16, device=device) for _ in range(2)]
    table = torch.full((batch, width), 99, dtype=torch.int32, device=device)
    lens = int32([0] * batch, device)
    sinks = torch.tensor([1.0, 2.0, 3.0, 4.0], device=device)
    for given, expected in ((None, torch.full((4,), -torch.inf)), (sinks, sinks.cpu())):
        q = torch.randn(batch, 4, 16, dtype=fp16, device=device)
        out, lse = torch.full_like(q, torch.nan), torch.full((batch, 4), torch.nan, device=device)
        pw.decode(q, *caches, table, lens, sinks=given, out=out, lse=lse, backend=backend)
        assert (out == 0).all() and torch.equal(lse.cpu(), expected.expand(batch, 4))
        rows = 3  # of the first request, if there is one, and one of nobody
        q = torch.randn(rows + 1, 4, 16, dtype=fp16, device=device)
        cu = int32([0] + [rows] * batch, device)
        out, lse = (torch.full_like(q, torch.nan), torch.full((rows + 1, 4), torch.nan, device=device))
        pw.prefill(q, *caches, table, lens, cu, sinks=given, max_q_len=16, out=out, lse=lse, backend=backend)
        assert (out == 0).all() and torch.equal(lse.cpu(), expected.expand(rows + 1, 4))
        empty = pw.prefill(q[:0], *caches, table, lens, cu * 0, max_q_len=16, backend=backend)
        assert empty.shape == (0, 4, 16)


@pytest.mark.parametrize("heads", [0, 2])
@pytest.mark.parametrize("kv_dtype", [fp32, int8], ids=cases.SHORT.get)
@pytest.mark.parametrize("num_pages", [0, 2])
def test_append_of_nothing(num_pages, kv_dtype, heads, backend, device):
    caches = [torch.full((num_pages, 4, heads, 16), 3, dtype=kv_dtype, device=device) for _ in range(2)]
    scales = [torch.ones(num_pages, 4, heads, device=device) for _ in range(2)]
    kw = {} if kv_dtype == fp32 else {"k_scale": scales[0], "v_scale": scales[1]}
    for slots in ([], [-1, -1]):
        k = torch.randn(len(slots), heads, 16, device=device)
        index = torch.tensor(slots, dtype=torch.int64, device=device)
        pw.append_kv(k, k, *caches, index, **kw, backend=backend)
    assert all((c == 3).all() for c in caches) and all((s == 1).all() for s in scales)


@pytest.mark.parametrize(
    "n, tokens, heads, width", [(0, 3, 2, 8), (2, 0, 2, 8), (2, 3, 0, 8), (2, 3, 2, 0), (0, 0, 0, 0), (0, 3, 2, 0)]
)
def test_merges_of_nothing(n, tokens, heads, width, backend, device):
    outs = torch.ones(n, tokens, heads, width, device=device)
    lses = torch.full((n, tokens, heads), 2.0, device=device)
    out = torch.full((tokens, heads, width), torch.nan, device=device)
    lse = torch.full((tokens, heads), torch.nan, device=device)
    pw.merge_states(outs, lses, out=out, lse=lse, backend=backend)
    expected = -torch.inf if n == 0 else 2 + torch.tensor(float(n)).log().item()
    torch.testing.assert_close(lse, torch.full_like(lse, expected))
    assert (out == (n > 0)).all()
    if n == 2:
        out, lse = pw.merge_state(outs[0], lses[0], outs[1], lses[1], backend=backend)
        torch.testing.assert_close(lse, torch.full_like(lse, expected))


def test_an_empty_cache_packs_nothing(backend, device):
    tensors = [torch.empty(0, 4, 2, 8, device=device) for _ in range(2)]
    cache = pw.PagedKVCache(tensors[:1], tensors[1:])
    none = torch.empty(0, dtype=torch.int64, device=device)
    packed = pw.pack_kv(cache, none, backend=backend)
    pw.unpack_kv(packed, cache, none, backend=backend)
    assert packed.num_bytes == 0 and packed.k.shape == (1, 2, 0, 8)
    with pytest.raises(pw.BadIndexError):
        pw.pack_kv(cache, torch.zeros(1, dtype=torch.int64, device=device), backend=backend)
        pw.check_errors()


def test_no_layers_no_heads_are_refused_in_a_sentence(backend):
    with pytest.raises(TypeError, match="k_caches: expected a sequence with a tensor for each layer"):
        pw.PagedKVCache([], [])
    no_heads = [torch.empty(2, 4, 0, 8)]
    with pytest.raises(ValueError, match="num_kv_heads >= 1"):
        pw.PagedKVCache(no_heads, [no_heads[0].clone()])
    call = cases.build(Attention((5,), dtype=fp16))
    q, k, v, *rest = call.args
    with pytest.raises(ValueError, match="num_qo_heads to be a multiple of num_kv_heads=0"):
        pw.decode(q, k[:, :, :0], v[:, :, :0], *rest, backend=backend)
    with pytest.raises(ValueError, match="expected head_dim >= 1, got 0"):
        pw.decode(q[..., :0], k[..., :0], v[..., :0], *rest, backend=backend)
    with pytest.raises(ValueError, match="expected head_dim_v >= 1, got 0"):
        pw.decode(q, k, v[..., :0], *rest, backend=backend)
