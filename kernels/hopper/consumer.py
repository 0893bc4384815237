"""A partition of one warpgroup: 64 packed rows times all tiles of their walk, item after item.

        tile i:    Q K(i) ──────┐                 Q K(i+1) ──────┐
                                softmax(i) ─ P(i)                softmax(i+1)
        tile i-1:  ... P V(i-1) ─────────────┐    P V(i) ────────────────────┐
                   wait(1) ─┘        wait(0) ─┘

P V of a tile and Q K of the next are on their way while the softmax runs: with TURNS the two consumers take
turns in asking for products, so that one's softmax meets the other's products. ptxas would move wait(0) up to wait(1),
across the softmax; the wait for the next K between them, a loop of its own in machine code, keeps it down, and
tests/gluon/test_compile.py reads the order.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from pagewire.kernels import hopper
from pagewire.kernels.hopper.items import take
from pagewire.kernels.hopper.layouts import in_eights, of_product
from pagewire.kernels.hopper.merging import Partials, Parts, merge_in
from pagewire.kernels.hopper.pages import last_bad_entry
from pagewire.kernels.hopper.ring import release, tile_of, wait_full
from pagewire.kernels.hopper.row_tiles import keys_of
from pagewire.kernels.hopper.rows_out import store_rows
from pagewire.kernels.hopper.scales import scales_of
from pagewire.kernels.hopper.softmax import Softmax, logits, terms_of, weights
from pagewire.kernels.hopper.words import barrier

MOST_PARTS = gl.constexpr(hopper.MOST_PARTS)
CONSUMERS = gl.constexpr(hopper.FLAGS)  # each says of its rows whether they are to be computed again
ROWS = gl.constexpr(64)  # of a warpgroup: wgmma's


class Tiles(NamedTuple):
    """In shared memory."""

    q: Any  # [STRIPS of columns, BLOCK_M, columns]
    k: Any  # Ring
    v: Any
    k_scales: Any  # fp32 [2 * STAGES, BLOCK_N], where scales are per token
    v_scales: Any
    turns: Any  # a barrier for each consumer


class Results(NamedTuple):
    out: Any  # as rows_out.Results
    stride_token: Any
    stride_head: Any
    lse: Any
    redo: Any  # fp32 [tiles, num_kv_heads, CONSUMERS]: whether a tile is to be computed again
    partial_out: Any  # PARTS: as merging.Partials, [tiles, num_kv_heads, parts, BLOCK_M] rows
    partial_lse: Any
    arrived: Any  # [MOST_PARTS] items taken; PARTS: and [tiles, num_kv_heads, CONSUMERS]
    next: Any


class Sums(NamedTuple):
    """From one tile to the next."""

    weights: Any  # [ROWS, BLOCK_N] of the tile before, the left operand of its product with V
    acc: Any  # fp32 [ROWS, D], without that product
    softmax: Any


@gluon.jit
def consume(tiles, items, q, k, v, batch, call, rule, results, CONSUMER: gl.constexpr, spec: gl.constexpr):
    i = 0
    done = 0  # tiles of the items before
    more = True
    while more:
        item = take(items, i)
        more = item.rows.seq_len >= 0
        if more:
            scales = scales_of(k, v, item.rows.request, item.kv_head, rule, spec)
            _load_q(tiles.q, q, scales.sign, item, CONSUMER, spec)
            exists = last_bad_entry(keys_of(item, batch, call), spec) < 0
            acc, softmax = _sums(item, done, i, tiles, scales, rule, CONSUMER, spec)
            whole = True
            if spec.PARTS:
                whole, acc, softmax = _merge(acc, softmax, item, exists, results, CONSUMER, spec)
            if whole:
                _store(acc, softmax, item, exists, call, rule, results, CONSUMER, spec)
            done += item.walk.num
        i += 1


@gluon.jit
def _load_q(tile, q, sign, item, CONSUMER: gl.constexpr, spec: gl.constexpr):
    """The warpgroup's rows of [STRIPS, BLOCK_M, columns] in shared memory; 0 where there is no row."""
    STRIPS: gl.constexpr = tile.shape[0]
    D: gl.constexpr = tile.shape[2]
    layout: gl.constexpr = in_eights(D)
    row = item.rows.first + CONSUMER * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    dim = gl.arange(0, D, gl.SliceLayout(0, layout))
    token = row // spec.GROUP_SIZE
    head = item.kv_head * spec.GROUP_SIZE + row % spec.GROUP_SIZE
    at = (item.rows.row_start + token).to(gl.int64) * q.stride_token + head.to(gl.int64) * q.stride_head
    exists = (token < item.rows.q_len)[:, None]
    for strip in gl.static_range(STRIPS):
        values = gl.load(q.ptr + at[:, None] + (strip * D + dim)[None, :], mask=exists, other=0.0)
        tile.index(strip).slice(CONSUMER * ROWS, ROWS).store((values.to(gl.float32) * sign).to(tile.dtype))
    fence_async_shared()
    barrier()


