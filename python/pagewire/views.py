"""Tensors taken apart into the storages they lie in and put together again, so that copies share what originals share.

`pickle` gives every tensor a storage of its own, and torch.save, deepcopy and shared memory keep what two tensors share
only within one call: a list of storages, each once, and where every tensor lies in them serves all of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Place(NamedTuple):
    storage: int  # index
    dtype: torch.dtype
    offset: int  # elements
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Parts(NamedTuple):
    storages: tuple[Tensor, ...]  # uint8 [num_bytes] each
    places: tuple[Place, ...]


def split(tensors: Sequence[Tensor]) -> Parts:
    storages: dict[int, Tensor] = {}
    places = []
    for x in tensors:
        storage = x.untyped_storage()
        key = storage._cdata  # of meta tensors data_ptr() is 0
        if key not in storages:
            with torch.inference_mode(False):
                whole = torch.empty(0, dtype=torch.uint8, device=x.device)
                storages[key] = whole.set_(storage, 0, (storage.nbytes(),), (1,))
        at = list(storages).index(key)
        places.append(Place(at, x.dtype, int(x.storage_offset()), tuple(x.shape), tuple(x.stride())))
    return Parts(tuple(storages.values()), tuple(places))


def join(parts: Parts) -> tuple[Tensor, ...]:
    with torch.inference_mode(False):
        return tuple(
            torch.empty(0, dtype=p.dtype, device=parts.storages[p.storage].device).set_(
                parts.storages[p.storage].untyped_storage(), p.offset, p.shape, p.stride
            )
            for p in parts.places
        )


def moved(parts: Parts, device: torch.device) -> Parts:
    """Copies on `device` of whole storages, with the same places in them."""
    return Parts(tuple(s.to(device) for s in parts.storages), parts.places)
