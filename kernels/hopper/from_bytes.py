"""Tiles of 8-bit values as left operands of wgmma, in fp16: from shared memory through registers, and not back.

A thread loads bytes that lie side by side, and these become the values that wgmma wants of it, if rows or columns are
counted in another order: K's columns, with Q's in the same one; V's columns, which are put back in the sums. Where a
thread's bytes come from is chosen so that no two lanes meet in a bank. Exact: fp16 has every stored value.
"""

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def _runs(D: int) -> Any:
    """(columns that are reordered among themselves, of them side by side in a thread): of K."""
    WIDTH = min(D, 128)
    return D // WIDTH, WIDTH // 4


@gluon.constexpr_function
def _powers(first: int, stop: int) -> Any:
    return [1 << n for n in range(first.bit_length() - 1, stop.bit_length() - 1)]


@gluon.constexpr_function
def _layout_of_keys(N: int, D: int) -> Any:
    """Of [N, D] bytes: 16 or 32 columns of a key, lanes 0 to 3 have the next ones, 4 to 31 the next keys."""
    run = min(D, 128) // 4
    registers = [[0, c] for c in _powers(1, run)] + [[8, 0]] + [[0, c] for c in _powers(128, D)]
    registers += [[n, 0] for n in _powers(64, N)]
    lanes = [[0, run], [0, 2 * run], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [N, D])


@gluon.constexpr_function
def _layout_of_values(N: int, D: int) -> Any:
    """Of [N, D] bytes: D / 32 columns of two keys; lanes 0 to 3 have the next keys, every fourth the next columns."""
    run = D // 32
    registers = [[1, 0]] + [[0, c] for c in _powers(1, run)] + [[n, 0] for n in _powers(8, N)]
    lanes = [[2, 0], [4, 0], [0, run], [0, 2 * run], [0, 4 * run]]
    return gl.DistributedLinearLayout(registers, lanes, [[0, D // 4], [0, D // 2]], [], [N, D])


@gluon.jit
def reordered(x):
    """x: [M, D], K or Q with columns in the order in which `keys_operand` has them."""
    M: gl.constexpr = x.shape[0]
    D: gl.constexpr = x.shape[1]
    GROUPS: gl.constexpr = _runs(D)[0]
    RUN: gl.constexpr = _runs(D)[1]
    x = gl.permute(gl.reshape(x, [M, GROUPS, 4, RUN // 2, 2]), [0, 1, 3, 2, 4])
    return gl.reshape(x, [M, D])


@gluon.jit
def keys_operand(tile, layout: gl.constexpr, spec: gl.constexpr):
    """tile: [N, D] in shared memory; layout: of the product."""
    N: gl.constexpr = tile.shape[0]
    D: gl.constexpr = tile.shape[1]
    x = reordered(_real(tile.load(_layout_of_keys(N, D)), spec))
    return gl.convert_layout(x, gl.DotOperandLayout(0, layout, 2), assert_trivial=True)


@gluon.jit
def values_operand(tile, layout: gl.constexpr, spec: gl.constexpr):
    """tile: [N, D]; the operand is [D, N], and its rows are put back by `in_order`."""
    N: gl.constexpr = tile.shape[0]
    D: gl.constexpr = tile.shape[1]
    x = _real(tile.load(_layout_of_values(N, D)), spec)
    x = gl.permute(gl.reshape(x, [N, 4, 8, D // 64, 2]), [3, 1, 4, 2, 0])
    return gl.convert_layout(gl.reshape(x, [D, N]), gl.DotOperandLayout(0, layout, 2), assert_trivial=True)


@gluon.jit
def in_order(x):
    """x: [D, R], a product of `values_operand`."""
    D: gl.constexpr = x.shape[0]
    R: gl.constexpr = x.shape[1]
    x = gl.permute(gl.reshape(x, [D // 64, 4, 2, 8, R]), [1, 3, 0, 2, 4])
    return gl.reshape(x, [D, R])


@gluon.jit
def _real(stored, spec: gl.constexpr):
    """As common.to_operand."""
    if spec.FORMAT == "int8":  # x + 128 below 2^10 in fp16's bits: no conversion, of which there are few a clock
        bits = (stored.to(gl.uint8, bitcast=True) ^ 0x80).to(gl.int16) | 0x6400
        return bits.to(gl.float16, bitcast=True) - 1152.0
    elif spec.FORMAT == "e5m2":
        return stored.to(gl.float8e5, bitcast=True).to(gl.float16)
    else:
        return stored.to(gl.float8e4nv, bitcast=True).to(gl.float16)
