"""Pages as boxes of the TMA unit: a cache is a matrix of rows, and a page, or a piece of one, some rows of it.

A box whose row lies beyond the matrix is filled with zeros: so are pages that nobody needs.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from pagewire.kernels.hopper.ring import full_of, tile_of, wait_empty
from pagewire.kernels.hopper.row_tiles import number
from pagewire.kernels.hopper.words import load_box


class Boxes(NamedTuple):
    """K or V in its matrix, a tensor descriptor of [rows, columns] in boxes of [a page at most, D]:
    row = page * per_page + head * per_head + offset, column = head * per_head_column.
    """

    nowhere: Any  # Varying: a page beyond it
    per_page: Any
    per_head: Any
    per_head_column: Any


@gluon.jit
def produce_boxes(k, v, k_matrix, v_matrix, k_ring, v_ring, table, kv_head, walk, spec: gl.constexpr):
    """k, v: Boxes. A partition of one warp: K and V of the walk's tiles, as stages become free."""
    for i in range(walk.num):
        _load_tile(k, k_matrix, k_ring, i, table, kv_head, walk, spec)
        _load_tile(v, v_matrix, v_ring, i, table, kv_head, walk, spec)


@gluon.jit
def _load_tile(boxes, matrix, ring, i, table, kv_head, walk, spec: gl.constexpr):
    N: gl.constexpr = ring.tiles.shape[1]
    D: gl.constexpr = ring.tiles.shape[2]
    ROWS: gl.constexpr = matrix.block_type.shape[0]
    full = full_of(ring, i)
    tile = tile_of(ring, i)
    wait_empty(ring, i)
    mbarrier.expect(full, N * D * 2)
    for j in gl.static_range(N // ROWS):
        key = (walk.last - i) * N + j * ROWS
        row = _page(table, key, number(boxes.nowhere), walk, spec) * boxes.per_page + key % spec.PAGE_SIZE
        where = [row + kv_head * boxes.per_head, kv_head * boxes.per_head_column]
        load_box(matrix, where, full, tile.slice(j * ROWS, ROWS))


@gluon.jit
def _page(table, key, nowhere, walk, spec: gl.constexpr):
    entry = key // spec.PAGE_SIZE
    stop_entry = (walk.stop_key + spec.PAGE_SIZE - 1) // spec.PAGE_SIZE
    needed = (entry >= walk.first_key // spec.PAGE_SIZE) & (entry < stop_entry)
    return gl.load(table + entry, mask=needed, other=nowhere)
