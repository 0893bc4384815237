"""Attention and merge by the contract, in fp64 with plain loops, each result with the error it may have.

Imports nothing of pagewire: an error there cannot hide here. Bounds come from the terms of a sum (|weight * value|),
never from the size of its result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fuzz.formats import OVERFLOW, ROUNDOFF, SMALLEST

U32 = 2.0**-24  # fp32 accumulation everywhere
FAINT = 1e-3  # weight relative to the heaviest; below, an infinite value may meet a weight rounded to 0: inf or NaN


@dataclass
class Expected:
    """`value` fp64, `allowed` error per element, `either`: any non-finite result will do."""

    value: np.ndarray
    allowed: np.ndarray
    either: np.ndarray
    dtype: str

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: str, value: float = 0.0) -> Expected:
        return cls(np.full(shape, value), np.zeros(shape), np.zeros(shape, bool), dtype)

    def wrong(self, got: np.ndarray) -> np.ndarray:
        """bool, elementwise. A result within the error of the dtype's overflow may be infinite."""
        with np.errstate(invalid="ignore"):
            close = (got == self.value) | (np.abs(got - self.value) <= self.allowed)
            edge = np.abs(self.value) + self.allowed >= OVERFLOW[self.dtype]
            close |= np.isinf(got) & edge & (np.sign(got) == np.sign(self.value))
        close |= np.isnan(got) & np.isnan(self.value)
        close |= self.either & ~np.isfinite(got)
        return ~close


@dataclass
class Attention:
    """What one call means. fp64 arrays; caches hold stored values, [num_pages, page_size, num_kv_heads, width]."""

    q: np.ndarray  # [num_tokens, num_qo_heads, head_dim]
    k_cache: np.ndarray
    v_cache: np.ndarray
    page_table: Sequence[Sequence[int]]
    seq_lens: Sequence[int]
    rows: Sequence[int]  # request b's rows are rows[b] .. rows[b + 1]
    softmax_scale: float
    causal: bool
    window: tuple[int, int]
    softcap: float
    slopes: np.ndarray | None  # [batch_size, num_qo_heads]
    sinks: np.ndarray | None  # [num_qo_heads]
    k_scale: Callable[[int, int, int], np.ndarray]  # (request, page, offset) -> [num_kv_heads]
    v_scale: Callable[[int, int, int], np.ndarray]
    dtype: str  # of q
    out_dtype: str
    least_weight: float  # relative to the heaviest: a smaller one may be lost, where it meets its value in fp16


