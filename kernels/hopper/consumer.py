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

from pagewire.kernels.hopper import FLAGS
from pagewire.kernels.hopper.layouts import of_product
from pagewire.kernels.hopper.merging import Partials, Parts, merge_in
from pagewire.kernels.hopper.ring import release, tile_of, wait_full
from pagewire.kernels.hopper.rows_out import store_rows
from pagewire.kernels.hopper.softmax import Softmax, logits, terms_of, weights

CONSUMERS = gl.constexpr(FLAGS)  # each says of its rows whether they are to be computed again
ROWS = gl.constexpr(64)  # of a warpgroup: wgmma's


class Tiles(NamedTuple):
    """In shared memory."""

    q: Any  # [STRIPS of columns, BLOCK_M, columns]
    k: Any  # Ring
    v: Any
    k_scales: Any  # fp32 [2 * STAGES, BLOCK_N], where scales are per token
    v_scales: Any


class Results(NamedTuple):
    out: Any  # as rows_out.Results
    stride_token: Any
    stride_head: Any
    lse: Any
    redo: Any  # fp32 [tiles, num_kv_heads, CONSUMERS]: whether a tile is to be computed again
    partial_out: Any  # PARTS: as merging.Partials, [tiles, num_kv_heads, parts, BLOCK_M] rows
    partial_lse: Any
    arrived: Any  # [tiles, num_kv_heads, CONSUMERS]
    next: Any


class Sums(NamedTuple):
    """From one tile to the next."""

    weights: Any  # [ROWS, BLOCK_N] of the tile before, the left operand of its product with V
    acc: Any  # fp32 [ROWS, D], without that product
    softmax: Any


@gluon.jit
def consume(
    tiles, walk, rows, scales, kv_head, call, rule, results, part, num_parts,
    CONSUMER: gl.constexpr, spec: gl.constexpr,
):  # fmt: skip
    N: gl.constexpr = spec.BLOCK_N
    D: gl.constexpr = spec.BLOCK_DV
    layout: gl.constexpr = of_product(N)
    by_row: gl.constexpr = gl.SliceLayout(1, layout)
    row = rows.first + CONSUMER * ROWS + gl.arange(0, ROWS, by_row)
    t = terms_of(rows, walk, row, kv_head, scales.logit_log2, rule, spec)

    empty = Softmax(gl.full([ROWS], float("-inf"), gl.float32, by_row), gl.zeros([ROWS], gl.float32, by_row))
    wait_full(tiles.k, 0, True)
    qk = warpgroup_mma_wait(0, [_q_k(tiles, 0, CONSUMER, spec)])
    release(tiles.k, 0)
    p, softmax, _rescale = _weights(qk, 0, empty, tiles, walk, t, True, spec)
    sums = Sums(p, gl.zeros([ROWS, D], gl.float32, of_product(D)), softmax)
    wait_full(tiles.k, 1, walk.num > 1)

    inner = walk.num_right + walk.num_inner
    for i in range(1, walk.num_right):
        sums = _step(i, sums, tiles, walk, t, True, CONSUMER, spec)
    for i in range(walk.num_right, inner):
        sums = _step(i, sums, tiles, walk, t, False, CONSUMER, spec)
    if spec.LEFT:
        for i in range(inner, walk.num):
            sums = _step(i, sums, tiles, walk, t, True, CONSUMER, spec)

    wait_full(tiles.v, walk.num - 1, True)
    acc = warpgroup_mma(sums.weights, tile_of(tiles.v, walk.num - 1), sums.acc, is_async=True)
    acc = warpgroup_mma_wait(0, [acc]) * scales.value
    softmax = _by_acc(sums.softmax, spec)
    whole = True
    if spec.PARTS:
        whole, acc, softmax = _merge(acc, softmax, walk, rows, kv_head, results, part, num_parts, CONSUMER, spec)
    if whole:
        _store(acc, softmax, walk, rows, kv_head, call, rule, results, CONSUMER, spec)


@gluon.jit
def _step(i, sums, tiles, walk, t, MASKED: gl.constexpr, CONSUMER: gl.constexpr, spec: gl.constexpr):
    """The i-th tile of the walk, and the sums with the one before it. K of tile i is there."""
    qk = _q_k(tiles, i, CONSUMER, spec)
    wait_full(tiles.v, i - 1, True)
    acc = warpgroup_mma(sums.weights, tile_of(tiles.v, i - 1), sums.acc, is_async=True)
    qk = warpgroup_mma_wait(1, [qk])
    release(tiles.k, i)
    p, softmax, rescale = _weights(qk, i, sums.softmax, tiles, walk, t, MASKED, spec)
    wait_full(tiles.k, i + 1, i + 1 < walk.num)  # here: see above
    acc = warpgroup_mma_wait(0, [acc])
    release(tiles.v, i - 1)
    acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, of_product(spec.BLOCK_DV)))[:, None]
    return Sums(p, acc, softmax)


