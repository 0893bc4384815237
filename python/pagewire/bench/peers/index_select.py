"""What is written without a kernel: index_select, permute, index_copy_, layer by layer; quantising in eager PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from pagewire.bench.cases import Case
from pagewire.bench.movement import AppendWork, PackWork
from pagewire.bench.peers import Peer
from pagewire.bench.work import Contender, Work
from pagewire.cache import nhd
from pagewire.quant import dequantise, quantise, token_head_scale
from pagewire.types import QUANT_MAX


def _get(cache: Tensor, layout: str, heads: slice, slots: Tensor) -> Tensor:
    """[num_tokens, heads, head_dim]."""
    if layout == "NHD":
        return cache.flatten(0, 1)[:, heads].index_select(0, slots)
    page_size = cache.shape[2]
    return cache[slots // page_size, heads, slots % page_size]


def _put(cache: Tensor, layout: str, heads: slice, slots: Tensor, rows: Tensor) -> None:
    if cache.dtype in QUANT_MAX:  # no indexed write for fp8: bytes
        cache, rows = cache.view(torch.uint8), rows.view(torch.uint8)
    if layout == "NHD":
        cache.flatten(0, 1)[:, heads].index_copy_(0, slots, rows)
    else:
        page_size = cache.shape[2]
        nhd(cache, "HND")[:, :, heads][slots // page_size, slots % page_size] = rows


def _append(work: AppendWork) -> Contender:
    cache, layout, everything = work.cache, work.cache.layout, slice(None)

    def call(copy: int) -> None:
        slots = work.slots[copy]
        for rows, stored, scale in (
            (work.k[copy], cache.k[0], cache.k_scale[0]),
            (work.v[copy], cache.v[0], cache.v_scale[0]),
        ):
            if scale is not None:
                divisor = token_head_scale(rows, stored.dtype)
                scale.flatten(0, 1).index_copy_(0, slots, divisor)
                rows = quantise(rows, divisor[..., None], stored.dtype)
            _put(stored, layout, everything, slots, rows)

    return Contender("index-select", call, version=torch.__version__)


def _pack(work: PackWork) -> Contender:
    cache, layout, heads = work.cache, work.cache.layout, slice(*work.heads)

    def pack(copy: int) -> None:
        packed, slots = work.packed[copy], work.slots[copy]
        for caches, target, scales in ((cache.k, packed.k, packed.k_scale), (cache.v, packed.v, packed.v_scale)):
            assert target is not None
            for layer, stored in enumerate(caches):
                rows = _get(stored, layout, heads, slots).permute(1, 0, 2)
                if scales is not None:
                    scales[layer] = token_head_scale(rows, target.dtype)
                    rows = quantise(rows, scales[layer][..., None], target.dtype)
                target[layer].copy_(rows)

    def unpack(copy: int) -> None:
        packed, slots = work.packed[copy], work.slots[copy]
        for caches, source, scales in ((cache.k, packed.k, packed.k_scale), (cache.v, packed.v, packed.v_scale)):
            assert source is not None
            for layer, stored in enumerate(caches):
                rows = source[layer]
                if scales is not None:
                    rows = dequantise(rows, scales[layer][..., None]).to(stored.dtype)
                _put(stored, layout, heads, slots, rows.permute(1, 0, 2))

    return Contender("index-select", pack if work.case.op == "pack" else unpack, version=torch.__version__)


def _prepare(work: Work) -> Contender:
    if isinstance(work, AppendWork):
        return _append(work)
    assert isinstance(work, PackWork)
    return _pack(work)


def _refuses(case: Case) -> str | None:
    return None


PEERS = (Peer("index-select", frozenset({"append", "pack", "unpack"}), lambda device: None, _refuses, _prepare),)
