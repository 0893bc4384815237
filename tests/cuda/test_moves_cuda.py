"""How a launch shares out rows and planes: bitwise the reference's results, whatever the device and the shapes."""

import pytest
import torch

import cases
import pagewire as pw
from cases import bf16, e4m3, fp16, int8
from pagewire import emulation

bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@pytest.fixture(params=[1, 1000], ids=lambda n: f"{n}sms")
def multiprocessors(request, device, monkeypatch):
    """Few: a block takes several planes. Many: one each."""
    if device.type != "cpu":
        pytest.skip("the emulation's device can be chosen")
    reason = pw.backends("cpu")["cuda"]
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setenv("PAGEWIRE_EMULATION_SMS", str(request.param))
    return request.param


class Shape:
    def __init__(self, layers, heads, width, width_v, tokens, layout="NHD", dtype=bf16, scale="none", narrow=0):
        self.layers, self.heads, self.width, self.width_v, self.tokens = layers, heads, width, width_v, tokens
        self.layout, self.dtype, self.scale, self.narrow = layout, dtype, scale, narrow

    def cache(self, seed, page_size=7):
        """`narrow` elements of every row belong to someone else, so that rows do not begin at multiples of 16 bytes."""
        g = torch.Generator().manual_seed(seed)
        cache = pw.PagedKVCache.allocate(
            num_layers=self.layers, num_pages=-(-self.tokens // page_size) + 1, page_size=page_size,
            num_kv_heads=self.heads, head_dim=self.width + self.narrow, head_dim_v=self.width_v + self.narrow,
            dtype=self.dtype, layout=self.layout, scale=self.scale, device="cpu",
        )  # fmt: skip
        k, v = ([t[..., self.narrow :] for t in part] for part in (cache.k, cache.v))
        if self.narrow:
            scales = (list(cache.k_scale), list(cache.v_scale)) if self.scale != "none" else (None, None)
            cache = pw.PagedKVCache(k, v, layout=self.layout, k_scales=scales[0], v_scales=scales[1])
        for t in [*cache.k, *cache.v]:
            t.copy_((torch.randn(t.shape, generator=g) * 30).to(self.dtype))
        for s in [*cache.k_scale, *cache.v_scale]:
            if s is not None:
                s.copy_(torch.rand(s.shape, generator=g) + 0.1)
        return cache

    def slots(self, cache):
        g = torch.Generator().manual_seed(3)
        return torch.randperm(cache.geometry.num_slots, generator=g)[: self.tokens]


SHAPES = {
    "one layer": Shape(1, 2, 32, 32, 5),
    "runs that cross from K to V": Shape(3, 8, 16, 16, 150),
    "all planes": Shape(2, 8, 128, 128, 140),
    "V narrower": Shape(3, 3, 64, 48, 170, "HND"),
    "five units a row": Shape(2, 4, 40, 40, 150),
    "a row of three pieces": Shape(2, 1, 1290, 1290, 9, dtype=int8, scale="token_head", narrow=1),
    "pieces of one part only": Shape(2, 1, 40, 1290, 9, dtype=int8, scale="token_head", narrow=1),
    "two bytes at a time": Shape(2, 3, 33, 35, 11, narrow=1),
    "scales of tokens": Shape(3, 4, 32, 32, 90, dtype=e4m3, scale="token_head"),
    "scales of heads": Shape(3, 4, 32, 32, 90, dtype=e4m3, scale="head"),
    "scales of tensors": Shape(3, 4, 32, 32, 90, "HND", dtype=int8, scale="tensor"),
    "more than a warp's chunks": Shape(2, 2, 1040, 576, 9),
    "more than a warp's elements": Shape(2, 2, 81, 33, 9, dtype=fp16),
    "sixty layers": Shape(60, 1, 16, 16, 3),
}  # fmt: skip
WIRES = (None, bf16, torch.float32, e4m3, int8)


@pytest.mark.parametrize("wire", WIRES, ids=lambda d: f"wire_{cases.SHORT.get(d, 'same')}")
@pytest.mark.parametrize("name", SHAPES)
def test_pack_and_unpack(name, wire, multiprocessors):
    shape = SHAPES[name]
    cache = shape.cache(1)
    slots = shape.slots(cache)
    packed = [pw.pack_kv(cache, slots, dtype=wire, backend=backend) for backend in ("cuda", "reference")]
    for part in ("k", "v", "k_scale", "v_scale"):
        a, b = (getattr(p, part) for p in packed)
        assert (a is None) == (b is None) and (a is None or torch.equal(a.view(torch.uint8), b.view(torch.uint8))), part
    caches = [shape.cache(2, page_size=4) for _ in range(2)]
    for cache, backend in zip(caches, ("cuda", "reference"), strict=True):
        pw.unpack_kv(packed[1], cache, shape.slots(cache), backend=backend)
    for part in ("k", "v", "k_scale", "v_scale"):
        for layer, (a, b) in enumerate(zip(*(getattr(c, part) for c in caches), strict=True)):
            assert a is None or torch.equal(a.view(bits[a.itemsize]), b.view(bits[b.itemsize])), f"{part}[{layer}]"


KINDS = {
    "copied": (bf16, "none", None),
    "copied with scales": (int8, "token_head", None),
    "converted": (e4m3, "head", bf16),
    "quantised": (bf16, "none", int8),
}


@pytest.mark.parametrize("layers, tokens", [(1, 3), (4, 200)])
@pytest.mark.parametrize("kind", KINDS)
def test_bad_slots_in_every_plane(kind, layers, tokens, multiprocessors):
    """Every third one: zeros, and scales of 1, in a pack; left alone by an unpack; each recorded once a call."""
    dtype, scale, wire = KINDS[kind]
    shape = Shape(layers, 4, 32, 32, tokens, dtype=dtype, scale=scale)
    cache = shape.cache(1)
    good = shape.slots(cache)
    bad = good.clone()
    bad[1::3] = torch.tensor([-1, cache.geometry.num_slots, 2**40]).repeat(tokens)[: len(bad[1::3])]
    expected = pw.pack_kv(cache, good, dtype=wire, backend="reference")
    got = pw.pack_kv(cache, bad, dtype=wire, backend="cuda")
    last = 1 + (tokens - 2) // 3 * 3
    with pytest.raises(pw.BadIndexError, match=rf"pack_kv: slots\[{last}\] is outside"):
        pw.check_errors()
    for part, fill in (("k", 0), ("v", 0), ("k_scale", 1), ("v_scale", 1)):
        a, b = getattr(got, part), getattr(expected, part)
        if a is not None:
            b[:, :, 1::3] = fill
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), part
    caches = [shape.cache(2) for _ in range(2)]
    pw.unpack_kv(expected, caches[0], bad, backend="cuda")
    with pytest.raises(pw.BadIndexError, match=rf"unpack_kv: slots\[{last}\] is outside"):
        pw.check_errors()
    kept = good[torch.arange(tokens) % 3 != 1]
    pw.unpack_kv(pw.pack_kv(cache, kept, dtype=wire, backend="reference"), caches[1], kept, backend="reference")
    for part in ("k", "v", "k_scale", "v_scale"):
        for a, b in zip(*(getattr(c, part) for c in caches), strict=True):
            assert a is None or torch.equal(a.view(bits[a.itemsize]), b.view(bits[b.itemsize])), part


