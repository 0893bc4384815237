"""Rows of an fp8 or int8 cache on their way into shared memory: loaded, converted in registers, stored as q's type.

Exact: every stored value is one of fp16 and of bf16. Scales that are numbers or a head's are in the softmax's and in
out; those of a token and head are laid beside the tiles. Four warps, some rows of a tile at a time: they are loaded
while their stage is still being read, and then wait for it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from pagewire.kernels.hopper.ring import full_of, tile_of, wait_empty
from pagewire.kernels.hopper.scales import per_token

_SLICES = gl.constexpr(4)  # of a tile's rows


@gluon.jit
def produce_converted(k, v, tiles, keys, kv_head, walk, done, spec: gl.constexpr):
    """k, v: Cache. Four warps. done: tiles of the items before."""
    for i in range(done, done + walk.num):
        tile = walk.last + done - i
        if spec.K_SCALE == "token":
            _load_scales(k, tiles.k_scales, i, keys, kv_head, tile, spec)
        if spec.V_SCALE == "token":
            _load_scales(v, tiles.v_scales, i, keys, kv_head, tile, spec)
        _convert_tile(k, tiles.k, i, keys, kv_head, tile, spec)
        _convert_tile(v, tiles.v, i, keys, kv_head, tile, spec)


@gluon.jit
def _load_scales(cache, scales, i, keys, kv_head, tile, spec: gl.constexpr):
    """Beside K's tile i, with which they are handed over. There are places for twice as many tiles as for K's: what is
    overwritten is of a tile that was read to its end before the last one of its stage was given back.
    """
    PLACES: gl.constexpr = scales.shape[0]
    scales.index(i & (PLACES - 1)).store(per_token(cache, keys, tile, kv_head, spec))


@gluon.jit
def _convert_tile(cache, ring, i, keys, kv_head, tile, spec: gl.constexpr):
    """A tile as the ring's i-th. Keys that nobody sees, and of pages that do not exist, are zeros."""
    D: gl.constexpr = ring.tiles.shape[2]
    STRIPS: gl.constexpr = ring.tiles.shape[0] // ring.full.shape[0]
    ROWS: gl.constexpr = ring.tiles.shape[1] // _SLICES
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [512 // D, D // 16], [gl.num_warps(), 1], [1, 0])
    dim = gl.arange(0, D, gl.SliceLayout(0, layout))
    row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    ptr = cache.ptr + kv_head.to(gl.int64) * cache.stride_head
    for n in gl.static_range(_SLICES):
        key = tile * ring.tiles.shape[1] + n * ROWS + row
        seen = (key >= keys.first) & (key < keys.stop)
        page = gl.load(keys.table + key // spec.PAGE_SIZE, mask=seen, other=0)
        seen = seen & (page >= 0) & (page < keys.num_pages)
        at = page.to(gl.int64) * cache.stride_page + (key % spec.PAGE_SIZE).to(gl.int64) * cache.stride_token
        for strip in gl.static_range(STRIPS):
            from_there = ptr + at[:, None] + (strip * D + dim)[None, :]
            stored = gl.load(from_there, mask=seen[:, None] & (dim >= 0)[None, :], other=0)
            if n == 0 and strip == 0:
                wait_empty(ring, i)
            tile_of(ring, i, strip).slice(n * ROWS, ROWS).store(_real(stored, ring.tiles.dtype, spec))
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
