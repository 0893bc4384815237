"""CUDA C++: each op hands its tensors and the current stream to the kernel of its name in csrc/cuda.

Caches arrive as NHD views, `[num_pages, page_size, num_kv_heads, head_dim]` with free strides. With
PAGEWIRE_EMULATE_CUDA the same kernels run on CPU tensors.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from pagewire import emulation
from pagewire.errors import BackendError, device_word
from pagewire.moves import Movement
from pagewire.types import Kept, Modifiers


@functools.cache
def _built() -> ModuleType:
    return importlib.import_module("pagewire._cuda")


def _extension(device: torch.device) -> ModuleType:
    if device.type == "cuda":
        return _built()
    kind = emulation.mode()
    assert kind is not None, "the registry lets CPU tensors in only under PAGEWIRE_EMULATE_CUDA"
    return emulation.load(kind)


class Call(NamedTuple):
    """Where a call runs, and where its kernels report what they find."""

    device: int
    stream: int
    error_word: Tensor


def _call(device: torch.device) -> Call:
    word = device_word(device)
    if device.type != "cuda":
        return Call(0, 0, word)
    index = torch.cuda.current_device() if device.index is None else device.index
    return Call(index, torch.cuda.current_stream(index).cuda_stream, word)


def _check_addresses(**caches: Tensor) -> None:
    """What registry.py cannot see: calls of one kind differ in addresses."""
    for name, cache in caches.items():
        if cache.data_ptr() % 16:
            raise BackendError(
                f"backend='cuda': {name} begins at {cache.data_ptr():#x}: expected a multiple of 16 bytes, "
                "which it copies at a time (triton takes any)"
            )


def decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, seq_lens: Tensor,
    modifiers: Modifiers, out: Tensor, lse: Tensor | None, kept: Kept,
) -> None:  # fmt: skip
    _check_addresses(k_cache=k_cache, v_cache=v_cache)
    call = _call(q.device)
    try:
        _extension(q.device).decode(
            q, k_cache, v_cache, page_table, seq_lens, modifiers, out, lse, call, _allocator(q.device, call.stream)
        )
    except Exception:
        _counter_buffers.clear()  # a launch that did not end may have left them anywhere
        raise


def prefill(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor,
    modifiers: Modifiers, out: Tensor, lse: Tensor | None, kept: Kept,
) -> None:  # fmt: skip
    _check_addresses(k_cache=k_cache, v_cache=v_cache)
    call = _call(q.device)
    try:
        _extension(q.device).prefill(
            q, k_cache, v_cache, page_table, seq_lens, cu_seqlens_q, modifiers, out, lse,
            call, _allocator(q.device, call.stream),
        )  # fmt: skip
    except Exception:
        _counter_buffers.clear()
        raise


def merge_state(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor, kept: Kept
) -> None:
    _extension(out.device).merge_state(out_a, lse_a, out_b, lse_b, out, lse, _call(out.device))


def merge_states(outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor, kept: Kept) -> None:
    _extension(out.device).merge_states(outs, lses, out, lse, _call(out.device))


def move(movement: Movement, kept: Kept) -> None:
    device = movement.slots.device
    _extension(device).move(movement, _call(device))


# ---------------------------------------------------------------------------------------------- work space


class Counters(NamedTuple):
    capture: int  # whose they are; 0: of no graph
    of_items: Tensor  # int32
    of_blocks: Tensor  # int32 [1]


class Workspace(NamedTuple):
    partial: Tensor  # fp32 [partial_floats]
    of_items: Tensor  # int32 [>= num_counters], zero before and after a launch
    of_blocks: Tensor  # int32 [1], the same


def _allocator(device: torch.device, stream: int) -> Callable[[int, int], Workspace]:
    def allocate(partial_floats: int, num_counters: int) -> Workspace:
        partial = torch.empty(partial_floats, dtype=torch.float32, device=device)
        counters = _counters(device, stream, num_counters)
        return Workspace(partial, counters.of_items, counters.of_blocks)

    return allocate


# (device, stream) -> counters. Kernels leave them at zero, so that one zeroed buffer serves every launch on a stream;
# each capture gets its own, zeroed inside the graph, since graphs may replay side by side.
_counter_buffers: dict[tuple[torch.device, int], Counters] = {}


def _counters(device: torch.device, stream: int, count: int) -> Counters:
    # asks q's stream: the current device may be another one, with another stream that is captured or not
    capture = _built().capture_id(stream) if device.type == "cuda" else 0
    key = (device, stream) if capture == 0 else (device, -1 - stream)  # of a captured stream: no stream is negative
    known = _counter_buffers.get(key)
    if known is None or known.capture != capture or known.of_items.shape[0] < count:
        with torch.inference_mode(False):  # kept for calls in any mode
            of_items = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
            of_blocks = torch.zeros(1, dtype=torch.int32, device=device)
        known = Counters(capture, of_items, of_blocks)
        _counter_buffers[key] = known
    return known
