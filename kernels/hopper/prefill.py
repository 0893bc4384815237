"""Attention of many rows per request on Hopper: two warpgroups multiply what others load.

grid: [programs, 1, parts], a program a processor; it computes 128 packed rows of a request at a time (row_tiles.py),
over all keys they see, or, where these are fewer than processors, over a part of these keys: the last part to come
merges (merging.py). Bound by the tensor cores: a tile of keys is 512 * BLOCK_N * D operations on 4 * BLOCK_N * D bytes,
mostly from L2.

        1 warp        K(0) V(0) K(1) V(1) ...        boxes.py: a box a page; or 4 warps, row by row:
                                                      rows.py, and converted.py from 8 bits;
                                                      on with the next rows while those before are still multiplied
        4 warps x 2   64 rows each                   consumer.py: wgmma of tile i+1 and i beside the softmax
        ring.py       STAGES tiles of K, and of V    as many of them as shared memory holds beside Q
        items.py      which rows come next

What is rare is left to `kernels/prefill.py`, whose launch follows and looks at `results.redo`: tiles with a page that
does not exist, tiles whose sums are not finite (a value in a slot that nobody owns may be NaN, and 0 * NaN is NaN),
rows that no request owns.
"""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from pagewire.kernels import error_codes as codes
from pagewire.kernels.arguments import UNSPECIALISED
from pagewire.kernels.hopper.boxes import produce_boxes
from pagewire.kernels.hopper.consumer import CONSUMERS, MOST_PARTS, Tiles, consume
from pagewire.kernels.hopper.converted import produce_converted
from pagewire.kernels.hopper.items import give, places_of
from pagewire.kernels.hopper.merging import Partials, clear_next
from pagewire.kernels.hopper.ring import ring_of, swizzled
from pagewire.kernels.hopper.row_tiles import Batch, item_of, keys_of, most_items
from pagewire.kernels.hopper.rows import produce_rows
from pagewire.kernels.hopper.words import barrier

_COUNTER = gl.constexpr(codes.PREFILL_COUNTER)
_FEWEST = gl.constexpr(4)  # tiles of a part


@gluon.jit(do_not_specialize=UNSPECIALISED)
def _prefill_kernel(
    q,  # Heads
    k,  # Boxes, or, without BOXES, Cache
    v,
    k_matrix,  # BOXES: what the boxes are of; arguments of their own, Triton 3.6 launches none within a tuple
    v_matrix,
    results,  # Results
    page_table,  # int32 [batch_size, max_pages_per_seq]
    seq_lens,  # int32 [batch_size]
    cu_seqlens_q,  # int32 [batch_size + 1]
    call,  # Call
    rule,  # Rule
    spec: gl.constexpr,
):
    batch = Batch(page_table, seq_lens, cu_seqlens_q)
    if spec.PARTS or spec.TURNS:
        _clear_next(results, call, spec)
    BOXES: gl.constexpr = spec.BOXES
    FORMAT: gl.constexpr = spec.FORMAT
    WARPS: gl.constexpr = _shares(BOXES, FORMAT)[0]
    CONSUMES: gl.constexpr = _shares(BOXES, FORMAT)[1]
    PRODUCES: gl.constexpr = _shares(BOXES, FORMAT)[2]
    tiles = _tiles(q.ptr.dtype.element_ty, spec)
    items = places_of(CONSUMERS)
    barrier()
    gl.warp_specialize(
        [
            (consume, (tiles, items, q, k, v, batch, call, rule, results, 0, spec)),
            (consume, (tiles, items, q, k, v, batch, call, rule, results, 1, spec)),
            (_produce, (tiles, items, k, v, k_matrix, v_matrix, batch, call, rule, results.arrived, spec)),
        ],
        [4, WARPS],
        [CONSUMES, PRODUCES],  # registers of a thread; the first partition has what is left
    )


