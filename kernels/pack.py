"""pack_kv, unpack_kv: tokens of all layers between a paged cache and one contiguous buffer, in one launch.

The packed buffer is [L][K | V][H][T][D] (see pagewire/packed.py). A table holds, per K or V and layer, where the
layer's cache and scales are, so layers may lie anywhere and have strides of their own.
"""

import functools
from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from pagewire.kernels import error_codes as codes
from pagewire.kernels.device import current
from pagewire.kernels.errors import record_error
from pagewire.kernels.quant import ELEMENTS, format_of, from_float32, native_fp8, quantise, to_float32, token_head_scale
from pagewire.kernels.rows import (
    VECTOR_BYTES,
    alignment,
    byte_strides,
    copy_chunks,
    scale_strides,
    slot_bytes,
    tile_pointers,
)
from pagewire.kernels.tables import device_table

_PACK_SLOT = tl.constexpr(codes.PACK_SLOT)
_UNPACK_SLOT = tl.constexpr(codes.UNPACK_SLOT)
# address, strides of page, token, head; the same of the scale; all in bytes
_FIELDS = tl.constexpr(8)
_CHUNKS = 512  # per program of 128 threads: 4 independent 16-byte copies a thread
_TILE = 2048  # elements per program when converting: 16 fp32 values a thread


def move(
    parts: Sequence[Any],  # Part of pagewire/moves.py: K and, unless it is a view of K, V
    slots: Tensor,  # [num_tokens] int64
    packed: Any,  # PackedKV
    error_word: Tensor,
    *,
    pack: bool,
) -> None:
    with current(slots.device):
        _launch(parts, slots, packed, error_word, pack=pack, copy=parts[0].how == 0)


def _scale_kind(scales: Sequence[Tensor]) -> str:
    return ("tensor", "head", "", "token_head")[scales[0].dim()] if scales else "none"


