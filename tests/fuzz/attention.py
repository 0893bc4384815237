"""One attention problem: its tensors, the call, and the fp64 oracle's verdict."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

import pagewire as pw
from fuzz import compare, oracle
from fuzz.contents import INFINITE, caches, filled, generator, nhd, normal, pick, poison, uniform, write
from fuzz.formats import FLOATS, LARGEST, bits, decode
from fuzz.problems import Attention
from fuzz.tensors import carve, ship

HUGE = 2147480000  # a page id that is never valid


def check(p: Attention, backend: str, device: torch.device | str = "cpu") -> None:
    given = build(p)
    sent = ship(given, device)
    kwargs = {
        name: sent[name] for name in ("k_scale", "v_scale", "alibi_slopes", "sinks", "out", "lse") if name in sent
    }
    kwargs.update(
        layout=p.layout, softmax_scale=p.softmax_scale, window_size=p.window, softcap=p.softcap,
        split_size=p.split_size, return_lse=True, backend=backend,
    )  # fmt: skip
    names = ["q", "k_cache", "v_cache", "page_table", "seq_lens"]
    if p.q_lens is None:
        out, lse = pw.decode(*(sent[n] for n in names), **kwargs)
    else:
        names.append("cu_seqlens_q")
        out, lse = pw.prefill(*(sent[n] for n in names), causal=p.causal, max_q_len=p.max_q_len, **kwargs)
    pw.check_errors()

    expected_out, expected_lse = oracle.attention(meaning(p, given))
    compare.close("lse", lse, expected_lse)
    compare.close("out", out, expected_out)
    for name in given:
        if isinstance(given[name], Tensor):
            compare.unchanged(name, sent[name], given[name], around=name in ("out", "lse"))


def build(p: Attention) -> dict:
    """Tensors and float scales by argument name, on the CPU."""
    g = generator(p.seed)
    table, owned = _pages(p, g)
    num_pages = len(owned)
    q_lens = (1,) * len(p.seq_lens) if p.q_lens is None else p.q_lens
    num_tokens, num_heads = sum(q_lens) + p.padding_rows, p.num_kv_heads * p.group_size
    shape = (num_tokens, num_heads, p.head_dim)
    given: dict = {
        "q": filled(shape, normal(g, *shape), p.dtype, p.gap, p.offset),
        "page_table": carve((len(table), len(table[0]) if table else 2), torch.int32, p.gap),
        "seq_lens": torch.tensor(p.seq_lens, dtype=torch.int32),
    }
    given["page_table"].copy_(torch.tensor(table, dtype=torch.int32).reshape(given["page_table"].shape))
    if "q_nan" in p.poison:
        poison(given["q"][sum(q_lens) :], p.dtype, "nan")
    ks, vs = caches(
        p.caches, 1, num_pages, p.page_size, p.num_kv_heads, (p.head_dim, p.head_dim_v), p.kv_dtype,
        p.layout, p.gap, p.offset,
    )  # fmt: skip
    given["k_cache"], given["v_cache"] = ks[0], vs[0]
    for name, kind, size in (("k", p.k_scale, p.k_size), ("v", p.v_scale, p.v_size)):
        if name == "v" and p.caches == "mla":
            if "k_scale" in given:
                given["v_scale"] = given["k_scale"]
            continue
        scale = _fill(p, nhd(given[f"{name}_cache"], p.layout), kind, size, owned, g)
        if scale is not None:
            given[f"{name}_scale"] = scale
    _poison_owned(p, given, owned)
    if p.q_lens is not None:
        given["cu_seqlens_q"] = torch.tensor(np.cumsum([0, *q_lens]), dtype=torch.int32)
    if p.alibi:
        shape = (num_heads,) if p.alibi == 1 else (len(p.seq_lens), num_heads)
        given["alibi_slopes"] = filled(shape, p.slope * uniform(g, *shape), "fp32", p.gap, p.offset)
    if p.sinks != "none":
        sinks = normal(g, num_heads) * (50 if p.sinks == "large" else 1)
        given["sinks"] = torch.from_numpy(sinks)
        if "inf" in p.sinks:
            given["sinks"][0] = float(p.sinks)
    if p.out_dtype is not None:
        given["out"] = carve((num_tokens, num_heads, p.head_dim_v), p.out_dtype, p.gap, p.offset)
        given["lse"] = carve((num_tokens, num_heads), "fp32", p.gap, p.offset)
        given["out"].fill_(torch.nan)
        given["lse"].fill_(torch.nan)
    return given


def _pages(p: Attention, g: torch.Generator) -> tuple[list[list[int]], np.ndarray]:
    """(page table, owned [num_pages, page_size] bool); two pages belong to nobody."""
    needed = [-(-n // p.page_size) for n in p.seq_lens]
    num_pages = sum(needed) + 2
    order = torch.randperm(num_pages, generator=g).tolist()
    owned = np.zeros((num_pages, p.page_size), bool)
    table: list[list[int]] = []
    for b, (count, seq_len) in enumerate(zip(needed, p.seq_lens, strict=True)):
        row = [order.pop() for _ in range(count)]
        if b and p.shared != "none":
            common = min(seq_len, p.seq_lens[0])
            common = -(-common // p.page_size) if p.shared == "all" else common // p.page_size
            row[:common] = table[0][:common]
        for i, page in enumerate(row):
            owned[page, : min(p.page_size, seq_len - i * p.page_size)] = True
        for _ in range(max(needed) + 2 - count):
            row.append({"huge": HUGE, "negative": -(2**31)}.get(p.padding_ids, pick(g, num_pages)))
        table.append(row)
    return table, owned


def _fill(
    p: Attention, cache: Tensor, kind: str, size: float, owned: np.ndarray, g: torch.Generator
) -> Tensor | float | None:
    """Values into an NHD view, what goes into slots of no request, and the scale."""
    x = normal(g, *cache.shape)
    largest = LARGEST.get(p.kv_dtype, 4.0) / 4 if p.fill else 1.0
    if kind == "none":
        x *= size
    else:
        x *= largest
    zero = np.zeros(owned.shape, bool)
    zero.reshape(-1)[::5] = p.zero_rows
    x[zero] = 0
    write(cache, x, p.kv_dtype)
    scale: Tensor | float | None = None
    if kind != "none":
        heads = p.num_kv_heads
        shape = {"head": (heads,), "batch_head": (len(p.seq_lens), heads), "token_head": cache.shape[:3]}.get(kind, ())
        values = size / largest * (1 + uniform(g, *shape))
        if kind == "float":
            return _with_unowned(p, cache, None, owned, float(values))
        if kind == "token_head":
            values[zero] = 1
        scale = filled(tuple(shape), values, "fp32", p.gap, p.offset)
    return _with_unowned(p, cache, scale, owned, scale)


def _with_unowned(p: Attention, cache: Tensor, scale, owned: np.ndarray, result):
    if p.unowned != "number":
        for page, offset in np.argwhere(~owned):
            poison(cache[page, offset], p.kv_dtype, p.unowned)
            if scale is not None and scale.dim() == 3:
                scale[page, offset] = float(p.unowned)
    return result


def _poison_owned(p: Attention, given: dict, owned: np.ndarray) -> None:
    """One element of one owned key each; int8 has neither NaN nor infinity, its scale per token does."""
    places = np.argwhere(owned)
    for kind in p.poison:
        side, value = kind.split("_")
        if side == "q" or len(places) == 0:
            continue
        g = generator(p.seed + "kv".index(side) + len(value))
        page, offset = places[pick(g, len(places))]
        cache = nhd(given[f"{side}_cache"], p.layout)
        head, column = pick(g, cache.shape[2]), pick(g, cache.shape[3])
        scale = given.get(f"{side}_scale")
        if p.kv_dtype in INFINITE or (value == "nan" and p.kv_dtype != "int8"):
            poison(cache[page, offset, head, column : column + 1], p.kv_dtype, value)
        elif isinstance(scale, Tensor) and scale.dim() == 3:
            # K times an infinite scale is NaN or infinite by the order of evaluation: no such scale is defined
            scale[page, offset, head] = math.nan if side == "k" else float(value)


def meaning(p: Attention, given: dict) -> oracle.Attention:
    """The same call in fp64, for the oracle."""
    caches = [decode(bits(nhd(given[name], p.layout)), p.kv_dtype) for name in ("k_cache", "v_cache")]
    slopes, sinks = given.get("alibi_slopes"), given.get("sinks")
    num_heads = p.num_kv_heads * p.group_size
    rows = [*range(len(p.seq_lens) + 1)]
    if p.q_lens is not None:
        rows = given["cu_seqlens_q"].tolist()
    return oracle.Attention(
        q=decode(bits(given["q"]), p.dtype),
        k_cache=caches[0],
        v_cache=caches[1],
        page_table=given["page_table"].tolist(),
        seq_lens=p.seq_lens,
        rows=rows,
        softmax_scale=p.head_dim**-0.5 if p.softmax_scale is None else p.softmax_scale,
        causal=p.causal and p.q_lens is not None,
        window=p.window,
        softcap=p.softcap,
        slopes=None if slopes is None else np.broadcast_to(slopes.double().numpy(), (len(p.seq_lens), num_heads)),
        sinks=None if sinks is None else sinks.double().numpy(),
        k_scale=_scale_of(given.get("k_scale"), p.num_kv_heads),
        v_scale=_scale_of(given.get("v_scale"), p.num_kv_heads),
        dtype=p.dtype,
        out_dtype=p.out_dtype or p.dtype,
        least_weight=_least_weight(p),
    )


def _least_weight(p: Attention) -> float:
    if p.dtype == "fp16":
        return 2.0**-24
    # bf16 weights may meet an 8-bit cache in fp16, the heaviest as 2^15
    return 2.0**-39 if p.dtype == "bf16" and p.kv_dtype not in FLOATS else 0.0


def _scale_of(scale: Tensor | float | None, num_kv_heads: int):
    """(request, page, offset) -> fp64 [num_kv_heads]."""
    values = np.asarray(1.0 if scale is None else scale, dtype=np.float64)

    def at(request: int, page: int, offset: int) -> np.ndarray:
        index = {2: (request,), 3: (page, offset)}.get(values.ndim, ())
        return np.broadcast_to(values[index], (num_kv_heads,))

    return at
