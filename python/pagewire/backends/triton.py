"""Triton: each op calls the launcher of the same name in `kernels/`, handing it the device's error word.

Caches arrive as NHD views, `[num_pages, page_size, num_kv_heads, head_dim]` with free strides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

import pagewire.kernels.append as _append
import pagewire.kernels.cache_keys as _cache_keys
import pagewire.kernels.decode as _decode
import pagewire.kernels.merge as _merge
import pagewire.kernels.pack as _pack
import pagewire.kernels.prefill as _prefill
from pagewire.errors import device_word
from pagewire.kernels import tuning
from pagewire.kernels.launch import Tensors
from pagewire.kernels.plan import Plan
from pagewire.moves import How, Movement
from pagewire.types import Kept, Modifiers

_cache_keys.settle()


def decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, seq_lens: Tensor,
    modifiers: Modifiers, out: Tensor, lse: Tensor | None, kept: Kept,
) -> None:  # fmt: skip
    _attend(_decode.plan, (q, k_cache, v_cache, page_table, seq_lens, None, out, lse), modifiers, kept)


def prefill(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor,
    modifiers: Modifiers, out: Tensor, lse: Tensor | None, kept: Kept,
) -> None:  # fmt: skip
    _attend(_prefill.plan, (q, k_cache, v_cache, page_table, seq_lens, cu_seqlens_q, out, lse), modifiers, kept)


def _attend(
    plan_of: Callable[[Tensors, Modifiers, Tensor], Plan], tensors: tuple[Any, ...], m: Modifiers, kept: Kept
) -> None:
    every = (*tensors, m.sinks, m.alibi_slopes, m.k_scale, m.v_scale)
    plan = kept.get(tuning.variant)
    if plan is None:
        plan = kept[tuning.variant] = plan_of(Tensors(*every), m, device_word(tensors[0].device))
    plan.run(*every)


def merge_state(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor, kept: Kept
) -> None:
    tensors = (out_a, lse_a, out_b, lse_b, out, lse)
    plan = kept.get("plan")
    if plan is None:
        plan = kept["plan"] = _merge.plan_two(*tensors)
    plan.run(*tensors)


def merge_states(outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor, kept: Kept) -> None:
    tensors = (outs, lses, out, lse)
    plan = kept.get("plan")
    if plan is None:
        plan = kept["plan"] = _merge.plan(*tensors)
    plan.run(*tensors)


def move(movement: Movement, kept: Kept) -> None:
    copy = movement.parts[0].how is How.COPY
    if movement.packed is None:
        _append.run(movement, device_word, kept, copy=copy)
    else:
        _pack.run(movement, movement.packed, device_word, kept, copy=copy)
