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
from pagewire.kernels.hopper.pieces import Line, beginning, behind, keys_of, piece_of, share_of
from pagewire.kernels.hopper.ring import ring_of, stage_of, swizzled, wait_empty
from pagewire.kernels.hopper.scales import per_token
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
    K_SCALE: gl.constexpr = spec.K_SCALE
    V_SCALE: gl.constexpr = spec.V_SCALE
    STORED: gl.constexpr = k_matrix.dtype
    OPERAND: gl.constexpr = q.ptr.dtype.element_ty if spec.FORMAT == "float" else gl.float16
    tiles = Tiles(
        gl.allocate_shared_memory(OPERAND, [R, D], swizzled(OPERAND, D)),
        gl.allocate_shared_memory(OPERAND, [R, N], swizzled(OPERAND, N)),
        ring_of(STORED, STAGES, N, D, 1),
        ring_of(STORED, STAGES, N, D, 1),
        _scales(K_SCALE, STAGES, N),
        _scales(V_SCALE, STAGES, N),
    )
    barrier()
    gl.warp_specialize(
        [
            (consume, (tiles, q, k, v, share, line, call, rule, results, partials, spec)),
            (_produce, (tiles, k, v, k_matrix, v_matrix, share, line, call, rule, spec)),
        ],
        [1],
        [_registers(K_SCALE, V_SCALE)],  # of a thread; the first partition has what is left
    )


@gluon.constexpr_function
def _registers(K_SCALE: str, V_SCALE: str) -> int:
    """Of who loads: scales of a tile and of the next one are some."""
    return 56 if "token" in (K_SCALE, V_SCALE) else 24


@gluon.jit
def _scales(KIND: gl.constexpr, STAGES: gl.constexpr, N: gl.constexpr):
    """In shared memory; of one place where they are not per token."""
    PLACES: gl.constexpr = STAGES if KIND == "token" else 1
    return gl.allocate_shared_memory(gl.float32, [PLACES, N], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def _produce(tiles, k, v, k_matrix, v_matrix, share, line, call, rule, spec: gl.constexpr):
    """K and V of the share's tiles, as stages become free."""
    N: gl.constexpr = spec.BLOCK_N
    ROWS: gl.constexpr = k_matrix.block_type.shape[0]
    K_SCALE: gl.constexpr = spec.K_SCALE
    V_SCALE: gl.constexpr = spec.V_SCALE
    at = beginning(share)
    i = 0
    while at.unit < share.stop:
        piece = piece_of(at, share, line, call, rule, spec)
        keys = keys_of(piece, line, call)
        pages = pages_of(keys, piece.first_tile, N, ROWS, spec)
        k_scale = _scale_of(k, keys, piece.first_tile, line.kv_head, K_SCALE, spec)
        v_scale = _scale_of(v, keys, piece.first_tile, line.kv_head, V_SCALE, spec)
        for tile in range(piece.first_tile, piece.first_tile + piece.num_tiles):
            next_pages = pages_of(keys, tile + 1, N, ROWS, spec)
            next_k_scale = _scale_of(k, keys, tile + 1, line.kv_head, K_SCALE, spec)
            next_v_scale = _scale_of(v, keys, tile + 1, line.kv_head, V_SCALE, spec)
            if K_SCALE == "token" or V_SCALE == "token":
                wait_empty(tiles.k, i)
                if K_SCALE == "token":
                    tiles.k_scales.index(stage_of(tiles.k, i)).store(k_scale)
                if V_SCALE == "token":
                    tiles.v_scales.index(stage_of(tiles.k, i)).store(v_scale)
                barrier()  # they are handed over with K
            load_tile(k, k_matrix, tiles.k, i, pages, tile, line.kv_head, spec)
            load_tile(v, v_matrix, tiles.v, i, pages, tile, line.kv_head, spec)
            pages = next_pages
            k_scale = next_k_scale
            v_scale = next_v_scale
            i += 1
        at = behind(at, piece)


@gluon.jit
def _scale_of(cache, keys, tile, kv_head, KIND: gl.constexpr, spec: gl.constexpr):
    """Of each key of a tile, fp32 [BLOCK_N]; a tile ahead, as its page table is."""
    if KIND == "token":
        return per_token(cache, keys, tile, kv_head, spec)
    else:
        return 1.0