@gluon.jit
def _q_k(tiles, i, CONSUMER: gl.constexpr, spec: gl.constexpr):
    """Under way."""
    N: gl.constexpr = spec.BLOCK_N
    STRIPS: gl.constexpr = tiles.q.shape[0]
    qk = gl.zeros([ROWS, N], gl.float32, of_product(N))
    for strip in gl.static_range(STRIPS):
        q = tiles.q.index(strip).slice(CONSUMER * ROWS, ROWS)
        k = tile_of(tiles.k, i, strip).permute([1, 0])
        qk = warpgroup_mma(q, k, qk, use_acc=strip > 0, is_async=True)
    return qk


@gluon.jit
def _weights(qk, i, softmax, tiles, walk, t, MASKED: gl.constexpr, spec: gl.constexpr):
    """(weights as the left operand, Softmax, rescale)"""
    N: gl.constexpr = spec.BLOCK_N
    DTYPE: gl.constexpr = tiles.q.dtype
    columns: gl.constexpr = gl.SliceLayout(0, of_product(N))
    operand: gl.constexpr = gl.DotOperandLayout(0, of_product(spec.BLOCK_DV), 2)
    if spec.K_SCALE == "token":
        qk *= _scales(tiles.k_scales, i).load(columns)[None, :]
    key = (walk.last - i) * N + gl.arange(0, N, columns)
    p, softmax, rescale = weights(logits(qk, key, t, MASKED, spec), softmax, t, DTYPE == gl.float16, spec)
    if spec.V_SCALE == "token":
        p *= _scales(tiles.v_scales, i).load(columns)[None, :]
    return gl.convert_layout(p.to(DTYPE), operand), softmax, rescale


@gluon.jit
def _scales(scales, i):
    PLACES: gl.constexpr = scales.shape[0]
    return scales.index(i & (PLACES - 1))


@gluon.jit
def _by_acc(softmax, spec: gl.constexpr):
    """As acc has its rows."""
    by_row: gl.constexpr = gl.SliceLayout(1, of_product(spec.BLOCK_DV))
    return Softmax(gl.convert_layout(softmax.maximum_log2, by_row), gl.convert_layout(softmax.total, by_row))


@gluon.jit
def _rows_of(rows, kv_head, CONSUMER: gl.constexpr, spec: gl.constexpr):
    """(token in the request, head, whether there is such a row)"""
    row = rows.first + CONSUMER * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, of_product(spec.BLOCK_DV)))
    token = row // spec.GROUP_SIZE
    return token, kv_head * spec.GROUP_SIZE + row % spec.GROUP_SIZE, token < rows.q_len


@gluon.jit
def _merge(
    acc, softmax, walk, rows, kv_head, results, part, num_parts, CONSUMER: gl.constexpr, spec: gl.constexpr
):  # fmt: skip
    """With what other programs have of the same rows: (whether it is all of it, acc, Softmax)"""
    acc += gl.where(walk.exists, 0.0, float("nan"))  # to be computed again, and this part cannot say so alone
    tile = rows.tile * gl.num_programs(1) + kv_head
    first = tile.to(gl.int64) * (gl.num_programs(2) * spec.BLOCK_M) + CONSUMER * ROWS
    step: gl.constexpr = spec.BLOCK_M
    parts = Parts(num_parts, first + part * step, first, first + step, step, tile * CONSUMERS + CONSUMER)
    partials = Partials(results.partial_out, results.partial_lse, results.arrived, results.next)
    _, _, exists = _rows_of(rows, kv_head, CONSUMER, spec)
    return merge_in(acc, softmax, parts, exists, partials, of_product(spec.BLOCK_DV))


@gluon.jit
def _store(acc, softmax, walk, rows, kv_head, call, rule, results, CONSUMER: gl.constexpr, spec: gl.constexpr):
    """What is not finite may come from a key that the row does not see (0 * inf): it is to be computed again."""
    token, head, exists = _rows_of(rows, kv_head, CONSUMER, spec)
    wrong = gl.max(gl.max(((gl.abs(acc) < float("inf")) == 0).to(gl.float32), 1), 0)
    redo = results.redo + (rows.tile * gl.num_programs(1) + kv_head) * CONSUMERS + CONSUMER
    gl.store(redo, gl.where(walk.exists, wrong, 1.0))
    token = (rows.row_start + token).to(gl.int64)
    store_rows(acc, softmax, token, head, exists, call, rule, results, of_product(spec.BLOCK_DV), spec)
