"""CUDA C++: each op hands raw pointers, strides and the current stream to the kernel of its name in csrc/cuda.

Caches arrive as NHD views, `[num_pages, page_size, num_kv_heads, head_dim]` with free strides. With
PAGEWIRE_EMULATE_CUDA the same kernels run on CPU tensors.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from pagewire import emulation
from pagewire.errors import device_word
from pagewire.packed import PackedKV
from pagewire.types import QUANT_MAX, Modifiers, Scale, scale_kind

# enum DType of csrc/pagewire/dtype.h
_DTYPE = {
    torch.float16: 0, torch.bfloat16: 1, torch.float32: 2,
    torch.float8_e4m3fn: 3, torch.float8_e5m2: 4, torch.int8: 5,
}  # fmt: skip
_NONE, _VALUE, _READ, _MAKE, _COPY = range(5)  # enum ScaleUse of csrc/cuda/move.h
_NO_SCALE, _ONE_VALUE, _PER_HEAD, _TOKEN_HEAD = range(4)  # enum ScaleForm of csrc/cuda/attention.h


@functools.cache
def _built() -> ModuleType:
    return importlib.import_module("pagewire._cuda")


def _extension(device: torch.device) -> ModuleType:
    if device.type == "cuda":
        return _built()
    kind = emulation.mode()
    assert kind is not None, "the registry lets CPU tensors in only under PAGEWIRE_EMULATE_CUDA"
    return emulation.load(kind)


def _where(device: torch.device) -> tuple[int, int]:
    """(device index, stream)."""
    if device.type != "cuda":
        return 0, 0
    index = torch.cuda.current_device() if device.index is None else device.index
    return index, torch.cuda.current_stream(index).cuda_stream


# ---------------------------------------------------------------------------------------------- attention


def decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, seq_lens: Tensor,
    modifiers: Modifiers, out: Tensor, lse: Tensor | None,
) -> None:  # fmt: skip
    _attention(q, k_cache, v_cache, page_table, seq_lens, None, modifiers, out, lse, 1)


def prefill(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor,
    modifiers: Modifiers, out: Tensor, lse: Tensor | None,
) -> None:  # fmt: skip
    max_q_len = modifiers.max_q_len
    assert max_q_len is not None, "the registry takes only problems with max_q_len"
    _attention(q, k_cache, v_cache, page_table, seq_lens, cu_seqlens_q, modifiers, out, lse, max_q_len)


def _attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor | None,
    m: Modifiers, out: Tensor, lse: Tensor | None, max_q_len: int,
) -> None:  # fmt: skip
    index, stream = _where(q.device)
    alibi, sinks = m.alibi_slopes, m.sinks
    alibi_strides = (0, 0) if alibi is None else (0, *alibi.stride())[-2:]
    tensors = (
        q.data_ptr(), q.stride(0), q.stride(1),
        page_table.data_ptr(), page_table.stride(0),
        seq_lens.data_ptr(), seq_lens.stride(0),
        0 if cu_seqlens_q is None else cu_seqlens_q.data_ptr(),
        out.data_ptr(), out.stride(0), out.stride(1),
        *((0, 0, 0) if lse is None else (lse.data_ptr(), *lse.stride())),
        0 if alibi is None else alibi.data_ptr(), *alibi_strides,
        *((0, 0) if sinks is None else (sinks.data_ptr(), sinks.stride(0))),
        device_word(q.device).data_ptr(),
    )  # fmt: skip
    num_kv_heads = k_cache.shape[2]
    sizes = (
        _DTYPE[q.dtype], _DTYPE[k_cache.dtype], out.dtype == torch.float32,
        page_table.shape[0], q.shape[0], num_kv_heads, q.shape[1] // num_kv_heads,
        k_cache.shape[0], k_cache.shape[1], page_table.shape[1], max_q_len, index, stream,
    )  # fmt: skip
    unbounded = 2**31 - 1
    modifiers = (
        float(m.softmax_scale), float(m.softcap), m.causal,
        min(m.window_left, unbounded), min(m.window_right, unbounded), min(m.split_size or 0, unbounded),
    )  # fmt: skip
    held: list[Tensor] = []  # until the launch has been queued

    def allocate(partial_floats: int, num_counters: int) -> tuple[int, int, int]:
        partial = torch.empty(partial_floats, dtype=torch.float32, device=q.device)
        counters = _counters(q.device, stream, num_counters)
        held.extend((partial, counters.of_items, counters.of_blocks))
        return partial.data_ptr(), counters.of_items.data_ptr(), counters.of_blocks.data_ptr()

    _extension(q.device).attention(
        tensors, _cache(k_cache, m.k_scale), _cache(v_cache, m.v_scale), sizes, modifiers, allocate
    )


def _cache(cache: Tensor, scale: Scale) -> tuple[object, ...]:
    size = cache.element_size()
    strides = tuple(s * size for s in cache.stride()[:3])
    return cache.data_ptr(), *strides, cache.shape[3], _attention_scale(scale)


def _attention_scale(scale: Scale) -> tuple[int, float, int, int, int, int, int]:
    """(form, value, pointer, strides of request, page, token, head)."""
    if scale is None:
        return _NO_SCALE, 1.0, 0, 0, 0, 0, 0
    if not isinstance(scale, Tensor):
        return _ONE_VALUE, float(scale), 0, 0, 0, 0, 0
    at = scale.data_ptr()
    match scale_kind(scale):
        case "tensor":
            return _PER_HEAD, 1.0, at, 0, 0, 0, 0
        case "head":
            return _PER_HEAD, 1.0, at, 0, 0, 0, scale.stride(0)
        case "batch_head":
            return _PER_HEAD, 1.0, at, scale.stride(0), 0, 0, scale.stride(1)
        case _:
            return _TOKEN_HEAD, 1.0, at, 0, *scale.stride()  # type: ignore[return-value]


class _Counters(NamedTuple):
    capture: int  # whose they are; 0: of no graph
    of_items: Tensor  # int32
    of_blocks: Tensor  # int32 [1]


# (device, stream) -> counters. Kernels leave them at zero, so that one zeroed buffer serves every launch on a stream;
# each capture gets its own, zeroed inside the graph, since graphs may replay side by side.
_counter_buffers: dict[tuple[torch.device, int], _Counters] = {}


def _counters(device: torch.device, stream: int, count: int) -> _Counters:
    # asks q's stream: the current device may be another one, with another stream that is captured or not
    capture = _built().capture_id(stream) if device.type == "cuda" else 0
    key = (device, stream) if capture == 0 else (device, -1 - stream)
    known = _counter_buffers.get(key)
    if known is None or known.capture != capture or known.of_items.shape[0] < count:
        with torch.inference_mode(False):  # kept for calls in any mode
            of_items = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
            of_blocks = torch.zeros(1, dtype=torch.int32, device=device)
        known = _Counters(capture, of_items, of_blocks)
        _counter_buffers[key] = known
    return known


# ---------------------------------------------------------------------------------------------- merge


def merge_state(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor) -> None:
    _merge(_states(out_a, lse_a, 0, 0), _states(out_b, lse_b, 0, 0), 2, out_a.dtype, out, lse)


def merge_states(outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor) -> None:
    n = outs.shape[0]
    if n == 0:
        with torch.inference_mode():  # they may be inference tensors
            out.zero_()
            lse.fill_(-torch.inf)
        return
    strides = (outs.stride(0), lses.stride(0))
    last = min(1, n - 1)
    _merge(_states(outs[0], lses[0], *strides), _states(outs[last], lses[last], *strides), n, outs.dtype, out, lse)


def _states(out: Tensor, lse: Tensor, stride_out: int, stride_lse: int) -> tuple[int, ...]:
    return (
        out.data_ptr(), stride_out, out.stride(0), out.stride(1),
        lse.data_ptr(), stride_lse, lse.stride(0), lse.stride(1),
    )  # fmt: skip


def _merge(first: tuple[int, ...], rest: tuple[int, ...], n: int, dtype: torch.dtype, out: Tensor, lse: Tensor) -> None:
    result = (
        _DTYPE[dtype], _DTYPE[out.dtype], *out.shape, out.data_ptr(), out.stride(0), out.stride(1),
        lse.data_ptr(), lse.stride(0), lse.stride(1),
    )  # fmt: skip
    _extension(out.device).merge_states(first, rest, n, result, *_where(out.device))


# ---------------------------------------------------------------------------------------------- append, pack, unpack


def append_kv(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, k_scale: Scale, v_scale: Scale
) -> None:
    parts, pointers = [], []
    for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        stored, at = _append_scale(cache, scale)
        parts.append((x.shape[2], _rows(x, _no_scale()), _slotted(cache, stored)))
        pointers.append((x.data_ptr(), cache.data_ptr(), 0, at))
    slots = _slots(slot_mapping, k_cache, k.shape[1])
    _extension(k.device).append_kv(tuple(parts), tuple(pointers), slots)


def pack_kv(
    k_caches: Sequence[Tensor], v_caches: Sequence[Tensor], k_scales: Sequence[Tensor], v_scales: Sequence[Tensor],
    slots: Tensor, packed: PackedKV,
) -> None:  # fmt: skip
    run = _extension(slots.device).pack_kv
    for layers in _alike(k_caches, v_caches, k_scales, v_scales):
        parts, pointers = [], []
        for caches, scales, rows, row_scale in _sides(k_caches, v_caches, k_scales, v_scales, packed):
            cache, scale = caches[layers.start], scales[layers.start] if scales else None
            same = rows.dtype == cache.dtype
            target = _no_scale()
            if row_scale is not None:
                target = (_COPY if same else _MAKE, 1.0, *_row_scale_strides(row_scale[layers.start]))
            source = _cache_scale(scale, _COPY if same else _READ)
            parts.append((cache.shape[3], _slotted(cache, source), _rows(rows[0].transpose(0, 1), target)))
            pointers.append([
                (caches[i].data_ptr(), rows[i].data_ptr(), _pointer(scales, i), _pointer(row_scale, i))
                for i in layers
            ])  # fmt: skip
        run(tuple(parts), _interleave(pointers), _slots(slots, k_caches[0], packed.shape.num_heads))


def unpack_kv(
    packed: PackedKV, k_caches: Sequence[Tensor], v_caches: Sequence[Tensor], k_scales: Sequence[Tensor],
    v_scales: Sequence[Tensor], slots: Tensor,
) -> None:  # fmt: skip
    run = _extension(slots.device).unpack_kv
    for layers in _alike(k_caches, v_caches, k_scales, v_scales):
        parts, pointers = [], []
        for caches, scales, rows, row_scale in _sides(k_caches, v_caches, k_scales, v_scales, packed):
            cache, scale = caches[layers.start], scales[layers.start] if scales else None
            per_token = scale is not None and scale.dim() == 3
            packed_per_token = row_scale is not None and row_scale.dim() == 3
            same = rows.dtype == cache.dtype and (row_scale is None or (per_token and packed_per_token))
            source = _no_scale()
            if row_scale is not None:
                source = (_COPY if same else _READ, 1.0, *_row_scale_strides(row_scale[layers.start]))
            target = _cache_scale(scale, _COPY if same else _MAKE if per_token else _READ)
            if same and not per_token:
                target = _no_scale()
            parts.append((cache.shape[3], _rows(rows[0].transpose(0, 1), source), _slotted(cache, target)))
            pointers.append([
                (rows[i].data_ptr(), caches[i].data_ptr(), _pointer(row_scale, i), _pointer(scales, i))
                for i in layers
            ])  # fmt: skip
        run(tuple(parts), _interleave(pointers), _slots(slots, k_caches[0], packed.shape.num_heads))


_ScaleFields = tuple[int, float, int, int, int]  # use, value, byte strides of page, token, head


def _no_scale() -> _ScaleFields:
    return _NONE, 1.0, 0, 0, 0


def _cache_scale(scale: Tensor | None, use: int) -> _ScaleFields:
    if scale is None:
        return _no_scale()
    if scale.dim() == 3:
        return use, 1.0, 4 * scale.stride(0), 4 * scale.stride(1), 4 * scale.stride(2)
    return use, 1.0, 0, 0, 4 * scale.stride(0) if scale.dim() else 0


def _row_scale_strides(scale: Tensor) -> tuple[int, int, int]:
    """Of one layer's packed scale, `[]`, `[H]` or `[H, T]`: byte strides of page, token, head."""
    if scale.dim() == 0:
        return 0, 0, 0
    return 0, 4 * scale.stride(1) if scale.dim() == 2 else 0, 4 * scale.stride(0)


