"""Merging the partial states of split row tiles, in the order of their keys; rows that nobody computed become empty."""

import triton
import triton.language as tl

from pagewire.kernels import launch, tuning
from pagewire.kernels.common import finish, load_sinks, store_rows
from pagewire.kernels.spans import load_row_stop, load_seq_lens, split_units
from pagewire.kernels.work import row_tiles, units_before

# arguments taken over from the decode kernel
SHARED = (
    "part_out", "part_lse", "head_rows", "part_rows", "token_rows", "request_rows", "seq_lens", "seq_lens_stride",
    "max_seq_len", "cu_seqlens_q", "num_tokens", "max_q_len", "sinks", "out", "lse", "lse_stride_token",
    "lse_stride_head", "batch_size", "window_left", "split_size", "spec",
)  # fmt: skip

_BLOCK_S = tl.constexpr(tuning.COMBINE.BLOCK_N)  # partials loaded together


@triton.jit
def split_row(request, row_start, token_rows, request_rows):
    """With SPLIT: where the rows of a request begin among those of a partial. Every row that can exist has a place,
    counted by tokens or, if they can have fewer, by requests: one of the factors is 0."""
    return row_start.to(tl.int64) * token_rows + tl.cast(request, tl.int64) * request_rows


@triton.jit
def store_partial(partials, values, lse_log2, kv_head, part, row, row_ok, spec: tl.constexpr):
    """values: fp32 [BLOCK_M, BLOCK_DV], lse_log2: [BLOCK_M]; row: of the partial, the tile's first."""
    BLOCK_M: tl.constexpr = spec.BLOCK_M
    BLOCK_DV: tl.constexpr = spec.BLOCK_DV
    out_ptr, lse_ptr, head_rows, part_rows = partials
    row += kv_head.to(tl.int64) * head_rows + part.to(tl.int64) * part_rows
    lane = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_DV)
    mask = row_ok[:, None] & (dim < spec.HEAD_DIM_V)[None, :]
    offset = lane[:, None] * spec.HEAD_DIM_V + dim[None, :]
    tl.store(out_ptr + row * spec.HEAD_DIM_V + offset, values, mask=mask)
    tl.store(lse_ptr + row + lane, lse_log2, mask=row_ok)


@triton.jit(do_not_specialize=launch.PER_CALL)
def _combine_kernel(
    part_out,  # arguments as in decode.py
    part_lse,
    head_rows,
    part_rows,
    token_rows,
    request_rows,
    seq_lens,
    seq_lens_stride,
    max_seq_len,
    cu_seqlens_q,
    num_tokens,
    max_q_len,
    sinks,
    out,
    lse,
    lse_stride_token,
    lse_stride_head,
    batch_size,
    window_left,
    split_size,
    num_programs,  # of the decode kernel, per kv head
    spec: tl.constexpr,
):
    """grid: [batch_size (+ 1: the rows no request owns), num_lanes, num_kv_heads]; a program merges every num_lanes-th
    packed row of a request. Bound by latency: a few KiB per row, mostly none, since most row tiles are not split.
    """
    lse_rows = (lse, lse_stride_token, lse_stride_head)
    lengths = (seq_lens, seq_lens_stride, max_seq_len)
    rows = (cu_seqlens_q, num_tokens, max_q_len)
    BLOCK_M: tl.constexpr = spec.BLOCK_M
    BLOCK_DV: tl.constexpr = spec.BLOCK_DV
    BLOCK_S: tl.constexpr = _BLOCK_S
    STEP: tl.constexpr = 1 if spec.SPLIT else 2
    request = tl.program_id(0)
    kv_head = tl.program_id(2)
    request_unit, row_start, num_units = units_before(request, lengths, rows, batch_size, window_left, split_size, spec)
    row_stop = row_start + 1
    num = 0
    packed = spec.GROUP_SIZE
    if spec.RAGGED:
        row_stop = num_tokens
        if request < batch_size:
            row_stop = tl.maximum(row_start, load_row_stop(rows, request))
        packed = (row_stop - row_start) * spec.GROUP_SIZE
    if request < batch_size:
        seq_len = load_seq_lens(lengths, request, True)[0]
        _, _, num = split_units(row_stop - row_start, seq_len, window_left, split_size, spec)
        num = tl.where(row_tiles(row_stop - row_start, rows, spec) > 0, num, 0)
        if spec.ROW_LIMIT > 0:
            packed = tl.where(packed > spec.ROW_LIMIT, 0, packed)
    share = (num_units + num_programs - 1) // num_programs
    dim = tl.arange(0, BLOCK_DV)
    dim_ok = dim < spec.HEAD_DIM_V

    for row in range(tl.program_id(1), packed, tl.num_programs(1)):
        # this row's partials: first_part, then next_part, next_part + STEP, ...
        first_unit = request_unit + row // BLOCK_M * num
        if spec.SPLIT:
            num_parts = num
            first_part = num * 0
            next_part = num * 0 + 1
            row_of_part = split_row(request, row_start, token_rows, request_rows) + row
        else:
            first_program = first_unit // tl.maximum(share, 1)
            last_program = (first_unit + num - 1) // tl.maximum(share, 1)
            num_parts = tl.where(num > 0, last_program - first_program + 1, 0)
            first_part = 2 * first_program + (first_unit != first_program * share).to(tl.int32)
            next_part = 2 * first_program + 2
            row_of_part = row % BLOCK_M
        if num_parts != 1:  # one part was written where it belongs
            one = tl.zeros([1], tl.int32)
            maximum = tl.full([1], float("-inf"), tl.float32)
            total = tl.zeros([1], tl.float32)
            acc = tl.zeros([1, BLOCK_DV], tl.float32)
            # the scalar part of an address goes into the pointer: inside the offsets of a tile, Triton 3.5 and 3.6
            # have miscompiled such a reduction (lmdeploy pull request 4920)
            base = kv_head.to(tl.int64) * head_rows + row_of_part
            lse_ptr = part_lse + base
            out_ptr = part_out + base * spec.HEAD_DIM_V
            for start in range(0, num_parts, BLOCK_S):
                part = start + tl.arange(0, BLOCK_S)
                at = tl.where(part == 0, first_part, next_part + (part - 1) * STEP).to(tl.int64)
                part_row = at * part_rows
                part_ok = part < num_parts
                lse_log2 = tl.load(lse_ptr + part_row, mask=part_ok, other=float("-inf"))
                ptrs = out_ptr + (part_row[:, None] * spec.HEAD_DIM_V + dim[None, :])
                values = tl.load(ptrs, mask=part_ok[:, None] & dim_ok[None, :], other=0.0)
                new_maximum = tl.maximum(maximum, tl.max(lse_log2, 0))
                shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
                weight = tl.exp2(lse_log2 - shift)
                rescale = tl.exp2(maximum - shift)
                acc = acc * rescale[:, None] + tl.sum(weight[:, None] * values, 0)[None, :]
                total = total * rescale + tl.sum(weight, 0)
                maximum = new_maximum
            head = one + kv_head * spec.GROUP_SIZE + row % spec.GROUP_SIZE
            token = one + row_start + row // spec.GROUP_SIZE
            sink_log2 = load_sinks(sinks, head, one == 0, spec)
            merged, merged_lse_log2 = finish(acc, maximum, total, sink_log2, spec.SINKS)
            store_rows(out, lse_rows, merged, merged_lse_log2, token, head, one == 0, spec)
