"""Merging the partial states of split row tiles, in the order of their keys; rows that nobody computed become empty."""

import triton
import triton.language as tl

from pagewire.kernels.common import finish, load_sinks, store_rows
from pagewire.kernels.spans import load_row_stop, load_seq_lens, split_units
from pagewire.kernels.work import row_tiles, units_before

# arguments taken over from the decode kernel
SHARED = ("partials", "seq_lens", "rows", "sinks", "out", "lse", "batch_size", "split_size", "spec")

_BLOCK_S = tl.constexpr(16)  # partials loaded together


@triton.jit
def store_partial(partials, values, lse_log2, kv_head, slot, row_ok, spec: tl.constexpr):
    """values: fp32 [BLOCK_M, BLOCK_DV], lse_log2: [BLOCK_M]."""
    BLOCK_M: tl.constexpr = spec.BLOCK_M
    BLOCK_DV: tl.constexpr = spec.BLOCK_DV
    out_ptr, lse_ptr, num_slots = partials
    row = (kv_head * num_slots + slot).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_DV)
    mask = row_ok[:, None] & (dim < spec.HEAD_DIM_V)[None, :]
    tl.store(out_ptr + row[:, None] * spec.HEAD_DIM_V + dim[None, :], values, mask=mask)
    tl.store(lse_ptr + row, lse_log2, mask=row_ok)


@triton.jit(do_not_specialize=["seq_lens", "rows", "lse", "partials", "batch_size", "window_left", "split_size"])
def _combine_kernel(
    partials,  # as in decode.py
    seq_lens,
    rows,
    sinks,
    out,
    lse,
    batch_size,
    window_left,
    split_size,
    num_programs,  # of the decode kernel, per kv head
    spec: tl.constexpr,
):
    """grid: [batch_size (+ 1: the rows no request owns), num_lanes, num_kv_heads]; a program merges every num_lanes-th
    packed row of a request. Bound by latency: a few KiB per row, mostly none, since most row tiles are not split.
    """
    BLOCK_M: tl.constexpr = spec.BLOCK_M
    BLOCK_DV: tl.constexpr = spec.BLOCK_DV
    BLOCK_S: tl.constexpr = _BLOCK_S
    STEP: tl.constexpr = 1 if spec.SPLIT else 2
    request = tl.program_id(0)
    kv_head = tl.program_id(2)
    part_ptr, part_lse_ptr, num_slots = partials
    request_unit, row_start, num_units = units_before(
        request, seq_lens, rows, batch_size, window_left, split_size, spec
    )
    row_stop = row_start + 1
    num = 0
    packed = spec.GROUP_SIZE
    if spec.RAGGED:
        _, num_tokens, _ = rows
        row_stop = num_tokens
        if request < batch_size:
            row_stop = tl.maximum(row_start, load_row_stop(rows, request))
        packed = (row_stop - row_start) * spec.GROUP_SIZE
    if request < batch_size:
        seq_len = load_seq_lens(seq_lens, request, True)[0]
        _, _, num = split_units(row_stop - row_start, seq_len, window_left, split_size, spec)
        num = tl.where(row_tiles(row_stop - row_start, rows, spec) > 0, num, 0)
        if spec.ROW_LIMIT > 0:
            packed = tl.where(packed > spec.ROW_LIMIT, 0, packed)
    share = (num_units + num_programs - 1) // num_programs
    dim = tl.arange(0, BLOCK_DV)
    dim_ok = dim < spec.HEAD_DIM_V

    for row in range(tl.program_id(1), packed, tl.num_programs(1)):
        # partials of this row's tile: slots first_slot, then next_slot, next_slot + step, ...
        first_unit = request_unit + row // BLOCK_M * num
        if spec.SPLIT:
            num_parts = num
            first_slot = first_unit
            next_slot = first_unit + 1
        else:
            first_program = first_unit // tl.maximum(share, 1)
            last_program = (first_unit + num - 1) // tl.maximum(share, 1)
            num_parts = tl.where(num > 0, last_program - first_program + 1, 0)
            first_slot = 2 * first_program + (first_unit != first_program * share).to(tl.int32)
            next_slot = 2 * first_program + 2
        if num_parts != 1:  # one part was written where it belongs
            one = tl.zeros([1], tl.int32)
            maximum = tl.full([1], float("-inf"), tl.float32)
            total = tl.zeros([1], tl.float32)
            acc = tl.zeros([1, BLOCK_DV], tl.float32)
            for start in range(0, num_parts, BLOCK_S):
                part = start + tl.arange(0, BLOCK_S)
                slot = tl.where(part == 0, first_slot, next_slot + (part - 1) * STEP)
                part_row = (kv_head * num_slots + slot).to(tl.int64) * BLOCK_M + row % BLOCK_M
                part_lse = tl.load(part_lse_ptr + part_row, mask=part < num_parts, other=float("-inf"))
                ptrs = part_ptr + part_row[:, None] * spec.HEAD_DIM_V + dim[None, :]
                values = tl.load(ptrs, mask=(part < num_parts)[:, None] & dim_ok[None, :], other=0.0)
                new_maximum = tl.maximum(maximum, tl.max(part_lse, 0))
                shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
                weight = tl.exp2(part_lse - shift)
                rescale = tl.exp2(maximum - shift)
                acc = acc * rescale[:, None] + tl.sum(weight[:, None] * values, 0)[None, :]
                total = total * rescale + tl.sum(weight, 0)
                maximum = new_maximum
            head = one + kv_head * spec.GROUP_SIZE + row % spec.GROUP_SIZE
            values, lse_log2 = finish(acc, maximum, total, load_sinks(sinks, head, one == 0, spec), spec.SINKS)
            store_rows(out, lse, values, lse_log2, one + row_start + row // spec.GROUP_SIZE, head, one == 0, spec)
