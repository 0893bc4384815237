"""The definition of every op in plain PyTorch: fp32 (fp64 when asked), one request at a time, obviously right.

Caches arrive as NHD views, `[num_pages, page_size, num_kv_heads, head_dim]` with free strides. Every index is checked
before anything is written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pagewire.errors import BadIndexError
from pagewire.packed import PackedKV
from pagewire.quant import dequantise, quantise, token_head_scale
from pagewire.types import QUANT_MAX, Modifiers, Scale, scale_kind

_ROWS = 256  # query rows at a time: bounds the logits of a long prefill


def _bound_by_nobody(op: Callable[..., None]) -> Callable[..., None]:
    """Autocast, gradients and inference mode of the caller change nothing, of the result or of its tensors."""

    @functools.wraps(op)
    def run(first: Any, *args: Any, **keywords: Any) -> None:
        x = first.buffer if isinstance(first, PackedKV) else first
        device = (x if isinstance(x, Tensor) else x[0]).device
        with torch.inference_mode(), torch.autocast(device.type, enabled=False):
            op(first, *args, **keywords)

    return run


# ---------------------------------------------------------------------------------------------- attention


@_bound_by_nobody
def decode(
    q: Tensor,  # [batch_size, num_qo_heads, head_dim]
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,  # [batch_size, max_pages_per_seq] int32
    seq_lens: Tensor,  # [batch_size] int32
    modifiers: Modifiers,
    out: Tensor,  # [batch_size, num_qo_heads, head_dim_v]
    lse: Tensor | None,  # [batch_size, num_qo_heads] fp32
    *,
    compute_dtype: torch.dtype = torch.float32,
) -> None:
    rows = range(q.shape[0] + 1)
    _attention("decode", q, k_cache, v_cache, page_table, seq_lens, rows, modifiers, out, lse, compute_dtype)


@_bound_by_nobody
def prefill(
    q: Tensor,  # [num_tokens, num_qo_heads, head_dim]
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,  # [batch_size + 1] int32
    modifiers: Modifiers,
    out: Tensor,
    lse: Tensor | None,
    *,
    compute_dtype: torch.dtype = torch.float32,
) -> None:
    rows = cu_seqlens_q.tolist()
    _check_rows(rows, q.shape[0], modifiers.max_q_len)
    _attention("prefill", q, k_cache, v_cache, page_table, seq_lens, rows, modifiers, out, lse, compute_dtype)


def _attention(
    op: str,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    rows: Sequence[int],  # request b's query rows are rows[b] .. rows[b + 1]
    m: Modifiers,
    out: Tensor,
    lse: Tensor | None,
    compute_dtype: torch.dtype,
) -> None:
    lengths = seq_lens.tolist()
    first_keys = [_first_key(n, rows[b + 1] - rows[b], m.window_left) for b, n in enumerate(lengths)]
    _check_pages(op, page_table, lengths, rows, first_keys, k_cache)
    result = torch.zeros_like(out)  # rows without a visible key stay so; out may be q
    if lse is not None:
        lse.copy_(torch.full_like(lse, -torch.inf) if m.sinks is None else m.sinks.expand_as(lse))
    for b, seq_len in enumerate(lengths):
        first = first_keys[b]
        if first >= seq_len:
            continue
        slots = _slots(page_table[b], first, seq_len, k_cache.shape[1])
        k = _gather(k_cache, slots, m.k_scale, b, compute_dtype)  # [keys, num_kv_heads, head_dim]
        v = _gather(v_cache, slots, m.v_scale, b, compute_dtype)
        key = torch.arange(first, seq_len, device=q.device)
        for start in range(rows[b], rows[b + 1], _ROWS):
            stop = min(start + _ROWS, rows[b + 1])
            position = seq_len - rows[b + 1] + torch.arange(start, stop, device=q.device)
            o, row_lse = _attend(q[start:stop].to(compute_dtype), k, v, position, key, b, m)
            result[start:stop] = o.to(out.dtype)
            if lse is not None:
                lse[start:stop] = row_lse.to(lse.dtype)
    out.copy_(result)


def _attend(
    q: Tensor,  # [q_len, num_qo_heads, head_dim]
    k: Tensor,  # [num_keys, num_kv_heads, head_dim]
    v: Tensor,  # [num_keys, num_kv_heads, head_dim_v]
    position: Tensor,  # [q_len]
    key: Tensor,  # [num_keys]
    request: int,
    m: Modifiers,
) -> tuple[Tensor, Tensor]:
    """The formula: logits, mask, softmax with the sink in the denominator, weighted sum. Returns (out, lse)."""
    group_size = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(group_size, dim=1)
    v = v.repeat_interleave(group_size, dim=1)
    logits = m.softmax_scale * torch.einsum("qhd,khd->hqk", q, k)  # [num_qo_heads, q_len, num_keys]
    if m.softcap > 0:
        logits = m.softcap * torch.tanh(logits / m.softcap)
    distance = position[:, None] - key[None, :]  # p - j
    if m.alibi_slopes is not None:
        slopes = m.alibi_slopes if m.alibi_slopes.dim() == 1 else m.alibi_slopes[request]
        logits = logits - slopes[:, None, None].to(logits.dtype) * distance.abs()
    visible = torch.ones_like(distance, dtype=torch.bool)
    if m.causal:
        visible &= distance >= 0
    if m.window_left >= 0:
        visible &= distance <= m.window_left
    if m.window_right >= 0:
        visible &= -distance <= m.window_right
    logits = logits.masked_fill(~visible, -torch.inf)
    lse = logits.logsumexp(-1)  # [num_qo_heads, q_len]
    lse = lse.masked_fill(lse == torch.inf, torch.nan)  # inf - inf; as a state +inf would be an empty one
    if m.sinks is not None:
        sink = m.sinks[:, None].to(lse.dtype).expand_as(lse)
        joint = torch.logaddexp(lse, sink)
        lse = torch.where((sink == torch.inf) & ~lse.isnan(), sink, joint)  # inf - inf within it
    # an empty row has lse -inf (or its sink): its weights are exp(-inf - finite) = 0
    weights = torch.exp(logits - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    weights = weights.masked_fill(~visible, 0.0)
    # what is not finite counts where it is seen only: elsewhere 0 * inf would be NaN
    finite = v.isfinite().flatten(1).all(1)  # [num_keys]
    out = torch.einsum("hqk,khd->qhd", weights[..., finite], v[finite])
    for j in (~finite).nonzero().flatten().tolist():
        seen = visible[:, j, None, None]  # [q_len, 1, 1]
        out += torch.where(seen, weights[:, :, j].t()[..., None] * v[j], 0.0)
    return out, lse.transpose(0, 1)


def _gather(cache: Tensor, slots: Tensor, scale: Scale, request: int, compute_dtype: torch.dtype) -> Tensor:
    """Real values of the given slots, `[len(slots), num_kv_heads, width]`."""
    page, offset = slots // cache.shape[1], slots % cache.shape[1]
    values = _take(cache, page, offset).to(compute_dtype)
    kind = scale_kind(scale)
    if kind == "none":
        return values
    if kind == "tensor":
        return values * scale  # type: ignore[operator]
    assert isinstance(scale, Tensor)
    if kind == "token_head":
        return values * scale[page, offset][..., None].to(compute_dtype)
    per_head = scale if kind == "head" else scale[request]
    return values * per_head[:, None].to(compute_dtype)


def _slots(page_table_row: Tensor, start: int, stop: int, page_size: int) -> Tensor:
    token = torch.arange(start, stop, device=page_table_row.device)
    return page_table_row[token // page_size].long() * page_size + token % page_size


def _first_key(seq_len: int, q_len: int, window_left: int) -> int:
    """The first key any row of the request can see; `seq_len` if there is no row."""
    if q_len <= 0:
        return seq_len
    return max(0, seq_len - q_len - window_left) if window_left >= 0 else 0


def _check_rows(rows: Sequence[int], num_tokens: int, max_q_len: int | None) -> None:
    if rows[0] != 0:
        raise BadIndexError(f"prefill: cu_seqlens_q[0]: expected 0, got {rows[0]}")
    for b in range(len(rows) - 1):
        if not rows[b] <= rows[b + 1] <= num_tokens:
            raise BadIndexError(
                f"prefill: cu_seqlens_q[{b + 1}]: expected a value in [{rows[b]}, {num_tokens}] (non-decreasing, at "
                f"most num_tokens from q), got {rows[b + 1]}"
            )
        if max_q_len is not None and rows[b + 1] - rows[b] > max_q_len:
            raise BadIndexError(
                f"prefill: request {b} has {rows[b + 1] - rows[b]} query rows, more than max_q_len={max_q_len}"
            )


def _check_pages(
    op: str, page_table: Tensor, lengths: list[int], rows: Sequence[int], first_keys: list[int], k_cache: Tensor
) -> None:
    num_pages, page_size = k_cache.shape[:2]
    capacity = page_table.shape[1] * page_size
    for b, seq_len in enumerate(lengths):
        if not 0 <= seq_len <= capacity:
            raise BadIndexError(
                f"{op}: seq_lens[{b}]: expected a value in [0, {capacity}] ({page_table.shape[1]} pages of "
                f"{page_size}, from page_table and k_cache), got {seq_len}"
            )
        if first_keys[b] >= seq_len:
            continue
        used = page_table[b, first_keys[b] // page_size : -(-seq_len // page_size)]
        bad = ((used < 0) | (used >= num_pages)).nonzero()
        if bad.numel():
            entry = first_keys[b] // page_size + int(bad[0])
            raise BadIndexError(
                f"{op}: page_table[{b}, {entry}]: expected a page in [0, {num_pages}) (num_pages, from k_cache), "
                f"got {int(page_table[b, entry])}"
            )


# ---------------------------------------------------------------------------------------------- append


@_bound_by_nobody
def append_kv(
    k: Tensor,  # [num_tokens, num_kv_heads, head_dim]
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,  # [<= num_tokens] int32 or int64; negative = skip
    k_scale: Scale,
    v_scale: Scale,
) -> None:
    slots = slot_mapping.long()
    num_slots = k_cache.shape[0] * k_cache.shape[1]
    _check_slots("append_kv", "slot_mapping", slots, num_slots, negative_skips=True)
    kept = slots >= 0
    page, offset = slots[kept] // k_cache.shape[1], slots[kept] % k_cache.shape[1]
    for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        _store(x[: len(slots)][kept], cache, page, offset, scale)


def _store(x: Tensor, cache: Tensor, page: Tensor, offset: Tensor, scale: Scale) -> None:
    """Write real values `x [n, num_kv_heads, width]`; per-token-head scales are written, others read."""
    if cache.dtype not in QUANT_MAX:
        cache[page, offset] = x.to(cache.dtype)
        return
    divisor: Tensor | float | None
    if scale_kind(scale) == "token_head":
        assert isinstance(scale, Tensor)
        divisor = token_head_scale(x, cache.dtype)  # [n, num_kv_heads]
        scale[page, offset] = divisor
        divisor = divisor[..., None]
    else:
        divisor = scale[:, None] if isinstance(scale, Tensor) and scale.dim() == 1 else scale
    _put(cache, page, offset, quantise(x, divisor, cache.dtype))


def _take(cache: Tensor, page: Tensor, offset: Tensor) -> Tensor:
    """`cache[page, offset]`, also of fp8 on a CPU with torch 2.9."""
    if cache.dtype.itemsize == 1:
        return cache.view(torch.uint8)[page, offset].view(cache.dtype)
    return cache[page, offset]


def _put(cache: Tensor, page: Tensor, offset: Tensor, stored: Tensor) -> None:
    """Indexed write of stored values; torch has no indexed write for fp8, so bytes are moved."""
    if cache.dtype in QUANT_MAX:
        cache, stored = cache.view(torch.uint8), stored.view(torch.uint8)
    cache[page, offset] = stored


def _check_slots(op: str, name: str, slots: Tensor, num_slots: int, *, negative_skips: bool = False) -> None:
    low = torch.zeros_like(slots, dtype=torch.bool) if negative_skips else slots < 0
    bad = (low | (slots >= num_slots)).nonzero()
    if bad.numel():
        entry = int(bad[0])
        raise BadIndexError(
            f"{op}: {name}[{entry}]: expected a slot in [0, {num_slots}) (num_pages * page_size), "
            f"got {int(slots[entry])}"
        )


# ---------------------------------------------------------------------------------------------- merge


@_bound_by_nobody
def merge_state(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor) -> None:
    merge_states(torch.stack([out_a.float(), out_b.float()]), torch.stack([lse_a, lse_b]), out, lse)


@_bound_by_nobody
def merge_states(
    outs: Tensor,  # [n, num_tokens, num_qo_heads, head_dim]
    lses: Tensor,  # [n, num_tokens, num_qo_heads] fp32; +inf and -inf are empty
    out: Tensor,
    lse: Tensor,
) -> None:
    if outs.shape[0] == 0:
        out.zero_()
        lse.fill_(-torch.inf)
        return
    lses = lses.masked_fill(lses == torch.inf, -torch.inf)
    merged = lses.logsumexp(0)
    weights = torch.exp(lses - merged.masked_fill(merged == -torch.inf, 0.0))[..., None]
    live = (lses != -torch.inf)[..., None]
    values = torch.where(live, outs.float(), 0.0)  # an empty state's out may be anything
    out.copy_((weights * values).sum(0))
    lse.copy_(merged)


# ---------------------------------------------------------------------------------------------- pack / unpack


@_bound_by_nobody
def pack_kv(
    k_caches: Sequence[Tensor],  # per layer, NHD view of the heads to pack
    v_caches: Sequence[Tensor],  # empty when V is a view of K
    k_scales: Sequence[Tensor],  # per layer [], [num_heads] or [num_pages, page_size, num_heads]; empty for none
    v_scales: Sequence[Tensor],
    slots: Tensor,  # [num_tokens] int64
    packed: PackedKV,
) -> None:
    num_slots = k_caches[0].shape[0] * k_caches[0].shape[1]
    _check_slots("pack_kv", "slots", slots, num_slots)
    for caches, scales, target, target_scale in (
        (k_caches, k_scales, packed.k, packed.k_scale),
        (v_caches, v_scales, packed.v, packed.v_scale),
    ):
        for layer, cache in enumerate(caches):
            assert target is not None
            scale = scales[layer] if scales else None
            stored_scale = None if target_scale is None else target_scale[layer]
            _pack_layer(cache, scale, slots, target[layer], stored_scale)


def _pack_layer(
    cache: Tensor, scale: Tensor | None, slots: Tensor, target: Tensor, target_scale: Tensor | None
) -> None:
    page, offset = slots // cache.shape[1], slots % cache.shape[1]
    stored = _take(cache, page, offset).transpose(0, 1)  # [num_heads, num_tokens, width]
    row_scale = _per_head_token(scale, page, offset)
    if target.dtype == cache.dtype:
        target.copy_(stored)
        if target_scale is not None and scale is not None:
            target_scale.copy_(scale if scale.dim() < 3 else scale[page, offset].transpose(0, 1))
        return
    x = dequantise(stored, row_scale)
    divisor = None
    if target_scale is not None:  # a new quantised dtype: per token and head, from the same pass
        target_scale.copy_(token_head_scale(x, target.dtype))
        divisor = target_scale[..., None]
    target.copy_(quantise(x, divisor, target.dtype))


@_bound_by_nobody
def unpack_kv(
    packed: PackedKV,
    k_caches: Sequence[Tensor],
    v_caches: Sequence[Tensor],
    k_scales: Sequence[Tensor],
    v_scales: Sequence[Tensor],
    slots: Tensor,
) -> None:
    num_slots = k_caches[0].shape[0] * k_caches[0].shape[1]
    _check_slots("unpack_kv", "slots", slots, num_slots)
    for caches, scales, source, source_scale in (
        (k_caches, k_scales, packed.k, packed.k_scale),
        (v_caches, v_scales, packed.v, packed.v_scale),
    ):
        for layer, cache in enumerate(caches):
            assert source is not None
            scale = scales[layer] if scales else None
            stored_scale = None if source_scale is None else source_scale[layer]
            _unpack_layer(source[layer], stored_scale, cache, scale, slots)


def _unpack_layer(
    source: Tensor, source_scale: Tensor | None, cache: Tensor, scale: Tensor | None, slots: Tensor
) -> None:
    page, offset = slots // cache.shape[1], slots % cache.shape[1]
    source_per_token = source_scale is not None and source_scale.dim() == 2
    cache_per_token = scale is not None and scale.dim() == 3
    if source.dtype == cache.dtype and (source_scale is None or (source_per_token and cache_per_token)):
        _put(cache, page, offset, source.transpose(0, 1))
        if cache_per_token:
            assert scale is not None and source_scale is not None
            scale[page, offset] = source_scale.transpose(0, 1)
        return
    if source_scale is not None and source_scale.dim() >= 1:
        source_scale = source_scale[..., None] if source_per_token else source_scale[:, None, None]
    x = dequantise(source, source_scale).transpose(0, 1)  # [num_tokens, num_heads, width]
    _store(x, cache, page, offset, scale)


def _per_head_token(scale: Tensor | None, page: Tensor, offset: Tensor) -> Tensor | None:
    """A cache scale broadcast against `[num_heads, num_tokens, width]`."""
    if scale is None or scale.dim() == 0:
        return scale
    return scale[:, None, None] if scale.dim() == 1 else scale[page, offset].transpose(0, 1)[..., None]
