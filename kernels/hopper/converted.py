"""Rows of an fp8 or int8 cache on their way into shared memory: loaded, converted in registers, stored as q's type.

Exact: every stored value is one of fp16 and of bf16. The numbers that are their scales are in the softmax's and in out.
Four warps, a piece of a tile at a time: a piece is loaded while its stage is still being read, and then waits for it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from pagewire.kernels.hopper.ring import full_of, tile_of, wait_empty

_PIECES = gl.constexpr(4)  # of a tile


@gluon.jit
def produce_converted(k, v, k_ring, v_ring, table, kv_head, walk, spec: gl.constexpr):
    """k, v: Cache. A partition of four warps."""
    for i in range(walk.num):
        _convert_tile(k, k_ring, i, table, kv_head, walk, spec)
        _convert_tile(v, v_ring, i, table, kv_head, walk, spec)


@gluon.jit
def _convert_tile(cache, ring, i, table, kv_head, walk, spec: gl.constexpr):
    """Keys that nobody sees are zeros."""
    D: gl.constexpr = ring.tiles.shape[2]
    ROWS: gl.constexpr = ring.tiles.shape[1] // _PIECES
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [512 // D, D // 16], [gl.num_warps(), 1], [1, 0])
    dim = gl.arange(0, D, gl.SliceLayout(0, layout))
    row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    ptr = cache.ptr + kv_head.to(gl.int64) * cache.stride_head
    for piece in gl.static_range(_PIECES):
        key = (walk.last - i) * ring.tiles.shape[1] + piece * ROWS + row
        seen = (key >= walk.first_key) & (key < walk.stop_key)
        page = gl.load(table + key // spec.PAGE_SIZE, mask=seen, other=0).to(gl.int64)
        at = page * cache.stride_page + (key % spec.PAGE_SIZE).to(gl.int64) * cache.stride_token
        stored = gl.load(ptr + at[:, None] + dim[None, :], mask=seen[:, None] & (dim >= 0)[None, :], other=0)
        if piece == 0:
            wait_empty(ring, i)
        tile_of(ring, i).slice(piece * ROWS, ROWS).store(_real(stored, ring.tiles.dtype, spec))
    fence_async_shared()
    mbarrier.arrive(full_of(ring, i), count=1)


@gluon.jit
def _real(stored, DTYPE: gl.constexpr, spec: gl.constexpr):
    """As common.to_operand."""
    if spec.FORMAT == "int8":
        return stored.to(DTYPE)
    elif spec.FORMAT == "e5m2":
        return stored.to(gl.float8e5, bitcast=True).to(DTYPE)
    else:
        return stored.to(gl.float8e4nv, bitcast=True).to(DTYPE)
