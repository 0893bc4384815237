"""torch.ops.pagewire.pack_kv and .unpack_kv."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pagewire import eager
from pagewire.cache_part import CachePart, LayerViews
from pagewire.overlap import is_prefix
from pagewire.packed import PackedKV, PackedShape
from pagewire.torch_ops.define import define, nothing

# the rest of a PackedShape is the views'
_SHAPE = "SymInt num_tokens, SymInt head_dim, SymInt head_dim_v, ScalarType dtype, str scale_kind"


def _flat(shape: PackedShape) -> tuple[Any, ...]:
    return shape.num_tokens, shape.head_dim, shape.head_dim_v, shape.dtype, shape.scale_kind


def _packed_shape(k_caches: Sequence[Tensor], flat: Sequence[Any]) -> PackedShape:
    return PackedShape(len(k_caches), k_caches[0].shape[2], *flat)


# ---------------------------------------------------------------------------------------------- pack


def pack_kv(part: CachePart, slots: Tensor, packed: PackedKV, backend: str | None) -> None:
    torch.ops.pagewire.pack_kv.out(*part.views, slots, *_flat(packed.shape), backend, buffer=packed.buffer)


def _run_pack(
    k_caches: list[Tensor], v_caches: list[Tensor], k_scales: list[Tensor], v_scales: list[Tensor], slots: Tensor,
    *shape_and_backend: Any, buffer: Tensor | None = None,
) -> Tensor:  # fmt: skip
    *flat, backend = shape_and_backend
    shape = _packed_shape(k_caches, flat)
    packed = PackedKV.empty(shape, slots.device) if buffer is None else PackedKV.wrap(buffer, shape)
    views = LayerViews(k_caches, v_caches, k_scales, v_scales)
    eager.run_pack(eager.Moved.of("pack_kv", packed.shape, views), slots, packed, backend)
    return packed.buffer


def _run_pack_into(*args: Any, buffer: Tensor) -> None:
    _run_pack(*args, buffer=buffer)


def _fake_pack(
    k_caches: list[Tensor], v_caches: list[Tensor], k_scales: list[Tensor], v_scales: list[Tensor], slots: Tensor,
    *shape_and_backend: Any,
) -> Tensor:  # fmt: skip
    return slots.new_empty((_packed_shape(k_caches, shape_and_backend[:-1]).num_bytes,), dtype=torch.uint8)


_PACKED_FROM = (
    f"Tensor[] k_caches, Tensor[] v_caches, Tensor[] k_scales, Tensor[] v_scales, Tensor slots, {_SHAPE}, str? backend"
)
define(f"pack_kv({_PACKED_FROM}) -> Tensor", _run_pack, _fake_pack)
define(f"pack_kv.out({_PACKED_FROM}, *, Tensor(a!) buffer) -> ()", _run_pack_into, nothing)


# ---------------------------------------------------------------------------------------------- unpack


def unpack_kv(packed: PackedKV, part: CachePart, slots: Tensor, backend: str | None) -> None:
    for views in (part.views, part.second_scales()):
        if views is not None:
            torch.ops.pagewire.unpack_kv(packed.buffer, *views, slots, *_flat(packed.shape), backend)


def _run_unpack(
    buffer: Tensor, k_caches: list[Tensor], v_caches: list[Tensor], k_scales: list[Tensor], v_scales: list[Tensor],
    slots: Tensor, *shape_and_backend: Any,
) -> None:  # fmt: skip
    *flat, backend = shape_and_backend
    packed = PackedKV.wrap(buffer, _packed_shape(k_caches, flat))
    for layer, v in enumerate(v_caches):  # none when V is known to be within K
        if is_prefix(v, k_caches[layer]):
            raise ValueError(
                f"unpack_kv: v_caches[{layer}] is a view of k_caches[{layer}], but V was packed on its own; make the "
                "cache outside torch.compile, or with shares_kv=True"
            )
    views = LayerViews(k_caches, v_caches, k_scales, v_scales)
    eager.run_unpack(packed, eager.Moved.of("unpack_kv", packed.shape, views), slots, backend)


define(
    "unpack_kv(Tensor buffer, Tensor(a!)[] k_caches, Tensor(b!)[] v_caches, Tensor(c!)[] k_scales, "
    f"Tensor(d!)[] v_scales, Tensor slots, {_SHAPE}, str? backend) -> ()",
    _run_unpack,
    nothing,
)