def _launch(parts: Sequence[Any], slots: Tensor, packed: Any, error_word: Tensor, *, pack: bool, copy: bool) -> None:
    """grid: [num_tiles * num_heads, K and V, num_layers]: adjacent programs take the heads of the same tokens."""
    shape, cache, cache_scales = packed.shape, parts[0].caches[0], parts[0].cache_scales
    places = tuple((_places(part.caches), _places(part.cache_scales)) for part in parts)
    entries, cache_align = _entries(places, tuple(cache.shape[:-1]), cache.element_size())
    table = device_table(entries, cache.device)
    widths = [shape.head_dim * shape.dtype.itemsize, shape.head_dim_v * shape.dtype.itemsize]
    packed_align = alignment(packed.buffer.data_ptr(), *widths)
    num_slots, page_size = cache.shape[0] * cache.shape[1], cache.shape[1]
    scales = error_word if packed.k_scale is None else packed.k_scale  # V's lie behind K's
    args = (table, slots, slots.stride(0), packed.buffer, scales, error_word)
    sizes = (shape.num_tokens, shape.num_heads, shape.num_layers, num_slots)
    outer = (2 if shape.head_dim_v else 1, shape.num_layers)
    if copy:
        align = min(cache_align, packed_align)
        num_chunks = shape.num_tokens * max(widths) // align
        chunks = min(_CHUNKS, max(128, triton.next_power_of_2(num_chunks)))
        grid = (triton.cdiv(num_chunks, chunks) * shape.num_heads, *outer)
        _copy_kernel[grid](
            *args, *sizes, PACK=pack, SCALE=shape.scale_kind, PAGE_SIZE=page_size,
            K_BYTES=widths[0], V_BYTES=widths[1], ALIGN=align, CHUNKS=chunks,
        )  # fmt: skip
        return
    width = triton.next_power_of_2(max(shape.head_dim, shape.head_dim_v))
    rows = max(1, _TILE // width)
    grid = (triton.cdiv(shape.num_tokens, rows) * shape.num_heads, *outer)
    _convert_kernel[grid](
        *args, *sizes, PACK=pack, PAGE_SIZE=page_size, K_DIM=shape.head_dim, V_DIM=shape.head_dim_v,
        WIDTH=width, ROWS=rows, NATIVE=native_fp8(cache.device),
        CACHE=ELEMENTS[cache.dtype], CACHE_FORMAT=format_of(cache.dtype),
        CACHE_SCALE=_scale_kind(cache_scales), CACHE_ALIGN=cache_align,
        PACKED=ELEMENTS[shape.dtype], PACKED_FORMAT=format_of(shape.dtype),
        PACKED_SCALE=shape.scale_kind, PACKED_ALIGN=packed_align,
    )  # fmt: skip


_Places = tuple[tuple[int, tuple[int, ...]], ...]


def _places(tensors: Sequence[Tensor]) -> _Places:
    return tuple((t.data_ptr(), t.stride()) for t in tensors)


@functools.lru_cache(256)
def _entries(
    parts: tuple[tuple[_Places, _Places], ...], shape: tuple[int, ...], itemsize: int
) -> tuple[tuple[int, ...], int]:
    """(the table: _FIELDS numbers per K or V and layer, alignment of the caches' rows)."""
    table: list[int] = []
    align = VECTOR_BYTES
    for caches, scales in parts:
        nowhere = ((0, ()),) * len(caches)
        for (cache, stride), (scale, scale_stride) in zip(caches, scales or nowhere, strict=True):
            strides = byte_strides(shape, stride[:-1], itemsize)
            table += (cache, *strides, scale, *scale_strides(scale_stride))
            align = alignment(align, cache, *strides)
    return tuple(table), align


# ------------------------------------------------------------------------------------------ where things are


@triton.jit
def _locate(table_ptr, num_layers, slots_ptr, stride_slots, token, num_tokens, num_slots):
    """(entry of this program's layer, head-independent), (live, fits [N]), slot [N] int64: 0 where it does not fit."""
    side, layer = tl.program_id(1), tl.program_id(2)
    entry = table_ptr + (side * num_layers + layer) * _FIELDS
    live = token < num_tokens
    slot = tl.load(slots_ptr + token.to(tl.int64) * stride_slots, mask=live, other=0)
    fits = live & (slot >= 0) & (slot < num_slots)
    return entry, live, fits, tl.where(fits, slot, 0)


@triton.jit
def _cache_rows(entry, slot, head, PAGE_SIZE: tl.constexpr):
    """int64 byte addresses [N]; `entry + 4` gives those of the scales."""
    offset = slot_bytes(slot, tl.load(entry + 1), tl.load(entry + 2), PAGE_SIZE)
    return tl.load(entry) + offset + head.to(tl.int64) * tl.load(entry + 3)


@triton.jit
def _packed_rows(
    packed_ptr, token, head, num_tokens, num_heads, K_BYTES: tl.constexpr, V_BYTES: tl.constexpr,
    ROW_BYTES: tl.constexpr,
):  # fmt: skip
    """int64 byte addresses [N]."""
    side, layer = tl.program_id(1), tl.program_id(2).to(tl.int64)
    num_rows = tl.cast(num_heads, tl.int64) * num_tokens  # of K, and as many of V
    start = packed_ptr.to(tl.int64) + num_rows * (layer * (K_BYTES + V_BYTES) + side * K_BYTES)
    return start + (head.to(tl.int64) * num_tokens + token) * ROW_BYTES


@triton.jit
def _packed_scales(scales_ptr, token, head, num_tokens, num_heads, num_layers, SCALE: tl.constexpr):
    """Pointers, of token's shape."""
    side, layer = tl.program_id(1).to(tl.int64), tl.program_id(2)
    row = side * num_layers + layer
    if SCALE == "tensor":
        return scales_ptr + row + tl.zeros_like(token)
    elif SCALE == "head":
        return scales_ptr + row * num_heads + head + tl.zeros_like(token)
    else:
        return scales_ptr + (row * num_heads + head) * num_tokens + token


@triton.jit
def _record(error_ptr, PACK: tl.constexpr, head, token, bad):
    # every layer and head sees the same slots: one of them reports
    if (tl.program_id(1) == 0) & (tl.program_id(2) == 0) & (head == 0):
        record_error(error_ptr, _PACK_SLOT if PACK else _UNPACK_SLOT, 0, token, bad)


# ------------------------------------------------------------------------------------------ the same bytes


@triton.jit
def _copy_kernel(
    table_ptr,  # int64 [K | V, num_layers, _FIELDS]
    slots_ptr, stride_slots,  # int64 [num_tokens]
    packed_ptr,  # uint8
    scales_ptr,  # fp32 [K | V, ...]: [L], [L, H] or [L, H, T]
    error_ptr, num_tokens, num_heads, num_layers, num_slots,
    PACK: tl.constexpr, SCALE: tl.constexpr, PAGE_SIZE: tl.constexpr,
    K_BYTES: tl.constexpr, V_BYTES: tl.constexpr, ALIGN: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """A program moves CHUNKS chunks of ALIGN bytes of one head of one layer of K or V, and their tokens' scales."""
    if tl.program_id(1) == 0:
        _copy_tile(
            table_ptr, slots_ptr, stride_slots, packed_ptr, scales_ptr, error_ptr, num_tokens,
            num_heads, num_layers, num_slots, PACK, SCALE, PAGE_SIZE, K_BYTES, V_BYTES, K_BYTES,
            ALIGN, CHUNKS,
        )  # fmt: skip
    elif V_BYTES > 0:
        _copy_tile(
            table_ptr, slots_ptr, stride_slots, packed_ptr, scales_ptr, error_ptr, num_tokens,
            num_heads, num_layers, num_slots, PACK, SCALE, PAGE_SIZE, K_BYTES, V_BYTES, V_BYTES,
            ALIGN, CHUNKS,
        )  # fmt: skip


@triton.jit
def _copy_tile(
    table_ptr, slots_ptr, stride_slots, packed_ptr, scales_ptr, error_ptr, num_tokens,
    num_heads, num_layers, num_slots,
    PACK: tl.constexpr, SCALE: tl.constexpr, PAGE_SIZE: tl.constexpr,
    K_BYTES: tl.constexpr, V_BYTES: tl.constexpr, ROW_BYTES: tl.constexpr,
    ALIGN: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    ROW_CHUNKS: tl.constexpr = ROW_BYTES // ALIGN
    head, tile = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads
    # the tile's first chunk in 64 bits, the others relative to it in 32
    first = tile.to(tl.int64) * CHUNKS
    chunk = (first % ROW_CHUNKS).to(tl.int32) + tl.arange(0, CHUNKS)
    token = (first // ROW_CHUNKS).to(tl.int32) + chunk // ROW_CHUNKS
    column = ((chunk % ROW_CHUNKS) * ALIGN).to(tl.int64)
    entry, live, fits, slot = _locate(table_ptr, num_layers, slots_ptr, stride_slots, token, num_tokens, num_slots)
    _record(error_ptr, PACK, head, token, live & (fits == 0) & (column == 0))
    cache = _cache_rows(entry, slot, head, PAGE_SIZE) + column
    packed = _packed_rows(packed_ptr, token, head, num_tokens, num_heads, K_BYTES, V_BYTES, ROW_BYTES)
    packed += column
    if PACK:
        copy_chunks(cache, packed, fits, live, ALIGN)
    else:
        copy_chunks(packed, cache, fits, fits, ALIGN)
    if SCALE == "token_head":
        once = column == 0
        cache_scales = _cache_rows(entry + 4, slot, head, PAGE_SIZE).to(tl.pointer_type(tl.float32))
        packed_scales = _packed_scales(scales_ptr, token, head, num_tokens, num_heads, num_layers, SCALE)
        if PACK:
            scale = tl.load(cache_scales, mask=fits & once, other=1.0)
            tl.store(packed_scales, scale, mask=live & once)
        else:
            scale = tl.load(packed_scales, mask=fits & once)
            tl.store(cache_scales, scale, mask=fits & once)
    elif PACK and SCALE != "none":  # unpack converts to the cache's own tensor or head scale
        if (tile == 0) & ((head == 0) | (SCALE == "head")):
            address = tl.load(entry + 4) + head.to(tl.int64) * tl.load(entry + 7)
            scale = tl.load(address.to(tl.pointer_type(tl.float32)))
            packed_scale = _packed_scales(scales_ptr, head, head, num_tokens, num_heads, num_layers, SCALE)
            tl.store(packed_scale, scale)


# ------------------------------------------------------------------------------------------ other bytes


@triton.jit
def _convert_kernel(
    table_ptr,  # as in _copy_kernel
    slots_ptr, stride_slots, packed_ptr, scales_ptr,
    error_ptr, num_tokens, num_heads, num_layers, num_slots,
    PACK: tl.constexpr, PAGE_SIZE: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, NATIVE: tl.constexpr,
    CACHE: tl.constexpr, CACHE_FORMAT: tl.constexpr, CACHE_SCALE: tl.constexpr,
    CACHE_ALIGN: tl.constexpr, PACKED: tl.constexpr, PACKED_FORMAT: tl.constexpr,
    PACKED_SCALE: tl.constexpr, PACKED_ALIGN: tl.constexpr,
):  # fmt: skip
    """A program converts ROWS tokens of one head of one layer of K or V."""
    if tl.program_id(1) == 0:
        _convert_tile(
            table_ptr, slots_ptr, stride_slots, packed_ptr, scales_ptr, error_ptr, num_tokens,
            num_heads, num_layers, num_slots, PACK, PAGE_SIZE, K_DIM, V_DIM, K_DIM, WIDTH, ROWS,
            NATIVE, CACHE, CACHE_FORMAT, CACHE_SCALE, CACHE_ALIGN, PACKED, PACKED_FORMAT,
            PACKED_SCALE, PACKED_ALIGN,
        )  # fmt: skip
    elif V_DIM > 0:
        _convert_tile(
            table_ptr, slots_ptr, stride_slots, packed_ptr, scales_ptr, error_ptr, num_tokens,
            num_heads, num_layers, num_slots, PACK, PAGE_SIZE, K_DIM, V_DIM, V_DIM, WIDTH, ROWS,
            NATIVE, CACHE, CACHE_FORMAT, CACHE_SCALE, CACHE_ALIGN, PACKED, PACKED_FORMAT,
            PACKED_SCALE, PACKED_ALIGN,
        )  # fmt: skip


@triton.jit
def _convert_tile(
    table_ptr, slots_ptr, stride_slots, packed_ptr, scales_ptr, error_ptr, num_tokens,
    num_heads, num_layers, num_slots,
    PACK: tl.constexpr, PAGE_SIZE: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, NATIVE: tl.constexpr,
    CACHE: tl.constexpr, CACHE_FORMAT: tl.constexpr, CACHE_SCALE: tl.constexpr,
    CACHE_ALIGN: tl.constexpr, PACKED: tl.constexpr, PACKED_FORMAT: tl.constexpr,
    PACKED_SCALE: tl.constexpr, PACKED_ALIGN: tl.constexpr,
):  # fmt: skip
    ITEM_BYTES: tl.constexpr = PACKED.primitive_bitwidth // 8
    head, tile = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads
    token = tile * ROWS + tl.arange(0, ROWS)
    entry, live, fits, slot = _locate(table_ptr, num_layers, slots_ptr, stride_slots, token, num_tokens, num_slots)
    _record(error_ptr, PACK, head, token, live & (fits == 0))
    cache_rows = _cache_rows(entry, slot, head, PAGE_SIZE)
    cache_scales = _cache_rows(entry + 4, slot, head, PAGE_SIZE).to(tl.pointer_type(tl.float32))
    cache = tile_pointers(cache_rows, CACHE, WIDTH, CACHE_ALIGN)
    packed_rows = _packed_rows(
        packed_ptr, token, head, num_tokens, num_heads, K_DIM * ITEM_BYTES, V_DIM * ITEM_BYTES, DIM * ITEM_BYTES
    )
    packed_scales = _packed_scales(scales_ptr, token, head, num_tokens, num_heads, num_layers, PACKED_SCALE)
    packed = tile_pointers(packed_rows, PACKED, WIDTH, PACKED_ALIGN)
    column = (tl.arange(0, WIDTH) < DIM)[None, :]
    if PACK:
        x = _load_real(cache, cache_scales, fits, column, CACHE_FORMAT, CACHE_SCALE, NATIVE)
        _store_real(x, packed, packed_scales, live, column, PACKED, PACKED_FORMAT, PACKED_SCALE, NATIVE)
    else:
        x = _load_real(packed, packed_scales, fits, column, PACKED_FORMAT, PACKED_SCALE, NATIVE)
        _store_real(x, cache, cache_scales, fits, column, CACHE, CACHE_FORMAT, CACHE_SCALE, NATIVE)


@triton.jit
def _load_real(pointers, scales, rows, column, FORMAT: tl.constexpr, SCALE: tl.constexpr, NATIVE: tl.constexpr):
    """stored * scale, fp32 [ROWS, WIDTH]; 0 where masked."""
    x = to_float32(tl.load(pointers, mask=rows[:, None] & column, other=0), FORMAT, NATIVE)
    if SCALE != "none":
        x = x * tl.load(scales, mask=rows, other=1.0)[:, None]
    return x


@triton.jit
def _store_real(
    x, pointers, scales, rows, column, ELEMENT: tl.constexpr, FORMAT: tl.constexpr,
    SCALE: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Per-token-head scales are written, others read."""
    if SCALE == "none":
        stored = from_float32(x, ELEMENT)
    else:
        if SCALE == "token_head":
            scale = token_head_scale(x, FORMAT)
            tl.store(scales, scale, mask=rows)
        else:
            scale = tl.load(scales, mask=rows, other=1.0)
        stored = quantise(x, scale[:, None], FORMAT, NATIVE)
    tl.store(pointers, stored, mask=rows[:, None] & column)
