"""A partition of one warpgroup: 64 packed rows times all tiles of their walk.

        tile i:    Q K(i) ──────┐                 Q K(i+1) ──────┐
                                softmax(i) ─ P(i)                softmax(i+1)
        tile i-1:  ... P V(i-1) ─────────────┐    P V(i) ────────────────────┐
                   wait(1) ─┘        wait(0) ─┘

P V of a tile and Q K of the next are on their way while the softmax runs. ptxas would move wait(0) up to wait(1),
across the softmax; the wait for the next K between them, a loop of its own in machine code, keeps it down, and
tests/gluon/test_compile.py reads the order.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from pagewire.kernels.hopper.ring import release, tile_of, wait_full
from pagewire.kernels.hopper.rows_out import store_rows
from pagewire.kernels.hopper.softmax import Softmax, logits, terms_of, weights

CONSUMERS = gl.constexpr(2)
ROWS = gl.constexpr(64)  # of a warpgroup: wgmma's


class Sums(NamedTuple):
    """From one tile to the next."""

    weights: Any  # [ROWS, BLOCK_N] of the tile before, the left operand of its product with V
    acc: Any  # fp32 [ROWS, D], without that product
    softmax: Any


@gluon.constexpr_function
def _layout(columns: int) -> Any:
    """Of a product's result, a warpgroup's."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.jit
def consume(
    q_tile, k_ring, v_ring, walk, rows, kv_head, call, rule, results, flags, CONSUMER: gl.constexpr, spec: gl.constexpr
):  # fmt: skip
    N: gl.constexpr = spec.BLOCK_N
    D: gl.constexpr = spec.BLOCK_D
    layout: gl.constexpr = _layout(N)
    by_row: gl.constexpr = gl.SliceLayout(1, layout)
    q = q_tile.slice(CONSUMER * ROWS, ROWS)
    row = rows.first + CONSUMER * ROWS + gl.arange(0, ROWS, by_row)
    key = gl.arange(0, N, gl.SliceLayout(0, layout))
    t = terms_of(rows, walk, row, kv_head, rule, spec)

    empty = Softmax(gl.full([ROWS], float("-inf"), gl.float32, by_row), gl.zeros([ROWS], gl.float32, by_row))
    wait_full(k_ring, 0, True)
    qk = warpgroup_mma_wait(0, [_q_k(q, k_ring, 0, spec)])
    release(k_ring, 0)
    p, softmax, _rescale = _weights(qk, 0, empty, walk, t, key, q, True, spec)
    sums = Sums(p, gl.zeros([ROWS, D], gl.float32, _layout(D)), softmax)
    wait_full(k_ring, 1, walk.num > 1)

    inner = walk.num_right + walk.num_inner
    for i in range(1, walk.num_right):
        sums = _step(i, q, sums, k_ring, v_ring, walk, t, key, True, spec)
    for i in range(walk.num_right, inner):
        sums = _step(i, q, sums, k_ring, v_ring, walk, t, key, False, spec)
    if spec.LEFT:
        for i in range(inner, walk.num):
            sums = _step(i, q, sums, k_ring, v_ring, walk, t, key, True, spec)

    wait_full(v_ring, walk.num - 1, True)
    acc = warpgroup_mma(sums.weights, tile_of(v_ring, walk.num - 1), sums.acc, is_async=True)
    acc = warpgroup_mma_wait(0, [acc])
    _store(acc, sums.softmax, rows, kv_head, call, rule, results, flags, CONSUMER, spec)


@gluon.jit
def _step(i, q, sums, k_ring, v_ring, walk, t, key, MASKED: gl.constexpr, spec: gl.constexpr):
    """The i-th tile of the walk, and the sums with the one before it. K of tile i is there."""
    qk = _q_k(q, k_ring, i, spec)
    wait_full(v_ring, i - 1, True)
    acc = warpgroup_mma(sums.weights, tile_of(v_ring, i - 1), sums.acc, is_async=True)
    qk = warpgroup_mma_wait(1, [qk])
    release(k_ring, i)
    p, softmax, rescale = _weights(qk, i, sums.softmax, walk, t, key, q, MASKED, spec)
    wait_full(k_ring, i + 1, i + 1 < walk.num)  # here: see above
    acc = warpgroup_mma_wait(0, [acc])
    release(v_ring, i - 1)
    acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, _layout(spec.BLOCK_D)))[:, None]
    return Sums(p, acc, softmax)


@gluon.jit
def _q_k(q, k_ring, i, spec: gl.constexpr):
    """Under way."""
    N: gl.constexpr = spec.BLOCK_N
    zeros = gl.zeros([ROWS, N], gl.float32, _layout(N))
    return warpgroup_mma(q, tile_of(k_ring, i).permute([1, 0]), zeros, use_acc=False, is_async=True)


@gluon.jit
def _weights(qk, i, softmax, walk, t, key, q, MASKED: gl.constexpr, spec: gl.constexpr):
    """(weights as the left operand, Softmax, rescale)"""
    FP16: gl.constexpr = q.dtype == gl.float16
    operand: gl.constexpr = gl.DotOperandLayout(0, _layout(spec.BLOCK_D), 2)
    logit = logits(qk, (walk.last - i) * spec.BLOCK_N + key, t, MASKED, spec)
    p, softmax, rescale = weights(logit, softmax, t, FP16, spec)
    return gl.convert_layout(p.to(q.dtype), operand), softmax, rescale


@gluon.jit
def _store(acc, softmax, rows, kv_head, call, rule, results, flags, CONSUMER: gl.constexpr, spec: gl.constexpr):
    """What is not finite may come from a key that the row does not see (0 * inf): it is to be computed again."""
    layout: gl.constexpr = _layout(spec.BLOCK_D)
    by_row: gl.constexpr = gl.SliceLayout(1, layout)
    row = rows.first + CONSUMER * ROWS + gl.arange(0, ROWS, by_row)
    token = row // spec.GROUP_SIZE
    exists = token < rows.q_len
    head = kv_head * spec.GROUP_SIZE + row % spec.GROUP_SIZE
    wrong = ((gl.abs(acc) < float("inf")) == 0).to(gl.float32)
    gl.store(flags + CONSUMER, gl.max(gl.max(wrong, 1), 0))

    softmax = Softmax(gl.convert_layout(softmax.maximum_log2, by_row), gl.convert_layout(softmax.total, by_row))
    if spec.V_SCALE == "value":
        acc = acc * rule.v_factor
    token = (rows.row_start + token).to(gl.int64)
    store_rows(acc, softmax, token, head, exists, call, rule, results, layout, spec)
