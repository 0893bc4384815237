"""Drop-in `flash_attn_with_kvcache` and `flash_attn_varlen_func`: FlashAttention's names and layouts, pagewire's ops.

    from pagewire.flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

Forward only. Argument names of FlashAttention 2, 3 and vLLM's fork are all accepted; what is not supported raises
NotImplementedError by name. The rest is as there, except:

- A row that sees no key has `out = 0` and `lse = -inf` (or its sink), where FlashAttention 2 writes +inf.
- An fp8 or int8 cache needs `k_descale` and `v_descale`; q is fp16, bf16 or fp32, and `q_descale` still applies.
- `num_splits=1` never splits a request, so its result does not depend on its batch; other values leave the number of
  splits, which moves results by rounding only, to pagewire.
- `max_seqlen_q` is a promise: a longer request is reported by `pagewire.check_errors()` and comes out empty.
- `deterministic`, `fa_version`, `rotary_interleaved` (without rotary tables) and `max_seqlen_k` (with a page table)
  change nothing: results are always deterministic, there is one implementation, lengths are read on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pagewire import ops
from pagewire.scalars import integer, show
from pagewire.types import QUANT_MAX, Scale, dtype_name

Result = Tensor | tuple[Tensor, Tensor]


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: Tensor | int | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    block_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Scale = None,
    k_descale: Scale = None,
    v_descale: Scale = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int | None] | None = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0,  # as in pagewire.decode
    alibi_slopes: Tensor | None = None,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    return_softmax_lse: bool = False,
    out: Tensor | None = None,
    fa_version: int | None = None,
) -> Result:
    """Attention over a KV cache, after appending new keys and values to it.

    Args:
        q: [batch, q_len, num_qo_heads, head_dim], or with `cu_seqlens_q` [total_q, num_qo_heads, head_dim].
        k_cache, v_cache: [num_pages, page_size, num_kv_heads, head_dim] with a page table, else
            [batch, max_len, num_kv_heads, head_dim].
        k, v: [batch, new_len, num_kv_heads, head_dim], or with `cu_seqlens_k_new` [total_new, ...]: written to the
            cache first, behind `cache_seqlens`. Into a float cache only.
        cache_seqlens: int or int32 [batch], keys in the cache without the new ones; None: all of it.
        cache_batch_idx: [batch], the row of an unpaged cache that belongs to each request.
        page_table, block_table: int32 [batch, max_pages]; two names of one argument, like `s_aux` and `sinks`.
        cu_seqlens_q: int32 [batch + 1]; needs `max_seqlen_q`.
        q_descale, k_descale, v_descale: [batch, num_kv_heads] fp32, or another form of pagewire's scales.
        window_size: (left, right); -1 or None = unbounded. causal: aligned to the last key.
    Returns:
        out like q, or (out, lse) with `return_softmax_lse`: lse fp32 [batch, num_qo_heads, q_len], or with
        `cu_seqlens_q` [num_qo_heads, total_q].
    Raises:
        NotImplementedError: an argument this forward does not have. Else as `pagewire.prefill`.
    """
    _refuse(
        "flash_attn_with_kvcache", qv=qv, rotary_cos=rotary_cos, rotary_sin=rotary_sin, cache_leftpad=cache_leftpad,
        rotary_seqlens=rotary_seqlens, scheduler_metadata=scheduler_metadata, pack_gqa=pack_gqa,
        attention_chunk=attention_chunk or None, sm_margin=sm_margin or None,
    )  # fmt: skip
    _tensors(q=q, k_cache=k_cache, v_cache=v_cache)
    _tensors(
        k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k_new=cu_seqlens_k_new, cache_batch_idx=cache_batch_idx,
        page_table=page_table, block_table=block_table, out=out, optional=True,
    )  # fmt: skip
    table = _one_of(page_table=page_table, block_table=block_table)
    batch_size = _batch(q, cu_seqlens_q)
    if table is None:
        table = _rows_as_pages(k_cache, cache_batch_idx, batch_size)
    elif cache_batch_idx is not None:
        raise NotImplementedError("flash_attn_with_kvcache: cache_batch_idx together with a page table")
    if cu_seqlens_q is not None and max_seqlen_q is None:
        raise ValueError("max_seqlen_q: expected an int (cu_seqlens_q is given), got None")
    capacity = table.shape[1] * k_cache.shape[1]
    seq_lens = _cached_lens(cache_seqlens, batch_size, capacity, q.device)
    keywords = _keywords(
        k_cache, capacity, q_descale, k_descale, v_descale, softmax_scale, window_size, softcap, alibi_slopes,
        _one_of(s_aux=s_aux, sinks=sinks), num_splits, return_softmax_lse,
    )  # fmt: skip
    rows, out_rows = q, out
    if cu_seqlens_q is None:
        rows = _merge_rows("q", q)
        out_rows = None if out is None else _merge_rows("out", out)
    if k is not None or v is not None:
        seq_lens = _append(k, v, k_cache, v_cache, table, seq_lens, cu_seqlens_k_new)
    elif cu_seqlens_k_new is not None:
        raise ValueError("cu_seqlens_k_new: expected None without k and v, got a tensor")
    keys = (k_cache, v_cache, table, seq_lens)
    if cu_seqlens_q is not None:
        return _ragged(q, keys, cu_seqlens_q, causal, max_seqlen_q, out, keywords)
    q_len = q.shape[1]
    if q_len == 1:
        result = ops.decode(rows, *keys, out=out_rows, **keywords)
    else:
        cu_seqlens_q = q_len * torch.arange(batch_size + 1, dtype=torch.int32, device=q.device)
        result = ops.prefill(
            rows, *keys, cu_seqlens_q, causal=causal, max_q_len=max(q_len, 1), out=out_rows, **keywords
        )
    result_rows, lse = result if isinstance(result, tuple) else (result, None)
    if out is None:
        out = result_rows.unflatten(0, q.shape[:2])
    return out if lse is None else (out, lse.unflatten(0, q.shape[:2]).transpose(1, 2).contiguous())


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    dropout_p: float = 0,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_v: Tensor | None = None,
    q_descale: Scale = None,
    k_descale: Scale = None,
    v_descale: Scale = None,
    window_size: Sequence[int | None] | None = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0,  # as in pagewire.decode
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    return_softmax_lse: bool = False,
    page_table: Tensor | None = None,
    block_table: Tensor | None = None,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    fa_version: int | None = None,
    cp_world_size: int = 1,
    cp_rank: int = 0,
    cp_tot_seqused_k: Tensor | None = None,
) -> Result:
    """Attention of ragged queries over paged KV (with a page table) or over ragged contiguous KV (without).

    Args:
        q: [total_q, num_qo_heads, head_dim]. cu_seqlens_q: int32 [batch + 1]. max_seqlen_q: their static upper bound.
        k, v: [num_pages, page_size, num_kv_heads, head_dim] with a page table, else [total_k, num_kv_heads, head_dim],
            whose requests start at `cu_seqlens_k` and have at most `max_seqlen_k` keys.
        seqused_k: int32 [batch], keys of each request; default the differences of `cu_seqlens_k`.
        The rest as in `flash_attn_with_kvcache`.
    Returns:
        out like q, or (out, lse) with `return_softmax_lse`: lse fp32 [num_qo_heads, total_q].
    Raises:
        NotImplementedError: an argument this forward does not have. Else as `pagewire.prefill`.
    """
    _refuse(
        "flash_attn_varlen_func", seqused_q=seqused_q, dropout_p=dropout_p or None, qv=qv, q_v=q_v,
        attention_chunk=attention_chunk or None, return_attn_probs=return_attn_probs or None,
        scheduler_metadata=scheduler_metadata, pack_gqa=pack_gqa, sm_margin=sm_margin or None,
        cp_world_size=None if cp_world_size == 1 else cp_world_size, cp_rank=cp_rank or None,
        cp_tot_seqused_k=cp_tot_seqused_k,
    )  # fmt: skip
    if not isinstance(cu_seqlens_q, Tensor):
        raise TypeError(f"cu_seqlens_q: expected an int32 tensor [batch + 1], got {cu_seqlens_q!r}")
    _tensors(q=q, k=k, v=v)
    _tensors(
        cu_seqlens_k=cu_seqlens_k, seqused_k=seqused_k, page_table=page_table, block_table=block_table, out=out,
        optional=True,
    )  # fmt: skip
    if max_seqlen_q is None:
        raise ValueError("max_seqlen_q: expected an int, got None")
    table = _one_of(page_table=page_table, block_table=block_table)
    if (cu_seqlens_k is None) == (seqused_k is None) and (table is not None or cu_seqlens_k is None):
        raise ValueError("seqused_k, cu_seqlens_k: expected exactly one of the two to give the keys' lengths")
    if table is None:
        assert cu_seqlens_k is not None
        if max_seqlen_k is None:
            raise ValueError("max_seqlen_k: expected an int (there is no page table), got None")
        # every token is a page of its own
        k, v = k.unsqueeze(1), v.unsqueeze(1)
        # no request has more keys than there are: a bound of any size costs no memory
        max_seqlen_k = min(integer("max_seqlen_k", max_seqlen_k, least=0), k.shape[0])
        key = torch.arange(max_seqlen_k, dtype=torch.int32, device=q.device)
        table = cu_seqlens_k[:-1, None] + key
    if seqused_k is None:
        assert cu_seqlens_k is not None
        seqused_k = cu_seqlens_k[1:] - cu_seqlens_k[:-1]
    keywords = _keywords(
        k, table.shape[1] * k.shape[1], q_descale, k_descale, v_descale, softmax_scale, window_size, softcap,
        alibi_slopes, _one_of(s_aux=s_aux, sinks=sinks), num_splits, return_softmax_lse,
    )  # fmt: skip
    return _ragged(q, (k, v, table, seqused_k), cu_seqlens_q, causal, max_seqlen_q, out, keywords)


def _ragged(
    q: Tensor,  # [total_q, num_qo_heads, head_dim]
    keys: tuple[Tensor, Tensor, Tensor, Tensor],  # k_cache, v_cache, page_table, seq_lens
    cu_seqlens_q: Tensor,
    causal: bool,
    max_seqlen_q: int | None,
    out: Tensor | None,
    keywords: dict[str, Any],
) -> Result:
    """out, or (out, lse [num_qo_heads, total_q])."""
    max_q_len = None if max_seqlen_q is None else max(integer("max_seqlen_q", max_seqlen_q), 1)
    if keywords["return_lse"]:
        keywords["lse"] = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device).t()
    result = ops.prefill(q, *keys, cu_seqlens_q, causal=causal, max_q_len=max_q_len, out=out, **keywords)
    return (result[0], result[1].t()) if isinstance(result, tuple) else result


def _tensors(*, optional: bool = False, **arguments: Any) -> None:
    for name, value in arguments.items():
        if not isinstance(value, Tensor) and not (optional and value is None):
            raise TypeError(f"{name}: expected a torch.Tensor, got {show(value)}")


def _batch(q: Tensor, cu_seqlens_q: Tensor | None) -> int:
    name, x = ("q", q) if cu_seqlens_q is None else ("cu_seqlens_q", cu_seqlens_q)
    if x.dim() == 0 or (x.shape[0] < 1 and x is not q):
        expected = "[batch, q_len, num_qo_heads, head_dim]" if x is q else "[batch + 1]"
        raise ValueError(f"{name}: expected {expected}, got shape {tuple(x.shape)}")
    return q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1


def _refuse(function: str, **arguments: Any) -> None:
    """Each is None, or an argument that would change the result and that we do not have."""
    for name, value in arguments.items():
        if value is not None:
            shown = "a tensor" if isinstance(value, Tensor) else repr(value)
            raise NotImplementedError(f"pagewire.flash_attn.{function}: {name} is not supported, got {shown}")


def _one_of(**names: Tensor | None) -> Tensor | None:
    given = {name: value for name, value in names.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)}: two names of one argument, expected only one of them")
    return next(iter(given.values()), None)


def _keywords(
    k_cache: Tensor,
    capacity: int,
    q_descale: Scale,
    k_descale: Scale,
    v_descale: Scale,
    softmax_scale: float | None,
    window_size: Sequence[int | None] | None,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    num_splits: int,
    return_lse: bool,
) -> dict[str, Any]:
    """The modifiers that both public ops take, in pagewire's words."""
    num_splits = integer("num_splits", num_splits, least=0)
    for name, descale in (("k_descale", k_descale), ("v_descale", v_descale)):
        if descale is None and k_cache.dtype in QUANT_MAX:
            raise ValueError(f"{name}: a {dtype_name(k_cache.dtype)} cache needs one (1.0 for none), got None")
    if q_descale is not None:  # (q * q_descale) . k = q . (k * q_descale)
        k_descale = q_descale if k_descale is None else q_descale * k_descale
    if window_size is None:
        window_size = (-1, -1)
    elif isinstance(window_size, (tuple, list)):
        window_size = tuple(-1 if side is None else side for side in window_size)
    return {
        "softmax_scale": softmax_scale,
        "window_size": window_size,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "sinks": None if sinks is None else sinks.float(),  # FlashAttention's are bf16
        "k_scale": k_descale,
        "v_scale": v_descale,
        "split_size": max(capacity, 1) if num_splits == 1 else None,
        "return_lse": return_lse,
    }