def attention(a: Attention) -> tuple[Expected, Expected]:
    """(out [num_tokens, num_qo_heads, head_dim_v], lse [num_tokens, num_qo_heads])."""
    num_tokens, num_heads, _ = a.q.shape
    out = Expected.empty((num_tokens, num_heads, a.v_cache.shape[-1]), a.out_dtype)
    lse = Expected.empty((num_tokens, num_heads), "fp32", -math.inf)
    if a.sinks is not None:
        lse.value[:] = a.sinks
        lse.allowed[:] = np.where(np.isfinite(a.sinks), 8 * U32 * (1 + np.abs(a.sinks)), 0.0)
    group_size = num_heads // a.k_cache.shape[2]
    with np.errstate(all="ignore"):
        for b, seq_len in enumerate(a.seq_lens):
            keys, values = _gather(a, b)
            for row in range(a.rows[b], a.rows[b + 1]):
                position = seq_len - a.rows[b + 1] + row
                visible = [j for j in range(seq_len) if sees(a, position, j)]
                if not visible:
                    continue
                for h in range(num_heads):
                    k, v = keys[visible, h // group_size], values[visible, h // group_size]
                    distance = np.abs(position - np.array(visible))
                    slope = 0.0 if a.slopes is None else a.slopes[b, h]
                    logits, error = _logits(a, a.q[row, h], k, slope * distance)
                    sink = -math.inf if a.sinks is None else a.sinks[h]
                    _softmax(a.dtype, a.least_weight, logits, error, v, sink, out, lse, (row, h))
    return out, lse


def sees(a: Attention, position: int, key: int) -> bool:
    left, right = a.window
    return (
        (left < 0 or key >= position - left)
        and (right < 0 or key <= position + right)
        and (not a.causal or key <= position)
    )


def _gather(a: Attention, b: int) -> tuple[np.ndarray, np.ndarray]:
    """Real keys and values of request b, [seq_len, num_kv_heads, width]."""
    page_size = a.k_cache.shape[1]
    keys = np.empty((a.seq_lens[b], *a.k_cache.shape[2:]))
    values = np.empty((a.seq_lens[b], *a.v_cache.shape[2:]))
    for token in range(a.seq_lens[b]):
        page, offset = a.page_table[b][token // page_size], token % page_size
        keys[token] = a.k_cache[page, offset] * a.k_scale(b, page, offset)[:, None]
        values[token] = a.v_cache[page, offset] * a.v_scale(b, page, offset)[:, None]
    return keys, values


def _logits(a: Attention, q: np.ndarray, k: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(logits, their error in fp32) of one row, [num_visible]."""
    x = a.softmax_scale * (k @ q)
    terms = abs(a.softmax_scale) * (np.abs(k) @ np.abs(q))
    if a.softcap > 0:
        x = a.softcap * np.tanh(x / a.softcap)
    x = x - bias
    error = U32 * ((6 + math.sqrt(len(q))) * terms + 8 * np.abs(x) + 8 * np.abs(bias))
    return x, np.where(np.isfinite(x), error, 0.0)


def _softmax(
    dtype: str, least_weight: float, x: np.ndarray, error: np.ndarray, v: np.ndarray, sink: float,
    out: Expected, lse: Expected, at: tuple[int, int],
) -> None:  # fmt: skip
    """One row of one head: x, error [num_visible], v [num_visible, head_dim_v]."""
    nan_v, inf_v = np.isnan(v).any(0), np.isinf(v).any(0)
    if np.isnan(x).any() or np.isposinf(x).any():
        out.value[at] = lse.value[at] = math.nan
        return
    if math.isinf(sink) and sink > 0:
        lse.value[at], out.either[at] = math.inf, nan_v | inf_v
        return
    top = float(x.max())
    largest = max(top, sink)
    if largest == -math.inf:  # every logit is -inf: an empty row
        out.either[at] = nan_v | inf_v
        return
    weights = np.exp(x - largest)
    total = float(weights.sum() + np.exp(sink - largest))
    weights /= total
    lse.value[at] = largest + math.log(total)

    finite = np.where(np.isfinite(v), v, 0.0)
    wv = weights[:, None] * np.abs(finite)  # the terms the bound is made of
    # an exponent is taken relative to the maximum, which has an error of its own
    error = np.minimum(error + 8 * U32 * abs(largest), 80.0)
    spread = np.expm1(error)
    shared = float((weights * spread).sum()) + 8 * U32
    relative = (spread + shared)[:, None] + U32 * (8 + math.sqrt(len(x)))
    if dtype != "fp32":
        relative = relative + 2 * ROUNDOFF[dtype]  # weights meet values in q's dtype
    out.value[at] = (weights[:, None] * finite).sum(0)
    # a weight beside a heavy sink may be subnormal, or flushed
    allowed = (relative * wv + SMALLEST["fp32"] * np.abs(finite)).sum(0) + SMALLEST[out.dtype]
    allowed += least_weight * math.exp(top - lse.value[at]) * np.abs(finite).sum(0)
    out.allowed[at] = allowed + 1.01 * ROUNDOFF[out.dtype] * (np.abs(out.value[at]) + allowed)
    lse.allowed[at] = math.log1p(shared) + 8 * U32 * (1 + abs(lse.value[at]))

    if inf_v.any():
        # beside a heavy sink all weights may be subnormal or flushed: 0 * inf is NaN
        heavy = (weights >= FAINT * weights.max()) & (weights >= 2 * SMALLEST["fp32"])
        up = (np.isposinf(v) & heavy[:, None]).any(0)
        down = (np.isneginf(v) & heavy[:, None]).any(0)
        faint = (np.isinf(v) & ~heavy[:, None]).any(0)
        infinite = np.where(up & down, math.nan, np.where(up, math.inf, -math.inf))
        out.value[at] = np.where(inf_v, infinite, out.value[at])
        out.either[at] |= inf_v & faint
    out.value[at] = np.where(nan_v, math.nan, out.value[at])
    out.either[at] &= ~nan_v


def merge(outs: np.ndarray, lses: np.ndarray, out_dtype: str) -> tuple[Expected, Expected]:
    """States [n, num_tokens, num_qo_heads, head_dim] and [n, num_tokens, num_qo_heads] fp64 -> (out, lse)."""
    out = Expected.empty(outs.shape[1:], out_dtype)
    lse = Expected.empty(lses.shape[1:], "fp32", -math.inf)
    with np.errstate(all="ignore"):
        for at in np.ndindex(lses.shape[1:]):
            live = [i for i in range(len(lses)) if not math.isinf(lses[(i, *at)])]
            if not live:
                continue
            x = np.array([lses[(i, *at)] for i in live])
            v = np.array([outs[(i, *at)] for i in live])
            _softmax("fp32", 0.0, x, U32 * 4 * np.abs(x), v, -math.inf, out, lse, at)
    return out, lse
