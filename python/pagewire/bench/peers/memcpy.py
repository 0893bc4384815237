"""One cudaMemcpyAsync per fragment, the host's loop included: what a transfer without a pack kernel does."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from pagewire.bench.cases import Case, Pack
from pagewire.bench.movement import PackWork
from pagewire.bench.peers import Peer
from pagewire.bench.work import Contender, Work

_MAX_FRAGMENTS = 1 << 15  # more would take most of the suite's time to show the same
_DEVICE_TO_DEVICE = 3


def _missing(device: str) -> str | None:
    return None if device == "cuda" else "needs a GPU"


def _run(case: Pack) -> int:
    """Tokens of one head that are contiguous on both sides."""
    return case.page_size if case.layout == "HND" or case.num_kv_heads == 1 else 1


def _refuses(case: Case) -> str | None:
    assert isinstance(case, Pack)
    if case.packed != case.dtype:
        return "copies bytes, does not convert"
    fragments = 2 * case.num_layers * case.heads * -(-case.num_tokens // _run(case))
    if fragments > _MAX_FRAGMENTS:
        return f"{fragments} fragments, more than the {_MAX_FRAGMENTS} that are waited for"
    return None


@functools.cache
def _runtime() -> ctypes.CDLL:
    """The CUDA runtime PyTorch has loaded already."""
    library = ctypes.CDLL(f"libcudart.so.{(torch.version.cuda or '12').split('.')[0]}")
    pointer = ctypes.c_void_p
    library.cudaMemcpyAsync.argtypes = [pointer, pointer, ctypes.c_size_t, ctypes.c_int, pointer]
    return library


def _fragments(work: PackWork, copy: int) -> list[tuple[int, int, int]]:
    """(address in the cache, address in the packed buffer, bytes), in the packed order."""
    case, packed = work.case, work.packed[copy]
    run, width = _run(case), case.head_dim * case.dtype.itemsize
    first = work.slots[copy][::run].cpu()
    page, offset = first // case.page_size, first % case.page_size
    found: list[tuple[int, int, int]] = []
    for caches, target in ((work.cache.k, packed.k), (work.cache.v, packed.v)):
        assert target is not None
        for layer, cache in enumerate(caches):
            head_stride, token_stride = cache.stride(1), cache.stride(2)
            if case.layout == "NHD":
                head_stride, token_stride = token_stride, head_stride
            for head in range(case.heads):
                elements = page * cache.stride(0) + offset * token_stride + (work.heads[0] + head) * head_stride
                sources = (cache.data_ptr() + elements * case.dtype.itemsize).tolist()
                start = target[layer, head].data_ptr()
                for i, source in enumerate(sources):
                    tokens = min(run, case.num_tokens - i * run)
                    found.append((source, start + i * run * width, tokens * width))
    return found


def _prepare(work: Work) -> Contender:
    assert isinstance(work, PackWork)
    copy_async, unpacks = _runtime().cudaMemcpyAsync, work.case.op == "unpack"
    lists: dict[int, list[tuple[int, int, int]]] = {}

    def before(copy: int) -> None:
        if copy not in lists:
            lists[copy] = _fragments(work, copy)

    def call(copy: int) -> Tensor:
        stream = torch.cuda.current_stream().cuda_stream
        for in_cache, in_packed, size in lists[copy]:
            source, target = (in_packed, in_cache) if unpacks else (in_cache, in_packed)
            code = copy_async(target, source, size, _DEVICE_TO_DEVICE, stream)
            if code:
                raise RuntimeError(f"cudaMemcpyAsync returned {code}")
        return work.packed[copy].buffer

    # the host's loop is the cost: wall time
    return Contender("memcpy", call, before, syncs=True, version=torch.version.cuda or "")


PEERS = (Peer("memcpy", frozenset({"pack", "unpack"}), _missing, _refuses, _prepare, ("cuda",)),)
