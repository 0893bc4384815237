"""What the tensors of a problem hold: caches in every storage form, their scales, slots."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fuzz.formats import FLOATS, LARGEST, bits, encode
from fuzz.tensors import carve

INFINITE = ("fp32", "fp16", "bf16", "e5m2")  # formats that hold an infinity


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(g: torch.Generator, *shape: int) -> np.ndarray:
    return torch.randn(shape, generator=g).numpy()


def uniform(g: torch.Generator, *shape: int) -> np.ndarray:
    return torch.rand(shape, generator=g).numpy()


def pick(g: torch.Generator, count: int) -> int:
    return int(torch.randint(count, (), generator=g))


def nhd(cache: Tensor, layout: str) -> Tensor:
    return cache if layout == "NHD" else cache.transpose(1, 2)


def write(view: Tensor, x: np.ndarray, dtype: str) -> None:
    """Real numbers, kept finite, into a view of any strides."""
    most = LARGEST.get(dtype, {"fp16": 6e4}.get(dtype, 3e38))
    bits(view)[...] = encode(np.clip(x, -most, most), dtype)


def filled(shape: tuple[int, ...], x: np.ndarray, dtype: str, gap: int, offset: int) -> Tensor:
    view = carve(shape, dtype, gap, offset)
    write(view, x, dtype)
    return view


def caches(
    form: str, num_layers: int, num_pages: int, page_size: int, num_heads: int, widths: tuple[int, int],
    dtype: str, layout: str, gap: int, offset: int,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """K and V of each layer in `layout`. fused: V behind K in a row; layers: all layers in one storage, page by page;
    mla: V is the first columns of K."""
    rows = (page_size, num_heads) if layout == "NHD" else (num_heads, page_size)
    width, width_v = widths
    ks, vs = [], []
    if form == "layers":
        for w, found in ((width, ks), (width_v, vs)):
            whole = carve((num_pages, num_layers + 1, *rows, w), dtype, gap, offset)
            found += [whole[:, i + 1] for i in range(num_layers)]
        return ks, vs
    for _ in range(num_layers):
        if form == "fused":
            both = carve((num_pages, *rows, width + width_v), dtype, gap, offset)
            ks.append(both[..., :width])
            vs.append(both[..., width:])
            continue
        ks.append(carve((num_pages, *rows, width), dtype, gap, offset))
        if form == "mla":
            vs.append(ks[-1][..., :width_v])
        else:
            vs.append(carve((num_pages, *rows, width_v), dtype, gap, offset))
    return ks, vs


def poison(view: Tensor, dtype: str, kind: str) -> None:
    """NaN or infinities into every element of a view; a format without them gets its nearest."""
    number = {"nan": np.nan, "inf": np.inf}[kind]
    if dtype in FLOATS:
        codes = encode(np.full(1, number, np.float32), dtype)[0]
    else:
        codes = {"e4m3": 0x7F, "e5m2": 0x7C if kind == "inf" else 0x7E, "int8": 0x7F}[dtype]
    bits(view)[...] = codes
