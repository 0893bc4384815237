"""CPU: each op is one call into `pagewire._cpu`, which checks every index and runs on a pool of threads of its own.

Caches arrive as NHD views, `[num_pages, page_size, num_kv_heads, head_dim]` with free strides. PAGEWIRE_CPU_ISA forces
an instruction set (amx, avx512, avx2, neon, scalar), PAGEWIRE_CPU_THREADS a number of threads (default:
`torch.get_num_threads()`). Results depend on neither the threads nor the rest of the batch.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pagewire import _cpu
from pagewire.packed import PackedKV
from pagewire.types import Modifiers, Scale

# the codes of csrc/pagewire/dtype.h; the index dtypes follow them
_CODES = {
    torch.float16: 0,
    torch.bfloat16: 1,
    torch.float32: 2,
    torch.float8_e4m3fn: 3,
    torch.float8_e5m2: 4,
    torch.int8: 5,
    torch.int32: 6,
    torch.int64: 7,
}

_View = tuple[int, int, Sequence[int], Sequence[int]]


def _view(t: Tensor) -> _View:
    return t.data_ptr(), _CODES[t.dtype], t.shape, t.stride()


def _optional(t: Tensor | None) -> _View | None:
    return None if t is None else _view(t)


def _scale(scale: Scale) -> _View | float | None:
    return _view(scale) if isinstance(scale, Tensor) else scale


@functools.cache
def _kernels(isa: str) -> Any:
    return _cpu.choose_kernels(isa)


def _machine() -> tuple[Any, int]:
    """(kernels, num_threads) of this call."""
    threads = os.environ.get("PAGEWIRE_CPU_THREADS")
    return (
        _kernels(os.environ.get("PAGEWIRE_CPU_ISA", "")),
        max(1, int(threads)) if threads else torch.get_num_threads(),
    )


def _modifiers(m: Modifiers) -> tuple:
    return (
        m.softmax_scale,
        m.causal,
        m.window_left,
        m.window_right,
        m.softcap,
        _optional(m.alibi_slopes),
        _optional(m.sinks),
        _scale(m.k_scale),
        _scale(m.v_scale),
        m.split_size or 0,
        m.max_q_len or 0,
    )


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    modifiers: Modifiers,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    _cpu.decode(
        _view(q), _view(k_cache), _view(v_cache), _view(page_table), _view(seq_lens),
        _modifiers(modifiers), _view(out), _optional(lse), *_machine(),
    )  # fmt: skip


def prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    modifiers: Modifiers,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    _cpu.prefill(
        _view(q), _view(k_cache), _view(v_cache), _view(page_table), _view(seq_lens), _view(cu_seqlens_q),
        _modifiers(modifiers), _view(out), _optional(lse), *_machine(),
    )  # fmt: skip


def append_kv(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, k_scale: Scale, v_scale: Scale
) -> None:
    _cpu.append_kv(
        _view(k), _view(v), _view(k_cache), _view(v_cache), _view(slot_mapping),
        _scale(k_scale), _scale(v_scale), *_machine(),
    )  # fmt: skip


def merge_state(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor) -> None:
    states = [(_view(out_a), _view(lse_a)), (_view(out_b), _view(lse_b))]
    _cpu.merge_states(states, _view(out), _view(lse), *_machine())


def merge_states(outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor) -> None:
    states = [(_view(o), _view(s)) for o, s in zip(outs.unbind(), lses.unbind(), strict=True)]
    _cpu.merge_states(states, _view(out), _view(lse), *_machine())


def pack_kv(
    k_caches: Sequence[Tensor],
    v_caches: Sequence[Tensor],
    k_scales: Sequence[Tensor],
    v_scales: Sequence[Tensor],
    slots: Tensor,
    packed: PackedKV,
) -> None:
    layers = [
        (_view(cache), _optional(scale), _view(rows), _optional(rows_scale))
        for cache, scale, rows, rows_scale in _layers(packed, k_caches, v_caches, k_scales, v_scales)
    ]
    _cpu.pack_kv(layers, _view(slots), *_machine())
    packed.take_shared_scales(k_scales, v_scales)


def unpack_kv(
    packed: PackedKV,
    k_caches: Sequence[Tensor],
    v_caches: Sequence[Tensor],
    k_scales: Sequence[Tensor],
    v_scales: Sequence[Tensor],
    slots: Tensor,
) -> None:
    layers = [
        (_view(rows), _optional(rows_scale), _view(cache), _optional(scale))
        for cache, scale, rows, rows_scale in _layers(packed, k_caches, v_caches, k_scales, v_scales)
    ]
    _cpu.unpack_kv(layers, _view(slots), *_machine())


def _layers(
    packed: PackedKV,
    k_caches: Sequence[Tensor],
    v_caches: Sequence[Tensor],
    k_scales: Sequence[Tensor],
    v_scales: Sequence[Tensor],
) -> list[tuple[Tensor, Tensor | None, Tensor, Tensor | None]]:
    """(cache, its scale, packed rows, their scale) of each layer's K, then of each layer's V."""
    found = []
    for caches, scales, rows, rows_scales in (
        (k_caches, k_scales, packed.k, packed.k_scale),
        (v_caches, v_scales, packed.v, packed.v_scale),
    ):
        for i, cache in enumerate(caches):
            assert rows is not None
            scale = scales[i] if scales else None
            found.append((cache, scale, rows[i], None if rows_scales is None else rows_scales[i]))
    return found
