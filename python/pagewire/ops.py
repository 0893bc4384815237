"""The public ops: check, choose a backend, call it. Under torch.compile the same call goes through the torch op."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pagewire import check, library, registry
from pagewire.cache import PagedKVCache, nhd
from pagewire.errors import check_after_call
from pagewire.packed import PackedKV, PackedShape
from pagewire.types import (
    FLOAT_DTYPES,
    KV_DTYPES,
    QUANT_MAX,
    Layout,
    Modifiers,
    Problem,
    Scale,
    dtype_name,
)


def append_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    layout: Layout = "NHD",
    k_scale: Scale = None,
    v_scale: Scale = None,
    backend: str | None = None,
) -> None:
    """Write new tokens into the cache, quantising into its dtype.

    Args:
        k, v: [num_tokens, num_kv_heads, head_dim] and [..., head_dim_v], fp16, bf16 or fp32, free strides but a
            contiguous last dim.
        k_cache, v_cache: paged caches in `layout`; k's dtype, or fp8 e4m3, fp8 e5m2 or int8.
        slot_mapping: [<= num_tokens] int32 or int64: `page * page_size + offset`; negative = skip this token. Rows
            of k and v beyond its length are padding. Duplicate slots are undefined.
        k_scale, v_scale: real = stored * scale. A float, fp32 [] or [num_kv_heads] are read;
            fp32 [num_pages, page_size, num_kv_heads] is written. Needed exactly for fp8 and int8 caches.
    Raises:
        ValueError, TypeError: a shape, dtype, stride or device that does not fit.
        BadIndexError: a slot past the end (CPU and reference: at once, nothing written; GPU: see `check_errors`).
        BackendError: no backend takes it.
    """
    if library.traced(k):
        library.append_kv(k, v, k_cache, v_cache, slot_mapping, layout, k_scale, v_scale, backend)
        return
    dims = check.Dims()
    check.caches(dims, k_cache, v_cache, layout)
    dims.check("k", k, "num_tokens num_kv_heads head_dim")
    dims.check("v", v, "num_tokens num_kv_heads head_dim_v")
    check.cache_dtype("k", k, k_cache.dtype)
    check.dtype("v", v, (k.dtype,), " (from k)")
    check.last_dim_contiguous(k=k, v=v)
    dims.check("slot_mapping", slot_mapping, "<=num_tokens")
    check.dtype("slot_mapping", slot_mapping, check.INDEX_DTYPES)
    check.scale(dims, "k_scale", k_scale, k_cache.dtype, per_request=False)
    check.scale(dims, "v_scale", v_scale, k_cache.dtype, per_request=False)
    check.no_float_scale(k_cache.dtype, k_scale=k_scale, v_scale=v_scale)
    check.device(
        "k",
        k.device,
        v=v,
        k_cache=k_cache,
        v_cache=v_cache,
        slot_mapping=slot_mapping,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    module = registry.choose(_problem("append_kv", k, dims, k_cache.dtype), backend)
    module.append_kv(
        k, v, nhd(k_cache, layout), nhd(v_cache, layout), slot_mapping, k_scale, v_scale
    )
    check_after_call(k.device)


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    *,
    layout: Layout = "NHD",
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scale: Scale = None,
    v_scale: Scale = None,
    split_size: int | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of one query token per request over its paged KV.

    Args:
        q: [batch_size, num_qo_heads, head_dim] fp16, bf16 or fp32; its position is `seq_len - 1`.
        k_cache, v_cache: paged caches in `layout`; q's dtype, or fp8 e4m3, fp8 e5m2 or int8 with scales.
        page_table: [batch_size, max_pages_per_seq] int32; entries at or past ceil(seq_len / page_size) are never read.
        seq_lens: [batch_size] int32, KV tokens of each request including the new one; 0 is legal.
        softmax_scale: default 1 / sqrt(head_dim).
        window_size: (left, right) keys visible around the query; -1 = unbounded.
        softcap: logits become `softcap * tanh(logit / softcap)`; 0 = off.
        alibi_slopes: fp32 [num_qo_heads] or [batch_size, num_qo_heads]; `slope * |distance|` is subtracted.
        sinks: fp32 [num_qo_heads], final logits that join the softmax's denominator only.
        k_scale, v_scale: real = stored * scale: a float, or fp32 [], [num_kv_heads], [batch_size, num_kv_heads] or
            [num_pages, page_size, num_kv_heads]. Needed for fp8 and int8 caches.
        split_size: KV tokens per split; given, a request's result is bitwise independent of the rest of the batch.
        out: [batch_size, num_qo_heads, head_dim_v] in q's dtype or fp32; default a new tensor in q's dtype.
        lse: [batch_size, num_qo_heads] fp32, natural log of the softmax's whole denominator.
    Returns:
        out, or (out, lse) with `return_lse`. A request without a visible key: out = 0, lse = its sink or -inf.
    Raises:
        ValueError, TypeError, BackendError: see `append_kv`. BadIndexError: a page id or length out of range.

    >>> cache = PagedKVCache.allocate(num_layers=1, num_pages=4, page_size=2, num_kv_heads=1, head_dim=8,
    ...                               dtype=torch.float32, device="cpu")
    >>> table, lens = torch.tensor([[3, 1]], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    >>> decode(torch.ones(1, 2, 8), cache.k[0], cache.v[0], table, lens, backend="reference").shape
    torch.Size([1, 2, 8])
    """
    m = Modifiers(
        q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale, False, *_window(window_size), softcap,
        alibi_slopes, sinks, k_scale, v_scale, split_size,
    )  # fmt: skip
    if library.traced(q):
        result = library.decode(
            q, k_cache, v_cache, page_table, seq_lens, layout, m, backend, out, lse, return_lse
        )
        return result if return_lse else result[0]
    dims = check.Dims()
    dims.check("q", q, "batch_size num_qo_heads head_dim")
    check.attention(dims, q, k_cache, v_cache, page_table, seq_lens, layout)
    check.modifiers(dims, q, k_cache.dtype, m)
    check.out_and_lse(dims, q, out, lse, "batch_size")
    out, lse = _results(q, dims["head_dim_v"], out, lse, return_lse)
    module = registry.choose(_problem("decode", q, dims, k_cache.dtype), backend)
    module.decode(q, nhd(k_cache, layout), nhd(v_cache, layout), page_table, seq_lens, m, out, lse)
    check_after_call(q.device)
    return (out, lse) if return_lse else out  # type: ignore[return-value]


def prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    causal: bool = True,
    max_q_len: int | None = None,
    layout: Layout = "NHD",
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scale: Scale = None,
    v_scale: Scale = None,
    split_size: int | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of ragged query rows over paged KV that is already in the cache: prefill, chunked prefill,
    speculative verification and mixed prefill + decode batches are this one call.

    Query row i of a request sits at position `seq_len - q_len + i`.

    Args:
        q: [num_tokens, num_qo_heads, head_dim]; rows past `cu_seqlens_q[-1]` are padding and come out empty.
        cu_seqlens_q: [batch_size + 1] int32, from 0, non-decreasing, at most num_tokens; equal neighbours = no rows.
        causal: key j is visible only if j <= position.
        max_q_len: static upper bound on a request's rows that lets a kernel specialise; a longer request is an error.
        out, lse: [num_tokens, num_qo_heads, head_dim_v] and [num_tokens, num_qo_heads].
        The rest as in `decode`.
    Returns, Raises: as `decode`; BadIndexError also for cu_seqlens_q.
    """
    m = Modifiers(
        q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale, causal, *_window(window_size), softcap,
        alibi_slopes, sinks, k_scale, v_scale, split_size, max_q_len,
    )  # fmt: skip
    if library.traced(q):
        result = library.prefill(
            q,
            k_cache,
            v_cache,
            page_table,
            seq_lens,
            cu_seqlens_q,
            layout,
            m,
            backend,
            out,
            lse,
            return_lse,
        )
        return result if return_lse else result[0]
    dims = check.Dims()
    dims.check("q", q, "num_tokens num_qo_heads head_dim")
    check.attention(dims, q, k_cache, v_cache, page_table, seq_lens, layout)
    check.offsets(dims, cu_seqlens_q, q.device)
    check.modifiers(dims, q, k_cache.dtype, m)
    check.out_and_lse(dims, q, out, lse, "num_tokens")
    out, lse = _results(q, dims["head_dim_v"], out, lse, return_lse)
    module = registry.choose(_problem("prefill", q, dims, k_cache.dtype, max_q_len), backend)
    module.prefill(
        q,
        nhd(k_cache, layout),
        nhd(v_cache, layout),
        page_table,
        seq_lens,
        cu_seqlens_q,
        m,
        out,
        lse,
    )
    check_after_call(q.device)
    return (out, lse) if return_lse else out  # type: ignore[return-value]


def merge_state(
    out_a: Tensor,
    lse_a: Tensor,
    out_b: Tensor,
    lse_b: Tensor,
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge two attention states over disjoint keys. `lse` +inf or -inf marks an empty state; give sinks to one part.

    Args:
        out_a, out_b: [num_tokens, num_qo_heads, head_dim] fp16, bf16 or fp32. lse_a, lse_b: [num_tokens, num_qo_heads]
            fp32, natural log.
        out, lse: results; may be out_a and lse_a themselves (in place). Default new tensors like out_a, lse_a.
    Returns:
        (out, lse); both empty: out = 0, lse = -inf.
    Raises:
        ValueError, TypeError: a shape, dtype, stride or device that does not fit. BackendError: no backend takes it.
    """
    if library.traced(out_a):
        return library.merge_state(out_a, lse_a, out_b, lse_b, out, lse, backend)
    dims = check.Dims()
    for name, o, s in (("a", out_a, lse_a), ("b", out_b, lse_b)):
        dims.check(f"out_{name}", o, "num_tokens num_qo_heads head_dim")
        dims.check(f"lse_{name}", s, "num_tokens num_qo_heads")
        check.dtype(f"out_{name}", o, FLOAT_DTYPES if name == "a" else (out_a.dtype,))
        check.dtype(f"lse_{name}", s, (torch.float32,))
    check.last_dim_contiguous(out_a=out_a, out_b=out_b)
    check.device("out_a", out_a.device, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    check.out_and_lse(dims, out_a, out, lse, "num_tokens", width="head_dim")
    out, lse = _results(out_a, dims["head_dim"], out, lse, True)
    assert lse is not None
    module = registry.choose(_movement("merge_state", out_a, dims["head_dim"]), backend)
    module.merge_state(out_a, lse_a, out_b, lse_b, out, lse)
    return out, lse


def merge_states(
    outs: Tensor,
    lses: Tensor,
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge n attention states over disjoint keys in order.

    Args:
        outs: [n, num_tokens, num_qo_heads, head_dim]. lses: [n, num_tokens, num_qo_heads] fp32. n = 0 gives empty rows.
        out, lse: results, [num_tokens, num_qo_heads, head_dim] and [num_tokens, num_qo_heads].
    Returns, Raises: as `merge_state`.
    """
    if library.traced(outs):
        return library.merge_states(outs, lses, out, lse, backend)
    dims = check.Dims()
    dims.check("outs", outs, "n num_tokens num_qo_heads head_dim")
    dims.check("lses", lses, "n num_tokens num_qo_heads")
    check.dtype("outs", outs, FLOAT_DTYPES)
    check.dtype("lses", lses, (torch.float32,))
    check.last_dim_contiguous(outs=outs)
    check.device("outs", outs.device, lses=lses)
    check.out_and_lse(dims, outs, out, lse, "num_tokens", width="head_dim")
    if out is None:
        out = torch.empty(outs.shape[1:], dtype=outs.dtype, device=outs.device)
    if lse is None:
        lse = torch.empty(lses.shape[1:], dtype=torch.float32, device=outs.device)
    module = registry.choose(_movement("merge_states", outs, dims["head_dim"]), backend)
    module.merge_states(outs, lses, out, lse)
    return out, lse


def pack_kv(
    cache: PagedKVCache,
    slots: Tensor,
    *,
    layers: tuple[int, int] | None = None,
    heads: tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
    out: PackedKV | Tensor | None = None,
    backend: str | None = None,
) -> PackedKV:
    """Gather tokens of all layers into one contiguous buffer, converting on the way.

    Args:
        slots: [num_tokens] int64, `page * page_size + offset`, in the order wanted.
        layers, heads: (start, stop) of this cache; default all.
        dtype: of the packed values; default the cache's, which makes it a byte copy. Another fp8 or int8 dtype is
            requantised per token and head; a float dtype holds real values.
        out: a uint8 buffer (contiguous, 16-byte aligned, at least `PackedShape.num_bytes`) or a PackedKV of the
            right shape; default a new buffer.
    Raises:
        ValueError, TypeError, BackendError: as `append_kv`. BadIndexError: a slot out of range (GPU: packed as zeros).
    """
    layers, heads = _ranges(cache, layers, heads)
    dtype = dtype or cache.geometry.dtype
    shape = packed_shape(
        cache, slots.shape[0] if slots.dim() else 0, layers=layers, heads=heads, dtype=dtype
    )
    if not library.traced(slots):
        _check_slots(cache, slots)
    packed = _packed_out(out, shape, cache.device)
    views = _layer_views(cache, layers, heads)
    if library.traced(slots):
        library.pack_kv(views, slots, packed, backend)
        return packed
    run_pack(views, slots, packed, backend)
    return packed


def unpack_kv(
    packed: PackedKV,
    cache: PagedKVCache,
    slots: Tensor,
    *,
    layers: tuple[int, int] | None = None,
    heads: tuple[int, int] | None = None,
    backend: str | None = None,
) -> None:
    """Scatter packed tokens into the cache, the inverse of `pack_kv`: any page size, layout, dtype and head range.

    Args:
        slots: [num_tokens] int64, where each packed token goes. Duplicate slots are undefined.
        layers, heads: (start, stop) of this cache that receive; as many as were packed; default all.
    Raises:
        ValueError, TypeError, BackendError: as `append_kv`. BadIndexError: a slot out of range (GPU: skipped).
    """
    layers, heads = _ranges(cache, layers, heads)
    _check_packed(packed, cache, slots, layers, heads)
    views = _layer_views(cache, layers, heads)
    if library.traced(slots):
        library.unpack_kv(packed, views, slots, backend)
        return
    _check_slots(cache, slots)
    run_unpack(packed, views, slots, backend)


def packed_shape(
    cache: PagedKVCache,
    num_tokens: int,
    *,
    layers: tuple[int, int] | None = None,
    heads: tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
) -> PackedShape:
    """The shape (and so the byte size) that `pack_kv` with the same arguments gives."""
    layers, heads = _ranges(cache, layers, heads)
    g = cache.geometry
    dtype = dtype or g.dtype
    if dtype not in KV_DTYPES:
        raise TypeError(
            f"dtype: expected one of {', '.join(map(dtype_name, KV_DTYPES))}, got {dtype_name(dtype)}"
        )
    scale_kind = g.scale if dtype == g.dtype else "token_head" if dtype in QUANT_MAX else "none"
    head_dim_v = 0 if g.shares_kv else g.head_dim_v
    return PackedShape(
        layers[1] - layers[0],
        heads[1] - heads[0],
        num_tokens,
        g.head_dim,
        head_dim_v,
        dtype,
        scale_kind,
    )


# ------------------------------------------------------------------------------- shared by ops and torch ops

LayerViews = tuple[
    list[Tensor], list[Tensor], list[Tensor], list[Tensor]
]  # NHD k, v and scales k, v; lists may be empty


def run_pack(views: LayerViews, slots: Tensor, packed: PackedKV, backend: str | None) -> None:
    k_caches, v_caches, k_scales, v_scales = views
    module = registry.choose(_cache_problem("pack_kv", packed, k_caches[0]), backend)
    module.pack_kv(k_caches, v_caches, k_scales, v_scales, slots, packed)
    # rarely any: what lay there before must not travel, and equal contents must give equal buffers
    padding = packed.buffer[packed.shape.payload_bytes : packed.shape.scales_start]
    if padding.numel():
        padding.zero_()
    check_after_call(slots.device)


def run_unpack(packed: PackedKV, views: LayerViews, slots: Tensor, backend: str | None) -> None:
    k_caches, v_caches, k_scales, v_scales = views
    module = registry.choose(_cache_problem("unpack_kv", packed, k_caches[0]), backend)
    module.unpack_kv(packed, k_caches, v_caches, k_scales, v_scales, slots)
    check_after_call(slots.device)


def _window(window_size: Sequence[int]) -> tuple[int, int]:
    if len(window_size) != 2:
        raise ValueError(f"window_size: expected (left, right), got {window_size!r}")
    left, right = window_size
    return int(left), int(right)


def _results(
    q: Tensor, width: int, out: Tensor | None, lse: Tensor | None, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    if out is None:
        out = torch.empty((*q.shape[:-1], width), dtype=q.dtype, device=q.device)
    if lse is None and return_lse:
        lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    return out, lse


def _problem(
    op: str, x: Tensor, dims: check.Dims, kv_dtype: torch.dtype, max_q_len: int | None = None
) -> Problem:
    """Only a max_q_len that makes every request short tells backends apart: keep the number of problems small."""
    group_size = x.shape[1] // max(dims["num_kv_heads"], 1)
    max_q_len = max_q_len if max_q_len is not None and max_q_len <= 16 else None
    return Problem(
        op, x.device.type, x.dtype, kv_dtype, dims["head_dim"], dims["head_dim_v"], dims["page_size"], group_size,
        max_q_len, x.device.index,
    )  # fmt: skip


def _movement(op: str, x: Tensor, width: int) -> Problem:
    return Problem(op, x.device.type, x.dtype, x.dtype, width, width, device_index=x.device.index)


def _cache_problem(op: str, packed: PackedKV, k_cache: Tensor) -> Problem:
    shape, device = packed.shape, k_cache.device
    page_size = k_cache.shape[1]
    return Problem(
        op, device.type, shape.dtype, k_cache.dtype, shape.head_dim, shape.head_dim_v, page_size,
        device_index=device.index,
    )  # fmt: skip


def _ranges(
    cache: PagedKVCache, layers: tuple[int, int] | None, heads: tuple[int, int] | None
) -> tuple[tuple[int, int], tuple[int, int]]:
    g = cache.geometry
    result = []
    for name, given, extent in (("layers", layers, g.num_layers), ("heads", heads, g.num_kv_heads)):
        start, stop = (0, extent) if given is None else given
        if not 0 <= start < stop <= extent:
            raise ValueError(
                f"{name}: expected (start, stop) with 0 <= start < stop <= {extent}, got {given}"
            )
        result.append((start, stop))
    return result[0], result[1]


def _layer_views(
    cache: PagedKVCache, layers: tuple[int, int], heads: tuple[int, int]
) -> LayerViews:
    which, columns = slice(*layers), slice(*heads)
    every_head = heads == (0, cache.geometry.num_kv_heads)

    def views(tensors: Sequence[Tensor]) -> list[Tensor]:
        all_heads = [nhd(t, cache.layout) for t in tensors[which]]
        return all_heads if every_head else [t[:, :, columns] for t in all_heads]

    def scales(tensors: Sequence[Tensor | None]) -> list[Tensor]:
        return [s if s.dim() == 0 else s[..., columns] for s in tensors[which] if s is not None]

    shared = cache.geometry.shares_kv
    return (
        views(cache.k),
        [] if shared else views(cache.v),
        scales(cache.k_scale),
        [] if shared else scales(cache.v_scale),
    )


def _check_slots(cache: PagedKVCache, slots: Tensor) -> None:
    if slots.dim() != 1 or slots.dtype != torch.int64:
        raise ValueError(
            f"slots: expected [num_tokens] int64, got {tuple(slots.shape)} {dtype_name(slots.dtype)}"
        )
    if slots.device != cache.device:
        raise ValueError(
            f"slots: expected device {cache.device} (from the cache), got {slots.device}"
        )


def _packed_out(
    out: PackedKV | Tensor | None, shape: PackedShape, device: torch.device
) -> PackedKV:
    if out is None:
        return PackedKV.empty(shape, device)
    if isinstance(out, PackedKV):
        if out.shape != shape:
            raise ValueError(f"out: expected {shape}, got {out.shape}")
        buffer = out.buffer
    else:
        buffer = out
    if buffer.device != device and not (device.type == "cuda" and buffer.is_pinned()):
        raise ValueError(
            f"out: expected device {device} (from the cache) or pinned memory, got {buffer.device}"
        )
    return out if isinstance(out, PackedKV) else PackedKV.wrap(buffer, shape)


def _check_packed(
    packed: PackedKV,
    cache: PagedKVCache,
    slots: Tensor,
    layers: tuple[int, int],
    heads: tuple[int, int],
) -> None:
    g, shape = cache.geometry, packed.shape
    head_dim_v = 0 if g.shares_kv else g.head_dim_v
    for name, expected, got, source in (
        ("num_layers", layers[1] - layers[0], shape.num_layers, f"layers={layers}"),
        ("num_heads", heads[1] - heads[0], shape.num_heads, f"heads={heads}"),
        ("num_tokens", math.prod(slots.shape), shape.num_tokens, "slots"),
        ("head_dim", g.head_dim, shape.head_dim, "the cache"),
        ("head_dim_v", head_dim_v, shape.head_dim_v, "the cache; 0 = V is a view of K"),
    ):
        if expected != got:
            raise ValueError(f"packed: expected {name}={expected} (from {source}), got {got}")
    if (shape.dtype in QUANT_MAX) != (shape.scale_kind != "none"):
        raise ValueError(
            f"packed: scale kind {shape.scale_kind!r} does not go with {dtype_name(shape.dtype)}"
        )
    if packed.buffer.device != cache.device and not (
        cache.device.type == "cuda" and packed.buffer.is_pinned()
    ):
        raise ValueError(
            f"packed: expected device {cache.device} (from the cache) or pinned memory, got {packed.buffer.device}"
        )
