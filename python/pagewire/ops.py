"""The public ops. Each is done at once (`eager.py`) or, under torch.compile, through the torch op (`torch_ops/`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pagewire import eager, torch_ops
from pagewire.cache import PagedKVCache
from pagewire.cache_part import CachePart
from pagewire.packed import PackedKV, PackedShape
from pagewire.types import Layout, Options, Scale


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
    _route(k).append_kv(k, v, k_cache, v_cache, slot_mapping, layout, k_scale, v_scale, backend)


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
    softcap: float = 0,  # not 0.0: torch.compile makes a float default an input of its graph
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
    options = Options(
        softmax_scale, False, window_size, softcap, alibi_slopes, sinks, k_scale, v_scale, split_size, None
    )
    found: tuple[Tensor, Tensor] = _route(q).decode(
        q, k_cache, v_cache, page_table, seq_lens, layout, options, backend, out, lse, return_lse
    )
    return found if return_lse else found[0]


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
    softcap: float = 0,  # not 0.0: torch.compile makes a float default an input of its graph
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
    options = Options(
        softmax_scale, causal, window_size, softcap, alibi_slopes, sinks, k_scale, v_scale, split_size, max_q_len
    )
    found: tuple[Tensor, Tensor] = _route(q).prefill(
        q, k_cache, v_cache, page_table, seq_lens, cu_seqlens_q, layout, options, backend, out, lse, return_lse
    )
    return found if return_lse else found[0]


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
    merged: tuple[Tensor, Tensor] = _route(out_a).merge_state(out_a, lse_a, out_b, lse_b, out, lse, backend)
    return merged


def merge_states(
    outs: Tensor, lses: Tensor, *, out: Tensor | None = None, lse: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Merge n attention states over disjoint keys in order.

    Args:
        outs: [n, num_tokens, num_qo_heads, head_dim]. lses: [n, num_tokens, num_qo_heads] fp32. n = 0 gives empty rows.
        out, lse: results, [num_tokens, num_qo_heads, head_dim] and [num_tokens, num_qo_heads].
    Returns, Raises: as `merge_state`.
    """
    merged: tuple[Tensor, Tensor] = _route(outs).merge_states(outs, lses, out, lse, backend)
    return merged


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
    part = CachePart.of(cache, layers, heads)
    part.check_slots(slots)
    packed = part.buffer(out, part.packed_shape(slots.shape[0], dtype), slots)
    _route(slots).pack_kv(part, slots, packed, backend)
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
    part = CachePart.of(cache, layers, heads)
    part.check_slots(slots)
    part.check_packed(packed, slots)
    _route(slots).unpack_kv(packed, part, slots, backend)


def packed_shape(
    cache: PagedKVCache,
    num_tokens: int,
    *,
    layers: tuple[int, int] | None = None,
    heads: tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
) -> PackedShape:
    """The shape (and so the byte size) that `pack_kv` with the same arguments gives."""
    return CachePart.of(cache, layers, heads).packed_shape(num_tokens, dtype)


def _route(first: Any) -> Any:
    """`torch_ops` under torch.compile and for tensors only a torch op can take, else `eager`: the same functions."""
    return torch_ops if torch_ops.traced(first) else eager