def _merge_rows(name: str, x: Tensor) -> Tensor:
    """[batch, len, ...] as [batch * len, ...], a view."""
    if x.dim() != 4:
        raise ValueError(f"{name}: expected [batch, len, num_heads, head_dim], got shape {tuple(x.shape)}")
    try:
        return x[:, 0] if x.shape[1] == 1 else x.view(-1, *x.shape[2:])
    except RuntimeError:
        raise ValueError(
            f"{name}: expected batch and len dims that merge into one without a copy, got stride {x.stride()} for "
            f"shape {tuple(x.shape)}"
        ) from None


def _rows_as_pages(k_cache: Tensor, cache_batch_idx: Tensor | None, batch_size: int) -> Tensor:
    """An unpaged cache [rows, max_len, ...] is one page per row."""
    if cache_batch_idx is not None:
        # an index past 32 bits stays one that is out of range
        return cache_batch_idx.clamp(-1, torch.iinfo(torch.int32).max).to(torch.int32)[:, None]
    if k_cache.shape[0] != batch_size:
        raise ValueError(
            f"k_cache: expected [{batch_size}, max_len, ...] (batch from q; no page table), got {tuple(k_cache.shape)}"
        )
    return torch.arange(batch_size, dtype=torch.int32, device=k_cache.device)[:, None]


