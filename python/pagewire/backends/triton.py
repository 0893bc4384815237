"""Triton: each op calls the launcher of the same name in `kernels/`, handing it the device's error word.

Caches arrive as NHD views, `[num_pages, page_size, num_kv_heads, head_dim]` with free strides.
"""

from __future__ import annotations

from torch import Tensor

import pagewire.kernels.append as _append
import pagewire.kernels.cache_keys as _cache_keys
import pagewire.kernels.decode as _decode
import pagewire.kernels.merge as _merge
import pagewire.kernels.pack as _pack
import pagewire.kernels.prefill as _prefill
from pagewire.errors import device_word
from pagewire.moves import How, Movement
from pagewire.types import Modifiers

_cache_keys.settle()


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


def move(movement: Movement) -> None:
    word, copy = device_word(movement.slots.device), movement.parts[0].how is How.COPY
    if movement.op == "append_kv":
        k, v = movement.parts
        _append.append_kv(k, v, movement.slots, word, copy=copy)
    else:
        assert movement.packed is not None
        _pack.move(movement.parts, movement.slots, movement.packed, word, pack=movement.from_cache, copy=copy)