def _append_scale(cache: Tensor, scale: Scale) -> tuple[_ScaleFields, int]:
    if cache.dtype not in QUANT_MAX:
        return _no_scale(), 0
    if not isinstance(scale, Tensor):
        assert scale is not None
        return (_VALUE, float(scale), 0, 0, 0), 0
    return _cache_scale(scale, _MAKE if scale.dim() == 3 else _READ), scale.data_ptr()


def _rows(x: Tensor, scale: _ScaleFields) -> tuple[object, ...]:
    """The side that is `[num_tokens, num_heads, width]`."""
    size = x.element_size()
    return _DTYPE[x.dtype], 0, x.stride(0) * size, x.stride(1) * size, *scale


def _slotted(cache: Tensor, scale: _ScaleFields) -> tuple[object, ...]:
    size = cache.element_size()
    page, token, head = (s * size for s in cache.stride()[:3])
    return _DTYPE[cache.dtype], page, token, head, *scale


def _slots(slots: Tensor, cache: Tensor, num_heads: int) -> tuple[object, ...]:
    num_pages, page_size = cache.shape[:2]
    return (
        slots.data_ptr(), slots.dtype == torch.int64, slots.stride(0), num_pages * page_size, page_size,
        slots.shape[0], num_heads, device_word(slots.device).data_ptr(), *_where(slots.device),
    )  # fmt: skip


