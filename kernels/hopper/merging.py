"""Sums of the same rows in several programs, each over its keys: all leave theirs in memory, the last to come merges.

They are counted by one of them. A call counts in one half of a buffer that belongs to its stream, and sets the other
half to zero for the next call: so no call can leave the next one miscounted, and a count that is not zero by then tells
that lengths changed while that call ran.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from pagewire.kernels.hopper.errors import record_error
from pagewire.kernels.hopper.rows_out import finish
from pagewire.kernels.hopper.softmax import Softmax
from pagewire.kernels.hopper.words import barrier

_FLOATS = 64  # of a thread, of several partials on their way together


class Partials(NamedTuple):
    out: Any  # fp32 [rows, D]
    lse: Any  # fp32 [rows], base 2
    arrived: Any  # int32: how many of a group of parts are there; 0 before the call
    next: Any  # the same of the call after this one


class Parts(NamedTuple):
    """Of a block of rows, and where they lie: rows of the partials, int64."""

    num: Any
    own: Any  # where this program's begins
    first: Any  # where the first one does, the second, and from there one after the other
    second: Any
    step: Any
    counter: Any  # which of them counts


@gluon.jit
def clear_next(partials, counter, kind: gl.constexpr, call):
    """kind: of error_codes, if it is not zero."""
    left = gl.load(partials.next + counter)
    gl.store(partials.next + counter, 0)
    record_error(call.error_word, kind, left * 0, counter, left != 0)


@gluon.jit
def merge_in(acc, softmax, parts, exists, partials, layout: gl.constexpr):
    """(whether all parts are there, acc and softmax of all)

    acc: fp32 [M, D] of that layout, softmax, exists: [M], of this program's part.
    """
    complete = True
    if parts.num > 1:
        row = gl.arange(0, acc.shape[0], gl.SliceLayout(1, layout))
        dim = gl.arange(0, acc.shape[1], gl.SliceLayout(0, layout))
        out, lse = _place(partials, parts.own, row, acc.shape[1])
        values, lse_log2 = finish(acc, softmax)
        gl.store(out[:, None] + dim[None, :], values, mask=exists[:, None])
        gl.store(lse, lse_log2, mask=exists)
        barrier()  # all of it is there before this program counts itself; Triton 3.6 puts none before the atomic
        count = partials.arrived + parts.counter
        before = gl.atomic_add(count, 1, sem="acq_rel", scope="gpu")
        complete = before == parts.num - 1
        if complete:
            gl.store(count, 0)
            acc, softmax = _merged(parts, exists, partials, row, dim)
    return complete, acc, softmax


@gluon.jit
def _place(partials, start, row, D: gl.constexpr):
    """(of the sums' first dim, of the lse) of the rows of a part that begins there"""
    return partials.out + (start + row) * D, partials.lse + (start + row)


@gluon.jit
def _merged(parts, exists, partials, row, dim):
    """One after the other: (acc, softmax), several on their way at once."""
    ROWS: gl.constexpr = row.shape[0]
    D: gl.constexpr = dim.shape[0]
    AT_ONCE: gl.constexpr = _at_once(ROWS, D, gl.num_warps())
    maximum = (row * 0).to(gl.float32) + float("-inf")
    total = (row * 0).to(gl.float32)
    acc = total[:, None] + (dim * 0).to(gl.float32)[None, :]
    for start in range(0, parts.num, AT_ONCE):
        outs = ()
        lses = ()
        largest = maximum
        for j in gl.static_range(AT_ONCE):
            n = start + j
            begin = gl.where(n == 0, parts.first, parts.second + (n - 1) * parts.step)
            out, lse = _place(partials, begin, row, D)
            mask = exists & (n < parts.num)
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
