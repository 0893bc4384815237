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
from pagewire.moves import How, Layer, Movement, layers
from pagewire.quant import dequantise, quantise, token_head_scale
from pagewire.types import QUANT_MAX, Kept, Modifiers, Scale, scale_kind

_ROWS = 256  # query rows at a time: bounds the logits of a long prefill


def _bound_by_nobody(op: Callable[..., None]) -> Callable[..., None]:
    """Autocast, gradients and inference mode of the caller change nothing, of the result or of its tensors."""

    @functools.wraps(op)
    def run(first: Any, *args: Any, **keywords: Any) -> None:
        device = (first.slots if isinstance(first, Movement) else first).device
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
    kept: Kept | None = None,
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
    kept: Kept | None = None,
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
    if scale is None:
        return values
    kind = scale_kind(scale)
    if kind == "tensor":
        return values * scale
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


# ---------------------------------------------------------------------------------------------- append, pack, unpack


@_bound_by_nobody
def move(movement: Movement, kept: Kept) -> None:
    slots = movement.slots.long()
    appends = movement.op == "append_kv"
    cache = movement.parts[0].caches[0]
    num_pages, page_size = cache.shape[:2]
    _check_slots(movement, slots, num_pages * page_size, negative_skips=appends)
    taken = slots >= 0
    page, offset = slots[taken] // page_size, slots[taken] % page_size
    for layer in layers(movement):
        if movement.from_cache:
            _pack(layer, page, offset)
        else:
            _store(layer._replace(rows=layer.rows[: len(slots)][taken]), page, offset)


def _pack(layer: Layer, page: Tensor, offset: Tensor) -> None:
    """Rows of the cache, [num_tokens, num_heads, width], into `layer.rows`, and their scales."""
    scale = layer.cache_scale
    taken = scale[page, offset] if isinstance(scale, Tensor) and scale.dim() == 3 else scale
    stored = _take(layer.cache, page, offset)
    if layer.how is How.COPY:
        layer.rows.copy_(stored)
        if layer.row_scale is not None:
            assert isinstance(taken, Tensor)
            layer.row_scale.copy_(taken)
        return
    x = dequantise(stored, _of_rows(taken))
    divisor = None
    if layer.how is How.QUANTISE:
        assert layer.row_scale is not None
        layer.row_scale.copy_(token_head_scale(x, layer.rows.dtype))
        divisor = _of_rows(layer.row_scale)
    layer.rows.copy_(quantise(x, divisor, layer.rows.dtype))


def _store(layer: Layer, page: Tensor, offset: Tensor) -> None:
    """`layer.rows`, [num_tokens, num_heads, width], into slots of the cache, and their scales."""
    cache, scale = layer.cache, layer.cache_scale
    if layer.how is How.COPY:
        _put(cache, page, offset, layer.rows)
        if layer.row_scale is not None:
            assert isinstance(scale, Tensor)
            scale[page, offset] = layer.row_scale
        return
    x = dequantise(layer.rows, _of_rows(layer.row_scale))
    if layer.how is How.QUANTISE:
        assert isinstance(scale, Tensor)
        divisor = token_head_scale(x, cache.dtype)  # [num_tokens, num_heads]
        scale[page, offset] = divisor
        scale = divisor
    _put(cache, page, offset, quantise(x, _of_rows(scale), cache.dtype))


def _of_rows(scale: Scale) -> Scale:
    """A scale that is a number, [], [num_heads] or [num_tokens, num_heads], against [num_tokens, num_heads, width]."""
    return scale[..., None] if isinstance(scale, Tensor) and scale.dim() else scale


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


def _check_slots(movement: Movement, slots: Tensor, num_slots: int, *, negative_skips: bool) -> None:
    low = torch.zeros_like(slots, dtype=torch.bool) if negative_skips else slots < 0
    bad = (low | (slots >= num_slots)).nonzero()
    if bad.numel():
        entry = int(bad[0])
        raise BadIndexError(
            f"{movement.op}: {movement.slots_name}[{entry}]: expected a slot in [0, {num_slots}) "
            f"(num_pages * page_size), got {int(slots[entry])}"
        )


# ---------------------------------------------------------------------------------------------- merge


@_bound_by_nobody
def merge_state(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor, kept: Kept
) -> None:
    merge_states(torch.stack([out_a.float(), out_b.float()]), torch.stack([lse_a, lse_b]), out, lse, kept)


@_bound_by_nobody
def merge_states(
    outs: Tensor,  # [n, num_tokens, num_qo_heads, head_dim]
    lses: Tensor,  # [n, num_tokens, num_qo_heads] fp32; +inf and -inf are empty
    out: Tensor,
    lse: Tensor,
    kept: Kept,
) -> None:
    lses = lses.masked_fill(lses == torch.inf, -torch.inf)
    merged = lses.logsumexp(0)
    weights = torch.exp(lses - merged.masked_fill(merged == -torch.inf, 0.0))[..., None]
    live = (lses != -torch.inf)[..., None]
    values = torch.where(live, outs.float(), 0.0)  # an empty state's out may be anything
    out.copy_((weights * values).sum(0))
    lse.copy_(merged)
