"""A request's keys that take part, and the pages they lie in."""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


class Keys(NamedTuple):
    """Of a request, that take part."""

    table: Any  # its pages
    num_pages: Any  # of the cache
    first: Any
    stop: Any


@gluon.jit
def pages_of(keys, tile, N: gl.constexpr, ROWS: gl.constexpr, spec: gl.constexpr):
    """Of each box of a tile; -1: no page."""
    pages = ()
    for j in gl.static_range(N // ROWS):
        entry = (tile * N + j * ROWS) // spec.PAGE_SIZE
        stop_entry = (keys.stop + spec.PAGE_SIZE - 1) // spec.PAGE_SIZE
        needed = (entry >= keys.first // spec.PAGE_SIZE) & (entry < stop_entry)
        page = gl.load(keys.table + entry, mask=needed, other=-1)
        page = gl.where(page < keys.num_pages, page, -1)
        pages = pages + (page,)  # type: ignore[assignment]  # noqa: RUF005, it unpacks none
    return pages


@gluon.jit
def last_bad_entry(keys, spec: gl.constexpr):
    """Of their page table, the last that is no page of the cache; -1: all are."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    BLOCK: gl.constexpr = spec.BLOCK_B
    stop_entry = (keys.stop + spec.PAGE_SIZE - 1) // spec.PAGE_SIZE
    bad = gl.full([BLOCK], -1, gl.int32, layout)
    for start in range(keys.first // spec.PAGE_SIZE, stop_entry, BLOCK):
        entry = start + gl.arange(0, BLOCK, layout)
        page = gl.load(keys.table + entry, mask=entry < stop_entry, other=0)
        bad = gl.maximum(bad, gl.where((page < 0) | (page >= keys.num_pages), entry, -1))
    return gl.max(bad, 0)
