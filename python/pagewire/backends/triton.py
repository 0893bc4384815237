"""Triton: each op calls the launcher of the same name in `kernels/`, handing it the device's error word.

Caches arrive as NHD views, `[num_pages, page_size, num_kv_heads, head_dim]` with free strides.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

import pagewire.kernels.append as _append
import pagewire.kernels.cache_keys as _cache_keys
import pagewire.kernels.decode as _decode
import pagewire.kernels.merge as _merge
import pagewire.kernels.pack as _pack
import pagewire.kernels.prefill as _prefill
from pagewire.errors import device_word
from pagewire.packed import PackedKV
from pagewire.types import Modifiers, Scale

_cache_keys.settle()


def append_kv(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, k_scale: Scale, v_scale: Scale
) -> None:
    _append.append_kv(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale, device_word(k.device))


def decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, seq_lens: Tensor,
    modifiers: Modifiers, out: Tensor, lse: Tensor | None,
) -> None:  # fmt: skip
    _decode.decode(q, k_cache, v_cache, page_table, seq_lens, modifiers, out, lse, device_word(q.device))


def prefill(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor,
    modifiers: Modifiers, out: Tensor, lse: Tensor | None,
) -> None:  # fmt: skip
    word = device_word(q.device)
    _prefill.prefill(q, k_cache, v_cache, page_table, seq_lens, cu_seqlens_q, modifiers, out, lse, word)


def merge_state(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor) -> None:
    _merge.merge_state(out_a, lse_a, out_b, lse_b, out, lse)


def merge_states(outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor) -> None:
    _merge.merge_states(outs, lses, out, lse)


def pack_kv(
    k_caches: Sequence[Tensor], v_caches: Sequence[Tensor], k_scales: Sequence[Tensor], v_scales: Sequence[Tensor],
    slots: Tensor, packed: PackedKV,
) -> None:  # fmt: skip
    _pack.pack_kv(k_caches, v_caches, k_scales, v_scales, slots, packed, device_word(slots.device))


def unpack_kv(
    packed: PackedKV, k_caches: Sequence[Tensor], v_caches: Sequence[Tensor], k_scales: Sequence[Tensor],
    v_scales: Sequence[Tensor], slots: Tensor,
) -> None:  # fmt: skip
    _pack.unpack_kv(packed, k_caches, v_caches, k_scales, v_scales, slots, device_word(slots.device))
