"""Every cache over every wire into every cache: 12 x 12 x 7, against the definition written out in fp64."""

import functools
import itertools

import pytest
import torch
from torch import Tensor

import pagewire as pw
from pagewire.transfer.frames import Block, Chunk, Held
from pagewire.transfer.packing import Packing, new_hello
from pagewire.types import FLOAT_DTYPES, KV_DTYPES, QUANT_MAX, dtype_name

LAYERS, PAGE_SIZE, HEADS, DIM, TOKENS = 2, 3, 2, 8, 7
P_PAGES, D_PAGES = [4, 0, 2], [1, 3, 0]
BLOCK = Block(0, 0, LAYERS, 0, HEADS)
CACHES = [(d, "none") for d in FLOAT_DTYPES] + [(d, s) for d in QUANT_MAX for s in ("tensor", "head", "token_head")]
WIRES = [None, *KV_DTYPES]  # None: P's own
KINDS = {0: "tensor", 1: "head", 3: "token_head"}

Rows = tuple[Tensor, Tensor | None]  # stored [L, H, T, dim] and their scales [L, H, T, 1]


def make(dtype: torch.dtype, scale: str, seed: int) -> pw.PagedKVCache:
    g = torch.Generator().manual_seed(seed)
    cache = pw.PagedKVCache.allocate(
        num_layers=LAYERS, num_pages=5, page_size=PAGE_SIZE, num_kv_heads=HEADS, head_dim=DIM, dtype=dtype,
        device="cpu", scale=scale,
    )  # fmt: skip
    for rows in (*cache.k, *cache.v):
        values = torch.randn(rows.shape, generator=g) * (30 if dtype in QUANT_MAX else 3)
        values[0] = 0  # rows whose amax is 0
        if dtype in FLOAT_DTYPES:
            values[2, 0, 0, :3] = torch.tensor([3e4, torch.inf, torch.nan])
        rows.copy_(values)
    for scales in (*cache.k_scale, *cache.v_scale):
        if scales is not None:
            scales.copy_(torch.rand(scales.shape, generator=g) * 0.1 + 0.02)
    return cache


source = functools.cache(functools.partial(make, seed=1))  # caches of P: nothing writes them