def _cached_lens(lens: Tensor | int | None, batch_size: int, capacity: int, device: torch.device) -> Tensor:
    if isinstance(lens, Tensor):
        if lens.dtype != torch.int32:
            raise TypeError(f"cache_seqlens: expected int32, got {dtype_name(lens.dtype)}")
        return lens
    length = capacity if lens is None else integer("cache_seqlens", lens, what=" or an int32 tensor")
    if lens is not None and not torch.compiler.is_compiling() and not 0 <= length <= capacity:
        raise ValueError(f"cache_seqlens: expected a length in [0, {capacity}], got {length}")
    return torch.full((batch_size,), length, dtype=torch.int32, device=device)


def _append(
    k: Tensor | None,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cached_lens: Tensor,
    cu_seqlens_k_new: Tensor | None,
) -> Tensor:
    """Write k and v behind the cached keys; the lengths with the new ones."""
    if k is None or v is None:
        raise ValueError("k, v: expected both or neither")
    if k_cache.dtype in QUANT_MAX:
        raise NotImplementedError(
            "pagewire.flash_attn.flash_attn_with_kvcache: k and v are not supported with a "
            f"{dtype_name(k_cache.dtype)} cache; call pagewire.append_kv with its scales first"
        )
    batch_size, page_size = cached_lens.shape[0], k_cache.shape[1]
    if cu_seqlens_k_new is None:
        if k.dim() != 4 or k.shape[0] != batch_size:
            raise ValueError(f"k: expected [{batch_size}, new_len, num_kv_heads, head_dim], got {tuple(k.shape)}")
        new_lens: Tensor | int = k.shape[1]
        token = torch.arange(batch_size * k.shape[1], device=k.device)
        request, offset = token // max(k.shape[1], 1), token % max(k.shape[1], 1)
        k, v = _merge_rows("k", k), _merge_rows("v", v)
    else:
        new_lens = cu_seqlens_k_new[1:] - cu_seqlens_k_new[:-1]
        token = torch.arange(k.shape[0], dtype=torch.int32, device=k.device)
        request = torch.searchsorted(cu_seqlens_k_new[1:].contiguous(), token, right=True)
        offset = token - cu_seqlens_k_new[request.clamp(max=batch_size - 1)]
    if batch_size and k.shape[0]:
        owner = request.clamp(max=batch_size - 1)
        position = cached_lens[owner].long() + offset
        entry = position // page_size
        page = page_table[owner, entry.clamp(0, page_table.shape[1] - 1)].long()
        # a position outside the table, or a page that is none, becomes a slot past the end: it is reported
        fits = (entry >= 0) & (entry < page_table.shape[1]) & (page >= 0)
        slot = torch.where(fits, page * page_size + position % page_size, k_cache.shape[0] * page_size)
        slot = torch.where(request < batch_size, slot, -1)  # padding behind the last request
        ops.append_kv(k, v, k_cache, v_cache, slot)
    return cached_lens + new_lens
