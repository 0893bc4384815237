"""Which rows and which keys a request has: lengths read and clamped on the device, bad ones recorded."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from pagewire.kernels import error_codes as codes
from pagewire.kernels.arguments import number
from pagewire.kernels.common import INTERPRETED
from pagewire.kernels.errors import record_error

MAX_SPLITS = 64  # of one request, whatever split_size

# a jitted function reads only constexpr globals
_MAX_SPLITS = tl.constexpr(MAX_SPLITS)
_SEQ_LEN = tl.constexpr((codes.DECODE_SEQ_LEN, codes.PREFILL_SEQ_LEN))
_CU_SEQLENS_Q = tl.constexpr(codes.PREFILL_CU_SEQLENS_Q)
_MAX_Q_LEN = tl.constexpr(codes.PREFILL_MAX_Q_LEN)


class Batch(NamedTuple):
    """The requests of a call."""

    error_word: Any  # pointer
    size: Any
    seq_lens: Any  # pointer, int32 [size]
    stride_seq_lens: Any
    max_seq_len: Any
    cu_seqlens_q: Any  # pointer, int32 [size + 1]; RAGGED only
    num_tokens: Any
    max_q_len: Any


@triton.jit
def batch_of(seq_lens, cu_seqlens_q, call, spec: tl.constexpr):
    cu_seqlens_q = cu_seqlens_q if spec.RAGGED else seq_lens  # None: Triton 3.6 returns none in a tuple
    max_seq_len = number(call.max_pages) * spec.PAGE_SIZE
    return Batch(
        call.error_word, number(call.batch_size), seq_lens, number(call.stride_seq_lens), max_seq_len,
        cu_seqlens_q, number(call.num_tokens), number(call.max_q_len),
    )  # fmt: skip


@triton.jit
def load_seq_lens(batch, request, mask):
    """(clamped to [0, max_seq_len], whether it had to be)."""
    found = tl.load(batch.seq_lens + tl.cast(request, tl.int64) * batch.stride_seq_lens, mask=mask, other=0)
    length = tl.minimum(tl.maximum(found, 0), batch.max_seq_len)
    return length, length != found


@triton.jit
def load_row_stop(batch, request):
    """Where a request's rows end if those before it end earlier."""
    return tl.minimum(tl.maximum(tl.load(batch.cu_seqlens_q + request + 1), 0), batch.num_tokens)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _running_maximum(x):
    """x: int32 [N], all >= 0."""
    if INTERPRETED:  # its scans take a millisecond an element
        index = tl.arange(0, x.shape[0])
        return tl.max(tl.where(index[None, :] <= index[:, None], x[None, :], 0), 1)
    else:
        return tl.associative_scan(x, 0, _larger)


@triton.jit
def load_rows(batch, request, mask, first_row):
    """Rows [start, stop) of consecutive requests, [BLOCK_B]; first_row: where the first of them starts.

    cu_seqlens_q[0] is read as 0, the rest is clamped to [0, num_tokens] and, where it decreases, to its running
    maximum: rows never overlap. Also returned: whether that changed anything.
    """
    ptr = batch.cu_seqlens_q
    found_start = tl.load(ptr + request, mask=mask, other=0)
    found_stop = tl.load(ptr + request + 1, mask=mask, other=0)
    stop = tl.minimum(tl.maximum(found_stop, 0), batch.num_tokens)
    stop = tl.maximum(_running_maximum(stop), first_row)
    start = tl.minimum(tl.maximum(tl.where(request == 0, 0, found_start), 0), batch.num_tokens)
    start = tl.where(mask, tl.maximum(_running_maximum(start), first_row), stop)
    return start, stop, (found_stop != stop) & mask


@triton.jit
def record_spans(batch, request, q_len, bad_rows, bad_seq_len, mask, RAGGED: tl.constexpr):
    """Leave what was clamped, or is not computed, in the error word; mask: requests this program answers for."""
    if RAGGED:
        first = tl.load(batch.cu_seqlens_q + request, mask & (request == 0), 0)
        record_error(batch.error_word, _SEQ_LEN[1], request, 0, bad_seq_len)
        record_error(batch.error_word, _CU_SEQLENS_Q, request + 1, 0, bad_rows)
        record_error(batch.error_word, _CU_SEQLENS_Q, request, 0, first != 0)
        record_error(batch.error_word, _MAX_Q_LEN, request, 0, (q_len > batch.max_q_len) & mask)
    else:
        record_error(batch.error_word, _SEQ_LEN[0], request, 0, bad_seq_len)


@triton.jit
def first_visible_key(q_len, seq_len, rule, LEFT: tl.constexpr):
    """The first key that a request's first row sees."""
    if LEFT:
        return tl.maximum(seq_len - q_len - rule.window_left, 0)
    else:
        return seq_len * 0  # of its shape and type


@triton.jit
def split_units(q_len, seq_len, rule, spec: tl.constexpr):
    """The keys of a request in units that one program takes or leaves: (tokens per unit, first unit, number of units).

    A unit is a tile, or with SPLIT a split; units start at absolute multiples of their size.
    """
    BLOCK_N: tl.constexpr = spec.BLOCK_N
    size = seq_len * 0 + BLOCK_N
    if spec.SPLIT:
        share = (seq_len + _MAX_SPLITS - 1) // _MAX_SPLITS
        size = tl.maximum(rule.split_size, (share + BLOCK_N - 1) // BLOCK_N * BLOCK_N)
    first = first_visible_key(q_len, seq_len, rule, spec.LEFT) // size
    num = tl.maximum((seq_len + size - 1) // size - first, 0)
    return size, first, tl.where(q_len > 0, num, 0)


@triton.jit
def tile_keys(first_token, last_token, q_len, seq_len, rule, spec: tl.constexpr):
    """Keys [first, stop) that some row in [first_token, last_token] of a request sees."""
    first = seq_len * 0
    stop = seq_len
    if spec.LEFT:
        first = tl.maximum(seq_len - q_len + first_token - rule.window_left, 0)
    if spec.RIGHT:
        stop = tl.minimum(seq_len, seq_len - q_len + last_token + rule.window_right + 1)
    return first, stop


@triton.jit
def inner_keys(first_key, stop_key, first_token, last_token, q_len, seq_len, rule, spec: tl.constexpr):
    """The whole tiles within [first_key, stop_key) of which every row in [first_token, last_token] sees every key."""
    BLOCK_N: tl.constexpr = spec.BLOCK_N
    first = first_key
    stop = stop_key
    if spec.LEFT:
        first = tl.maximum(first, seq_len - q_len + last_token - rule.window_left)
    if spec.RIGHT:
        stop = tl.minimum(stop, seq_len - q_len + first_token + rule.window_right + 1)
    first = (first + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    stop = tl.maximum(stop, 0) // BLOCK_N * BLOCK_N
    some = stop > first
    return tl.where(some, first, first_key), tl.where(some, stop, first_key)
