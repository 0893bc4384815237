"""Triton: each op calls the launcher of the same name in `kernels/`, handing it the device's error word.

Caches arrive as NHD views, `[num_pages, page_size, num_kv_heads, head_dim]` with free strides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import pagewire.kernels.append as _append
import pagewire.kernels.cache_keys as _cache_keys
import pagewire.kernels.decode as _decode
import pagewire.kernels.merge as _merge
import pagewire.kernels.pack as _pack
import pagewire.kernels.prefill as _prefill
from pagewire.errors import device_word
from pagewire.kernels import hopper, launch, tuning
from pagewire.kernels.launch import Tensors
from pagewire.kernels.plan import Plan
from pagewire.moves import How, Movement
from pagewire.types import Kept, Modifiers, Problem

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


def kernels_of(problem: Problem) -> str:
    """What `explain` says of the kernels that take an attention call: those for Hopper, or why they do not."""
    if problem.device != "cuda" or problem.op not in ("decode", "prefill"):
        return ""
    device = launch.device_of(torch.device("cuda", problem.device_index or 0))
    if device.arch != 90:
        return ""
    rows = torch.empty(2, dtype=torch.int32, device="meta") if problem.op == "prefill" else None
    q, k, v = (
        torch.empty(1, *shape, dtype=dtype, device="meta")
        for shape, dtype in (
            ((problem.group_size, problem.head_dim), problem.dtype),
            ((problem.page_size, 1, problem.head_dim), problem.kv_dtype),
            ((problem.page_size, 1, problem.head_dim_v), problem.kv_dtype),
        )
    )
    table, lens = (torch.empty(shape, dtype=torch.int32, device="meta") for shape in ((1, 1), (1,)))
    tensors = Tensors(q, k, v, table, lens, rows, q[..., : problem.head_dim_v], None, None, None, None, None)
    m = Modifiers(1.0, max_q_len=problem.max_q_len)
    short = rows is None or _prefill.all_short(tensors, m, tuning.row_limit(launch.traits(tensors, device)))
    why = (hopper.why_no_decode if short else hopper.why_no_prefill)(tensors, m, device)
    return ", by kernels/hopper/" if why is None else f", by the tl kernels: {why}"


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
