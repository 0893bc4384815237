"""What a program computes at a time, from who loads to who multiplies: found once, so that all agree on it even where
lengths change while the call runs; two of them at a time, so that nobody waits to hear what comes next.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from pagewire.kernels.hopper.ring import Ring, full_of, release, stage_of, wait_empty, wait_full
from pagewire.kernels.hopper.row_tiles import Item, Rows, Walk
from pagewire.kernels.hopper.words import barrier

_PLACES = gl.constexpr(2)
_FIELDS = gl.constexpr(14)


@gluon.jit
def places_of(CONSUMERS: gl.constexpr):
    """A Ring of items: int32 [_PLACES * _FIELDS, 1]."""
    in_line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    words = gl.allocate_shared_memory(gl.int32, [_PLACES * _FIELDS, 1], in_line)
    full = gl.allocate_shared_memory(gl.int64, [_PLACES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [_PLACES, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(_PLACES):
        mbarrier.init(full.index(place), count=1)
        mbarrier.init(empty.index(place), count=CONSUMERS)
    return Ring(words, full, empty)


@gluon.jit
def give(items, i, item):
    """As the i-th."""
    rows = item.rows
    walk = item.walk
    wait_empty(items, i)
    _put(items, i, 0, item.kv_head)
    _put(items, i, 1, item.num_parts)
    _put(items, i, 2, rows.request)
    _put(items, i, 3, rows.row_start)
    _put(items, i, 4, rows.q_len)
    _put(items, i, 5, rows.seq_len)
    _put(items, i, 6, rows.tile)
    _put(items, i, 7, rows.first)
    _put(items, i, 8, walk.last)
    _put(items, i, 9, walk.num_right)
    _put(items, i, 10, walk.num_inner)
    _put(items, i, 11, walk.num)
    _put(items, i, 12, walk.first_key)
    _put(items, i, 13, walk.stop_key)
    barrier()
    mbarrier.arrive(full_of(items, i), count=1)


@gluon.jit
def take(items, i):
    wait_full(items, i, True)
    kv_head = _got(items, i, 0)
    num_parts = _got(items, i, 1)
    rows = Rows(
        _got(items, i, 2), _got(items, i, 3), _got(items, i, 4), _got(items, i, 5), _got(items, i, 6), _got(items, i, 7)
    )
    walk = Walk(
        _got(items, i, 8), _got(items, i, 9), _got(items, i, 10), _got(items, i, 11), _got(items, i, 12),
        _got(items, i, 13),
    )  # fmt: skip
    release(items, i)
    return Item(kv_head, rows, walk, num_parts)


@gluon.jit
def _put(items, i, FIELD: gl.constexpr, value):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    items.tiles.index(stage_of(items, i) * _FIELDS + FIELD).store(gl.arange(0, 1, layout) + value)


@gluon.jit
def _got(items, i, FIELD: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.sum(items.tiles.index(stage_of(items, i) * _FIELDS + FIELD).load(layout), 0)