@gluon.jit
def _sums(item, done, items_before, tiles, scales, rule, CONSUMER: gl.constexpr, spec: gl.constexpr):
    """(acc, Softmax) of the item's rows; its tiles are the ring's from `done` on."""
    N: gl.constexpr = spec.BLOCK_N
    D: gl.constexpr = spec.BLOCK_DV
    walk = item.walk
    by_row: gl.constexpr = gl.SliceLayout(1, of_product(N))
    row = item.rows.first + CONSUMER * ROWS + gl.arange(0, ROWS, by_row)
    t = terms_of(item.rows, walk, row, item.kv_head, scales.logit_log2, rule, spec)

    empty = Softmax(gl.full([ROWS], float("-inf"), gl.float32, by_row), gl.zeros([ROWS], gl.float32, by_row))
    wait_full(tiles.k, done, True)
    qk = warpgroup_mma_wait(0, [_q_k(tiles, done, CONSUMER, spec)])
    release(tiles.k, done)
    p, softmax, _rescale = _weights(qk, done, walk.last, empty, tiles, t, True, spec)
    sums = Sums(p, gl.zeros([ROWS, D], gl.float32, of_product(D)), softmax)
    wait_full(tiles.k, done + 1, walk.num > 1)

    inner = walk.num_right + walk.num_inner
    for i in range(1, walk.num_right):
        sums = _step(i, done, done - items_before, sums, tiles, walk, t, True, CONSUMER, spec)
    for i in range(walk.num_right, inner):
        sums = _step(i, done, done - items_before, sums, tiles, walk, t, False, CONSUMER, spec)
    if spec.LEFT:
        for i in range(inner, walk.num):
            sums = _step(i, done, done - items_before, sums, tiles, walk, t, True, CONSUMER, spec)

    last = done + walk.num - 1
    wait_full(tiles.v, last, True)
    acc = warpgroup_mma(sums.weights, tile_of(tiles.v, last), sums.acc, is_async=True)
    acc = warpgroup_mma_wait(0, [acc])
    release(tiles.v, last)
    return acc * scales.value, _by_acc(sums.softmax, spec)


@gluon.jit
def _step(i, done, turns, sums, tiles, walk, t, MASKED: gl.constexpr, CONSUMER: gl.constexpr, spec: gl.constexpr):
    """The i-th tile of the walk, and the sums with the one before it. K of tile i is there. done, turns: of the items
    before; an item's first tile takes none.
    """
    at = done + i
    if spec.TURNS:
        _begin_turn(tiles.turns, turns + i - 1, CONSUMER)
    qk = _q_k(tiles, at, CONSUMER, spec)
    wait_full(tiles.v, at - 1, True)
    acc = warpgroup_mma(sums.weights, tile_of(tiles.v, at - 1), sums.acc, is_async=True)
    if spec.TURNS:
        _end_turn(tiles.turns, CONSUMER)
    qk = warpgroup_mma_wait(1, [qk])
    release(tiles.k, at)
    p, softmax, rescale = _weights(qk, at, walk.last - i, sums.softmax, tiles, t, MASKED, spec)
    wait_full(tiles.k, at + 1, i + 1 < walk.num)  # here: see above
    acc = warpgroup_mma_wait(0, [acc])
    release(tiles.v, at - 1)
    acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, of_product(spec.BLOCK_DV)))[:, None]
    return Sums(p, acc, softmax)


