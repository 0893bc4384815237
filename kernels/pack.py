"""pack_kv, unpack_kv: tokens of all layers between a paged cache and one contiguous buffer, in one launch.

The packed buffer is [L][K | V][H][T][D] (see pagewire/packed.py). A table holds, per K or V and layer, where the
layer's cache and scales are, so layers may lie anywhere and have strides of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from pagewire.kernels import error_codes as codes
from pagewire.kernels.errors import record_error
from pagewire.kernels.plan import Launch, Place, Plan
from pagewire.kernels.quant import native_fp8, scale_kind
from pagewire.kernels.rows import (
    VECTOR_BYTES,
    Stored,
    alignment,
    byte_strides,
    copy_chunks,
    element,
    load_real,
    scale_strides,
    slot_bytes,
    store_real,
)
from pagewire.kernels.tables import TableValues, device_table

if TYPE_CHECKING:
    from pagewire.moves import Movement
    from pagewire.packed import PackedKV
    from pagewire.types import Kept

_PACK_SLOT = tl.constexpr(codes.PACK_SLOT)
_UNPACK_SLOT = tl.constexpr(codes.UNPACK_SLOT)
# address, strides of page, token, head; the same of the scale; all in bytes
_FIELDS = tl.constexpr(8)
_CHUNKS = 512  # per program of 128 threads: 4 independent 16-byte copies a thread
_MOST_PLANS = 64  # per part of a cache
_TILE = 2048  # elements per program when converting: 16 fp32 values a thread


class _Slots(NamedTuple):
    ptr: Any  # int64 [num_tokens]
    stride: int
    num_slots: int
    error_word: Any


class _Packed(NamedTuple):
    ptr: Any  # uint8
    num_layers: int
    num_heads: int
    num_tokens: int
    scales: Any  # fp32 [K | V, L], [K | V, L, H] or [K | V, L, H, T]
    stride_scale_layer: int  # times num_tokens, if they are per token
    stride_scale_head: int


class _Move(NamedTuple):
    """What a kernel is compiled for."""

    PACK: bool
    PAGE_SIZE: int
    K_BYTES: int  # of a packed row
    V_BYTES: int
    NATIVE: bool
    CACHE: Stored
    PACKED: Stored


class Tensors(NamedTuple):
    """What a call brings, in the order in which its places count them."""

    table: Any  # int64 [K | V, num_layers, _FIELDS]
    slots: Any  # int64 [num_tokens]
    buffer: Any  # uint8, the packed one
    scales: Any  # fp32, V's behind K's, or None


_PLACES = Tensors._make(map(Place, range(len(Tensors._fields))))


def move(movement: Movement, packed: PackedKV, error_word: Tensor, kept: Kept, *, copy: bool) -> None:
    """kept: for calls with the same caches."""
    entries = kept.get("table")
    if entries is None:
        places = tuple((_places(part.caches), _places(part.cache_scales)) for part in movement.parts)
        cache = movement.parts[0].caches[0]
        entries = kept["table"] = _entries(places, tuple(cache.shape[:-1]), cache.element_size())
    slots, buffer = movement.slots, packed.buffer
    tensors = Tensors(device_table(entries.values, slots.device), slots, buffer, packed.k_scale)
    if buffer.is_cuda != slots.is_cuda:  # pinned: Triton asks the driver for its address on the device
        _plan(movement, packed, entries.align, error_word, copy).run(*tensors)
        return
    key = (movement.op, packed.shape, alignment(buffer.data_ptr()), slots.stride())
    plan = kept.get(key)
    if plan is None:
        if len(kept) >= _MOST_PLANS:
            kept.clear()
        plan = kept[key] = _plan(movement, packed, entries.align, error_word, copy)
    plan.run(*tensors)


def _plan(movement: Movement, packed: PackedKV, cache_align: int, error_word: Tensor, copy: bool) -> Plan:
    """grid: [num_tiles * num_heads, K and V, num_layers]: adjacent programs take the heads of the same tokens."""
    shape, part, slots = packed.shape, movement.parts[0], movement.slots
    cache, cache_scales = part.caches[0], part.cache_scales
    widths = [shape.head_dim * shape.dtype.itemsize, shape.head_dim_v * shape.dtype.itemsize]
    packed_align = alignment(packed.buffer.data_ptr(), *widths)
    num_slots, page_size = cache.shape[0] * cache.shape[1], cache.shape[1]
    scales = _scales(packed, error_word)
    kinds = scale_kind(cache_scales[0] if cache_scales else None), scale_kind(packed.k_scale)
    arguments: dict[str, Any] = {
        "table_ptr": _PLACES.table,
        "slots": _Slots(_PLACES.slots, slots.stride(0), num_slots, error_word),
        "packed": _Packed(_PLACES.buffer, shape.num_layers, shape.num_heads, shape.num_tokens, *scales),
        "move": _Move(
            movement.from_cache, page_size, widths[0], widths[1], native_fp8(cache.device),
            Stored.of(cache.dtype, kinds[0], cache_align), Stored.of(shape.dtype, kinds[1], packed_align),
        ),
    }  # fmt: skip
    if copy:
        align = min(cache_align, packed_align)
        num_chunks = shape.num_tokens * max(widths) // align
        chunks = min(_CHUNKS, max(128, triton.next_power_of_2(num_chunks)))
        kernel, num_tiles = _copy_kernel, triton.cdiv(num_chunks, chunks)
        arguments |= {"ALIGN": align, "CHUNKS": chunks}
    else:
        width = triton.next_power_of_2(max(shape.head_dim, shape.head_dim_v))
        rows = max(1, _TILE // width)
        kernel, num_tiles = _convert_kernel, triton.cdiv(shape.num_tokens, rows)
        arguments |= {"WIDTH": width, "ROWS": rows}
    grid = (num_tiles * shape.num_heads, 2 if shape.head_dim_v else 1, shape.num_layers)
    return Plan([Launch(kernel, grid, arguments, {})], cache.device)


class _Entries(NamedTuple):
    """Of the table."""

    values: TableValues  # _FIELDS per K or V and layer
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
    """Scales, V's behind K's, and their strides, as _Packed has them."""
    if packed.k_scale is None:
        return nothing, 0, 0
    by_head = packed.k_scale.dim() > 1
    return _PLACES.scales, packed.shape.num_heads if by_head else 1, int(by_head)


# ------------------------------------------------------------------------------------------ where things are


@triton.jit
def _locate(table_ptr, slots, packed, head, token, reports, SIDE: tl.constexpr, move: tl.constexpr):
    """Of tokens [N] of a head: byte addresses in the cache and the packed buffer, of the scales in both, whether the
    token exists, whether its slot does."""
    layer = tl.program_id(2)
    live = token < packed.num_tokens
    slot = tl.load(slots.ptr + token.to(tl.int64) * slots.stride, mask=live, other=0)
    fits = live & (slot >= 0) & (slot < slots.num_slots)
    # every layer and head sees the same slots: one of them reports
    if (SIDE == 0) & (layer == 0) & (head == 0):
        record_error(
            slots.error_word, _PACK_SLOT if move.PACK else _UNPACK_SLOT, 0, token, live & (fits == 0) & reports
        )
    slot = tl.where(fits, slot, 0)
    entry = table_ptr + (SIDE * packed.num_layers + layer) * _FIELDS
    PAGE_SIZE: tl.constexpr = move.PAGE_SIZE
    cache = _cache_rows(entry, slot, head, PAGE_SIZE)
    cache_scales = _cache_rows(entry + 4, slot, head, PAGE_SIZE).to(tl.pointer_type(tl.float32))
    num_rows = tl.cast(packed.num_heads, tl.int64) * packed.num_tokens  # of K, and as many of V
    row = head.to(tl.int64) * packed.num_tokens + token
    start = packed.ptr.to(tl.int64) + num_rows * layer.to(tl.int64) * (move.K_BYTES + move.V_BYTES)
    if SIDE == 0:
        rows = start + row * move.K_BYTES
    else:
        rows = start + num_rows * move.K_BYTES + row * move.V_BYTES
    index = (SIDE * packed.num_layers + layer).to(tl.int64) * packed.stride_scale_layer
    index += head * packed.stride_scale_head + tl.zeros_like(token)
    if move.PACKED.SCALE == "token":
        index = index * packed.num_tokens + token
    return cache, rows, cache_scales, packed.scales + index, live, fits


@triton.jit
def _cache_rows(entry, slot, head, PAGE_SIZE: tl.constexpr):
    """int64 byte addresses [N]; `entry + 4` gives those of the scales."""
    offset = slot_bytes(slot, tl.load(entry + 1), tl.load(entry + 2), PAGE_SIZE)
    return tl.load(entry) + offset + head.to(tl.int64) * tl.load(entry + 3)


# ------------------------------------------------------------------------------------------ the same bytes


@triton.jit
def _copy_kernel(
    table_ptr,  # int64 [K | V, num_layers, _FIELDS]
    slots,  # _Slots
    packed,  # _Packed
    ALIGN: tl.constexpr,
    CHUNKS: tl.constexpr,
    move: tl.constexpr,
):
    """A program moves CHUNKS chunks of ALIGN bytes of one head of one layer of K or V, and their tokens' scales.
    Bound by memory."""
    if tl.program_id(1) == 0:
        _copy_tile(table_ptr, slots, packed, ALIGN, CHUNKS, 0, move)
    elif move.V_BYTES > 0:
        _copy_tile(table_ptr, slots, packed, ALIGN, CHUNKS, 1, move)


@triton.jit
def _copy_tile(
    table_ptr, slots, packed, ALIGN: tl.constexpr, CHUNKS: tl.constexpr, SIDE: tl.constexpr, move: tl.constexpr
):
    ROW_CHUNKS: tl.constexpr = (move.V_BYTES if SIDE else move.K_BYTES) // ALIGN
    head, tile = tl.program_id(0) % packed.num_heads, tl.program_id(0) // packed.num_heads
    # the tile's first chunk in 64 bits, the others relative to it in 32
    first = tile.to(tl.int64) * CHUNKS
    chunk = (first % ROW_CHUNKS).to(tl.int32) + tl.arange(0, CHUNKS)
    token = (first // ROW_CHUNKS).to(tl.int32) + chunk // ROW_CHUNKS
    column = ((chunk % ROW_CHUNKS) * ALIGN).to(tl.int64)
    once = column == 0
    cache, rows, cache_scales, scales, live, fits = _locate(table_ptr, slots, packed, head, token, once, SIDE, move)
    if move.PACK:
        copy_chunks(cache + column, rows + column, fits, live, ALIGN)
    else:
        copy_chunks(rows + column, cache + column, fits, fits, ALIGN)
    if move.PACKED.SCALE == "token":
        if move.PACK:
            tl.store(scales, tl.load(cache_scales, mask=fits & once, other=1.0), mask=live & once)
        else:
            tl.store(cache_scales, tl.load(scales, mask=fits & once), mask=fits & once)
    elif move.PACK and move.PACKED.SCALE != "none":  # unpack converts to the cache's own tensor or head scale
        if tile == 0:
            first_token = token == 0
            tl.store(scales, tl.load(cache_scales, mask=once & first_token), mask=once & first_token)


# ------------------------------------------------------------------------------------------ other bytes


@triton.jit
def _convert_kernel(
    table_ptr,  # as in _copy_kernel
    slots,
    packed,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    move: tl.constexpr,
):
    """A program converts ROWS tokens of one head of one layer of K or V. Bound by memory."""
    if tl.program_id(1) == 0:
        _convert_tile(table_ptr, slots, packed, WIDTH, ROWS, 0, move)
    elif move.V_BYTES > 0:
        _convert_tile(table_ptr, slots, packed, WIDTH, ROWS, 1, move)


@triton.jit
def _convert_tile(
    table_ptr, slots, packed, WIDTH: tl.constexpr, ROWS: tl.constexpr, SIDE: tl.constexpr, move: tl.constexpr
):
    CACHE: tl.constexpr = move.CACHE
    PACKED: tl.constexpr = move.PACKED
    NATIVE: tl.constexpr = move.NATIVE
    ROW_BYTES: tl.constexpr = move.V_BYTES if SIDE else move.K_BYTES
    ITEM_BYTES: tl.constexpr = element(PACKED).primitive_bitwidth // 8
    head, tile = tl.program_id(0) % packed.num_heads, tl.program_id(0) // packed.num_heads
    token = tile * ROWS + tl.arange(0, ROWS)
    cache, rows, cache_scales, scales, live, fits = _locate(
        table_ptr, slots, packed, head, token, token >= 0, SIDE, move
    )
    width_ok = (tl.arange(0, WIDTH) < ROW_BYTES // ITEM_BYTES)[None, :]
    if move.PACK:
        x = load_real(cache, cache_scales, fits, width_ok, WIDTH, NATIVE, CACHE)
        store_real(x, rows, scales, live, width_ok, NATIVE, PACKED)
    else:
        x = load_real(rows, scales, fits, width_ok, WIDTH, NATIVE, PACKED)
        store_real(x, cache, cache_scales, fits, width_ok, NATIVE, CACHE)