@pytest.mark.parametrize("kv_dtype", [bf16, e4m3], ids=cases.SHORT.get)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("tokens", [1, 450])
def test_append(tokens, index_dtype, kv_dtype, multiprocessors):
    """K and V of strides and widths of their own; negative slots are skipped without a word."""
    g = torch.Generator().manual_seed(1)
    k = torch.randn(tokens, 8, 64, generator=g).to(bf16)
    v = torch.randn(tokens, 8, 96, generator=g).to(bf16)[..., 16:64]
    scale = torch.rand(8, generator=g) + 0.1 if kv_dtype == e4m3 else None
    slots = torch.randperm(tokens + 9, generator=g)[:tokens].to(index_dtype)
    slots[2::5] = -1
    caches = []
    for backend in ("cuda", "reference"):
        k_cache, v_cache = (torch.zeros(-(-(tokens + 9) // 5), 5, 8, n).to(kv_dtype) for n in (64, 48))
        pw.append_kv(k, v, k_cache, v_cache, slots, k_scale=scale, v_scale=scale, backend=backend)
        caches.append((k_cache, v_cache))
    for a, b in zip(*caches, strict=True):
        assert torch.equal(a.view(bits[a.itemsize]), b.view(bits[b.itemsize]))


# 3 layers of K and V; a block of 128 threads takes 256 rows of 32 bytes that it copies, 128 that it converts
@pytest.mark.parametrize(
    "wire, grids", [(None, {1: (5, 3), 1000: (5, 6)}), (int8, {1: (10, 2), 1000: (10, 6)})], ids=["copied", "converted"]
)
def test_planes_are_shared_out_until_the_device_is_full(wire, grids, multiprocessors):
    shape = SHAPES["runs that cross from K to V"]
    cache = shape.cache(1)
    pw.pack_kv(cache, shape.slots(cache), dtype=wire, backend="cuda")
    assert emulation.load(emulation.mode()).last_launch()["grid"] == grids[multiprocessors]
