"""CPU: each op is one call into `pagewire._cpu`, which checks every index and runs on a pool of threads of its own.

Caches arrive as NHD views, `[num_pages, page_size, num_kv_heads, head_dim]` with free strides. PAGEWIRE_CPU_ISA forces
an instruction set (amx, avx512, avx2, neon, scalar), PAGEWIRE_CPU_THREADS a number of threads (default:
`torch.get_num_threads()`). Results depend on neither the threads nor the rest of the batch.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pagewire import _cpu
from pagewire.environment import lookup
from pagewire.moves import Movement
from pagewire.types import Kept, Modifiers


@functools.cache
def _kernels(isa: str) -> _cpu.Kernels:
    return _cpu.choose_kernels(isa)


def _machine() -> tuple[_cpu.Kernels, int]:
    """(kernels, num_threads) of this call."""
    threads = lookup("PAGEWIRE_CPU_THREADS")
    return (_kernels(lookup("PAGEWIRE_CPU_ISA") or ""), max(1, int(threads)) if threads else torch.get_num_threads())


def decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, seq_lens: Tensor,
    modifiers: Modifiers, out: Tensor, lse: Tensor | None, kept: Kept,
) -> None:  # fmt: skip
    _cpu.decode(q, k_cache, v_cache, page_table, seq_lens, modifiers, out, lse, *_machine())


def prefill(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor,
    modifiers: Modifiers, out: Tensor, lse: Tensor | None, kept: Kept,
) -> None:  # fmt: skip
    _cpu.prefill(q, k_cache, v_cache, page_table, seq_lens, cu_seqlens_q, modifiers, out, lse, *_machine())


def merge_state(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor, kept: Kept
) -> None:
    _cpu.merge_state(out_a, lse_a, out_b, lse_b, out, lse, *_machine())


def merge_states(outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor, kept: Kept) -> None:
    _cpu.merge_states(outs, lses, out, lse, *_machine())


def move(movement: Movement, kept: Kept) -> None:
    _cpu.move(movement, *_machine())
