"""One pack and unpack problem: the wire's bytes, then the whole storage of the cache that receives them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import pagewire as pw
from fuzz import compare, moves
from fuzz.contents import caches, filled, generator, nhd, normal, uniform, write
from fuzz.formats import BYTES, LARGEST, QUANTISED, TORCH, bits
from fuzz.problems import Pack, Side
from fuzz.tensors import ship

FILLER = 0xAB  # bytes of a buffer before the call


def check(p: Pack, backend: str, device: torch.device | str = "cpu") -> None:
    g = generator(p.seed)
    source, target = build(p, p.source, g), build(p, p.target, g)
    leaving = _slots(p, p.source, g, repeated=p.repeated)
    arriving = _slots(p, p.target, g, repeated=False)
    sent = ship({**source, "slots": leaving}, device)
    packed, buffer = _pack(p, sent, sent["slots"], backend)
    pw.check_errors()
    _check_wire(p, source, leaving.tolist(), packed, buffer)
    for name in source:
        compare.unchanged(f"source {name}", sent[name], source[name])

    sent, expected = ship({**target, "slots": arriving}, device), ship(target, "cpu")
    before = packed.buffer.clone()
    layers, heads = _ranges(p, p.target)
    pw.unpack_kv(packed, _cache(p, p.target, sent), sent["slots"], layers=layers, heads=heads, backend=backend)
    pw.check_errors()
    assert torch.equal(packed.buffer, before), "unpack_kv wrote into the packed buffer"
    _unpack(p, expected, packed, arriving.tolist())
    for name in target:
        dtype = "fp32" if "scale" in name else p.target.dtype
        copied = dtype == (p.wire_dtype or p.source.dtype)
        exact = copied and dtype not in QUANTISED
        compare.same_elements(f"target {name}", sent[name], expected[name], dtype, exact=exact)
        if p.target.caches == "apart" and not p.mla:
            compare.unchanged(f"target {name}", sent[name], target[name], around=True)


def _ranges(p: Pack, side: Side) -> tuple[tuple[int, int], tuple[int, int]]:
    """(layers, heads) of this side that travel."""
    return ((side.more_layers, side.more_layers + p.num_layers), (side.more_heads, side.more_heads + p.num_heads))


def _num_pages(p: Pack, side: Side) -> int:
    return (p.num_tokens + 3) // side.page_size + 1


def _slots(p: Pack, side: Side, g: torch.Generator, *, repeated: bool) -> Tensor:
    count = _num_pages(p, side) * side.page_size
    if repeated:
        return torch.randint(count, (p.num_tokens,), generator=g)
    return torch.randperm(count, generator=g)[: p.num_tokens]


def build(p: Pack, side: Side, g: torch.Generator) -> dict[str, Tensor]:
    """k0, v0, k_scale0, ... of every layer of one cache."""
    (_, num_layers), (_, num_heads) = _ranges(p, side)
    num_pages = _num_pages(p, side)
    ks, vs = caches(
        "mla" if p.mla else side.caches, num_layers, num_pages, side.page_size, num_heads,
        (p.head_dim, p.head_dim_v), side.dtype, side.layout, side.gap, side.offset,
    )  # fmt: skip
    found: dict[str, Tensor] = {}
    for i in range(num_layers):
        for name, cache in (("k", ks[i]), ("v", vs[i])):
            found[f"{name}{i}"] = cache
            if name == "v" and p.mla:
                if "k_scale0" in found:
                    found[f"v_scale{i}"] = found[f"k_scale{i}"]
                continue
            if p.noise:
                view = bits(cache)
                noise = torch.randint(2**31, cache.shape, generator=g).numpy().astype(np.uint64) * 3
                view[...] = (noise >> 1).astype(view.dtype)
            else:
                write(cache, normal(g, *cache.shape) * LARGEST.get(side.dtype, 12.0) / 4, side.dtype)
            if side.scale != "none":
                shape = {"head": (num_heads,), "token_head": (num_pages, side.page_size, num_heads)}.get(side.scale, ())
                values = p.scale_size * (0.5 + uniform(g, *shape))
                found[f"{name}_scale{i}"] = filled(shape, values, "fp32", side.gap, side.offset)
    return found


def _cache(p: Pack, side: Side, tensors: dict[str, Tensor]) -> pw.PagedKVCache:
    num_layers = _ranges(p, side)[0][1]

    def layers(name: str) -> list[Tensor] | None:
        return [tensors[f"{name}{i}"] for i in range(num_layers)] if f"{name}0" in tensors else None

    return pw.PagedKVCache(
        layers("k"), layers("v"), layout=side.layout, k_scales=layers("k_scale"), v_scales=layers("v_scale")
    )


def _pack(p: Pack, sent: dict, slots: Tensor, backend: str) -> tuple[pw.PackedKV, Tensor | None]:
    """(packed, the buffer given for it)."""
    cache = _cache(p, p.source, sent)
    layers, heads = _ranges(p, p.source)
    dtype = None if p.wire_dtype is None else TORCH[p.wire_dtype]
    out: pw.PackedKV | Tensor | None = None
    buffer = None
    if p.out != "none":
        shape = pw.packed_shape(cache, len(slots), layers=layers, heads=heads, dtype=dtype)
        buffer = torch.full((shape.num_bytes + 48,), FILLER, dtype=torch.uint8, device=slots.device)
        out = buffer[16:] if p.out == "buffer" else pw.PackedKV.wrap(buffer[16:], shape)
    packed = pw.pack_kv(cache, slots, layers=layers, heads=heads, dtype=dtype, out=out, backend=backend)
    return packed, buffer


def _check_wire(p: Pack, source: dict, slots: list[int], packed: pw.PackedKV, buffer: Tensor | None) -> None:
    """Rows and scales against the oracle, then where they lie: per layer K, V; scales behind, 16-byte aligned."""
    wire = p.wire_dtype or p.source.dtype
    (first, stop), heads = _ranges(p, p.source)
    payload: list[bytes] = []
    scales: dict[str, list[bytes]] = {"k": [], "v": []}
    copied = wire == p.source.dtype
    got_all = packed.buffer.cpu()
    at = 0
    for layer in range(first, stop):
        for name in ("k",) if p.mla else ("k", "v"):
            cache = bits(nhd(source[f"{name}{layer}"], p.source.layout))[:, :, slice(*heads)]
            scale = source.get(f"{name}_scale{layer}")
            values = None if scale is None else scale.numpy()
            values = values[..., slice(*heads)] if values is not None and values.ndim else values
            rows, row_scale = moves.pack(cache, p.source.dtype, values, slots, wire)
            expected = torch.from_numpy(rows.copy().view(np.uint8)).reshape(-1)
            expected = expected.view(TORCH[wire]).reshape(rows.shape)
            got = got_all[at : at + rows.nbytes].clone().view(TORCH[wire]).reshape(rows.shape)
            compare.same_elements(f"packed {name}[{layer - first}]", got, expected, wire, exact=copied)
            payload.append(rows.tobytes())
            at += rows.nbytes
            if row_scale is not None:
                scales[name].append(np.asarray(row_scale, np.float32).tobytes())
    behind = b"".join(scales["k"] + scales["v"])
    padding = -at % 16 if scales["k"] else 0
    got, expected = list(got_all[at:].numpy()), list(b"\0" * padding + behind)
    assert len(got) == len(expected), f"packed: {len(got)} bytes behind the rows, not {len(expected)}"
    for i, (have, want) in enumerate(zip(got, expected, strict=True)):
        assert have == want, f"packed scales: byte {i} behind the rows is {have:#x}, not {want:#x}"
    if buffer is not None:
        around = torch.cat([buffer[:16], buffer[16 + len(got_all) :]])
        assert bool((around == FILLER).all()), "pack_kv wrote outside its buffer"


def _unpack(p: Pack, expected: dict, packed: pw.PackedKV, slots: list[int]) -> None:
    wire = p.wire_dtype or p.source.dtype
    (first, _), heads = _ranges(p, p.target)
    columns = slice(*heads)
    for i in range(p.num_layers):
        for name in ("k",) if p.mla else ("k", "v"):
            rows = bits(getattr(packed, name)[i].cpu())
            assert rows.itemsize == BYTES[wire]
            row_scale = getattr(packed, f"{name}_scale")
            cache = nhd(expected[f"{name}{first + i}"], p.target.layout)
            scale = expected.get(f"{name}_scale{first + i}")
            values = None if scale is None else scale.numpy()
            values = values[..., columns] if values is not None and values.ndim else values
            moves.unpack(
                rows, wire, None if row_scale is None else row_scale[i].cpu().numpy(),
                bits(cache)[:, :, columns], p.target.dtype, values, slots,
            )  # fmt: skip
