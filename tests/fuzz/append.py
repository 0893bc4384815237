"""One append problem: the whole storage of caches and scales against the oracle's, byte by byte."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import pagewire as pw
from fuzz import compare, moves
from fuzz.contents import caches, filled, generator, nhd, normal, pick, uniform
from fuzz.formats import LARGEST, bits, encode
from fuzz.problems import Append
from fuzz.tensors import carve, ship

SPECIALS = (np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-40, 6e-8, 3e38, 448.0, 464.0, 465.0, 61440.0, 2.5)
ODD_SCALES = (0.0, np.inf, np.nan, -1.0, 1e-45, 3e38)


def check(p: Append, backend: str, device: torch.device | str = "cpu") -> None:
    given = build(p)
    sent, expected = ship(given, device), ship(given, "cpu")
    scales = {name: sent[name] for name in ("k_scale", "v_scale") if name in sent}
    names = ("k", "v", "k_cache", "v_cache", "slot_mapping")
    pw.append_kv(*(sent[n] for n in names), layout=p.layout, backend=backend, **scales)
    pw.check_errors()

    slots = given["slot_mapping"].tolist()
    for side in ("k", "v"):
        scale = expected.get(f"{side}_scale")
        if side == "v" and p.caches == "mla":  # written with K, and so are its scales
            if p.scale == "token_head":
                _same_scales(expected, slots, p.page_size)
            continue
        cache = bits(nhd(expected[f"{side}_cache"], p.layout))
        values = scale.numpy() if isinstance(scale, Tensor) else scale
        values = np.asarray(values, np.float32) if isinstance(values, float) else values
        moves.append(bits(expected[side]), p.dtype, cache, p.kv_dtype, values, slots)
    for name in ("k_scale", "v_scale", "k_cache", "v_cache"):
        if isinstance(given.get(name), Tensor):
            dtype = p.kv_dtype if "cache" in name else "fp32"
            compare.same_elements(name, sent[name], expected[name], dtype, exact=False)
    for name in given:
        if isinstance(given[name], Tensor):
            written = name.endswith(("cache", "scale"))
            if not (written and p.caches in ("fused", "mla")):  # K lies beside V there
                compare.unchanged(name, sent[name], given[name], around=written)


def _same_scales(tensors: dict, slots: list[int], page_size: int) -> None:
    for slot in slots:
        if slot >= 0:
            at = divmod(slot, page_size)
            tensors["v_scale"][at] = tensors["k_scale"][at]


def build(p: Append) -> dict:
    g = generator(p.seed)
    num_pages = (p.num_tokens + 3) // p.page_size + 2
    given: dict = {}
    for side, width in (("k", p.head_dim), ("v", p.head_dim_v)):
        shape = (p.num_tokens + p.padding_rows, p.num_kv_heads, width)
        if side == "v" and p.caches == "mla":
            given["v"] = given["k"][..., :width]
            continue
        x = carve(shape, p.dtype, p.gap, p.offset)
        values = (p.size * normal(g, *shape)).astype(np.float32)
        if p.specials:
            _specials(values, g)
        with np.errstate(over="ignore"):
            bits(x)[...] = encode(values, p.dtype)
        given[side] = x
    ks, vs = caches(
        p.caches, 1, num_pages, p.page_size, p.num_kv_heads, (p.head_dim, p.head_dim_v), p.kv_dtype,
        p.layout, p.gap, p.offset,
    )  # fmt: skip
    given["k_cache"], given["v_cache"] = ks[0], vs[0]
    for side in ("k", "v"):
        if p.scale == "none":
            continue
        if side == "v" and p.caches == "mla" and p.scale != "token_head":
            given["v_scale"] = given["k_scale"]
            continue
        shape = {"head": (p.num_kv_heads,), "token_head": (num_pages, p.page_size, p.num_kv_heads)}.get(p.scale, ())
        values = p.size * p.scale_size / LARGEST[p.kv_dtype] * (1 + uniform(g, *shape).astype(float))
        values = np.clip(values, 1e-45, 3e38)
        if p.scale == "float":
            given[f"{side}_scale"] = float(np.clip(values, 1e-37, 8e37))  # others are refused
            continue
        scale = filled(shape, values, "fp32", p.gap, p.offset)
        if p.odd_scales:
            scale[tuple(pick(g, n) for n in shape)] = ODD_SCALES[pick(g, len(ODD_SCALES))]
        given[f"{side}_scale"] = scale
    slots = torch.randperm(num_pages * p.page_size, generator=g)[: p.num_tokens]
    skipped = torch.randperm(p.num_tokens, generator=g)[: p.skipped]
    slots[skipped] = torch.tensor([-1, -(2**31)])[torch.arange(len(skipped)) % 2]
    slots = slots.to(getattr(torch, p.slot_dtype))
    given["slot_mapping"] = torch.stack([slots, slots], 1)[:, 0] if p.strided_slots else slots
    return given


def _specials(values: np.ndarray, g: torch.Generator) -> None:
    """Single elements, a row of zeros, a row of NaN, a row of the smallest subnormals."""
    flat, rows = values.reshape(-1), values.reshape(-1, values.shape[-1])
    for number in SPECIALS:
        if flat.size:
            flat[pick(g, flat.size)] = number
    for number in (0.0, np.nan, 1e-45):
        if len(rows):
            rows[pick(g, len(rows))] = number
