"""pack_kv, unpack_kv: tokens of all layers between a paged cache and one contiguous buffer, in one launch.

Layers may lie anywhere and have strides of their own: a table tells the kernel where each is.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from pagewire.kernels import error_codes as codes
from pagewire.kernels import move
from pagewire.kernels.errors import WordOf
from pagewire.kernels.place import Place
from pagewire.kernels.plan import Plan
from pagewire.kernels.quant import native_fp8, scale_kind
from pagewire.kernels.rows import VECTOR_BYTES, Stored, alignment, byte_strides, scale_strides
from pagewire.kernels.tables import TableValues, device_table

if TYPE_CHECKING:
    from pagewire.moves import Movement
    from pagewire.packed import PackedKV
    from pagewire.types import Kept

_MOST_PLANS = 64  # per part of a cache


class Tensors(NamedTuple):
    """What a call brings, in the order in which its places count them."""

    table: Any  # int64 [K | V, num_layers, fields of move.Plane]
    slots: Any  # int64 [num_tokens]
    buffer: Any  # uint8, the packed one
    scales: Any  # fp32, V's behind K's, or None


_PLACES = Tensors._make(map(Place, range(len(Tensors._fields))))


def run(movement: Movement, packed: PackedKV, word_of: WordOf, kept: Kept, *, copy: bool) -> None:
    """word_of: a device's error word. kept: for calls with the same caches."""
    entries = kept.get("table")
    if entries is None:
        places = tuple((_places(part.caches), _places(part.cache_scales)) for part in movement.parts)
        cache = movement.parts[0].caches[0]
        entries = kept["table"] = _entries(places, tuple(cache.shape[:-1]), cache.element_size())
    slots, buffer = movement.slots, packed.buffer
    tensors = Tensors(device_table(entries.values, slots.device), slots, buffer, packed.k_scale)
    if buffer.is_cuda != slots.is_cuda:  # pinned: Triton asks the driver for its address on the device
        _plan(movement, packed, entries.align, word_of(slots.device), copy).run(*tensors)
        return
    key = (movement.op, packed.shape, alignment(buffer.data_ptr()), slots.stride())
    plan = kept.get(key)
    if plan is None:
        if len(kept) >= _MOST_PLANS:
            kept.clear()
        plan = kept[key] = _plan(movement, packed, entries.align, word_of(slots.device), copy)
    plan.run(*tensors)


def _plan(movement: Movement, packed: PackedKV, cache_align: int, error_word: Tensor, copy: bool) -> Plan:
    """Adjacent rows are tokens of a head."""
    shape, part = packed.shape, movement.parts[0]
    cache, cache_scales = part.caches[0], part.cache_scales
    num_pages, page_size = cache.shape[:2]
    k_bytes, v_bytes = shape.head_dim * shape.dtype.itemsize, shape.head_dim_v * shape.dtype.itemsize
    rows = move.Packed(_PLACES.buffer, shape.num_layers, shape.num_heads, *_scales(packed, error_word))
    slots = move.Slots(
        _PLACES.slots, movement.slots.stride(0), shape.num_tokens, num_pages * page_size,
        heads_together=1, heads_apart=shape.num_heads, error_word=error_word,
    )  # fmt: skip
    stored = Stored.of(cache.dtype, scale_kind(cache_scales[0] if cache_scales else None), cache_align)
    rows_align = alignment(packed.buffer.data_ptr(), k_bytes, v_bytes)
    of = move.Move(
        codes.PACK_SLOT if movement.from_cache else codes.UNPACK_SLOT, FROM_CACHE=movement.from_cache, TABLE=True,
        PAGE_SIZE=page_size, K_BYTES=k_bytes, V_BYTES=v_bytes, NATIVE=native_fp8(cache.device),
        K_CACHE=stored, V_CACHE=stored, ROWS=Stored.of(shape.dtype, scale_kind(packed.k_scale), rows_align),
    )  # fmt: skip
    return move.plan(_PLACES.table, _PLACES.table, rows, slots, of, shape.num_layers, cache.device, copy=copy)


class _Entries(NamedTuple):
    """Of the table."""

    values: TableValues  # a move.Plane per K or V and layer
    align: int  # of the caches' rows, bytes


_Places = tuple[tuple[int, tuple[int, ...]], ...]


def _places(tensors: Sequence[Any]) -> _Places:
    return tuple((t.data_ptr(), t.stride()) for t in tensors)


@functools.lru_cache(256)
def _entries(parts: tuple[tuple[_Places, _Places], ...], shape: tuple[int, ...], itemsize: int) -> _Entries:
    table: list[int] = []
    align = VECTOR_BYTES
    for caches, scales in parts:
        nowhere = ((0, ()),) * len(caches)
        for (cache, stride), (scale, scale_stride) in zip(caches, scales or nowhere, strict=True):
            strides = byte_strides(shape, stride[:-1], itemsize)
            table += (cache, *strides, scale, *scale_strides(scale_stride))
            align = alignment(align, cache, *strides)
    return _Entries(TableValues(table), align)


def _scales(packed: PackedKV, nothing: Tensor) -> tuple[Any, int, int]:
    """Scales, V's behind K's, and their strides, as move.Packed has them."""
    if packed.k_scale is None:
        return nothing, 0, 0
    by_head = packed.k_scale.dim() > 1
    return _PLACES.scales, packed.shape.num_heads if by_head else 1, int(by_head)