def _sides(
    k_caches: Sequence[Tensor], v_caches: Sequence[Tensor], k_scales: Sequence[Tensor], v_scales: Sequence[Tensor],
    packed: PackedKV,
) -> list[tuple[Sequence[Tensor], Sequence[Tensor], Tensor, Tensor | None]]:  # fmt: skip
    """(caches, scales, packed rows, packed scale) of K and, unless it is a view of K, of V."""
    sides: list[tuple[Sequence[Tensor], Sequence[Tensor], Tensor, Tensor | None]] = [
        (k_caches, k_scales, packed.k, packed.k_scale)
    ]
    if v_caches:
        assert packed.v is not None
        sides.append((v_caches, v_scales, packed.v, packed.v_scale))
    return sides


def _alike(*tensors_of_layers: Sequence[Tensor]) -> list[range]:
    """Runs of layers whose tensors have the same strides: one launch each, one in all as a rule."""
    keys = [
        tuple(tensors[i].stride() for tensors in tensors_of_layers if tensors) for i in range(len(tensors_of_layers[0]))
    ]
    starts = [i for i in range(len(keys)) if i == 0 or keys[i] != keys[i - 1]]
    return [range(a, b) for a, b in zip(starts, [*starts[1:], len(keys)], strict=True)]


def _pointer(tensors: Sequence[Tensor] | Tensor | None, i: int) -> int:
    if tensors is None or len(tensors) == 0:
        return 0
    return tensors[i].data_ptr()


def _interleave(pointers: list[list[tuple[int, int, int, int]]]) -> tuple[tuple[int, int, int, int], ...]:
    """Per layer: K, then V."""
    return tuple(at for layer in zip(*pointers, strict=True) for at in layer)
