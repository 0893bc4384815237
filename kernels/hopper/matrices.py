"""A cache as a matrix that the TMA unit reads in boxes: which strides make one, and what kernels are told of it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from pagewire.kernels.arguments import Cache, varying
from pagewire.kernels.hopper.boxes import Boxes
from pagewire.kernels.place import MatrixPlace, Place

_MOST_ROWS = 1 << 31  # of a matrix: the TMA unit counts them in 32 bits
_COLUMN_BYTES = 16  # and strides in these
_ATOM = 8  # rows of the swizzle


def boxes_of(
    place: Place, cache: Tensor, numbers: Cache, most_rows: int, columns: int | None = None
) -> tuple[Boxes, MatrixPlace] | None:
    """None: rows have to be copied one by one. A box is a page, or most_rows of it.

    Args:
        columns: of a box, where not all of a head's.
        cache: [num_pages, page_size, num_kv_heads, head_dim], free strides.
        numbers: the same, as the `tl` kernels are told of it.
    """
    page_size, width, of_token = cache.shape[1], cache.shape[3], cache.stride(1)
    matrix = _matrix(cache)
    if matrix is None or page_size < _ATOM or page_size & (page_size - 1):
        return None
    # beyond the matrix, whichever head it is of
    nowhere = -(-matrix.rows // matrix.per_page)
    box = (min(page_size, most_rows), columns or width)
    (nowhere,) = varying([nowhere])
    boxes = Boxes(
        nowhere, matrix.per_page, matrix.per_head, matrix.per_head_column,
        numbers.scale, numbers.stride_scale_page, numbers.stride_scale_token, numbers.stride_scale_head,
    )  # fmt: skip
    return boxes, MatrixPlace(place.index, (matrix.rows, matrix.columns), (of_token, 1), box)


class _Matrix(NamedTuple):
    """A cache as a matrix whose rows are stride_token apart."""

    rows: int
    columns: int
    per_page: int
    per_head: int
    per_head_column: int


def _matrix(cache: Tensor) -> _Matrix | None:
    """cache: [num_pages, page_size, num_kv_heads, head_dim], free strides."""
    num_pages, page_size, num_heads, width = cache.shape
    of_page, of_token, of_head, _ = cache.stride()
    if num_pages == 0 or of_token <= 0 or of_token * cache.element_size() % _COLUMN_BYTES or of_page % of_token:
        return None
    per_page = of_page // of_token
    if num_heads == 1 or of_head * (num_heads - 1) + width <= of_token:  # heads side by side
        if of_head * cache.element_size() % _COLUMN_BYTES and num_heads > 1:
            return None
        per_head, per_head_column, columns = 0, of_head, of_head * (num_heads - 1) + width
        rows = (num_pages - 1) * per_page + page_size
    elif of_head % of_token == 0:  # a head's tokens follow each other
        per_head, per_head_column, columns = of_head // of_token, 0, width
        rows = (num_pages - 1) * per_page + (num_heads - 1) * per_head + page_size
    else:
        return None
    fits = 0 < per_page and rows + per_page + per_head * num_heads < _MOST_ROWS
    return _Matrix(rows, columns, per_page, per_head, per_head_column) if fits else None
