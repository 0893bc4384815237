"""Attention of many rows per request on Hopper: two warpgroups multiply what others load.

grid: [row tiles, num_kv_heads, parts]; a program computes 128 packed rows of a request over all keys they see, longest
first, or, where tiles are fewer than processors, over a part of these keys: the last part to come merges (merging.py).
Bound by the tensor cores: a tile of keys is 512 * BLOCK_N * D operations on 4 * BLOCK_N * D bytes, mostly from L2.

        1 warp        K(0) V(0) K(1) V(1) ...        boxes.py: a box a page; or 4 warps, row by row:
                                                      rows.py, and converted.py from 8 bits
        4 warps x 2   64 rows each                   consumer.py: wgmma of tile i+1 and i beside the softmax
        ring.py       STAGES tiles of K, and of V    as many of them as shared memory holds beside Q

What is rare is left to `kernels/prefill.py`, whose launch follows and looks at `results.redo`: tiles with a page that
does not exist, tiles whose sums are not finite (a value in a slot that nobody owns may be NaN, and 0 * NaN is NaN),
rows that no request owns.
"""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from pagewire.kernels import error_codes as codes
from pagewire.kernels.arguments import UNSPECIALISED
from pagewire.kernels.hopper.boxes import produce_boxes
from pagewire.kernels.hopper.consumer import CONSUMERS, Tiles, consume
from pagewire.kernels.hopper.converted import produce_converted
from pagewire.kernels.hopper.layouts import in_eights
from pagewire.kernels.hopper.merging import Partials, clear_next
from pagewire.kernels.hopper.pages import Keys, last_bad_entry
from pagewire.kernels.hopper.ring import ring_of, swizzled
from pagewire.kernels.hopper.row_tiles import find_rows, nothing, number, part_of, walk_of
from pagewire.kernels.hopper.rows import produce_rows
from pagewire.kernels.hopper.scales import scales_of
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
    kv_head = gl.program_id(1)
    part = gl.program_id(2)
    rows = find_rows(gl.program_id(0), seq_lens, cu_seqlens_q, call, spec)
    walk = walk_of(rows, rule, spec)
    num_parts = 1
    if spec.PARTS:
        _clear_next(results, part, kv_head, call)
        num_parts, walk = part_of(walk, gl.num_programs(2), _FEWEST, part, spec)
    if (rows.seq_len >= 0) & (part < num_parts):
        table = page_table + rows.request.to(gl.int64) * number(call.stride_table)
        keys = Keys(table, number(call.num_pages), walk.first_key, walk.stop_key)
        walk = nothing(walk, last_bad_entry(keys, spec) < 0)
        keys = Keys(table, keys.num_pages, walk.first_key, walk.stop_key)
        scales = scales_of(k, v, rows.request, kv_head, rule, spec)
        BOXES: gl.constexpr = spec.BOXES
        FORMAT: gl.constexpr = spec.FORMAT
        WARPS: gl.constexpr = _shares(BOXES, FORMAT)[0]
        CONSUMES: gl.constexpr = _shares(BOXES, FORMAT)[1]
        PRODUCES: gl.constexpr = _shares(BOXES, FORMAT)[2]
        tiles = _tiles(q.ptr.dtype.element_ty, spec)
        _load_q(tiles.q, q, scales.sign, rows, kv_head, spec)
        fence_async_shared()
        barrier()
        gl.warp_specialize(
            [
                (consume, (tiles, walk, rows, scales, kv_head, call, rule, results, part, num_parts, 0, spec)),
                (consume, (tiles, walk, rows, scales, kv_head, call, rule, results, part, num_parts, 1, spec)),
                (_produce, (k, v, k_matrix, v_matrix, tiles, keys, kv_head, walk, spec)),
            ],
            [4, WARPS],
            [CONSUMES, PRODUCES],  # registers of a thread; the first partition has what is left
        )


@gluon.jit
def _clear_next(results, part, kv_head, call):
    """One program of a tile's does, of all tiles that there can be."""
    if part == 0:
        partials = Partials(results.partial_out, results.partial_lse, results.arrived, results.next)
        tile = gl.program_id(0) * gl.num_programs(1) + kv_head
        for consumer in gl.static_range(CONSUMERS):
            clear_next(partials, tile * CONSUMERS + consumer, _COUNTER, call)


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
    return Tiles(q, k, v, k_scales, v_scales)


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
def _produce(k, v, k_matrix, v_matrix, tiles, keys, kv_head, walk, spec: gl.constexpr):
    if spec.BOXES:
        produce_boxes(k, v, k_matrix, v_matrix, tiles, keys, kv_head, walk, spec)
    elif spec.FORMAT == "float":
        produce_rows(k, v, tiles, keys, kv_head, walk, spec)
    else:
        produce_converted(k, v, tiles, keys, kv_head, walk, spec)


@gluon.jit
def _load_q(tile, q, sign, rows, kv_head, spec: gl.constexpr):
    """tile: [STRIPS, BLOCK_M, columns] in shared memory; 0 where there is no row."""
    STRIPS: gl.constexpr = tile.shape[0]
    M: gl.constexpr = tile.shape[1]
    D: gl.constexpr = tile.shape[2]
    layout: gl.constexpr = in_eights(D)
    row = rows.first + gl.arange(0, M, gl.SliceLayout(1, layout))
    dim = gl.arange(0, D, gl.SliceLayout(0, layout))
    token = row // spec.GROUP_SIZE
    head = kv_head * spec.GROUP_SIZE + row % spec.GROUP_SIZE
    at = (rows.row_start + token).to(gl.int64) * q.stride_token + head.to(gl.int64) * q.stride_head
    exists = (token < rows.q_len)[:, None]
    for strip in gl.static_range(STRIPS):
        values = gl.load(q.ptr + at[:, None] + (strip * D + dim)[None, :], mask=exists, other=0.0)
        tile.index(strip).store((values.to(gl.float32) * sign).to(tile.dtype))