@gluon.jit
def _clear_next(results, call, spec: gl.constexpr):
    """How many items were taken; and, by the first of each rows' programs, their counters, of all that there can be."""
    partials = Partials(results.partial_out, results.partial_lse, results.arrived, results.next)
    if spec.TURNS and gl.program_id(0) == 0:
        clear_next(partials, gl.program_id(2), _COUNTER, call)
    if spec.PARTS and gl.program_id(2) == 0:
        for first in range(0, most_items(call, spec), gl.num_programs(0)):
            item = first + gl.program_id(0)
            if item < most_items(call, spec):
                for consumer in gl.static_range(CONSUMERS):
                    clear_next(partials, MOST_PARTS + item * CONSUMERS + consumer, _COUNTER, call)


@gluon.jit
def _tiles(DTYPE: gl.constexpr, spec: gl.constexpr):
    STAGES: gl.constexpr = spec.STAGES
    M: gl.constexpr = spec.BLOCK_M
    N: gl.constexpr = spec.BLOCK_N
    WIDTH: gl.constexpr = strips(spec.HEAD_DIM)[0]
    STRIPS: gl.constexpr = strips(spec.HEAD_DIM)[1]
    D: gl.constexpr = spec.BLOCK_DV
    PLACES: gl.constexpr = 2 * STAGES
    in_line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q = gl.allocate_shared_memory(DTYPE, [STRIPS, M, WIDTH], swizzled(DTYPE, WIDTH))
    k = ring_of(DTYPE, STAGES, N, WIDTH, CONSUMERS, STRIPS)
    v = ring_of(DTYPE, STAGES, N, D, CONSUMERS)
    k_scales = q
    v_scales = q
    if spec.K_SCALE == "token":
        k_scales = gl.allocate_shared_memory(gl.float32, [PLACES, N], in_line)
    if spec.V_SCALE == "token":
        v_scales = gl.allocate_shared_memory(gl.float32, [PLACES, N], in_line)
    turns = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    for consumer in gl.static_range(CONSUMERS):
        mbarrier.init(turns.index(consumer), count=1)
    return Tiles(q, k, v, k_scales, v_scales, turns)


@gluon.constexpr_function
def strips(width: int) -> Any:
    """(columns of a strip, how many)"""
    return (width, 1) if width & (width - 1) == 0 else (64, width // 64)


@gluon.constexpr_function
def _shares(BOXES: bool, FORMAT: str) -> Any:
    """(warps that load, registers of a thread of the second consumer, of theirs): 504 in all by 128 threads."""
    if BOXES:
        return 1, 240, 24
    return (4, 224, 56) if FORMAT == "float" else (4, 216, 72)


@gluon.jit
def _produce(tiles, items, k, v, k_matrix, v_matrix, batch, call, rule, taken, spec: gl.constexpr):
    """Item after item; the last one that is given is none. taken: [parts], how many were beyond a program's first."""
    programs = gl.num_programs(0)
    program = gl.program_id(0)
    index = program
    step = 0
    given = 0
    done = 0  # tiles
    more = True
    while more:
        item, num_items = item_of(index, batch, call, rule, _FEWEST, spec)
        more = item.rows.seq_len >= 0
        ours = gl.program_id(2) < item.num_parts
        if ours | (item.rows.seq_len < 0):
            give(items, given, item)
            given += 1
        if more & ours:
            keys = keys_of(item, batch, call)
            if spec.BOXES:
                produce_boxes(k, v, k_matrix, v_matrix, tiles, keys, item.kv_head, item.walk, done, spec)
            elif spec.FORMAT == "float":
                produce_rows(k, v, tiles, keys, item.kv_head, item.walk, done, spec)
            else:
                produce_converted(k, v, tiles, keys, item.kv_head, item.walk, done, spec)
            done += item.walk.num
        step += 1
        if not spec.TURNS:
            index = step * programs + gl.where(step % 2 == 0, program, programs - 1 - program)
        elif more:
            before = gl.atomic_add(taken + gl.program_id(2), 1, sem="relaxed", scope="gpu")
            if before == num_items - 1:  # so often is it done in all
                gl.store(taken + gl.program_id(2), 0)
            index = programs + before
