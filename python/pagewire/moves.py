"""append_kv, pack_kv and unpack_kv as one movement: which planes of the cache, which rows, which scales, and how.

Decided here for every backend: bytes or values, and which side's scale is read, made or travels along.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import Literal, NamedTuple

from torch import Tensor

from pagewire.cache_part import LayerViews
from pagewire.packed import PackedKV
from pagewire.types import QUANT_MAX, Scale

Op = Literal["append_kv", "pack_kv", "unpack_kv"]


class How(IntEnum):
    """enum MoveHow of csrc/pagewire/params.h."""

    COPY = 0  # bytes; what scale the source has travels along
    CONVERT = 1  # source times its scale, over the target's
    QUANTISE = 2  # the same, and the target's scale is made: per token and head, from the row's amax


class Part(NamedTuple):
    """K or V of all layers. Scales: real = stored * scale."""

    caches: Sequence[Tensor]  # per layer [num_pages, page_size, num_heads, width], free strides but for the last
    cache_scales: Sequence[Scale]  # per layer a number or fp32 [], [H], [num_pages, page_size, H]; empty: none
    rows: Tensor  # [num_layers, num_tokens, num_heads, width]; [num_tokens, num_heads, width]: of the one layer
    row_scales: Tensor | None  # fp32 [num_layers], [num_layers, num_heads] or [num_layers, num_tokens, num_heads]
    how: How


class Movement(NamedTuple):
    op: Op
    parts: tuple[Part, ...]  # K, then V unless it is a view of K
    slots: Tensor  # [<= num_tokens]; append_kv: int32 or int64, negative = skip; else int64
    packed: PackedKV | None = None  # the buffer that all rows and their scales lie in

    @property
    def from_cache(self) -> bool:
        return self.op == "pack_kv"

    @property
    def slots_name(self) -> str:
        return "slot_mapping" if self.op == "append_kv" else "slots"


class Layer(NamedTuple):
    """K or V of one layer."""

    cache: Tensor
    cache_scale: Scale
    rows: Tensor  # [num_tokens, num_heads, width]
    row_scale: Tensor | None  # [], [num_heads] or [num_tokens, num_heads]
    how: How


def layers(movement: Movement) -> Iterator[Layer]:
    for part in movement.parts:
        for i, cache in enumerate(part.caches):
            yield Layer(
                cache, part.cache_scales[i] if part.cache_scales else None,
                part.rows if part.rows.dim() == 3 else part.rows[i],
                None if part.row_scales is None else part.row_scales[i], part.how,
            )  # fmt: skip


def append(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, k_scale: Scale, v_scale: Scale
) -> Movement:
    """Caches as NHD views."""
    return Movement("append_kv", (_appended(k, k_cache, k_scale), _appended(v, v_cache, v_scale)), slot_mapping)


def _appended(rows: Tensor, cache: Tensor, scale: Scale) -> Part:
    if cache.dtype not in QUANT_MAX:
        return Part((cache,), (), rows, None, How.COPY)
    return Part((cache,), (scale,), rows, None, How.QUANTISE if _per_token(scale) else How.CONVERT)


def pack(views: LayerViews, slots: Tensor, packed: PackedKV) -> Movement:
    """Another 8-bit dtype than the cache's is requantised per token and head."""
    if packed.shape.dtype == views.k[0].dtype:
        how = How.COPY
    else:
        how = How.CONVERT if packed.k_scale is None else How.QUANTISE
    return Movement("pack_kv", _packed_parts(views, packed, how), slots, packed)


def unpack(packed: PackedKV, views: LayerViews, slots: Tensor) -> Movement:
    """Bytes are right only where no scale belongs to more than a token: the cache's own would not fit them."""
    per_token = bool(views.k_scale) and _per_token(views.k_scale[0])
    if packed.shape.dtype == views.k[0].dtype and (
        packed.k_scale is None or (per_token and packed.scale_kind == "token_head")
    ):
        how = How.COPY
    else:
        how = How.QUANTISE if per_token else How.CONVERT
    return Movement("unpack_kv", _packed_parts(views, packed, how), slots, packed)


def _packed_parts(views: LayerViews, packed: PackedKV, how: How) -> tuple[Part, ...]:
    rows = packed.rows
    k = Part(views.k, views.k_scale, rows[0].values, rows[0].scales, how)
    return (k,) if len(rows) == 1 else (k, Part(views.v, views.v_scale, rows[1].values, rows[1].scales, how))


def _per_token(scale: Scale) -> bool:
    return isinstance(scale, Tensor) and scale.dim() == 3
