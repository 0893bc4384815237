"""append_kv, pack_kv and unpack_kv as one movement: rows (token, head) between a paged cache and where they lie dense.

Dense rows are new ones with strides of their own, or a packed buffer, [L][K | V][H][T][D] (see pagewire/packed.py). A
cache's plane, K or V of a layer, is an argument or, where there are many, a row of a table on the device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from pagewire.kernels import error_codes as codes
from pagewire.kernels.errors import record_error
from pagewire.kernels.place import Launch
from pagewire.kernels.plan import Plan
from pagewire.kernels.rows import Stored, copy_chunks, element, load_real, slot_bytes, store_real

_CHUNKS = 512  # per program of 128 threads: 4 independent 16-byte copies a thread
_TILE = 2048  # elements per program when converting: 16 fp32 values a thread
_SKIPS = tl.constexpr(codes.APPEND_SLOT)  # of all moves, the one for which a negative slot means: skip


class Plane(NamedTuple):
    """K or V of a layer; strides in bytes. As a row of a table: int64 all."""

    ptr: Any
    stride_page: Any
    stride_token: Any
    stride_head: Any
    scale: Any  # the number, or where they lie
    stride_scale_page: Any
    stride_scale_token: Any
    stride_scale_head: Any


class Given(NamedTuple):
    """New rows; strides in bytes."""

    k: Any
    stride_k_token: int
    stride_k_head: int
    v: Any
    stride_v_token: int
    stride_v_head: int


class Packed(NamedTuple):
    """A packed buffer."""

    ptr: Any  # uint8
    num_layers: int
    num_heads: int
    scales: Any  # fp32 [K | V, L], [K | V, L, H] or [K | V, L, H, T]
    stride_scale_layer: int  # times num_tokens, if they are per token
    stride_scale_head: int


class Slots(NamedTuple):
    ptr: Any  # int32 or int64 [>= num_tokens]
    stride: int
    num_tokens: int
    num_slots: int  # of a plane
    # Adjacent rows are heads of a token (new rows, and an NHD cache), or tokens of a head (a packed buffer); then
    # adjacent programs take the heads of the same tokens.
    heads_together: int
    heads_apart: int
    error_word: Any


class Move(NamedTuple):
    """What a kernel is compiled for."""

    ERROR: int  # of error_codes
    FROM_CACHE: bool
    TABLE: bool  # planes are rows of a table, the dense rows are packed
    PAGE_SIZE: int
    K_BYTES: int  # of a dense row
    V_BYTES: int  # 0: V is a view of K
    NATIVE: bool
    K_CACHE: Stored
    V_CACHE: Stored
    ROWS: Stored


def plan(
    k: Any, v: Any, rows: Given | Packed, slots: Slots, move: Move, num_layers: int, device: torch.device, *, copy: bool
) -> Plan:
    """k, v: planes, or the table for both. grid: [num_tiles * heads_apart, K and V, num_layers]."""
    num_rows = slots.num_tokens * slots.heads_together
    arguments = {"k": k, "v": v, "rows": rows, "slots": slots, "move": move}
    widest = max(move.K_BYTES, move.V_BYTES)
    kernel: Any
    options = {}
    if copy:
        align = min(move.ROWS.ALIGN, move.K_CACHE.ALIGN)
        num_chunks = num_rows * widest // align
        chunks = min(_CHUNKS, max(128, triton.next_power_of_2(num_chunks)))
        kernel, num_tiles = _copy_kernel, triton.cdiv(num_chunks, chunks)
        arguments |= {"ALIGN": align, "CHUNKS": chunks}
    else:
        width = triton.next_power_of_2(widest // move.ROWS.num_bytes)
        tile_rows = max(1, _TILE // width)
        kernel, num_tiles = _convert_kernel, triton.cdiv(num_rows, tile_rows)
        arguments |= {"WIDTH": width, "ROWS": tile_rows}
        if move.ROWS.num_bytes == 4:  # left to itself, ptxas spills 8 bytes of fp32 rows to stay at 40
            options["maxnreg"] = 48
    grid = (num_tiles * slots.heads_apart, 2 if move.V_BYTES else 1, num_layers)
    return Plan([Launch(kernel, grid, arguments, options)] if num_rows else (), device)


# ------------------------------------------------------------------------------------------ the same bytes


@triton.jit
def _copy_kernel(
    k,  # Plane, or the table: int64 [K | V, num_layers, Plane's fields]
    v,
    rows,  # Given or Packed
    slots,  # Slots
    ALIGN: tl.constexpr,
    CHUNKS: tl.constexpr,
    move: tl.constexpr,
):
    """grid as `plan` has it; a program moves CHUNKS chunks of ALIGN bytes of a layer's K (0) or V (1), and the scales
    of their tokens. Bound by memory."""
    if tl.program_id(1) == 0:
        _copy_tile(k, rows, slots, ALIGN, CHUNKS, 0, move)
    elif move.V_BYTES > 0:
        _copy_tile(v, rows, slots, ALIGN, CHUNKS, 1, move)


@triton.jit
def _copy_tile(plane, rows, slots, ALIGN: tl.constexpr, CHUNKS: tl.constexpr, SIDE: tl.constexpr, move: tl.constexpr):
    ROW_CHUNKS: tl.constexpr = (move.V_BYTES if SIDE else move.K_BYTES) // ALIGN
    # the tile's first chunk in 64 bits, the others relative to it in 32
    first = (tl.program_id(0) // slots.heads_apart).to(tl.int64) * CHUNKS
    chunk = (first % ROW_CHUNKS).to(tl.int32) + tl.arange(0, CHUNKS)
    row = (first // ROW_CHUNKS).to(tl.int32) + chunk // ROW_CHUNKS
    column = ((chunk % ROW_CHUNKS) * ALIGN).to(tl.int64)
    once = column == 0
    token, head, slot, live, fits = _place(row, once, slots, SIDE, move)
    in_cache, cache_scales = _in_cache(plane, slot, head, rows, SIDE, move)
    dense, scales = _dense(rows, token, head, slots, SIDE, move)
    if move.FROM_CACHE:
        copy_chunks(in_cache + column, dense + column, fits, live, ALIGN)
    else:
        copy_chunks(dense + column, in_cache + column, fits, fits, ALIGN)
    if move.ROWS.SCALE == "token":
        if move.FROM_CACHE:
            tl.store(scales, tl.load(cache_scales, mask=fits & once, other=1.0), mask=live & once)
        else:
            tl.store(cache_scales, tl.load(scales, mask=fits & once), mask=fits & once)
    elif move.FROM_CACHE and move.ROWS.SCALE != "none":  # unpack converts to the cache's own tensor or head scale
        if tl.program_id(0) < slots.heads_apart:
            first_token = once & (token == 0)
            tl.store(scales, tl.load(cache_scales, mask=first_token), mask=first_token)


# ------------------------------------------------------------------------------------------ other bytes


@triton.jit
def _convert_kernel(
    k,  # as in _copy_kernel
    v,
    rows,
    slots,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    move: tl.constexpr,
):
    """grid as `plan` has it; a program converts ROWS rows of a layer's K (0) or V (1). Bound by memory."""
    if tl.program_id(1) == 0:
        _convert_tile(k, rows, slots, WIDTH, ROWS, 0, move)
    elif move.V_BYTES > 0:
        _convert_tile(v, rows, slots, WIDTH, ROWS, 1, move)


