"""Strided tensors inside sentinel-filled storages, so that a write beside a view is seen."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fuzz.formats import TORCH

SENTINEL = 0xA5  # a byte; as fp8, int8, fp16, bf16 and fp32 a small ordinary number


def carve(shape: tuple[int, ...], dtype: str | torch.dtype, gap: int = 0, offset: int = 0) -> Tensor:
    """A view of `shape` with `gap` elements after each row, one spare row per outer dim (where gap > 0), starting
    `offset` elements into its storage."""
    dtype = TORCH[dtype] if isinstance(dtype, str) else dtype
    extents = (*(n + (gap > 0) for n in shape[:-1]), shape[-1] + gap) if shape else ()
    count = offset + int(torch.Size(extents).numel())
    size = torch.empty(0, dtype=dtype).element_size()
    elements = torch.full((count * size,), SENTINEL, dtype=torch.uint8).view(dtype)
    return elements[offset:].view(extents)[tuple(slice(0, n) for n in shape)]


def storage(view: Tensor) -> Tensor:
    """uint8: every byte of the storage a view lies in."""
    return torch.empty(0, dtype=torch.uint8, device=view.device).set_(view.untyped_storage())


def ship(tensors: Mapping[str, object], device: torch.device | str) -> dict:
    """The same views over copies of their storages on `device`; what shared a storage still does."""
    copies: dict[int, Tensor] = {}
    shipped = {}
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            shipped[name] = t
            continue
        at = t.untyped_storage().data_ptr()
        if at not in copies or at == 0:
            copies[at] = storage(t).clone().to(device)
        flat = copies[at].view(t.dtype)
        shipped[name] = flat.as_strided(t.shape, t.stride(), t.storage_offset())
    return shipped


def beside(view: Tensor) -> Tensor:
    """The storage's bytes with the view's own elements blanked out."""
    copy = ship({"": view}, "cpu")[""]
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[copy.element_size()]
    copy.view(whole).zero_()
    return storage(copy)
