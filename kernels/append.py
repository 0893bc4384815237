"""append_kv: new tokens into their slots, K and V and all heads in one launch, quantised on the way."""

from __future__ import annotations

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
    copy_chunks,
    load_real,
    row_strides,
    scale_strides,
    slot_bytes,
    store_real,
)

if TYPE_CHECKING:
    from pagewire.types import Scale

_APPEND_SLOT = tl.constexpr(codes.APPEND_SLOT)
_CHUNKS = 512  # per program of 128 threads: 4 independent 16-byte copies a thread
_TILE = 2048  # elements per program when quantising: 16 fp32 values a thread


class Tensors(NamedTuple):
    """What a call brings, in the order in which its places count them."""

    k: Any  # [num_tokens, num_kv_heads, head_dim], free strides
    v: Any
    k_cache: Any  # [num_pages, page_size, num_kv_heads, head_dim], free strides
    v_cache: Any
    k_scale: Any  # fp32 [], [num_kv_heads] or [num_pages, page_size, num_kv_heads]; a number or None has no place
    v_scale: Any
    slots: Any  # [<= num_tokens] int32 or int64; negative = skip


_PLACES = Tensors._make(map(Place, range(len(Tensors._fields))))


def alignments(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> tuple[int, int]:
    """Of the addresses of new rows, and of the caches': a plan is made for them."""
    rows, caches = k.data_ptr() | v.data_ptr(), k_cache.data_ptr() | v_cache.data_ptr()
    if (rows | caches) % VECTOR_BYTES == 0:
        return VECTOR_BYTES, VECTOR_BYTES
    return alignment(rows), alignment(caches)


def plan(t: Tensors, aligned: tuple[int, int], error_word: Tensor, *, copy: bool) -> Plan:
    num_heads = t.k.shape[1]
    num_rows = t.slots.shape[0] * num_heads
    num_pages, page_size = t.k_cache.shape[:2]
    slots = _Slots(_PLACES.slots, t.slots.stride(0), num_rows, num_heads, num_pages * page_size, error_word)
    strides = [row_strides(x) for x in (t.k, t.v, t.k_cache, t.v_cache)]
    x_align = alignment(aligned[0], *strides[0], *strides[1])
    cache_align = alignment(aligned[1], *strides[2], *strides[3])
    scales = t.k_scale, t.v_scale
    sides = [
        _Side._make((x, *x_strides, cache, *cache_strides, *_scale(scale, place, error_word)))
        for x, x_strides, cache, cache_strides, scale, place in (
            (_PLACES.k, strides[0], _PLACES.k_cache, strides[2], scales[0], _PLACES.k_scale),
            (_PLACES.v, strides[1], _PLACES.v_cache, strides[3], scales[1], _PLACES.v_scale),
        )
    ]
    arguments: dict[str, Any] = {"k": sides[0], "v": sides[1], "slots": slots, "PAGE_SIZE": page_size}
    k_dim, v_dim = t.k.shape[-1], t.v.shape[-1]
    if copy:
        k_bytes, v_bytes = k_dim * t.k.element_size(), v_dim * t.k.element_size()
        align = alignment(x_align, cache_align, k_bytes, v_bytes)
        num_programs = triton.cdiv(num_rows * max(k_bytes, v_bytes) // align, _CHUNKS)
        kernel = _append_copy_kernel
        arguments |= {"K_BYTES": k_bytes, "V_BYTES": v_bytes, "ALIGN": align, "CHUNKS": _CHUNKS}
    else:
        width = triton.next_power_of_2(max(k_dim, v_dim))
        rows = max(1, _TILE // width)
        num_programs = triton.cdiv(num_rows, rows)
        kernel = _append_quantise_kernel
        k_stored, v_stored = (Stored.of(t.k_cache.dtype, scale_kind(scale), cache_align) for scale in scales)
        arguments |= {
            "K_DIM": k_dim, "V_DIM": v_dim, "WIDTH": width, "ROWS": rows, "NATIVE": native_fp8(t.k.device),
            "given": Stored.of(t.k.dtype, "none", x_align), "k_stored": k_stored, "v_stored": v_stored,
        }  # fmt: skip
    return Plan([Launch(kernel, (num_programs, 2, 1), arguments, {})] if num_rows else (), t.k.device)


class _Side(NamedTuple):
    """New rows of K or V and the cache they go to; strides in bytes."""

    ptr: Any
    stride_token: int
    stride_head: int
    cache: Any
    stride_cache_page: int
    stride_cache_token: int
    stride_cache_head: int
    scale: Any  # the number, or a pointer
    stride_scale_page: int
    stride_scale_token: int
    stride_scale_head: int


class _Slots(NamedTuple):
    ptr: Any  # [num_tokens]
    stride: int  # in elements
    num_rows: int  # tokens times heads
    num_heads: int
    num_slots: int
    error_word: Any


def _scale(scale: Scale, place: Place, nothing: Tensor) -> tuple[Any, ...]:
    """The scale, strides of page, token and head."""
    if isinstance(scale, Tensor):
        return (place, *scale_strides(scale.stride()))
    return (nothing if scale is None else float(scale), 0, 0, 0)


@triton.jit
def _append_copy_kernel(
    k,  # _Side
    v,
    slots,  # _Slots
    PAGE_SIZE: tl.constexpr,
    K_BYTES: tl.constexpr,
    V_BYTES: tl.constexpr,
    ALIGN: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """grid: [num_tiles, 2]; a program copies CHUNKS chunks of ALIGN bytes of K (0) or V (1), token-major.
    Bound by memory."""
    if tl.program_id(1) == 0:
        _copy_rows(k, slots, PAGE_SIZE, K_BYTES // ALIGN, ALIGN, CHUNKS)
    else:
        _copy_rows(v, slots, PAGE_SIZE, V_BYTES // ALIGN, ALIGN, CHUNKS)


@triton.jit
def _copy_rows(
    side, slots, PAGE_SIZE: tl.constexpr, ROW_CHUNKS: tl.constexpr, ALIGN: tl.constexpr, CHUNKS: tl.constexpr
):
    # the tile's first chunk in 64 bits, the rest relative to it in 32
    first = tl.program_id(0).to(tl.int64) * CHUNKS
    chunk = (first % ROW_CHUNKS).to(tl.int32) + tl.arange(0, CHUNKS)
    row = (first // ROW_CHUNKS).to(tl.int32) + chunk // ROW_CHUNKS
    column = (chunk % ROW_CHUNKS).to(tl.int64) * ALIGN
    source, target, _, _, fits = _locate(side, slots, row, column == 0, PAGE_SIZE)
    copy_chunks(source + column, target + column, fits, fits, ALIGN)


@triton.jit
def _append_quantise_kernel(
    k,  # _Side
    v,
    slots,  # _Slots
    PAGE_SIZE: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    NATIVE: tl.constexpr,
    given: tl.constexpr,  # Stored
    k_stored: tl.constexpr,
    v_stored: tl.constexpr,
):
    """grid: [num_tiles, 2]; a program quantises ROWS (token, head) rows of K (0) or V (1). Bound by memory."""
    if tl.program_id(1) == 0:
        _quantise_rows(k, slots, PAGE_SIZE, K_DIM, WIDTH, ROWS, NATIVE, given, k_stored)
    else:
        _quantise_rows(v, slots, PAGE_SIZE, V_DIM, WIDTH, ROWS, NATIVE, given, v_stored)


@triton.jit
def _quantise_rows(
    side,
    slots,
    PAGE_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    NATIVE: tl.constexpr,
    given: tl.constexpr,
    stored: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    source, target, slot, head, fits = _locate(side, slots, row, row >= 0, PAGE_SIZE)
    width_ok = (tl.arange(0, WIDTH) < DIM)[None, :]
    x = load_real(source, source, fits, width_ok, WIDTH, NATIVE, given)
    if stored.SCALE == "value":
        store_real(x, target, side.scale, fits, width_ok, NATIVE, stored)
    else:
        address = side.scale.to(tl.int64) + head.to(tl.int64) * side.stride_scale_head
        address += slot_bytes(slot, side.stride_scale_page, side.stride_scale_token, PAGE_SIZE)
        store_real(x, target, address.to(tl.pointer_type(tl.float32)), fits, width_ok, NATIVE, stored)


@triton.jit
def _locate(side, slots, row, reports, PAGE_SIZE: tl.constexpr):
    """Of (token, head) rows [N]: byte addresses of source and target, slot (0 where none), head, whether it fits."""
    token, head = row // slots.num_heads, row % slots.num_heads
    mask = row < slots.num_rows
    slot = tl.load(slots.ptr + token.to(tl.int64) * slots.stride, mask=mask, other=-1).to(tl.int64)  # < 0: skip
    fits = (slot >= 0) & (slot < slots.num_slots)
    if tl.program_id(1) == 0:  # K reports for both
        record_error(slots.error_word, _APPEND_SLOT, 0, token, (slot >= slots.num_slots) & (head == 0) & reports)
    slot = tl.where(fits, slot, 0)
    source = side.ptr.to(tl.int64) + token.to(tl.int64) * side.stride_token + head.to(tl.int64) * side.stride_head
    target = side.cache.to(tl.int64) + slot_bytes(slot, side.stride_cache_page, side.stride_cache_token, PAGE_SIZE)
    return source, target + head.to(tl.int64) * side.stride_cache_head, slot, head, fits
