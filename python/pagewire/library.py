"""Schemas, fakes and callers of the torch ops `torch.ops.pagewire.*`, with true mutation annotations.

Outside torch.compile the public functions call a backend directly; under it (or given fake tensors) they come here.
`Library.define/impl` is used because a mutating `custom_op` costs 20 times more a call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pagewire import scalars
from pagewire.cache_part import CachePart
from pagewire.packed import PackedKV, PackedShape
from pagewire.types import Options, Scale, dispatches

LIBRARY = torch.library.Library("pagewire", "DEF")

_SCALES = "Tensor? k_scale, float? k_scale_value, Tensor? v_scale, float? v_scale_value"
_MODIFIERS = (
    "str layout, float? softmax_scale, bool causal, SymInt window_left, SymInt window_right, float softcap, "
    f"Tensor? alibi_slopes, Tensor? sinks, {_SCALES}, SymInt? split_size, SymInt? max_q_len, str? backend"
)
_DECODE = f"Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor seq_lens, {_MODIFIERS}"
_PREFILL = _DECODE.replace("Tensor seq_lens,", "Tensor seq_lens, Tensor cu_seqlens_q,")
_RESULTS = "Tensor(a!) out, Tensor(b!) lse"
_MERGE = "Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, str? backend"
_SHAPE = "SymInt num_tokens, SymInt head_dim, SymInt head_dim_v, ScalarType dtype, str scale_kind"
_VIEWS = "Tensor[] k_caches, Tensor[] v_caches, Tensor[] k_scales, Tensor[] v_scales, Tensor slots"
_VIEWS_MUT = _VIEWS.replace("Tensor[] k_c", "Tensor(a!)[] k_c").replace("Tensor[] v_c", "Tensor(b!)[] v_c")
_VIEWS_MUT = _VIEWS_MUT.replace("Tensor[] k_s", "Tensor(c!)[] k_s").replace("Tensor[] v_s", "Tensor(d!)[] v_s")

SCHEMAS = {
    # per-token-head scales are written; other scales are read, but a schema cannot tell the two apart
    "append_kv": "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, str layout, "
    "Tensor(c!)? k_scale, float? k_scale_value, Tensor(d!)? v_scale, float? v_scale_value, str? backend) -> ()",
    "decode": f"({_DECODE}) -> (Tensor, Tensor)",
    "decode.out": f"({_DECODE}, *, {_RESULTS}) -> ()",
    "prefill": f"({_PREFILL}) -> (Tensor, Tensor)",
    "prefill.out": f"({_PREFILL}, *, {_RESULTS}) -> ()",
    "merge_state": f"({_MERGE}) -> (Tensor, Tensor)",
    "merge_state.out": f"({_MERGE}, *, {_RESULTS}) -> ()",
    "merge_states": "(Tensor outs, Tensor lses, str? backend) -> (Tensor, Tensor)",
    "merge_states.out": f"(Tensor outs, Tensor lses, str? backend, *, {_RESULTS}) -> ()",
    "pack_kv": f"({_VIEWS}, {_SHAPE}, str? backend) -> Tensor",
    "pack_kv.out": f"({_VIEWS}, {_SHAPE}, str? backend, *, Tensor(a!) buffer) -> ()",
    "unpack_kv": f"(Tensor buffer, {_VIEWS_MUT}, {_SHAPE}, str? backend) -> ()",
}
for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema)


def traced(x: Any) -> bool:
    """The call is being compiled, or `x` is a tensor that takes torch ops into its own hands, as fake ones do."""
    if torch.compiler.is_compiling():
        return True
    return type(x) is not Tensor and isinstance(x, Tensor) and dispatches(type(x))


# ---------------------------------------------------------------------------------------- fakes


def _state_like(q: Tensor, width: int | torch.SymInt) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:-1], width)), q.new_empty(q.shape[:-1], dtype=torch.float32)


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def packed_shape(
    k_caches: Sequence[Tensor], num_tokens: int, head_dim: int, head_dim_v: int, dtype: torch.dtype, scale_kind: str
) -> PackedShape:
    num_heads = k_caches[0].shape[2]
    return PackedShape(len(k_caches), num_heads, num_tokens, head_dim, head_dim_v, dtype, scale_kind)


def _fake_pack(k_caches, v_caches, k_scales, v_scales, slots, *shape_and_backend) -> Tensor:  # type: ignore[no-untyped-def]
    *shape, _ = shape_and_backend
    return slots.new_empty((packed_shape(k_caches, *shape).num_bytes,), dtype=torch.uint8)


_FAKES: dict[str, Callable[..., Any]] = {
    "append_kv": _nothing,
    "decode": lambda q, k_cache, v_cache, *rest: _state_like(q, v_cache.shape[-1]),
    "decode.out": _nothing,
    "prefill": lambda q, k_cache, v_cache, *rest: _state_like(q, v_cache.shape[-1]),
    "prefill.out": _nothing,
    "merge_state": lambda out_a, *rest: _state_like(out_a, out_a.shape[-1]),
    "merge_state.out": _nothing,
    "merge_states": lambda outs, lses, backend: (outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])),
    "merge_states.out": _nothing,
    "pack_kv": _fake_pack,
    "pack_kv.out": _nothing,
    "unpack_kv": _nothing,
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"pagewire::{_name}", _fake, lib=LIBRARY)


# ---------------------------------------------------------------------------------------- flattening


def split_scale(scale: Scale) -> tuple[Tensor | None, float | None]:
    return (scale, None) if isinstance(scale, Tensor) else (None, scale)


def join_scale(tensor: Tensor | None, value: float | None) -> Scale:
    return tensor if tensor is not None else value


def flatten(layout: str, o: Options, backend: str | None) -> tuple[Any, ...]:
    """The schema's `_MODIFIERS`, in its order. Sizes stay symbols: one compilation serves them all."""
    left, right = scalars.pair("window_size", o.window_size, "(left, right)")
    sizes = [scalars.for_schema(n) for n in (left, right, o.split_size, o.max_q_len)]
    return (
        layout, o.softmax_scale, o.causal, *sizes[:2], o.softcap, o.alibi_slopes, o.sinks,
        *split_scale(o.k_scale), *split_scale(o.v_scale), *sizes[2:], backend,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------- callers


def append_kv(k, v, k_cache, v_cache, slot_mapping, layout, k_scale, v_scale, backend) -> None:  # type: ignore[no-untyped-def]
    torch.ops.pagewire.append_kv(
        k, v, k_cache, v_cache, slot_mapping, layout, *split_scale(k_scale), *split_scale(v_scale), backend
    )


def _state(op: Any, args: tuple[Any, ...], out: Tensor | None, lse: Tensor | None, new: Any) -> tuple[Tensor, Tensor]:
    """The functional form, or the out-variant when either result was given."""
    if out is None and lse is None:
        return op.default(*args)
    if out is None or lse is None:
        made_out, made_lse = new()
        out, lse = (made_out if out is None else out), (made_lse if lse is None else lse)
    op.out(*args, out=out, lse=lse)
    return out, lse


def decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, seq_lens: Tensor, layout: str, options: Options,
    backend: str | None, out: Tensor | None, lse: Tensor | None, return_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    args = (q, k_cache, v_cache, page_table, seq_lens, *flatten(layout, options, backend))
    return _state(torch.ops.pagewire.decode, args, out, lse, lambda: _state_like(q, v_cache.shape[-1]))


def prefill(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor,
    layout: str, options: Options, backend: str | None, out: Tensor | None, lse: Tensor | None, return_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    args = (q, k_cache, v_cache, page_table, seq_lens, cu_seqlens_q, *flatten(layout, options, backend))
    return _state(torch.ops.pagewire.prefill, args, out, lse, lambda: _state_like(q, v_cache.shape[-1]))


def merge_state(out_a, lse_a, out_b, lse_b, out, lse, backend) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    args = (out_a, lse_a, out_b, lse_b, backend)
    return _state(torch.ops.pagewire.merge_state, args, out, lse, lambda: _state_like(out_a, out_a.shape[-1]))


def merge_states(outs, lses, out, lse, backend) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    def new() -> tuple[Tensor, Tensor]:
        return outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])

    return _state(torch.ops.pagewire.merge_states, (outs, lses, backend), out, lse, new)


def _flat_shape(shape: PackedShape) -> tuple[Any, ...]:
    return shape.num_tokens, shape.head_dim, shape.head_dim_v, shape.dtype, shape.scale_kind


def pack_kv(part: CachePart, slots: Tensor, packed: PackedKV, backend: str | None) -> None:
    torch.ops.pagewire.pack_kv.out(*part.views, slots, *_flat_shape(packed.shape), backend, buffer=packed.buffer)


def unpack_kv(packed: PackedKV, part: CachePart, slots: Tensor, backend: str | None) -> None:
    for views in (part.views, part.second_scales()):
        if views is not None:
            torch.ops.pagewire.unpack_kv(packed.buffer, *views, slots, *_flat_shape(packed.shape), backend)
