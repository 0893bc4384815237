"""Attention of many rows per request on Hopper: two warpgroups multiply what others load.

grid: [row tiles, num_kv_heads]; a program computes 128 packed rows of a request over all keys they see, longest first.
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

from pagewire.kernels.arguments import UNSPECIALISED
from pagewire.kernels.hopper import FLAGS
from pagewire.kernels.hopper.boxes import produce_boxes
from pagewire.kernels.hopper.consumer import CONSUMERS, consume
from pagewire.kernels.hopper.converted import produce_converted
from pagewire.kernels.hopper.pages import Keys, last_bad_entry
from pagewire.kernels.hopper.ring import ring_of
from pagewire.kernels.hopper.row_tiles import find_rows, nothing, number, walk_of
from pagewire.kernels.hopper.rows import produce_rows
from pagewire.kernels.hopper.words import barrier

_FLAGS = gl.constexpr(FLAGS)


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
    tile, rows = find_rows(gl.program_id(0), seq_lens, cu_seqlens_q, call, spec)
    if rows.seq_len >= 0:
        table = page_table + rows.request.to(gl.int64) * number(call.stride_table)
        flags = results.redo + (tile * gl.num_programs(1) + kv_head) * _FLAGS
        walk = walk_of(rows, rule, spec)
        keys = Keys(table, number(call.num_pages), walk.first_key, walk.stop_key)
        exist = last_bad_entry(keys, spec) < 0
        gl.store(flags + 2, gl.where(exist, 0.0, 1.0))
        walk = nothing(walk, exist)
        keys = Keys(table, keys.num_pages, walk.first_key, walk.stop_key)
        dtype: gl.constexpr = q.ptr.dtype.element_ty
        STAGES: gl.constexpr = spec.STAGES
        N: gl.constexpr = spec.BLOCK_N
        D: gl.constexpr = spec.BLOCK_D
        BOXES: gl.constexpr = spec.BOXES
        FORMAT: gl.constexpr = spec.FORMAT
        WARPS: gl.constexpr = _shares(BOXES, FORMAT)[0]
        CONSUMES: gl.constexpr = _shares(BOXES, FORMAT)[1]
        PRODUCES: gl.constexpr = _shares(BOXES, FORMAT)[2]
        k_ring = ring_of(dtype, STAGES, N, D, CONSUMERS)
        v_ring = ring_of(dtype, STAGES, N, D, CONSUMERS)
        q_tile = _load_q(q, rows, kv_head, spec)
        fence_async_shared()
        barrier()
        gl.warp_specialize(
            [
                (consume, (q_tile, k_ring, v_ring, walk, rows, kv_head, call, rule, results, flags, 0, spec)),
                (consume, (q_tile, k_ring, v_ring, walk, rows, kv_head, call, rule, results, flags, 1, spec)),
                (_produce, (k, v, k_matrix, v_matrix, k_ring, v_ring, keys, kv_head, walk, spec)),
            ],
            [4, WARPS],
            [CONSUMES, PRODUCES],  # registers of a thread; the first partition has what is left
        )


@gluon.constexpr_function
def _shares(BOXES: bool, FORMAT: str) -> Any:
    """(warps that load, registers of a thread of the second consumer, of theirs): 504 in all by 128 threads."""
    if BOXES:
        return 1, 240, 24
    return (4, 224, 56) if FORMAT == "float" else (4, 216, 72)


@gluon.jit
def _produce(k, v, k_matrix, v_matrix, k_ring, v_ring, keys, kv_head, walk, spec: gl.constexpr):
    if spec.BOXES:
        produce_boxes(k, v, k_matrix, v_matrix, k_ring, v_ring, keys, kv_head, walk, spec)
    elif spec.FORMAT == "float":
        produce_rows(k, v, k_ring, v_ring, keys.table, kv_head, walk, spec)
    else:
        produce_converted(k, v, k_ring, v_ring, keys.table, kv_head, walk, spec)


@gluon.jit
def _load_q(q, rows, kv_head, spec: gl.constexpr):
    """In shared memory, [BLOCK_M, D]; 0 where there is no row."""
    M: gl.constexpr = spec.BLOCK_M
    D: gl.constexpr = spec.BLOCK_D
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D if D < 256 else 1, D // 8], [4, 1], [1, 0])
    row = rows.first + gl.arange(0, M, gl.SliceLayout(1, layout))
    dim = gl.arange(0, D, gl.SliceLayout(0, layout))
    token = row // spec.GROUP_SIZE
    head = kv_head * spec.GROUP_SIZE + row % spec.GROUP_SIZE
    at = (rows.row_start + token).to(gl.int64) * q.stride_token + head.to(gl.int64) * q.stride_head
    tile = gl.allocate_shared_memory(q.ptr.dtype.element_ty, [M, D], gl.NVMMASharedLayout(128, 16, 2))
    tile.store(gl.load(q.ptr + at[:, None] + dim[None, :], mask=(token < rows.q_len)[:, None], other=0.0))
    return tile
