"""What kernels are handed: NamedTuples, with the same names on the host and inside.

Triton compiles again for an integer that is 1, and for one that is a multiple of 16. For what a model fixes, strides
foremost, that is wanted: loads get wider. What changes from call to call must not get there, and `do_not_specialize`
reaches no member of a tuple (Triton 3.6, 3.9): such pointers are arguments of their own, such numbers `Varying`.

No tuple lies in another: handed on, its members that are 1 or None become None (Triton 3.6).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl

from pagewire.kernels.common import INTERPRETED

UNSPECIALISED = ["page_table", "seq_lens", "cu_seqlens_q", "lse"]  # a slice of a batch begins on no boundary
Varying = int  # as `varying` makes it


def varying(numbers: Sequence[int]) -> list[Varying]:
    """Of 64 bits, odd and not 1, whatever the numbers are; a register's upper half costs nothing to read."""
    assert max(numbers) < 1 << 31
    return [n << 32 | 0x80000001 for n in numbers]


@triton.jit
def number(x):
    if INTERPRETED:  # it keeps 0x80000001 in 32 bits
        x += tl.zeros([], tl.int64)
    return (x >> 32).to(tl.int32)


class Heads(NamedTuple):
    """[num_tokens, num_heads, width] or, of an lse, [num_tokens, num_heads]."""

    ptr: Any
    stride_token: int
    stride_head: int


class Cache(NamedTuple):
    """[num_pages, page_size, num_kv_heads, width], and its scales: one for all, by head, request and head, or row."""

    ptr: Any
    stride_page: int
    stride_token: int
    stride_head: int
    scale: Any  # fp32, or None
    stride_scale_page: int  # of a request, unless scales are per token; 0 where they do not vary
    stride_scale_token: int
    stride_scale_head: int


class Rule(NamedTuple):
    """What is computed of the products of q and k, and of v."""

    scale_log2: float  # of q k, K's scale in it if that is a number; with a softcap times 2 / softcap
    softcap: float
    v_factor: float  # of out: V's scale, if that is a number
    window_left: int
    window_right: int
    split_size: int  # SPLIT
    sinks: Any  # [num_qo_heads] or None
    stride_sinks: int
    alibi: Any  # [num_qo_heads], [batch_size, num_qo_heads] or None
    stride_alibi_request: int
    stride_alibi_head: int


class Call(NamedTuple):
    """What a call brings in numbers, and where its errors go."""

    error_word: Any
    batch_size: Varying
    num_tokens: Varying
    max_q_len: Varying
    max_pages: Varying  # of a request
    stride_seq_lens: Varying
    num_pages: Varying
    stride_table: Varying
    stride_lse_token: Varying
    stride_lse_head: Varying
