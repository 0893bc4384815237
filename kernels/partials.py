"""Where the state of a row tile waits whose keys several programs took, or several splits: a partial, to be merged.

Programs take equal shares of a line of units, one after the other (`work.py`). Of what program p leaves unfinished,
one row tile begins before its share or with it, and one begins within it and goes on beyond it: at most two partials,
2 p and 2 p + 1, of a row tile each. All others in between are whole. So the grid alone decides how many there are.

With SPLIT, every split of every row tile is a partial, and split n of a request is n, whoever computed it: it has a
place for every packed row that can exist, counted by tokens or, if requests can have fewer, by requests.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from pagewire.kernels.arguments import Varying, number


class Partials(NamedTuple):
    out: Any  # fp32 [num_kv_heads, num_partials, rows, HEAD_DIM_V]
    lse: Any  # fp32 [num_kv_heads, num_partials, rows], base 2
    stride_head: Varying  # strides in rows
    stride_partial: Varying
    stride_token: Varying  # SPLIT: one of these two is 0
    stride_request: Varying
    num_programs: Varying  # of the decode kernel, per kv head


@triton.jit
def partial_of(program, unit, share):
    """Without SPLIT: where `program` leaves what it takes of a row tile from `unit` on; `share`: units per program."""
    return 2 * program + (unit != program * share).to(tl.int32)


@triton.jit
def first_row(partials, kv_head, request, row_start, tile_m, spec: tl.constexpr):
    """int64: where the rows of a row tile begin in partial 0 of a kv head; partial n is n * stride_partial further."""
    row = kv_head.to(tl.int64) * number(partials.stride_head)
    if spec.SPLIT:
        row += row_start.to(tl.int64) * number(partials.stride_token)
        row += tl.cast(request, tl.int64) * number(partials.stride_request) + tile_m * spec.BLOCK_M
    return row


@triton.jit
def store_partial(partials, row, row_ok, values, lse_log2, spec: tl.constexpr):
    """values: fp32 [BLOCK_M, BLOCK_DV], lse_log2: [BLOCK_M]; row: where the first of them goes."""
    BLOCK_M: tl.constexpr = spec.BLOCK_M
    BLOCK_DV: tl.constexpr = spec.BLOCK_DV
    lane = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_DV)
    mask = row_ok[:, None] & (dim < spec.HEAD_DIM_V)[None, :]
    offset = lane[:, None] * spec.HEAD_DIM_V + dim[None, :]
    tl.store(partials.out + row * spec.HEAD_DIM_V + offset, values, mask=mask)
    tl.store(partials.lse + row + lane, lse_log2, mask=row_ok)
