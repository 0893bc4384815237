"""append_kv: new tokens into their slots, K and V and all heads in one launch, quantised on the way."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from pagewire.kernels import error_codes as codes
from pagewire.kernels.device import current
from pagewire.kernels.errors import record_error
from pagewire.kernels.quant import ELEMENTS, as_stored, format_of, native_fp8, quantise, to_float32, token_head_scale
from pagewire.kernels.rows import alignment, copy_chunks, row_strides, scale_strides, slot_bytes, tile_pointers

_APPEND_SLOT = tl.constexpr(codes.APPEND_SLOT)
_CHUNKS = 512  # per program of 128 threads: 4 independent 16-byte copies a thread
_TILE = 2048  # elements per program when quantising: 16 fp32 values a thread


def append_kv(
    k: Any,  # Part of pagewire/moves.py: rows [num_tokens, num_kv_heads, head_dim], free strides
    v: Any,
    slot_mapping: Tensor,  # [<= num_tokens] int32 or int64; negative = skip
    error_word: Tensor,
) -> None:
    if k.rows.shape[1] == 0:
        return
    k_scale, v_scale = (part.cache_scales[0] if part.cache_scales else None for part in (k, v))
    with current(k.rows.device):
        _launch(k.rows, v.rows, k.caches[0], v.caches[0], slot_mapping, k_scale, v_scale, error_word)


def _launch(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | float | None,
    v_scale: Tensor | float | None,
    error_word: Tensor,
) -> None:
    num_heads = k.shape[1]
    num_rows = slot_mapping.shape[0] * num_heads
    num_slots, page_size = k_cache.shape[0] * k_cache.shape[1], k_cache.shape[1]
    slots = (slot_mapping, slot_mapping.stride(0), num_rows, num_heads, num_slots, error_word)
    strides = [row_strides(x) for x in (k, v, k_cache, v_cache)]
    k_args, v_args = (k, *strides[0]), (v, *strides[1])
    k_cache_args = (as_stored(k_cache), *strides[2])
    v_cache_args = (as_stored(v_cache), *strides[3])
    x_align = alignment(k.data_ptr(), v.data_ptr(), *strides[0], *strides[1])
    cache_align = alignment(k_cache.data_ptr(), v_cache.data_ptr(), *strides[2], *strides[3])
    if k.dtype == k_cache.dtype:
        k_bytes, v_bytes = (x.shape[-1] * x.element_size() for x in (k, v))
        align = alignment(x_align, cache_align, k_bytes, v_bytes)
        num_chunks = num_rows * max(k_bytes, v_bytes) // align
        _append_copy_kernel[(triton.cdiv(num_chunks, _CHUNKS), 2)](
            *k_args, *k_cache_args, *v_args, *v_cache_args, *slots,
            PAGE_SIZE=page_size, K_BYTES=k_bytes, V_BYTES=v_bytes, ALIGN=align, CHUNKS=_CHUNKS,
        )  # fmt: skip
        return
    k_kind, k_scale_args = _scale_args(k_scale, error_word)
    v_kind, v_scale_args = _scale_args(v_scale, error_word)
    width = triton.next_power_of_2(max(k.shape[-1], v.shape[-1]))
    rows = max(1, _TILE // width)
    _append_quantise_kernel[(triton.cdiv(num_rows, rows), 2)](
        *k_args, *k_cache_args, *k_scale_args, *v_args, *v_cache_args, *v_scale_args, *slots,
        PAGE_SIZE=page_size, K_DIM=k.shape[-1], V_DIM=v.shape[-1], WIDTH=width, ROWS=rows,
        ELEMENT=ELEMENTS[k.dtype], FORMAT=format_of(k_cache.dtype), NATIVE=native_fp8(k.device),
        K_SCALE=k_kind, V_SCALE=v_kind, X_ALIGN=x_align, CACHE_ALIGN=cache_align,
    )  # fmt: skip


def _scale_args(scale: Tensor | float | None, nothing: Tensor) -> tuple[str, tuple[Any, ...]]:
    """Kind "value", "read" or "write"; tensor, value, byte strides of page, token and head."""
    if isinstance(scale, Tensor):
        kind = "write" if scale.dim() == 3 else "read"
        return kind, (scale, 1.0, *scale_strides(scale.stride()))
    assert scale is not None
    return "value", (nothing, float(scale), 0, 0, 0)


@triton.jit
def _append_copy_kernel(
    k_ptr, stride_kt, stride_kh,  # strides in bytes throughout
    k_cache_ptr, stride_kc_page, stride_kc_token, stride_kc_head,
    v_ptr, stride_vt, stride_vh,
    v_cache_ptr, stride_vc_page, stride_vc_token, stride_vc_head,
    slots_ptr, stride_slots,  # [num_tokens], in elements
    num_rows, num_heads, num_slots, error_ptr,
    PAGE_SIZE: tl.constexpr, K_BYTES: tl.constexpr, V_BYTES: tl.constexpr, ALIGN: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """grid: [num_tiles, 2]; a program copies CHUNKS chunks of ALIGN bytes of K (0) or V (1), token-major."""
    if tl.program_id(1) == 0:
        _copy_rows(
            k_ptr, stride_kt, stride_kh, k_cache_ptr, stride_kc_page, stride_kc_token,
            stride_kc_head, slots_ptr, stride_slots, num_rows, num_heads, num_slots, error_ptr,
            PAGE_SIZE, K_BYTES // ALIGN, ALIGN, CHUNKS,
        )  # fmt: skip
    else:
        _copy_rows(
            v_ptr, stride_vt, stride_vh, v_cache_ptr, stride_vc_page, stride_vc_token,
            stride_vc_head, slots_ptr, stride_slots, num_rows, num_heads, num_slots, error_ptr,
            PAGE_SIZE, V_BYTES // ALIGN, ALIGN, CHUNKS,
        )  # fmt: skip


@triton.jit
def _copy_rows(
    x_ptr, stride_t, stride_h, cache_ptr, stride_page, stride_token, stride_head,
    slots_ptr, stride_slots, num_rows, num_heads, num_slots, error_ptr,
    PAGE_SIZE: tl.constexpr, ROW_CHUNKS: tl.constexpr, ALIGN: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    # the tile's first chunk in 64 bits, the rest relative to it in 32
    first = tl.program_id(0).to(tl.int64) * CHUNKS
    chunk = (first % ROW_CHUNKS).to(tl.int32) + tl.arange(0, CHUNKS)
    row = (first // ROW_CHUNKS).to(tl.int32) + chunk // ROW_CHUNKS
    column = (chunk % ROW_CHUNKS).to(tl.int64) * ALIGN
    token, head = row // num_heads, row % num_heads
    slot = _load_slots(slots_ptr, stride_slots, token, row < num_rows)
    fits = (slot >= 0) & (slot < num_slots)
    _record(error_ptr, token, (slot >= num_slots) & (head == 0) & (column == 0))
    source = x_ptr.to(tl.int64) + token.to(tl.int64) * stride_t + head.to(tl.int64) * stride_h
    target = cache_ptr.to(tl.int64) + slot_bytes(tl.where(fits, slot, 0), stride_page, stride_token, PAGE_SIZE)
    target += head.to(tl.int64) * stride_head
    copy_chunks(source + column, target + column, fits, fits, ALIGN)


@triton.jit
def _append_quantise_kernel(
    k_ptr, stride_kt, stride_kh,  # strides in bytes throughout
    k_cache_ptr, stride_kc_page, stride_kc_token, stride_kc_head,
    k_scale_ptr, k_scale_value, stride_ks_page, stride_ks_token, stride_ks_head,
    v_ptr, stride_vt, stride_vh,
    v_cache_ptr, stride_vc_page, stride_vc_token, stride_vc_head,
    v_scale_ptr, v_scale_value, stride_vs_page, stride_vs_token, stride_vs_head,
    slots_ptr, stride_slots,  # [num_tokens], in elements
    num_rows, num_heads, num_slots, error_ptr,
    PAGE_SIZE: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, ELEMENT: tl.constexpr, FORMAT: tl.constexpr, NATIVE: tl.constexpr,
    K_SCALE: tl.constexpr, V_SCALE: tl.constexpr, X_ALIGN: tl.constexpr, CACHE_ALIGN: tl.constexpr,
):  # fmt: skip
    """grid: [num_tiles, 2]; a program quantises ROWS (token, head) rows of K (0) or V (1)."""
    if tl.program_id(1) == 0:
        _quantise_rows(
            k_ptr, stride_kt, stride_kh, k_cache_ptr, stride_kc_page, stride_kc_token,
            stride_kc_head, k_scale_ptr, k_scale_value, stride_ks_page, stride_ks_token,
            stride_ks_head, slots_ptr, stride_slots, num_rows, num_heads, num_slots, error_ptr,
            PAGE_SIZE, K_DIM, WIDTH, ROWS, ELEMENT, FORMAT, NATIVE, K_SCALE, X_ALIGN, CACHE_ALIGN,
        )  # fmt: skip
    else:
        _quantise_rows(
            v_ptr, stride_vt, stride_vh, v_cache_ptr, stride_vc_page, stride_vc_token,
            stride_vc_head, v_scale_ptr, v_scale_value, stride_vs_page, stride_vs_token,
            stride_vs_head, slots_ptr, stride_slots, num_rows, num_heads, num_slots, error_ptr,
            PAGE_SIZE, V_DIM, WIDTH, ROWS, ELEMENT, FORMAT, NATIVE, V_SCALE, X_ALIGN, CACHE_ALIGN,
        )  # fmt: skip


@triton.jit
def _quantise_rows(
    x_ptr, stride_t, stride_h, cache_ptr, stride_page, stride_token, stride_head,
    scale_ptr, scale_value, stride_s_page, stride_s_token, stride_s_head,
    slots_ptr, stride_slots, num_rows, num_heads, num_slots, error_ptr,
    PAGE_SIZE: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    ELEMENT: tl.constexpr, FORMAT: tl.constexpr, NATIVE: tl.constexpr, SCALE: tl.constexpr,
    X_ALIGN: tl.constexpr, CACHE_ALIGN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, head = row // num_heads, (row % num_heads).to(tl.int64)
    slot = _load_slots(slots_ptr, stride_slots, token, row < num_rows)
    fits = (slot >= 0) & (slot < num_slots)
    _record(error_ptr, token, (slot >= num_slots) & (head == 0))
    slot = tl.where(fits, slot, 0)
    mask = fits[:, None] & (tl.arange(0, WIDTH) < DIM)[None, :]
    source = x_ptr.to(tl.int64) + token.to(tl.int64) * stride_t + head * stride_h
    x = tl.load(tile_pointers(source, ELEMENT, WIDTH, X_ALIGN), mask=mask, other=0.0)
    x = to_float32(x, "float", NATIVE)  # [ROWS, WIDTH]
    if SCALE == "value":
        scale = scale_value + tl.zeros([ROWS], tl.float32)
    else:
        address = scale_ptr.to(tl.int64) + head * stride_s_head
        address += slot_bytes(slot, stride_s_page, stride_s_token, PAGE_SIZE)
        scales = address.to(tl.pointer_type(tl.float32))
        if SCALE == "write":
            scale = token_head_scale(x, FORMAT)
            tl.store(scales, scale, mask=fits)
        else:
            scale = tl.load(scales, mask=fits, other=1.0)
    target = cache_ptr.to(tl.int64) + slot_bytes(slot, stride_page, stride_token, PAGE_SIZE)
    target += head * stride_head
    STORED: tl.constexpr = tl.int8 if FORMAT == "int8" else tl.uint8
    stored = quantise(x, scale[:, None], FORMAT, NATIVE)
    tl.store(tile_pointers(target, STORED, WIDTH, CACHE_ALIGN), stored, mask=mask)


@triton.jit
def _load_slots(slots_ptr, stride_slots, token, mask):
    """int64; -1, which is skipped, outside the mask."""
    offset = token.to(tl.int64) * stride_slots
    return tl.load(slots_ptr + offset, mask=mask, other=-1).to(tl.int64)


@triton.jit
def _record(error_ptr, token, past_the_end):
    if tl.program_id(1) == 0:  # K reports for both
        record_error(error_ptr, _APPEND_SLOT, 0, token, past_the_end)
