"""torch.ops.pagewire.decode and .prefill."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pagewire import eager, scalars
from pagewire.torch_ops.define import call_with_results, define_with_results, join_scale, split_scale
from pagewire.types import Layout, Options

_MODIFIERS = (
    "str layout, float? softmax_scale, bool causal, SymInt window_left, SymInt window_right, float softcap, "
    "Tensor? alibi_slopes, Tensor? sinks, Tensor? k_scale, float? k_scale_value, Tensor? v_scale, "
    "float? v_scale_value, SymInt? split_size, SymInt? max_q_len, str? backend"
)


class _Flat(NamedTuple):
    """_MODIFIERS."""

    layout: Any
    softmax_scale: float | None
    causal: bool
    window_left: int
    window_right: int
    softcap: float
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    k_scale: Tensor | None
    k_scale_value: float | None
    v_scale: Tensor | None
    v_scale_value: float | None
    split_size: int | None
    max_q_len: int | None
    backend: str | None


def _flatten(layout: Layout, o: Options, backend: str | None) -> _Flat:
    """Sizes stay symbols: one compilation serves them all."""
    left, right = scalars.pair("window_size", o.window_size, "(left, right)")
    left, right, split_size, max_q_len = map(scalars.for_schema, (left, right, o.split_size, o.max_q_len))
    return _Flat(
        layout, o.softmax_scale, o.causal, left, right, o.softcap, o.alibi_slopes, o.sinks,
        *split_scale(o.k_scale), *split_scale(o.v_scale), split_size, max_q_len, backend,
    )  # fmt: skip


def _options(f: _Flat) -> Options:
    scales = join_scale(f.k_scale, f.k_scale_value), join_scale(f.v_scale, f.v_scale_value)
    window = (f.window_left, f.window_right)
    return Options(
        f.softmax_scale, f.causal, window, f.softcap, f.alibi_slopes, f.sinks, *scales, f.split_size, f.max_q_len
    )


def _state_like(q: Tensor, width: int | torch.SymInt) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:-1], width)), q.new_empty(q.shape[:-1], dtype=torch.float32)


def _fake(q: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _state_like(q, v_cache.shape[-1])


# ---------------------------------------------------------------------------------------------- decode


def decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, seq_lens: Tensor, layout: Layout,
    options: Options, backend: str | None, out: Tensor | None, lse: Tensor | None, return_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    args = (q, k_cache, v_cache, page_table, seq_lens, *_flatten(layout, options, backend))
    return call_with_results(torch.ops.pagewire.decode, args, out, lse, lambda: _state_like(q, v_cache.shape[-1]))


def _run_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, seq_lens: Tensor, *modifiers: Any,
    out: Tensor | None = None, lse: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    f = _Flat(*modifiers)
    return eager.decode(q, k_cache, v_cache, page_table, seq_lens, f.layout, _options(f), f.backend, out, lse, True)


define_with_results(
    "decode",
    f"Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor seq_lens, {_MODIFIERS}",
    _run_decode,
    _fake,
)


# ---------------------------------------------------------------------------------------------- prefill


def prefill(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor,
    layout: Layout, options: Options, backend: str | None, out: Tensor | None, lse: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    args = (q, k_cache, v_cache, page_table, seq_lens, cu_seqlens_q, *_flatten(layout, options, backend))
    return call_with_results(torch.ops.pagewire.prefill, args, out, lse, lambda: _state_like(q, v_cache.shape[-1]))


def _run_prefill(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor,
    *modifiers: Any, out: Tensor | None = None, lse: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    f = _Flat(*modifiers)
    return eager.prefill(
        q, k_cache, v_cache, page_table, seq_lens, cu_seqlens_q, f.layout, _options(f), f.backend, out, lse, True
    )


define_with_results(
    "prefill",
    "Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor seq_lens, Tensor cu_seqlens_q, " + _MODIFIERS,
    _run_prefill,
    _fake,
)
