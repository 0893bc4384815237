"""Attention of a row per request on Hopper: every byte of KV once, by the TMA unit, one launch.

grid: [num_kv_heads, num_programs], two programs a processor; a program takes an equal share of the line of KV tiles of
its kv head (pieces.py), whatever the mix of lengths. Bound by KV bytes: K and V of a request are read once, for all
queries of the group.

        1 warp    K(0) V(0) K(1) V(1) ...   the whole share, from one request to the next without a pause
        4 warps   keys times queries, as columns (columns.py); 8-bit keys through registers, in fp16 (from_bytes.py)
        ring.py   STAGES tiles of K, and of V: 64 KiB and more on their way for each program
        merging.py   of the pieces of a request the last one merges
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from pagewire.kernels import error_codes as codes
from pagewire.kernels.arguments import UNSPECIALISED
from pagewire.kernels.hopper.boxes import load_tile
from pagewire.kernels.hopper.columns import Tiles, consume
from pagewire.kernels.hopper.merging import clear_next
from pagewire.kernels.hopper.pages import pages_of
from pagewire.kernels.hopper.pieces import Line, keys_of, piece_of, share_of
from pagewire.kernels.hopper.ring import ring_of, swizzled
from pagewire.kernels.hopper.words import barrier

_COUNTER = gl.constexpr(codes.DECODE_COUNTER)


@gluon.jit(do_not_specialize=UNSPECIALISED)
def _decode_kernel(
    q,  # Heads
    k,  # Boxes
    v,
    k_matrix,  # what the boxes are of; arguments of their own, Triton 3.6 launches none within a tuple
    v_matrix,
    results,  # Results
    page_table,  # int32 [batch_size, max_pages_per_seq]
    seq_lens,  # int32 [batch_size]
    call,  # Call
    rule,  # Rule
    partials,  # Partials
    spec: gl.constexpr,
):
    line = Line(gl.program_id(0), page_table, seq_lens)
    clear_next(partials, line.kv_head * gl.num_programs(1) + gl.program_id(1), _COUNTER, call)
    share = share_of(line, call, rule, spec)
    STAGES: gl.constexpr = spec.STAGES
    N: gl.constexpr = spec.BLOCK_N
    D: gl.constexpr = spec.BLOCK_D
    R: gl.constexpr = spec.BLOCK_M
    STORED: gl.constexpr = k_matrix.dtype
    OPERAND: gl.constexpr = q.ptr.dtype.element_ty if spec.FORMAT == "float" else gl.float16
    tiles = Tiles(
        gl.allocate_shared_memory(OPERAND, [R, D], swizzled(OPERAND, D)),
        gl.allocate_shared_memory(OPERAND, [R, N], swizzled(OPERAND, N)),
        ring_of(STORED, STAGES, N, D, 1),
        ring_of(STORED, STAGES, N, D, 1),
    )
    barrier()
    gl.warp_specialize(
        [
            (consume, (tiles, q, k, v, share, line, call, rule, results, partials, spec)),
            (_produce, (tiles, k, v, k_matrix, v_matrix, share, line, call, rule, spec)),
        ],
        [1],
        [24],  # registers of a thread; the first partition has what is left
    )


@gluon.jit
def _produce(tiles, k, v, k_matrix, v_matrix, share, line, call, rule, spec: gl.constexpr):
    """K and V of the share's tiles, as stages become free."""
    N: gl.constexpr = spec.BLOCK_N
    ROWS: gl.constexpr = k_matrix.block_type.shape[0]
    unit = share.first
    request = share.request
    request_unit = share.request_unit
    i = 0
    while unit < share.stop:
        piece = piece_of(unit, request, request_unit, share, line, call, rule, spec)
        keys = keys_of(piece, line, call)
        pages = pages_of(keys, piece.first_tile, N, ROWS, spec)
        for tile in range(piece.first_tile, piece.first_tile + piece.num_tiles):
            next_pages = pages_of(keys, tile + 1, N, ROWS, spec)
            load_tile(k, k_matrix, tiles.k, i, pages, tile, line.kv_head, spec)
            load_tile(v, v_matrix, tiles.v, i, pages, tile, line.kv_head, spec)
            pages = next_pages
            i += 1
        unit += piece.num_tiles
        request += 1
        request_unit += piece.num_units
