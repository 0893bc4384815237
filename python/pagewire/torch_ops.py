"""What the torch ops run: the functions of `eager.py`, given back their own arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pagewire import eager, library
from pagewire.cache_part import LayerViews
from pagewire.overlap import is_prefix
from pagewire.packed import PackedKV
from pagewire.types import Options


def _scales(k_scale, k_value, v_scale, v_value) -> tuple[Any, Any]:  # type: ignore[no-untyped-def]
    return library.join_scale(k_scale, k_value), library.join_scale(v_scale, v_value)


def _append_kv(k, v, k_cache, v_cache, slot_mapping, layout, *scales_and_backend) -> None:  # type: ignore[no-untyped-def]
    *flat, backend = scales_and_backend
    eager.append_kv(k, v, k_cache, v_cache, slot_mapping, layout, *_scales(*flat), backend)


def _modifiers(
    layout, softmax_scale, causal, left, right, softcap, alibi, sinks,
    k_scale, k_value, v_scale, v_value, split_size, max_q_len, backend,
) -> tuple[Any, Any, Any]:  # type: ignore[no-untyped-def]  # fmt: skip
    """(layout, options, backend) of the schema's flat modifiers."""
    options = Options(
        softmax_scale, causal, (left, right), softcap, alibi, sinks,
        *_scales(k_scale, k_value, v_scale, v_value), split_size, max_q_len,
    )  # fmt: skip
    return layout, options, backend


def _decode(q, k_cache, v_cache, page_table, seq_lens, *flat, out=None, lse=None):  # type: ignore[no-untyped-def]
    return eager.decode(q, k_cache, v_cache, page_table, seq_lens, *_modifiers(*flat), out, lse, True)


def _prefill(q, k_cache, v_cache, page_table, seq_lens, cu_seqlens_q, *flat, out=None, lse=None):  # type: ignore[no-untyped-def]
    return eager.prefill(q, k_cache, v_cache, page_table, seq_lens, cu_seqlens_q, *_modifiers(*flat), out, lse, True)


def _merge_state(out_a, lse_a, out_b, lse_b, backend, out=None, lse=None):  # type: ignore[no-untyped-def]
    return eager.merge_state(out_a, lse_a, out_b, lse_b, out, lse, backend)


def _merge_states(outs, lses, backend, out=None, lse=None):  # type: ignore[no-untyped-def]
    return eager.merge_states(outs, lses, out, lse, backend)


def _pack_kv(k_caches, v_caches, k_scales, v_scales, slots, *shape_and_backend, buffer=None) -> Tensor:  # type: ignore[no-untyped-def]
    *flat, backend = shape_and_backend
    shape = library.packed_shape(k_caches, *flat)
    packed = PackedKV.empty(shape, slots.device) if buffer is None else PackedKV.wrap(buffer, shape)
    eager.run_pack(LayerViews(k_caches, v_caches, k_scales, v_scales), slots, packed, backend)
    return packed.buffer


def _unpack_kv(buffer, k_caches, v_caches, k_scales, v_scales, slots, *shape_and_backend) -> None:  # type: ignore[no-untyped-def]
    *flat, backend = shape_and_backend
    packed = PackedKV.wrap(buffer, library.packed_shape(k_caches, *flat))
    for layer, v in enumerate(v_caches):  # none when V is known to be within K
        if is_prefix(v, k_caches[layer]):
            raise ValueError(
                f"unpack_kv: v_caches[{layer}] is a view of k_caches[{layer}], but V was packed on its own; make the "
                "cache outside torch.compile, or with shares_kv=True"
            )
    eager.run_unpack(packed, LayerViews(k_caches, v_caches, k_scales, v_scales), slots, backend)


def _no_result(function: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> None:
        function(*args, **kwargs)

    return call


_IMPLEMENTATIONS = {
    "append_kv": _append_kv,
    "decode": _decode,
    "decode.out": _no_result(_decode),
    "prefill": _prefill,
    "prefill.out": _no_result(_prefill),
    "merge_state": _merge_state,
    "merge_state.out": _no_result(_merge_state),
    "merge_states": _merge_states,
    "merge_states.out": _no_result(_merge_states),
    "pack_kv": _pack_kv,
    "pack_kv.out": _no_result(_pack_kv),
    "unpack_kv": _unpack_kv,
}
for _name, _function in _IMPLEMENTATIONS.items():
    library.LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
assert set(_IMPLEMENTATIONS) == set(library.SCHEMAS), torch.__version__
