"""Rows of K and V copied one by one into shared memory, for pages that are no boxes: any size, any strides.

Four warps ask for K(0) K(1) V(0) K(2) V(1) ...; once a tile has been asked for, the one before is waited for, made
visible to wgmma and handed over, so that two are on their way. In the order K(0) V(0) K(1) V(1) nobody would go on: a
consumer waits for K(i+1) before it gives V(i-1) back, whose place V(i+1) would want before K(i+1) is handed over.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from pagewire.kernels.hopper.layouts import in_eights
from pagewire.kernels.hopper.ring import full_of, tile_of, wait_empty
from pagewire.kernels.hopper.words import copy_rows


@gluon.jit
def produce_rows(k, v, tiles, keys, kv_head, walk, done, spec: gl.constexpr):
    """k, v: Cache. Four warps. done: tiles of the items before."""
    _ask_for(k, tiles.k, done, keys, kv_head, walk.last, spec)
    for i in range(walk.num):
        if i + 1 < walk.num:
            _ask_for(k, tiles.k, done + i + 1, keys, kv_head, walk.last - i - 1, spec)
        else:
            async_copy.commit_group()  # of nothing, in its place
        if i == 0:
            _hand_over(tiles.k, done, 1)
        else:
            _hand_over(tiles.v, done + i - 1, 1)
        _ask_for(v, tiles.v, done + i, keys, kv_head, walk.last - i, spec)
        if i + 1 < walk.num:
            _hand_over(tiles.k, done + i + 1, 1)
    _hand_over(tiles.v, done + walk.num - 1, 0)


@gluon.jit
def _ask_for(cache, ring, i, keys, kv_head, tile, spec: gl.constexpr):
    """A tile as the ring's i-th. Keys that nobody sees, and of pages that do not exist, are zeros."""
    N: gl.constexpr = ring.tiles.shape[1]
    D: gl.constexpr = ring.tiles.shape[2]
    STRIPS: gl.constexpr = ring.tiles.shape[0] // ring.full.shape[0]
    layout: gl.constexpr = in_eights(D)
    key = tile * N + gl.arange(0, N, gl.SliceLayout(1, layout))
    dim = gl.arange(0, D, gl.SliceLayout(0, layout))
    seen = (key >= keys.first) & (key < keys.stop)
    page = gl.load(keys.table + key // spec.PAGE_SIZE, mask=seen, other=0)
    seen = seen & (page >= 0) & (page < keys.num_pages)
    at = page.to(gl.int64) * cache.stride_page + (key % spec.PAGE_SIZE).to(gl.int64) * cache.stride_token
    ptr = cache.ptr + kv_head.to(gl.int64) * cache.stride_head
    wait_empty(ring, i)
    for strip in gl.static_range(STRIPS):
        from_there = ptr + at[:, None] + (strip * D + dim)[None, :]
        copy_rows(tile_of(ring, i, strip), from_there, mask=seen[:, None] & (dim >= 0)[None, :])
    async_copy.commit_group()


@gluon.jit
def _hand_over(ring, i, later: gl.constexpr):
    """later: groups that were asked for since and may still be on their way."""
    async_copy.wait_group(later)
    fence_async_shared()
    mbarrier.arrive(full_of(ring, i), count=1)