@gluon.jit
def _begin_turn(turns, i, CONSUMER: gl.constexpr):
    """Consumer 0 has its first turn without waiting, as the phase before a barrier's first counts as over."""
    mbarrier.wait(turns.index(CONSUMER), (i & 1) ^ (1 - CONSUMER))


@gluon.jit
def _end_turn(turns, CONSUMER: gl.constexpr):
    mbarrier.arrive(turns.index(1 - CONSUMER), count=1)


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
def _weights(qk, i, tile, softmax, tiles, t, MASKED: gl.constexpr, spec: gl.constexpr):
    """(weights as the left operand, Softmax, rescale); tile: of the request's keys, the ring's i-th."""
    N: gl.constexpr = spec.BLOCK_N
    DTYPE: gl.constexpr = tiles.q.dtype
    columns: gl.constexpr = gl.SliceLayout(0, of_product(N))
    operand: gl.constexpr = gl.DotOperandLayout(0, of_product(spec.BLOCK_DV), 2)
    if spec.K_SCALE == "token":
        qk *= _scales(tiles.k_scales, i).load(columns)[None, :]
    key = tile * N + gl.arange(0, N, columns)
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
def _rows_of(item, CONSUMER: gl.constexpr, spec: gl.constexpr):
    """(token in the request, head, whether there is such a row)"""
    row = item.rows.first + CONSUMER * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, of_product(spec.BLOCK_DV)))
    token = row // spec.GROUP_SIZE
    return token, item.kv_head * spec.GROUP_SIZE + row % spec.GROUP_SIZE, token < item.rows.q_len


@gluon.jit
def _merge(acc, softmax, item, all_exist, results, CONSUMER: gl.constexpr, spec: gl.constexpr):
    """With what other programs have of the same rows: (whether it is all of it, acc, Softmax)"""
    acc += gl.where(all_exist, 0.0, float("nan"))  # to be computed again, and this part cannot say so alone
    tile = item.rows.tile * spec.KV_HEADS + item.kv_head
    first = tile.to(gl.int64) * (gl.num_programs(2) * spec.BLOCK_M) + CONSUMER * ROWS
    step: gl.constexpr = spec.BLOCK_M
    part = gl.program_id(2)
    parts = Parts(
        item.num_parts, first + part * step, first, first + step, step, MOST_PARTS + tile * CONSUMERS + CONSUMER
    )
    partials = Partials(results.partial_out, results.partial_lse, results.arrived, results.next)
    _, _, exists = _rows_of(item, CONSUMER, spec)
    return merge_in(acc, softmax, parts, exists, partials, of_product(spec.BLOCK_DV))


@gluon.jit
def _store(acc, softmax, item, all_exist, call, rule, results, CONSUMER: gl.constexpr, spec: gl.constexpr):
    """What is not finite may come from a key that the row does not see (0 * inf): it is to be computed again."""
    token, head, exists = _rows_of(item, CONSUMER, spec)
    wrong = gl.max((gl.sum(acc * 0.0, 1) != 0.0).to(gl.float32), 0)  # one of a row that is not finite makes it NaN
    redo = results.redo + (item.rows.tile * spec.KV_HEADS + item.kv_head) * CONSUMERS + CONSUMER
    gl.store(redo, gl.where(all_exist, wrong, 1.0))
    token = (item.rows.row_start + token).to(gl.int64)
    store_rows(acc, softmax, token, head, exists, call, rule, results, of_product(spec.BLOCK_DV), spec)
