"""Pages as boxes of the TMA unit: a cache is a matrix of rows, and a page, or a piece of one, some rows of it.

A box whose row lies beyond the matrix is filled with zeros: so are pages that nobody needs or that do not exist. Page
indices are loaded a tile ahead, so that no box waits for the page table.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from pagewire.kernels.hopper.numbers import number
from pagewire.kernels.hopper.pages import pages_of
from pagewire.kernels.hopper.ring import bytes_of, full_of, tile_of, wait_empty
from pagewire.kernels.hopper.words import load_box


class Boxes(NamedTuple):
    """K or V in its matrix, a tensor descriptor of [rows, columns] in boxes of [a page at most, a strip of D]:
    row = page * per_page + head * per_head + offset, column = head * per_head_column. And its scales, as Cache's.
    """

    nowhere: Any  # Varying: a page beyond it
    per_page: Any
    per_head: Any
    per_head_column: Any
    scale: Any
    stride_scale_page: Any
    stride_scale_token: Any
    stride_scale_head: Any


@gluon.jit
def load_tile(boxes, matrix, ring, i, pages, tile, kv_head, spec: gl.constexpr):
    """The tile of these pages as the ring's i-th, once its place is free."""
    N: gl.constexpr = ring.tiles.shape[1]
    D: gl.constexpr = ring.tiles.shape[2]
    ROWS: gl.constexpr = matrix.block_type.shape[0]
    BYTES: gl.constexpr = bytes_of(ring.tiles.dtype)
    STRIPS: gl.constexpr = ring.tiles.shape[0] // ring.full.shape[0]
    full = full_of(ring, i)
    wait_empty(ring, i)
    mbarrier.expect(full, STRIPS * N * D * BYTES)
    for j in gl.static_range(N // ROWS):
        page = gl.where(pages[j] < 0, number(boxes.nowhere), pages[j])
        row = page * boxes.per_page + (tile * N + j * ROWS) % spec.PAGE_SIZE + kv_head * boxes.per_head
        for strip in gl.static_range(STRIPS):
            where = [row, kv_head * boxes.per_head_column + strip * D]
            load_box(matrix, where, full, tile_of(ring, i, strip).slice(j * ROWS, ROWS))


@gluon.jit
def produce_boxes(k, v, k_matrix, v_matrix, tiles, keys, kv_head, walk, done, spec: gl.constexpr):
    """k, v: Boxes. One warp: K and V of the walk's tiles, as stages become free. done: tiles of the items before."""
    N: gl.constexpr = spec.BLOCK_N
    ROWS: gl.constexpr = k_matrix.block_type.shape[0]
    pages = pages_of(keys, walk.last, N, ROWS, spec)
    for i in range(walk.num):
        next_pages = pages_of(keys, gl.maximum(walk.last - i - 1, 0), N, ROWS, spec)
        load_tile(k, k_matrix, tiles.k, done + i, pages, walk.last - i, kv_head, spec)
        load_tile(v, v_matrix, tiles.v, done + i, pages, walk.last - i, kv_head, spec)
        pages = next_pages
