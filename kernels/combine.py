"""Merging the partial states of split row tiles, in the order of their keys; rows that nobody computed become empty."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from pagewire.kernels import tuning
from pagewire.kernels.arguments import UNSPECIALISED, Heads, number
from pagewire.kernels.common import finish, load_sinks, store_rows
from pagewire.kernels.partials import first_row, partial_of
from pagewire.kernels.spans import batch_of, load_row_stop, load_seq_lens, split_units
from pagewire.kernels.work import row_tiles, units_before

_BLOCK_S = tl.constexpr(tuning.COMBINE.BLOCK_N)  # partials loaded together


@triton.jit(do_not_specialize=UNSPECIALISED)
def _combine_kernel(
    out,  # as the decode kernel has them
    lse,
    seq_lens,
    cu_seqlens_q,
    call,
    rule,
    partials,
    spec: tl.constexpr,
):
    """grid: [batch_size (+ 1: the rows no request owns), num_lanes, num_kv_heads]; a program merges every num_lanes-th
    packed row of a request. Bound by latency: a few KiB per row, mostly none, since most row tiles are not split.
    """
    batch = batch_of(seq_lens, cu_seqlens_q, call, spec)
    lse_rows = Heads(lse, number(call.stride_lse_token), number(call.stride_lse_head))
    BLOCK_M: tl.constexpr = spec.BLOCK_M
    BLOCK_DV: tl.constexpr = spec.BLOCK_DV
    BLOCK_S: tl.constexpr = _BLOCK_S
    request = tl.program_id(0)
    kv_head = tl.program_id(2)
    request_unit, row_start, num_units = units_before(request, batch, rule, spec)
    row_stop = row_start + 1
    num = 0
    packed = spec.GROUP_SIZE
    if spec.RAGGED:
        row_stop = batch.num_tokens
        if request < batch.size:
            row_stop = tl.maximum(row_start, load_row_stop(batch, request))
        packed = (row_stop - row_start) * spec.GROUP_SIZE
    if request < batch.size:
        seq_len = load_seq_lens(batch, request, True)[0]
        _, _, num = split_units(row_stop - row_start, seq_len, rule, spec)
        num = tl.where(row_tiles(row_stop - row_start, batch, spec) > 0, num, 0)
        if spec.ROW_LIMIT > 0:
            packed = tl.where(packed > spec.ROW_LIMIT, 0, packed)
    num_programs = number(partials.num_programs)
    share = (num_units + num_programs - 1) // num_programs
    dim = tl.arange(0, BLOCK_DV)
    dim_ok = dim < spec.HEAD_DIM_V

    if spec.DEPENDENT:  # all that was found so far was there before the decode kernel began
        gdc_wait()
    for row in range(tl.program_id(1), packed, tl.num_programs(1)):
        first_unit = request_unit + row // BLOCK_M * num
        first_program = 0
        num_partials = num
        if not spec.SPLIT:
            first_program = first_unit // tl.maximum(share, 1)
            last_program = (first_unit + num - 1) // tl.maximum(share, 1)
            num_partials = tl.where(num > 0, last_program - first_program + 1, 0)
        if num_partials != 1:  # one was written where it belongs
            one = tl.zeros([1], tl.int32)
            maximum = tl.full([1], float("-inf"), tl.float32)
            total = tl.zeros([1], tl.float32)
            acc = tl.zeros([1, BLOCK_DV], tl.float32)
            # the scalar part of an address goes into the pointer: inside the offsets of a tile, Triton 3.5 and 3.6
            # have miscompiled such a reduction (lmdeploy pull request 4920)
            base = first_row(partials, kv_head, request, row_start, row // BLOCK_M, spec) + row % BLOCK_M
            lse_ptr = partials.lse + base
            out_ptr = partials.out + base * spec.HEAD_DIM_V
            for start in range(0, num_partials, BLOCK_S):
                index = start + tl.arange(0, BLOCK_S)
                partial = index
                if not spec.SPLIT:
                    program = first_program + index
                    partial = partial_of(program, tl.maximum(first_unit, program * share), share)
                partial_row = partial.to(tl.int64) * number(partials.stride_partial)
                ok = index < num_partials
                lse_log2 = tl.load(lse_ptr + partial_row, mask=ok, other=float("-inf"))
                ptrs = out_ptr + (partial_row[:, None] * spec.HEAD_DIM_V + dim[None, :])
                values = tl.load(ptrs, mask=ok[:, None] & dim_ok[None, :], other=0.0)
                new_maximum = tl.maximum(maximum, tl.max(lse_log2, 0))
                shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
                weight = tl.exp2(lse_log2 - shift)
                rescale = tl.exp2(maximum - shift)
                acc = acc * rescale[:, None] + tl.sum(weight[:, None] * values, 0)[None, :]
                total = total * rescale + tl.sum(weight, 0)
                maximum = new_maximum
            head = one + kv_head * spec.GROUP_SIZE + row % spec.GROUP_SIZE
            token = one + row_start + row // spec.GROUP_SIZE
            sink_log2 = load_sinks(rule, head, one == 0, spec)
            merged, merged_lse_log2 = finish(acc, maximum, total, sink_log2, spec.SINKS)
            store_rows(out, lse_rows, merged, merged_lse_log2, token, head, one == 0, spec)
