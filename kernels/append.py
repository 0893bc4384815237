"""append_kv: new tokens into their slots, K and V and all heads in one launch, quantised on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from pagewire.kernels import error_codes as codes
from pagewire.kernels import move
from pagewire.kernels.errors import WordOf
from pagewire.kernels.place import Place
from pagewire.kernels.plan import Plan
from pagewire.kernels.quant import native_fp8, scale_kind
from pagewire.kernels.rows import VECTOR_BYTES, Stored, alignment, row_strides, scale_strides

if TYPE_CHECKING:
    from pagewire.moves import Movement
    from pagewire.types import Kept, Scale


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


def run(movement: Movement, word_of: WordOf, kept: Kept, *, copy: bool) -> None:
    """word_of: a device's error word. kept: for calls of the same kind."""
    k, v = movement.parts
    k_scale, v_scale = (part.cache_scales[0] if part.cache_scales else None for part in (k, v))
    t = Tensors(k.rows, v.rows, k.caches[0], v.caches[0], k_scale, v_scale, movement.slots)
    rows, caches = t.k.data_ptr() | t.v.data_ptr(), t.k_cache.data_ptr() | t.v_cache.data_ptr()
    aligned = (alignment(rows), alignment(caches)) if (rows | caches) % VECTOR_BYTES else (VECTOR_BYTES, VECTOR_BYTES)
    plan = kept.get(aligned)
    if plan is None:
        plan = kept[aligned] = _plan(t, *aligned, word_of(t.slots.device), copy)
    plan.run(*t)


def _plan(t: Tensors, rows_align: int, cache_align: int, error_word: Tensor, copy: bool) -> Plan:
    """Adjacent rows are heads of a token."""
    num_heads, itemsize = t.k.shape[1], t.k.element_size()
    num_pages, page_size = t.k_cache.shape[:2]
    k_bytes, v_bytes = t.k.shape[-1] * itemsize, t.v.shape[-1] * itemsize
    k_strides, v_strides, k_cache_strides, v_cache_strides = map(row_strides, (t.k, t.v, t.k_cache, t.v_cache))
    rows_align = alignment(rows_align, *k_strides, *v_strides, *((k_bytes, v_bytes) if copy else ()))
    cache_align = alignment(cache_align, *k_cache_strides, *v_cache_strides)
    k, v = (
        move.Plane._make((cache, *strides, *_scale(scale, place, error_word)))
        for cache, strides, scale, place in (
            (_PLACES.k_cache, k_cache_strides, t.k_scale, _PLACES.k_scale),
            (_PLACES.v_cache, v_cache_strides, t.v_scale, _PLACES.v_scale),
        )
    )
    rows = move.Given._make((_PLACES.k, *k_strides, _PLACES.v, *v_strides))
    slots = move.Slots(
        _PLACES.slots, t.slots.stride(0), t.slots.shape[0], num_pages * page_size,
        heads_together=num_heads, heads_apart=1, error_word=error_word,
    )  # fmt: skip
    k_stored, v_stored = (Stored.of(t.k_cache.dtype, scale_kind(s), cache_align) for s in (t.k_scale, t.v_scale))
    of = move.Move(
        codes.APPEND_SLOT, FROM_CACHE=False, TABLE=False, PAGE_SIZE=page_size, K_BYTES=k_bytes, V_BYTES=v_bytes,
        NATIVE=native_fp8(t.k.device), K_CACHE=k_stored, V_CACHE=v_stored,
        ROWS=Stored.of(t.k.dtype, "none", rows_align),
    )  # fmt: skip
    return move.plan(k, v, rows, slots, of, 1, t.k.device, copy=copy)


def _scale(scale: Scale, place: Place, nothing: Tensor) -> tuple[Any, ...]:
    """The scale, strides of page, token and head."""
    if isinstance(scale, Tensor):
        return (place, *scale_strides(scale.stride()))
    return (nothing if scale is None else float(scale), 0, 0, 0)
