"""A request's sums where several programs have a piece of it: each leaves its own in memory, the last to come merges.

Programs take equal shares of a line (`pieces.py`): of each, one piece of a request began before its share or with it,
and one goes on beyond it, its places 2 p and 2 p + 1. The request is counted by the program that its first piece
belongs to, as only one request begins in a share and goes on beyond it. A call counts in one half of a buffer that
belongs to its stream, and sets the other half to zero for the next call: so no call can leave the next one miscounted,
and a count that is not zero by then tells that lengths changed while that call ran.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from pagewire.kernels import error_codes as codes
from pagewire.kernels.hopper.errors import record_error
from pagewire.kernels.hopper.rows_out import finish
from pagewire.kernels.hopper.softmax import Softmax
from pagewire.kernels.hopper.words import barrier

_COUNTER = gl.constexpr(codes.DECODE_COUNTER)
_FLOATS = 64  # of a thread, of several partials on their way together


class Partials(NamedTuple):
    out: Any  # fp32 [num_kv_heads, 2 * num_programs, GROUP_SIZE, D]
    lse: Any  # fp32 [num_kv_heads, 2 * num_programs, GROUP_SIZE], base 2
    arrived: Any  # int32 [num_kv_heads, num_programs]: pieces of a request that are there; 0 before the call
    next: Any  # the same of the call after this one


@gluon.jit
def clear_next(partials, kv_head, call):
    slot = partials.next + kv_head * gl.num_programs(1) + gl.program_id(1)
    left = gl.load(slot)
    gl.store(slot, 0)
    record_error(call.error_word, _COUNTER, left * 0, gl.program_id(1), left != 0)


@gluon.jit
def _place(partials, kv_head, place, row, spec: gl.constexpr):
    """(of the sums' first dim, of the lse) of rows of a partial"""
    at = (kv_head * (2 * gl.num_programs(1)) + place).to(gl.int64) * spec.GROUP_SIZE + row
    return partials.out + at * spec.BLOCK_D, partials.lse + at


@gluon.jit
def merge_in(acc, softmax, piece, unit, share, kv_head, partials, layout: gl.constexpr, spec: gl.constexpr):
    """(whether all of the request is there, acc and softmax of it)

    acc: fp32 [ROWS, D] of that layout, of the piece that begins at unit.
    """
    first_program = piece.first_unit // share.size
    num = (piece.first_unit + piece.num_units - 1) // share.size - first_program + 1
    complete = True
    if num > 1:
        row = gl.arange(0, acc.shape[0], gl.SliceLayout(1, layout))
        dim = gl.arange(0, acc.shape[1], gl.SliceLayout(0, layout))
        exists = row < spec.GROUP_SIZE
        program = gl.program_id(1)
        place = 2 * program + (unit != program * share.size).to(gl.int32)
        out, lse = _place(partials, kv_head, place, row, spec)
        values, lse_log2 = finish(acc, softmax)
        gl.store(out[:, None] + dim[None, :], values, mask=exists[:, None])
        gl.store(lse, lse_log2, mask=exists)
        barrier()  # all of it is there before this program counts itself; Triton 3.6 puts none before the atomic
        count = partials.arrived + kv_head * gl.num_programs(1) + first_program
        before = gl.atomic_add(count, 1, sem="acq_rel", scope="gpu")
        complete = before == num - 1
        if complete:
            gl.store(count, 0)
            began_inside = (piece.first_unit != first_program * share.size).to(gl.int32)
            acc, softmax = _merged(first_program, began_inside, num, kv_head, partials, row, dim, spec)
    return complete, acc, softmax


@gluon.jit
def _merged(first_program, began_inside, num, kv_head, partials, row, dim, spec: gl.constexpr):
    """In the order of keys: (acc, softmax), several partials on their way at once."""
    ROWS: gl.constexpr = row.shape[0]
    D: gl.constexpr = dim.shape[0]
    AT_ONCE: gl.constexpr = _at_once(ROWS, D, gl.num_warps())
    exists = row < spec.GROUP_SIZE
    maximum = (row * 0).to(gl.float32) + float("-inf")
    total = (row * 0).to(gl.float32)
    acc = total[:, None] + (dim * 0).to(gl.float32)[None, :]
    for start in range(0, num, AT_ONCE):
        outs = ()
        lses = ()
        largest = maximum
        for j in gl.static_range(AT_ONCE):
            n = start + j
            place = 2 * (first_program + n) + gl.where(n == 0, began_inside, 0)
            out, lse = _place(partials, kv_head, place, row, spec)
            mask = exists & (n < num)
            lse_log2 = gl.load(lse, mask=mask, other=float("-inf"), cache_modifier=".cg")
            values = gl.load(out[:, None] + dim[None, :], mask=mask[:, None], other=0.0, cache_modifier=".cg")
            largest = gl.maximum(largest, lse_log2)
            outs = outs + (values,)  # type: ignore[assignment]  # noqa: RUF005
            lses = lses + (lse_log2,)  # type: ignore[assignment]  # noqa: RUF005
        shift = gl.where(largest == float("-inf"), 0.0, largest)
        rescale = gl.exp2(maximum - shift)
        acc = acc * rescale[:, None]
        total = total * rescale
        maximum = largest
        for j in gl.static_range(AT_ONCE):
            weight = gl.exp2(lses[j] - shift)
            acc += outs[j] * weight[:, None]
            total += weight
    return acc, Softmax(maximum, total)


@gluon.constexpr_function
def _at_once(rows: int, width: int, num_warps: int) -> int:
    return max(1, _FLOATS * 32 * num_warps // (rows * width))
