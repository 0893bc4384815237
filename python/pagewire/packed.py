"""PackedKV: the tokens of one range, converted and gathered into one contiguous buffer, ready for a wire."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pagewire import scalars
from pagewire.types import StoredScaleKind, dtype_name

_ALIGN = 16  # bytes; the scales behind the payload start on this boundary


@dataclass(frozen=True)
class PackedShape:
    """What a packed buffer holds; sender and receiver derive the same byte layout from it.

    The buffer is, per layer: K `[num_heads, num_tokens, head_dim]`, then V `[num_heads, num_tokens, head_dim_v]`
    (absent when V is a view of K); behind all layers, on a 16-byte boundary, the fp32 scales of K, then of V.
    """

    num_layers: int
    num_heads: int
    num_tokens: int
    head_dim: int
    head_dim_v: int  # 0: V is a view of K and is not packed
    dtype: torch.dtype
    scale_kind: StoredScaleKind

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    @property
    def payload_bytes(self) -> int:
        width = self.head_dim + self.head_dim_v
        return self.num_layers * self.num_heads * self.num_tokens * width * self.dtype.itemsize

    @property
    def scale_shape(self) -> tuple[int, ...] | None:
        return {
            "none": None,
            "tensor": (self.num_layers,),
            "head": (self.num_layers, self.num_heads),
            "token_head": (self.num_layers, self.num_heads, self.num_tokens),
        }[self.scale_kind]

    @property
    def scales_start(self) -> int:
        """Byte offset of the scales; the bytes between the payload and it are zero."""
        return -(-self.payload_bytes // _ALIGN) * _ALIGN

    @cached_property
    def padding(self) -> tuple[int, int]:
        """The bytes [start, stop) between the payload and the scales: zero."""
        return self.payload_bytes, self.payload_bytes if self.scale_shape is None else self.scales_start

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole buffer, scales included."""
        if self.scale_shape is None:
            return self.payload_bytes
        num_scales = torch.Size(self.scale_shape).numel() * (2 if self.head_dim_v else 1)
        return self.scales_start + 4 * num_scales


class Rows(NamedTuple):
    """Tokens as kernels count them, and their scales."""

    values: Tensor  # [num_layers, num_tokens, num_heads, width]
    scales: Tensor | None  # fp32 [num_layers], [num_layers, num_heads] or [num_layers, num_tokens, num_heads]


def _by_token(scales: Tensor | None) -> Tensor | None:
    """[L, H, T] -> [L, T, H]; others as they are."""
    return scales.transpose(1, 2) if scales is not None and scales.dim() == 3 else scales


@dataclass(frozen=True, eq=False)
class PackedKV:
    """One contiguous buffer and its views; see `PackedShape` for the byte layout.

    buffer: uint8 [shape.num_bytes]. k: [L, H, T, head_dim]. v: [L, H, T, head_dim_v], or None when V is a view of K.
    k_scale, v_scale: fp32 None, [L], [L, H] or [L, H, T], as `scale_kind` says.
    """

    buffer: Tensor
    shape: PackedShape
    k: Tensor
    v: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None

    @property
    def scale_kind(self) -> StoredScaleKind:
        return self.shape.scale_kind

    @property
    def num_bytes(self) -> int:
        return self.shape.num_bytes

    @cached_property
    def rows(self) -> tuple[Rows, ...]:
        """K and, unless it is a view of K, V."""
        k = Rows(self.k.transpose(1, 2), _by_token(self.k_scale))
        return (k,) if self.v is None else (k, Rows(self.v.transpose(1, 2), _by_token(self.v_scale)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies keep the buffer and their views in it."""
        return PackedKV.wrap, (self.buffer, self.shape)

    def take_shared_scales(self, k_scales: Sequence[Tensor], v_scales: Sequence[Tensor]) -> None:
        """Of a byte copy: the scales of the cache's layers, each of a tensor or per head, which belong to no token."""
        if self.scale_kind not in ("tensor", "head"):
            return
        with torch.inference_mode():  # the buffer may be an inference tensor
            for scales, rows in ((k_scales, self.k_scale), (v_scales, self.v_scale)):
                for layer, scale in enumerate(scales):
                    assert rows is not None
                    rows[layer].copy_(scale)

    def to(self, device: torch.device | str) -> PackedKV:
        """The same tokens in a buffer on `device`; itself if it is there already."""
        buffer = self.buffer.to(device)
        return self if buffer is self.buffer else PackedKV.wrap(buffer, self.shape)

    def share_memory_(self) -> PackedKV:
        """Moves a CPU buffer to memory that other processes can map; the views stay views of it. Returns itself."""
        self.buffer.share_memory_()
        return self

    @classmethod
    def wrap(cls, buffer: Tensor, shape: PackedShape) -> PackedKV:
        """Views over the first `shape.num_bytes` bytes of `buffer` (uint8, 1-d, contiguous, 16-byte aligned).

        Raises:
            ValueError, TypeError: the buffer is of another dtype, not contiguous, not aligned, or too small.
        """
        if not isinstance(buffer, Tensor) or not isinstance(shape, PackedShape):
            raise TypeError(
                "packed buffer: expected a uint8 tensor and a PackedShape, got "
                f"{scalars.show(buffer)} and {scalars.show(shape)}"
            )
        if buffer.dtype != torch.uint8:
            raise TypeError(f"packed buffer: expected uint8, got {dtype_name(buffer.dtype)}")
        if buffer.dim() != 1 or not buffer.is_contiguous():
            raise ValueError(
                f"packed buffer: expected 1-d contiguous, got shape {tuple(buffer.shape)} stride {buffer.stride()}"
            )
        if buffer.shape[0] < shape.num_bytes:
            raise ValueError(f"packed buffer: expected at least {shape.num_bytes} bytes, got {buffer.shape[0]}")
        if not torch.compiler.is_compiling() and buffer.storage_offset() % _ALIGN:
            raise ValueError(
                f"packed buffer: expected a {_ALIGN}-byte aligned start, got byte {buffer.storage_offset()}"
            )
        buffer = buffer[: shape.num_bytes]
        k, v = _payload_views(buffer, shape)
        k_scale, v_scale = _scale_views(buffer, shape)
        return cls(buffer, shape, k, v, k_scale, v_scale)

    @classmethod
    def empty(cls, shape: PackedShape, device: torch.device | str) -> PackedKV:
        return cls.wrap(torch.empty(shape.num_bytes, dtype=torch.uint8, device=device), shape)


def _payload_views(buffer: Tensor, shape: PackedShape) -> tuple[Tensor, Tensor | None]:
    L, H, T, D, Dv = (shape.num_layers, shape.num_heads, shape.num_tokens, shape.head_dim, shape.head_dim_v)
    layers = buffer[: shape.payload_bytes].view(shape.dtype).view(L, H * T * (D + Dv))
    k = layers[:, : H * T * D].unflatten(1, (H, T, D))
    v = layers[:, H * T * D :].unflatten(1, (H, T, Dv)) if Dv else None
    return k, v


def _scale_views(buffer: Tensor, shape: PackedShape) -> tuple[Tensor | None, Tensor | None]:
    if shape.scale_shape is None:
        return None, None
    scales = buffer[shape.scales_start :].view(torch.float32)
    half = torch.Size(shape.scale_shape).numel()
    k_scale = scales[:half].view(shape.scale_shape)
    v_scale = scales[half : 2 * half].view(shape.scale_shape) if shape.head_dim_v else None
    return k_scale, v_scale