@triton.jit
def _convert_tile(plane, rows, slots, WIDTH: tl.constexpr, ROWS: tl.constexpr, SIDE: tl.constexpr, move: tl.constexpr):
    CACHE: tl.constexpr = move.V_CACHE if SIDE else move.K_CACHE
    DENSE: tl.constexpr = move.ROWS
    NATIVE: tl.constexpr = move.NATIVE
    ROW_BYTES: tl.constexpr = move.V_BYTES if SIDE else move.K_BYTES
    NAME: tl.constexpr = DENSE.ELEMENT
    DIM: tl.constexpr = ROW_BYTES // (element(NAME).primitive_bitwidth // 8)
    row = tl.program_id(0) // slots.heads_apart * ROWS + tl.arange(0, ROWS)
    token, head, slot, live, fits = _place(row, row >= 0, slots, SIDE, move)
    in_cache, cache_scales = _in_cache(plane, slot, head, rows, SIDE, move)
    dense, scales = _dense(rows, token, head, slots, SIDE, move)
    width_ok = (tl.arange(0, WIDTH) < DIM)[None, :]
    if move.FROM_CACHE:
        x = load_real(in_cache, cache_scales, fits, width_ok, WIDTH, NATIVE, CACHE)
        store_real(x, dense, scales, live, width_ok, NATIVE, DENSE)
    else:
        x = load_real(dense, scales, fits, width_ok, WIDTH, NATIVE, DENSE)
        store_real(x, in_cache, cache_scales, fits, width_ok, NATIVE, CACHE)