def cached(cache: pw.PagedKVCache, pages: list[int]) -> list[Rows]:
    """K and V of the tokens, found one by one."""
    found = []
    for caches, scales in ((cache.k, cache.k_scale), (cache.v, cache.v_scale)):
        at = [(pages[t // PAGE_SIZE], t % PAGE_SIZE) for t in range(TOKENS)]
        stored = torch.stack([torch.stack([rows[page, offset] for page, offset in at], 1) for rows in caches])
        if scales[0] is None:
            found.append((stored, None))
            continue
        per_token = [
            [s[page, offset] if s.dim() == 3 else s.expand(HEADS) for page, offset in at] for s in scales
        ]  # fmt: skip
        found.append((stored, torch.stack([torch.stack(of, 1) for of in per_token])[..., None]))
    return found


def on_wire(packed: pw.PackedKV) -> list[Rows]:
    found = []
    for stored, scales in ((packed.k, packed.k_scale), (packed.v, packed.v_scale)):
        if scales is not None:
            scales = scales.reshape(*scales.shape, *[1] * (4 - scales.dim())).expand(*stored.shape[:3], 1)
        found.append((stored, scales))
    return found


def real(rows: Rows) -> Tensor:
    stored, scales = rows
    return stored.double() if scales is None else stored.double() * scales.double()


@functools.cache
def values_of(dtype: torch.dtype) -> Tensor:
    """Every finite value of an 8-bit dtype, ascending; int8 without -128."""
    values = torch.arange(256).to(torch.uint8).view(dtype).double()
    return values[values.abs() <= QUANT_MAX[dtype]].unique()


def ordinal(x: Tensor) -> Tensor:
    """Neighbours among the values of a dtype differ by 1; NaN by much from all others."""
    if x.dtype in QUANT_MAX:
        found = torch.searchsorted(values_of(x.dtype), x.double().nan_to_num(0))
    else:
        bits = x.view({2: torch.int16, 4: torch.int32}[x.itemsize]).long()
        found = torch.where(bits < 0, -(bits & (2 ** (8 * x.itemsize - 1) - 1)), bits)
    return found.masked_fill(x.isnan(), -(1 << 40)) if x.is_floating_point() else found


def quantised(x: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`x / scale` to nearest even, saturated: by trying every value."""
    if dtype not in QUANT_MAX:
        return x.float().to(dtype)
    values = values_of(dtype)
    limit = QUANT_MAX[dtype]
    y = (x / scales.double()).clamp(-limit, limit)
    distance = (y.nan_to_num(0)[..., None] - values).abs()
    odd = values.to(dtype).view(torch.uint8).long() & 1
    nearest = (distance * 2**20 + odd * 1e-9 * (distance <= distance.amin(-1, keepdim=True))).argmin(-1)
    return values[nearest].masked_fill(y.isnan(), 0 if dtype == torch.int8 else torch.nan).to(dtype)


def compare(rows: Rows, source: Rows, kind: str) -> float:
    """Every value within one step of the definition's, none further; returns the share of those that are not equal."""
    (stored, scales), x = rows, real(source)
    if kind == "token_head":
        finite = x.abs().where(x.isfinite(), 0.0).amax(-1, keepdim=True)
        expected = (finite / QUANT_MAX[stored.dtype]).where(finite > 0, 1.0)
        assert torch.allclose(scales.double(), expected, rtol=2**-22, atol=0)
    steps = (ordinal(stored) - ordinal(quantised(x, scales, stored.dtype))).abs()
    assert steps.max() <= 1, steps
    if source[1] is None and stored.dtype in FLOAT_DTYPES:
        assert steps.max() == 0  # from one float to another: rounded once, or not at all
    return float((steps > 0).double().mean())


def same(a: Rows, b: Rows) -> bool:
    return all(
        x is None and y is None or torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
        for x, y in zip(a, b, strict=True)
    )


def stored(held: Held) -> tuple[str, str]:
    return held.dtype, held.scale_kind


def send(p: Packing, d: Packing) -> pw.PackedKV:
    """All layers and tokens as one chunk; returns the payload."""
    wire = d.wire.groups[0]
    staging = torch.zeros(d.wire.packed_bytes(0, LAYERS, HEADS, TOKENS), dtype=torch.uint8)
    num_bytes, checksum = p.pack(P_PAGES, BLOCK, (0, TOKENS), staging)
    chunk = Chunk(
        request_id="a", generation=1, capability=b"c" * 16, fingerprint=b"f" * 32, group=0, layer_start=0,
        layer_stop=LAYERS, head_start=0, head_stop=HEADS, head_dim=DIM, head_dim_v=DIM, token_start=0,
        token_stop=TOKENS, dtype=wire.dtype, scale_kind=wire.scale_kind, checksum_kind="crc32c", checksum=checksum,
        payload_bytes=num_bytes, slot=0,
    )  # fmt: skip
    assert d.unpack(chunk, D_PAGES, staging) is None
    shape = pw.PackedShape(LAYERS, HEADS, TOKENS, DIM, DIM, getattr(torch, wire.dtype), wire.scale_kind)
    return pw.PackedKV.wrap(staging, shape)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_all_triples(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if (reason := pw.backends("cpu")[backend]) is not None:
        pytest.skip(reason)
    monkeypatch.setenv("PAGEWIRE_BACKEND", backend)
    num, unequal = 0, []
    for of_p, of_d, asked in itertools.product(CACHES, CACHES, WIRES):
        p_cache, d_cache = source(*of_p), make(*of_d, seed=2)
        p_hello = new_hello("prefill", p_cache, b"f" * 32)
        d_hello = new_hello("decode", d_cache, b"f" * 32, dtype_name(asked or of_p[0]))
        p, d = Packing(p_cache, p_hello, d_hello), Packing(d_cache, d_hello, p_hello)
        assert p.wire == d.wire
        wire, kept = d.wire.groups[0], d_hello.groups[0]
        packed = send(p, d)
        for held, sent, arrived in zip(
            cached(p_cache, P_PAGES), on_wire(packed), cached(d_cache, D_PAGES), strict=True
        ):
            if stored(wire) == (dtype_name(of_p[0]), of_p[1]):
                assert same(sent, held)
            else:
                unequal.append(compare(sent, held, wire.scale_kind))
            if stored(wire) == stored(kept) and wire.scale_kind in ("none", "token_head"):
                assert same(arrived, sent)
            else:
                unequal.append(compare(arrived, sent, kept.scale_kind))
        digests = d.digests(D_PAGES, [BLOCK], (0, TOKENS))
        assert p.digests(P_PAGES, [BLOCK], (0, TOKENS)) == digests
        assert len(digests) == (0 if kept.scale_kind in ("tensor", "head") else LAYERS)
        num += 1
    assert num == 1008
    assert sum(unequal) / len(unequal) < 0.005  # fp32 and fp64 part next to a tie only


def test_scales_that_belong_to_the_cache_stay_as_they_are() -> None:
    """What D's tensor and head scales cannot hold saturates: nothing else in its cache depends on a request."""
    p_cache, d_cache = make(torch.float32, "none", 1), make(torch.int8, "head", 2)
    before = [scales.clone() for scales in (*d_cache.k_scale, *d_cache.v_scale)]
    p_hello, d_hello = new_hello("prefill", p_cache, b"f" * 32), new_hello("decode", d_cache, b"f" * 32, "float32")
    send(Packing(p_cache, p_hello, d_hello), Packing(d_cache, d_hello, p_hello))
    assert all(map(torch.equal, before, (*d_cache.k_scale, *d_cache.v_scale)))
    token = d_cache.k[0][D_PAGES[2], 0, 0]  # token 6 came from page 2: 3e4, inf, NaN
    assert token[:3].tolist() == [127, 127, 0]


def test_a_side_packs_only_scales_that_it_has() -> None:
    """As D, whose wire has P's."""
    cache, other = make(torch.float8_e4m3fn, "tensor", 1), make(torch.float8_e4m3fn, "head", 1)
    packing = Packing(cache, new_hello("decode", cache, b"f" * 32), new_hello("prefill", other, b"f" * 32))
    with pytest.raises(ValueError, match="expected .*scale_kind='tensor'.*got .*scale_kind='head'"):
        packing.pack(P_PAGES, BLOCK, (0, 3), torch.empty(4096, dtype=torch.uint8))
