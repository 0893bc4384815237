"""What the torch ops run: the public functions, given back their own arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pagewire import library, ops
from pagewire.packed import PackedKV

_FIELDS = (
    "layout", "softmax_scale", "causal", "window_left", "window_right", "softcap", "alibi_slopes", "sinks",
    "k_scale", "k_scale_value", "v_scale", "v_scale_value", "split_size", "max_q_len", "backend",
)  # fmt: skip


def _keywords(flat: tuple[Any, ...], *, prefill: bool) -> dict[str, Any]:
    """Keyword arguments of the public function from the schema's flat modifiers."""
    f = dict(zip(_FIELDS, flat, strict=True))
    f["window_size"] = (f.pop("window_left"), f.pop("window_right"))
    for name in ("k_scale", "v_scale"):
        f[name] = library.join_scale(f[name], f.pop(f"{name}_value"))
    if not prefill:
        del f["causal"], f["max_q_len"]
    return f


def _append_kv(
    k, v, k_cache, v_cache, slot_mapping, layout, k_scale, k_value, v_scale, v_value, backend
) -> None:  # type: ignore[no-untyped-def]
    ops.append_kv(
        k, v, k_cache, v_cache, slot_mapping, layout=layout, k_scale=library.join_scale(k_scale, k_value),
        v_scale=library.join_scale(v_scale, v_value), backend=backend,
    )  # fmt: skip


def _decode(
    q, k_cache, v_cache, page_table, seq_lens, *flat, out=None, lse=None
) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    keywords = _keywords(flat, prefill=False)
    return ops.decode(
        q, k_cache, v_cache, page_table, seq_lens, out=out, lse=lse, return_lse=True, **keywords
    )  # type: ignore[return-value]


def _prefill(q, k_cache, v_cache, page_table, seq_lens, cu_seqlens_q, *flat, out=None, lse=None):  # type: ignore[no-untyped-def]
    keywords = _keywords(flat, prefill=True)
    return ops.prefill(
        q,
        k_cache,
        v_cache,
        page_table,
        seq_lens,
        cu_seqlens_q,
        out=out,
        lse=lse,
        return_lse=True,
        **keywords,
    )


def _merge_state(out_a, lse_a, out_b, lse_b, backend, out=None, lse=None):  # type: ignore[no-untyped-def]
    return ops.merge_state(out_a, lse_a, out_b, lse_b, out=out, lse=lse, backend=backend)


def _merge_states(outs, lses, backend, out=None, lse=None):  # type: ignore[no-untyped-def]
    return ops.merge_states(outs, lses, out=out, lse=lse, backend=backend)


def _pack_kv(
    k_caches, v_caches, k_scales, v_scales, slots, *shape_and_backend, buffer=None
) -> Tensor:  # type: ignore[no-untyped-def]
    *flat, backend = shape_and_backend
    shape = library.packed_shape(k_caches, *flat)
    packed = PackedKV.empty(shape, slots.device) if buffer is None else PackedKV.wrap(buffer, shape)
    ops.run_pack((k_caches, v_caches, k_scales, v_scales), slots, packed, backend)
    return packed.buffer


def _unpack_kv(buffer, k_caches, v_caches, k_scales, v_scales, slots, *shape_and_backend) -> None:  # type: ignore[no-untyped-def]
    *flat, backend = shape_and_backend
    packed = PackedKV.wrap(buffer, library.packed_shape(k_caches, *flat))
    ops.run_unpack(packed, (k_caches, v_caches, k_scales, v_scales), slots, backend)


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