# ------------------------------------------------------------------------------------------ where things are


@triton.jit
def _place(row, reports, slots, SIDE: tl.constexpr, move: tl.constexpr):
    """Of the program's rows [N]: token, head, slot (0 where none), whether the token exists, whether its slot does."""
    first_head = tl.program_id(0) % slots.heads_apart
    token = row // slots.heads_together
    head = first_head + row % slots.heads_together
    live = token < slots.num_tokens
    slot = tl.load(slots.ptr + token.to(tl.int64) * slots.stride, mask=live, other=-1).to(tl.int64)
    fits = (slot >= 0) & (slot < slots.num_slots)
    if SIDE == 0:  # every plane and head sees the same slots: one of them reports
        if (tl.program_id(2) == 0) & (first_head == 0):
            wrong = slot >= slots.num_slots
            if move.ERROR != _SKIPS:
                wrong = live & (fits == 0)
            record_error(slots.error_word, move.ERROR, 0, token, wrong & (head == 0) & reports)
    return token, head, tl.where(fits, slot, 0), live, fits


@triton.jit
def _in_cache(plane, slot, head, rows, SIDE: tl.constexpr, move: tl.constexpr):
    """int64 byte addresses [N] in the cache, and pointers of scales [N], or the number that is the scale."""
    PAGE_SIZE: tl.constexpr = move.PAGE_SIZE
    SCALE: tl.constexpr = move.V_CACHE.SCALE if SIDE else move.K_CACHE.SCALE
    head = head.to(tl.int64)
    if move.TABLE:
        plane = _tabled(plane, SIDE * rows.num_layers + tl.program_id(2))
    address = plane.ptr.to(tl.int64) + head * plane.stride_head
    address += slot_bytes(slot, plane.stride_page, plane.stride_token, PAGE_SIZE)
    scale = plane.scale
    if SCALE != "value":
        scale = plane.scale.to(tl.int64) + head * plane.stride_scale_head
        scale += slot_bytes(slot, plane.stride_scale_page, plane.stride_scale_token, PAGE_SIZE)
        scale = scale.to(tl.pointer_type(tl.float32))
    return address, scale


@triton.jit
def _tabled(table, index):
    row = table + index * 8
    return Plane(
        tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3),
        tl.load(row + 4), tl.load(row + 5), tl.load(row + 6), tl.load(row + 7),
    )  # fmt: skip


@triton.jit
def _dense(rows, token, head, slots, SIDE: tl.constexpr, move: tl.constexpr):
    """int64 byte addresses [N] of dense rows, and pointers of their scales [N]; new rows have none."""
    if move.TABLE:
        address, scale = _packed(rows, token, head, slots, SIDE, move)
    else:
        address = _given(rows, token.to(tl.int64), head.to(tl.int64), SIDE)
        scale = address
    return address, scale


@triton.jit
def _given(rows, token, head, SIDE: tl.constexpr):
    if SIDE == 0:
        return rows.k.to(tl.int64) + token * rows.stride_k_token + head * rows.stride_k_head
    else:
        return rows.v.to(tl.int64) + token * rows.stride_v_token + head * rows.stride_v_head


@triton.jit
def _packed(rows, token, head, slots, SIDE: tl.constexpr, move: tl.constexpr):
    layer = tl.program_id(2).to(tl.int64)
    num_rows = tl.cast(rows.num_heads, tl.int64) * slots.num_tokens  # of K, and as many of V
    row = head.to(tl.int64) * slots.num_tokens + token
    start = rows.ptr.to(tl.int64) + num_rows * layer * (move.K_BYTES + move.V_BYTES)
    if SIDE == 0:
        address = start + row * move.K_BYTES
    else:
        address = start + num_rows * move.K_BYTES + row * move.V_BYTES
    scale = (SIDE * rows.num_layers + layer) * rows.stride_scale_layer + head * rows.stride_scale_head
    if move.ROWS.SCALE == "token":
        scale = scale * slots.num_tokens + token
    return address, rows.scales + scale
