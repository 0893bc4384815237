"""An op done at once: check, choose a backend, call it. The functions of `torch_ops/`, without torch ops between.

Checks of shapes, dtypes, strides, devices and numbers are done once per kind of call (`memo.py`), those of memory and
values every time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pagewire import check, memo, moves, overlap, registry, shared_kv
from pagewire.cache import nhd
from pagewire.cache_part import CachePart, LayerViews
from pagewire.errors import check_after_call
from pagewire.packed import PackedKV, PackedShape
from pagewire.results import Results
from pagewire.types import FLOAT_DTYPES, SHORT_QUERY, Kept, Layout, Modifiers, Options, Problem


def append_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    layout: Layout,
    k_scale: Any,
    v_scale: Any,
    backend: str | None,
) -> None:
    given = (k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)
    reads = _is_read(k_scale, k) or _is_read(v_scale, k)
    of = None if reads else memo.kind("append_kv", given, (layout,))
    seen = memo.once(of, lambda: _check_append(given, layout))
    k_scale = k_scale if seen.k_scale is None else seen.k_scale
    v_scale = v_scale if seen.v_scale is None else seen.v_scale
    implementation = registry.choose(seen.problem, backend)
    kept = seen.kept
    if not seen.room.surely(k_cache, v_cache, k_scale, v_scale, slot_mapping, k, v):
        given = (k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)
        changed = _make_room(*given, seen.room)
        if changed is not None:  # other tensors than the caller's are of no kind
            (k, v, v_cache, v_scale), kept = changed, {}
    caches = nhd(k_cache, layout), nhd(v_cache, layout)
    if slot_mapping.shape[0]:
        implementation.move(moves.append(k, v, *caches, slot_mapping, k_scale, v_scale), kept)
    check_after_call(k.device)


def _make_room(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, k_scale: Any, v_scale: Any,
    room: overlap.Room,
) -> tuple[Tensor, Tensor, Tensor, Any] | None:  # fmt: skip
    """k, v, v_cache and v_scale to go on with, so that each element is written once; None: as they are."""
    shared = overlap.is_prefix(v_cache, k_cache)
    if shared:  # K's rows are written, and V's within them
        shared_kv.one_scale("v_scale", k_scale, v_scale, may_wait=False)
        shared_kv.same_rows(k, v, slot_mapping)
        v, v_cache = k, k_cache
        v_scale = shared_kv.second_scale(k_scale, v_scale)
    written, read = {"k_cache": k_cache}, {"slot_mapping": slot_mapping}
    if not shared:
        written["v_cache"] = v_cache
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if isinstance(scale, Tensor) and not (shared and name == "v_scale" and scale is k_scale):
            (written if scale.dim() == 3 else read)[name] = scale
    # rows of the cache itself are read before any is written
    within = check.memory(written, read | {"k": k, "v": v}, copied=("k", "v"))
    if not shared and not within:
        every = (k_cache, v_cache, k_scale, v_scale, slot_mapping, k, v)
        num_written = 4 if "k_scale" in written or "v_scale" in written else 2
        room.learn(every[:num_written], every[num_written:])
        return None
    k, v = (x.clone() if name in within else x for name, x in (("k", k), ("v", v)))
    return k, v, v_cache, v_scale


class _Append(NamedTuple):
    """What was found of an append; scales: those that are numbers."""

    problem: Problem
    k_scale: float | None
    v_scale: float | None
    room: overlap.Room
    kept: Kept


def _check_append(given: tuple[Any, ...], layout: Layout) -> _Append:
    k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale = given
    dims = check.Dims()
    check.caches(dims, k_cache, v_cache, layout)
    dims.check("k", k, "num_tokens num_kv_heads head_dim")
    dims.check("v", v, "num_tokens num_kv_heads head_dim_v")
    check.cache_dtype("k", k, k_cache.dtype)
    check.dtype("v", v, (k.dtype,), " (from k)")
    check.last_dim_contiguous(k=k, v=v)
    dims.check("slot_mapping", slot_mapping, "<=num_tokens")
    check.dtype("slot_mapping", slot_mapping, check.INDEX_DTYPES)
    k_scale = check.scale_number("k_scale", k_scale, k.device)
    v_scale = check.scale_number("v_scale", v_scale, k.device)
    check.scale(dims, "k_scale", k_scale, k_cache.dtype, per_request=False)
    check.scale(dims, "v_scale", v_scale, k_cache.dtype, per_request=False)
    check.no_float_scale(k_cache.dtype, k_scale=k_scale, v_scale=v_scale)
    check.device(
        "k", k.device, v=v, k_cache=k_cache, v_cache=v_cache, slot_mapping=slot_mapping,
        k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip
    k_number, v_number = (None if isinstance(scale, Tensor) else scale for scale in (k_scale, v_scale))
    return _Append(_problem("append_kv", k, dims, k_cache.dtype), k_number, v_number, overlap.Room(), {})


def _is_read(scale: Any, x: Any) -> bool:
    """Whether it may be a tensor of one that stands for a number: then its value counts."""
    if not isinstance(scale, Tensor) or scale.dim() > 0:
        return False
    return not isinstance(x, Tensor) or (scale.dtype, scale.device) != (torch.float32, x.device)


def decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, seq_lens: Tensor, layout: Layout,
    options: Options, backend: str | None, out: Tensor | None, lse: Tensor | None, return_lse: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    tensors = (q, k_cache, v_cache, page_table, seq_lens, out, lse)
    of = _kind("decode", tensors, layout, options, return_lse)
    seen = memo.once(of, lambda: _check_attention("decode", tensors, None, layout, options))
    m = seen.with_tensors(options)
    if out is not None or lse is not None:
        _check_results(out, lse, (q, k_cache, v_cache, page_table, seq_lens, None), m, seen.room)
    out, lse = seen.results.given(out, lse, return_lse)
    implementation = registry.choose(seen.problem, backend)
    caches = nhd(k_cache, layout), nhd(v_cache, layout)
    implementation.decode(q, *caches, page_table, seq_lens, m, out, lse, seen.kept)
    check_after_call(q.device)
    return out, lse


def prefill(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor,
    layout: Layout, options: Options, backend: str | None, out: Tensor | None, lse: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    tensors = (q, k_cache, v_cache, page_table, seq_lens, out, lse)
    of = _kind("prefill", (*tensors, cu_seqlens_q), layout, options, return_lse)
    seen = memo.once(of, lambda: _check_attention("prefill", tensors, cu_seqlens_q, layout, options))
    m = seen.with_tensors(options)
    if out is not None or lse is not None:
        _check_results(out, lse, (q, k_cache, v_cache, page_table, seq_lens, cu_seqlens_q), m, seen.room)
    out, lse = seen.results.given(out, lse, return_lse)
    implementation = registry.choose(seen.problem, backend)
    implementation.prefill(
        q, nhd(k_cache, layout), nhd(v_cache, layout), page_table, seq_lens, cu_seqlens_q, m, out, lse, seen.kept
    )
    check_after_call(q.device)
    return out, lse


class _Attention(NamedTuple):
    """What was found of a decode or prefill."""

    problem: Problem
    results: Results
    modifiers: Modifiers  # without its tensors, which are each call's own
    tensors: tuple[str, ...]  # their fields
    room: overlap.Room
    kept: Kept

    def with_tensors(self, options: Options) -> Modifiers:
        if not self.tensors:
            return self.modifiers
        fields = [*self.modifiers]
        for name in self.tensors:
            fields[_FIELD[name]] = getattr(options, name)
        return Modifiers._make(fields)


_TENSORS = ("alibi_slopes", "sinks", "k_scale", "v_scale")  # modifiers that may be some
_FIELD = {name: Modifiers._fields.index(name) for name in _TENSORS}


def _kind(
    op: str, tensors: tuple[Tensor | None, ...], layout: Layout, options: Options, return_lse: bool
) -> memo.Kind | None:
    scale, causal, window, softcap, slopes, sinks, k_scale, v_scale, split_size, max_q_len = options
    if type(window) is not tuple:
        return None
    if (k_scale is not None or v_scale is not None) and (
        _is_read(k_scale, tensors[0]) or _is_read(v_scale, tensors[0])
    ):
        return None
    numbers = (layout, scale, causal, softcap, split_size, max_q_len, return_lse, *window)
    return memo.kind(op, (*tensors, slopes, sinks, k_scale, v_scale), numbers)


def _check_attention(
    op: str, tensors: tuple[Any, ...], cu_seqlens_q: Any, layout: Layout, options: Options
) -> _Attention:
    q, k_cache, v_cache, page_table, seq_lens, out, lse = tensors
    dims = check.Dims()
    rows = "batch_size" if op == "decode" else "num_tokens"
    dims.check("q", q, f"{rows} num_qo_heads head_dim")
    check.attention(dims, q, k_cache, v_cache, page_table, seq_lens, layout)
    if op == "prefill":
        check.offsets(dims, cu_seqlens_q, q.device)
    m = check.modifiers(dims, q, k_cache.dtype, options)
    check.out_and_lse(dims, q, out, lse, rows)
    names = tuple(name for name in _TENSORS if isinstance(getattr(m, name), Tensor))
    none: dict[str, Any] = dict.fromkeys(names)
    problem = _problem(op, q, dims, k_cache.dtype, m.max_q_len)._replace(row_step=_row_step(k_cache, v_cache))
    return _Attention(
        problem, Results.of(q, q.shape[:-1], dims["head_dim_v"]), m._replace(**none), names, overlap.Room(), {}
    )


_INPUTS = ("q", "k_cache", "v_cache", "page_table", "seq_lens", "cu_seqlens_q", *_TENSORS)


def _check_results(
    out: Tensor | None, lse: Tensor | None, tensors: tuple[Any, ...], m: Modifiers, room: overlap.Room
) -> None:
    inputs = (*tensors, m.alibi_slopes, m.sinks, m.k_scale, m.v_scale)
    if not room.surely(out, lse, *inputs):
        given = dict(zip(_INPUTS, inputs, strict=True))
        check.memory({"out": out, "lse": lse}, given, in_place=[("out", "q")])
        room.learn((out, lse), inputs)


def merge_state(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor | None, lse: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    tensors = (out_a, lse_a, out_b, lse_b, out, lse)
    seen = memo.once(memo.kind("merge_state", tensors, ()), lambda: _check_two(*tensors))
    states = (out_a, lse_a, out_b, lse_b)
    if (out is not None or lse is not None) and not seen.room.surely(out, lse, *states):
        _check_merged(out, lse, dict(zip(("out_a", "lse_a", "out_b", "lse_b"), states, strict=True)))
        seen.room.learn((out, lse), states)
    out, lse = seen.results.given(out, lse, True)
    assert lse is not None
    implementation = registry.choose(seen.problem, backend)
    implementation.merge_state(out_a, lse_a, out_b, lse_b, out, lse, seen.kept)
    return out, lse


class _Merge(NamedTuple):
    """What was found of a merge."""

    problem: Problem
    results: Results
    room: overlap.Room
    kept: Kept


def _check_merged(out: Tensor | None, lse: Tensor | None, states: dict[str, Tensor]) -> None:
    """A result may be a state of its own sort, in place."""
    check.memory({"out": out, "lse": lse}, states, [(name[:3], name) for name in states])


def _check_two(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor | None, lse: Tensor | None
) -> _Merge:
    dims = check.Dims()
    for name, o, s in (("a", out_a, lse_a), ("b", out_b, lse_b)):
        dims.check(f"out_{name}", o, "num_tokens num_qo_heads head_dim")
        dims.check(f"lse_{name}", s, "num_tokens num_qo_heads")
        check.dtype(f"out_{name}", o, FLOAT_DTYPES if name == "a" else (out_a.dtype,))
        check.dtype(f"lse_{name}", s, (torch.float32,))
    check.last_dim_contiguous(out_a=out_a, out_b=out_b)
    check.device("out_a", out_a.device, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    check.out_and_lse(dims, out_a, out, lse, "num_tokens", width="head_dim")
    return _merge("merge_state", out_a, out_a.shape)


def merge_states(
    outs: Tensor, lses: Tensor, out: Tensor | None, lse: Tensor | None, backend: str | None
) -> tuple[Tensor, Tensor]:
    tensors = (outs, lses, out, lse)
    seen = memo.once(memo.kind("merge_states", tensors, ()), lambda: _check_many(*tensors))
    if (out is not None or lse is not None) and not seen.room.surely(out, lse, outs, lses):
        states = {f"outs[{i}]": o for i, o in enumerate(outs)} | {f"lses[{i}]": s for i, s in enumerate(lses)}
        _check_merged(out, lse, states)
        seen.room.learn((out, lse), (outs, lses))
    out, lse = seen.results.given(out, lse, True)
    assert lse is not None
    implementation = registry.choose(seen.problem, backend)
    if outs.shape[0] == 0:
        with torch.inference_mode():  # they may be inference tensors
            out.zero_()
            lse.fill_(-torch.inf)
    else:
        implementation.merge_states(outs, lses, out, lse, seen.kept)
    return out, lse


def _check_many(outs: Tensor, lses: Tensor, out: Tensor | None, lse: Tensor | None) -> _Merge:
    dims = check.Dims()
    dims.check("outs", outs, "n num_tokens num_qo_heads head_dim")
    dims.check("lses", lses, "n num_tokens num_qo_heads")
    check.dtype("outs", outs, FLOAT_DTYPES)
    check.dtype("lses", lses, (torch.float32,))
    check.last_dim_contiguous(outs=outs)
    check.device("outs", outs.device, lses=lses)
    check.out_and_lse(dims, outs, out, lse, "num_tokens", width="head_dim")
    return _merge("merge_states", outs, outs.shape[1:])


class Moved(NamedTuple):
    """What was found of a move between a part of a cache and packed values of a dtype."""

    problem: Problem
    views: LayerViews
    kept: Kept

    @classmethod
    def of(cls, op: moves.Op, shape: PackedShape, views: LayerViews) -> Moved:
        device, page_size = views.k[0].device, views.k[0].shape[1]
        problem = Problem(
            op, device.type, shape.dtype, views.k[0].dtype, shape.head_dim, shape.head_dim_v, page_size,
            device_index=device.index,
        )  # fmt: skip
        return cls(problem, views, {})


def pack_kv(part: CachePart, slots: Tensor, packed: PackedKV, backend: str | None) -> None:
    part.check_shared_scales(slots)
    shape = packed.shape
    run_pack(part.once(("pack", shape.dtype), lambda: Moved.of("pack_kv", shape, part.views)), slots, packed, backend)


def unpack_kv(packed: PackedKV, part: CachePart, slots: Tensor, backend: str | None) -> None:
    part.check_writable(packed, slots)
    shape = packed.shape
    of = part.once(("unpack", shape.dtype), lambda: Moved.of("unpack_kv", shape, part.views))
    run_unpack(packed, of, slots, backend)
    second = part.second_scales()
    if second is not None:  # the same rows once more, for the scale of each
        of = part.once(("unpack, second scales", shape.dtype), lambda: Moved.of("unpack_kv", shape, second))
        run_unpack(packed, of, slots, backend)


def run_pack(of: Moved, slots: Tensor, packed: PackedKV, backend: str | None) -> None:
    implementation = registry.choose(of.problem, backend)
    if slots.shape[0] == 0:  # what travels without any token
        packed.take_shared_scales(of.views.k_scale, of.views.v_scale)
    else:
        implementation.move(moves.pack(of.views, slots, packed), of.kept)
    # rarely any: what lay there before must not travel, and equal contents must give equal buffers
    start, stop = packed.shape.padding
    if start < stop:
        with torch.inference_mode():  # the buffer may be an inference tensor
            packed.buffer[start:stop].zero_()
    check_after_call(slots.device)


def run_unpack(packed: PackedKV, of: Moved, slots: Tensor, backend: str | None) -> None:
    implementation = registry.choose(of.problem, backend)
    if slots.shape[0]:
        implementation.move(moves.unpack(packed, of.views, slots), of.kept)
    check_after_call(slots.device)


def _problem(op: str, x: Tensor, dims: check.Dims, kv_dtype: torch.dtype, max_q_len: int | None = None) -> Problem:
    """Only a max_q_len that makes every request short tells backends apart: keep the number of problems small."""
    group_size = x.shape[1] // max(dims["num_kv_heads"], 1)
    max_q_len = max_q_len if max_q_len is not None and max_q_len <= SHORT_QUERY else None
    return Problem(
        op, x.device.type, x.dtype, kv_dtype, dims["head_dim"], dims["head_dim_v"], dims["page_size"], group_size,
        max_q_len, x.device.index,
    )  # fmt: skip


def _row_step(*caches: Tensor) -> int:
    steps = [16]
    for cache in caches:
        dims = zip(cache.shape[:-1], cache.stride(), strict=False)
        steps += [stride * cache.element_size() for extent, stride in dims if extent > 1]
    return math.gcd(*steps)


def _merge(op: str, x: Tensor, shape: Sequence[int]) -> _Merge:
    *rows, width = shape
    problem = Problem(op, x.device.type, x.dtype, x.dtype, width, width, device_index=x.device.index)
    return _Merge(problem, Results.of(x, rows, width), overlap.Room(), {})
