"""pack_kv and unpack_kv: bitwise equal to the reference; a byte copy where nothing is to be converted."""

import gc
import itertools
import weakref

import pytest
import torch

import cases
import pagewire as pw
from cases import bf16, e4m3, e5m2, fp16, fp32, int8

CACHES = {
    # name: dtype, scale, layout, page_size
    "bf16-NHD-p16": (bf16, "none", "NHD", 16),
    "fp32-HND-p3": (fp32, "none", "HND", 3),
    "fp16-HND-p1": (fp16, "none", "HND", 1),
    "e4m3.tensor-NHD-p4": (e4m3, "tensor", "NHD", 4),
    "e5m2.head-HND-p16": (e5m2, "head", "HND", 16),
    "int8.token_head-NHD-p5": (int8, "token_head", "NHD", 5),
    "e4m3.token_head-HND-p8": (e4m3, "token_head", "HND", 8),
}
TOKENS = 13


def make(name, device, *, seed=0, num_layers=2, heads=4, head_dim=32, head_dim_v=48, strided=False):
    """A cache full of ordinary values, with scales that differ."""
    dtype, scale, layout, page_size = CACHES[name]
    num_pages = -(-3 * TOKENS // page_size)
    g = torch.Generator().manual_seed(seed)
    cache = pw.PagedKVCache.allocate(
        num_layers=num_layers, num_pages=num_pages, page_size=page_size, num_kv_heads=heads, head_dim=head_dim,
        head_dim_v=head_dim_v, dtype=dtype, device=device, layout=layout, scale=scale,
    )  # fmt: skip
    if strided:  # layers interleaved in one buffer, K beside V
        shape = cache.k[0].shape
        fused = torch.zeros((*shape[:-1], num_layers, head_dim + head_dim_v), dtype=dtype, device=device)
        cache = pw.PagedKVCache(
            [fused[..., i, :head_dim] for i in range(num_layers)],
            [fused[..., i, head_dim:] for i in range(num_layers)],
            layout=layout, k_scales=cache.k_scale if scale != "none" else None,
            v_scales=cache.v_scale if scale != "none" else None,
        )  # fmt: skip
    for tensors in (cache.k, cache.v):
        for t in tensors:
            values = torch.randn(t.shape, generator=g) * (40 if dtype in (e4m3, e5m2, int8) else 1)
            t.copy_(values.to(dtype))
    for scales in (cache.k_scale, cache.v_scale):
        for s in scales:
            if s is not None:
                s.copy_(torch.rand(s.shape, generator=g) + 0.1)
    return cache


def slots_of(cache, device, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randperm(cache.geometry.num_slots, generator=g)[:TOKENS].to(device)


def assert_packed_equal(a, b):
    for name in ("k", "v", "k_scale", "v_scale"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        if x is not None:
            assert torch.equal(x.view(torch.uint8), y.view(torch.uint8)), name


def assert_caches_equal(a, b):
    for name in ("k", "v", "k_scale", "v_scale"):
        for layer, (x, y) in enumerate(zip(getattr(a, name), getattr(b, name), strict=True)):
            if x is not None:
                bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.dtype.itemsize]
                assert torch.equal(x.view(bits), y.view(bits)), f"{name}[{layer}]"


@pytest.mark.parametrize(
    "dtype", [None, bf16, fp32, e4m3, e5m2, int8], ids=lambda d: f"wire_{cases.SHORT.get(d, 'same')}"
)
@pytest.mark.parametrize("name", CACHES)
def test_pack(name, dtype, backend, device):
    cache = make(name, device, strided=name.startswith("bf16"))
    slots = slots_of(cache, device)
    got = pw.pack_kv(cache, slots, layers=(0, 2), heads=(1, 3), dtype=dtype, backend=backend)
    want = pw.pack_kv(cache, slots, layers=(0, 2), heads=(1, 3), dtype=dtype, backend="reference")
    assert_packed_equal(got, want)


PAIRS = list(itertools.product(CACHES, CACHES))


@pytest.mark.parametrize("source, target", PAIRS[::3], ids=[f"{a}>{b}" for a, b in PAIRS[::3]])
def test_unpack(source, target, backend, device):
    """Any cache to any cache: page size, layout, dtype and head range in the one pass."""
    packed = pw.pack_kv(make(source, device), slots_of(make(source, device), device), heads=(0, 2), backend="reference")
    caches, sent = [], packed.buffer.clone()
    for name in (backend, "reference"):
        cache = make(target, device, seed=9, strided=target.startswith("fp32"))
        pw.unpack_kv(packed, cache, slots_of(cache, device, seed=5), heads=(2, 4), backend=name)
        caches.append(cache)
    assert_caches_equal(*caches)
    assert torch.equal(packed.buffer, sent)


@pytest.mark.parametrize("name", CACHES)
def test_round_trip_is_exact(name, backend, device):
    """pack, unpack into another cache of the same kind, pack again: the same bytes."""
    cache, other = make(name, device), make(name, device, seed=7)
    for mine, theirs in zip(cache.k_scale + cache.v_scale, other.k_scale + other.v_scale, strict=True):
        if mine is not None and mine.dim() < 3:
            theirs.copy_(mine)  # a shared scale belongs to the cache, not to the tokens
    packed = pw.pack_kv(cache, slots_of(cache, device), backend=backend)
    elsewhere = slots_of(other, device, seed=3)
    pw.unpack_kv(packed, other, elsewhere, backend=backend)
    assert_packed_equal(pw.pack_kv(other, elsewhere, backend=backend), packed)


def test_pack_into_a_given_buffer(backend, device):
    cache = make("int8.token_head-NHD-p5", device)
    slots = slots_of(cache, device)
    shape = pw.packed_shape(cache, TOKENS)
    buffer = torch.full((shape.num_bytes + 64,), 0xAB, dtype=torch.uint8, device=device)
    packed = pw.pack_kv(cache, slots, out=buffer[16:], backend=backend)
    assert packed.buffer.data_ptr() == buffer.data_ptr() + 16
    assert_packed_equal(packed, pw.pack_kv(cache, slots, backend="reference"))
    assert bool((buffer[:16] == 0xAB).all()) and bool((buffer[16 + shape.num_bytes :] == 0xAB).all())


def test_mla_cache_packs_once(backend, device):
    """V is a view of K: one copy on the wire."""
    k = torch.randn(3, 4, 1, 64, device=device)
    cache = pw.PagedKVCache([k], [k[..., :48]])
    slots = torch.tensor([11, 0, 5], device=device)
    packed = pw.pack_kv(cache, slots, backend=backend)
    assert packed.v is None and torch.equal(packed.k[0, 0], k.reshape(12, 64)[slots])
    other = torch.zeros_like(k)
    pw.unpack_kv(packed, pw.PagedKVCache([other], [other[..., :48]]), slots, backend=backend)
    assert torch.equal(other.reshape(12, 64)[slots], k.reshape(12, 64)[slots])


def test_no_tokens(backend, device):
    cache = make("bf16-NHD-p16", device)
    empty = torch.empty(0, dtype=torch.int64, device=device)
    packed = pw.pack_kv(cache, empty, backend=backend)
    assert packed.num_bytes == 0 and packed.k.shape == (2, 4, 0, 32)
    pw.unpack_kv(packed, cache, empty, backend=backend)


def test_a_cache_whose_memory_moves_is_packed_from_where_it_is(backend, device):
    """`tensor.data = ...`, as engines do that let go of a cache and fetch it again, and shared memory."""
    slots = torch.arange(TOKENS, device=device)
    for name in ("bf16-NHD-p16", "fp32-HND-p3"):
        cache = make(name, device)
        for heads in (None, (1, 3)):
            pw.pack_kv(cache, slots, heads=heads, backend=backend)
        old = cache.k[1].data
        cache.k[1].data = torch.full_like(old, 3.0)
        for heads, value in (((1, 3), 3.0), (None, 3.0), (None, 5.0)):
            packed = pw.pack_kv(cache, slots, heads=heads, backend=backend)
            assert torch.all(packed.k[1, packed.shape.num_heads - 1] == value)
            packed.k.fill_(5.0)
            if heads is None:
                pw.unpack_kv(packed, cache, slots, backend=backend)
        assert not torch.any(old == 5.0)
        assert torch.all(pw.pack_kv(cache, slots, heads=(1, 3), backend=backend).k == 5.0)
        with pytest.raises(ValueError, match="overlaps"):
            pw.pack_kv(cache, slots[:1], out=cache.k[1].view(-1).view(torch.uint8), backend=backend)


def test_a_cache_is_let_go_with_its_last_reference(backend, device):
    """And not when the garbage collector comes by: it may be most of a GPU's memory."""
    cache = make("bf16-NHD-p16", device)
    slots = torch.arange(TOKENS, device=device)
    gc.disable()
    try:
        pw.unpack_kv(pw.pack_kv(cache, slots, backend=backend), cache, slots, backend=backend)
        kept = weakref.ref(cache.k[0])
        del cache
        assert kept() is None
    finally:
        gc.enable()
