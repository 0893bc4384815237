"""append, pack and unpack by the contract, as bits written with plain loops.

Caches, rows and scales are numpy views of the tensors' bits (`formats.bits`) in NHD order; a scale is fp32 [],
[num_heads] or [num_pages, page_size, num_heads]. Imports nothing of pagewire.
"""

from __future__ import annotations

import numpy as np

from fuzz.formats import LARGEST, decode, encode


def real(stored: np.ndarray, dtype: str, scale: np.float32 | None) -> np.ndarray:
    """stored * scale, one fp32 multiplication."""
    with np.errstate(all="ignore"):
        x = decode(stored, dtype).astype(np.float32)
        return x if scale is None else x * np.float32(scale)


def quantise(x: np.ndarray, scale: np.float32 | None, dtype: str) -> np.ndarray:
    """One head of one token, fp32 [width] -> bits."""
    with np.errstate(all="ignore"):
        return encode(x if scale is None else x / np.float32(scale), dtype)


def amax_scale(x: np.ndarray, dtype: str) -> np.float32:
    """Largest finite magnitude / largest stored value; 1 where that is 0."""
    finite = np.abs(x[np.isfinite(x)])
    scale = np.float32(finite.max() if finite.size else 0.0) / np.float32(LARGEST[dtype])
    return scale if scale != 0 else np.float32(1.0)


def scale_at(scale: np.ndarray | None, page: int, offset: int, head: int) -> np.float32 | None:
    if scale is None:
        return None
    return scale[{0: (), 1: (head,), 3: (page, offset, head)}[scale.ndim]]


def store(x: np.ndarray, cache: np.ndarray, dtype: str, scale: np.ndarray | None, slot: int) -> None:
    """Real values of one token, fp32 [num_heads, width], into a slot; per-token-head scales are written."""
    page, offset = divmod(slot, cache.shape[1])
    for head in range(cache.shape[2]):
        divisor = None
        if dtype in LARGEST:
            if scale is not None and scale.ndim == 3:
                scale[page, offset, head] = amax_scale(x[head], dtype)
            divisor = scale_at(scale, page, offset, head)
        cache[page, offset, head] = quantise(x[head], divisor, dtype)


def append(
    x: np.ndarray, x_dtype: str, cache: np.ndarray, cache_dtype: str, scale: np.ndarray | None, slots: list[int]
) -> None:
    """x [num_tokens, num_heads, width]; a negative slot is skipped, rows beyond the slots are padding."""
    for token, slot in enumerate(slots):
        if slot >= 0:
            store(real(x[token], x_dtype, None), cache, cache_dtype, scale, slot)


def pack(
    cache: np.ndarray, cache_dtype: str, scale: np.ndarray | None, slots: list[int], wire_dtype: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """One layer's K or V: (bits [num_heads, num_tokens, width], fp32 scale [] or [num_heads(, num_tokens)])."""
    _, page_size, num_heads, width = cache.shape
    rows, scales = [], np.ones((num_heads, len(slots)), np.float32)
    for head in range(num_heads):
        for token, slot in enumerate(slots):
            page, offset = divmod(slot, page_size)
            stored, factor = cache[page, offset, head], scale_at(scale, page, offset, head)
            if wire_dtype == cache_dtype:
                rows.append(stored)
                if factor is not None:
                    scales[head, token] = factor
                continue
            x = real(stored, cache_dtype, factor)
            if wire_dtype in LARGEST:
                scales[head, token] = amax_scale(x, wire_dtype)
                rows.append(quantise(x, scales[head, token], wire_dtype))
            else:
                rows.append(encode(x, wire_dtype))
    packed = np.array(rows).reshape(num_heads, len(slots), width)
    if wire_dtype == cache_dtype:
        return packed, scale if scale is None or scale.ndim < 3 else scales
    return packed, scales if wire_dtype in LARGEST else None


def unpack(
    rows: np.ndarray, rows_dtype: str, rows_scale: np.ndarray | None, cache: np.ndarray, cache_dtype: str,
    scale: np.ndarray | None, slots: list[int],
) -> None:  # fmt: skip
    """The inverse; a byte copy where the dtype is the same and both have no scale or one per token and head."""
    per_token = rows_scale is not None and rows_scale.ndim == 2
    copied = rows_dtype == cache_dtype and (rows_scale is None or (per_token and scale is not None and scale.ndim == 3))
    for token, slot in enumerate(slots):
        page, offset = divmod(slot, cache.shape[1])
        if copied:
            cache[page, offset] = rows[:, token]
            if scale is not None and rows_scale is not None:
                scale[page, offset] = rows_scale[:, token]
            continue
        x = np.empty((rows.shape[0], rows.shape[2]), np.float32)
        for head in range(rows.shape[0]):
            factor = None
            if rows_scale is not None:
                factor = rows_scale[{0: (), 1: (head,), 2: (head, token)}[rows_scale.ndim]]
            x[head] = real(rows[head, token], rows_dtype, factor)
        store(x, cache, cache_dtype, scale, slot)
