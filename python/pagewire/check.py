"""Validation before launch: shapes by name, dtypes, strides, devices, in sentences a user can act on."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pagewire import overlap, scalars
from pagewire.types import (
    FLOAT_DTYPES,
    KV_DTYPES,
    LAYOUTS,
    QUANT_MAX,
    Modifiers,
    Options,
    Scale,
    dense,
    dispatches,
    dtype_name,
)

INDEX_DTYPES = (torch.int32, torch.int64)


class Dims:
    """Names dims as it meets them; the first tensor to name one decides, later ones must agree.

    >>> dims = Dims(); dims.check("q", torch.empty(2, 8, 64), "batch_size num_qo_heads head_dim")
    >>> dims["head_dim"]
    64
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, str]] = {}

    def __getitem__(self, name: str) -> int:
        return self._known[name][0]

    def check(self, name: str, tensor: Tensor, pattern: str) -> None:
        """`pattern`: dim names separated by spaces; a leading "<=" accepts a smaller extent."""
        if type(tensor) is not Tensor:
            _plain(name, tensor)
        dense(name, tensor)
        words, shape, known = _words(pattern), tensor.shape, self._known
        if len(shape) != len(words):
            raise ValueError(f"{name}: expected [{pattern.replace(' ', ', ')}], got shape {tuple(shape)}")
        for (word, at_most), extent in zip(words, shape, strict=True):
            if word not in known:
                known[word] = (extent, name)
                continue
            value, source = known[word]
            if extent != value and not (at_most and extent < value):
                raise ValueError(
                    f"{name}: expected [{pattern.replace(' ', ', ')}], got shape {tuple(shape)}; "
                    f"{word}={value} from {source}"
                )


def _plain(name: str, tensor: Any) -> None:
    """A subclass will do if it is no more than a name: what dispatches for itself may have no memory of its own."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if dispatches(type(tensor)):
        raise TypeError(
            f"{name}: expected a plain torch.Tensor like the arguments before it, got {type(tensor).__name__}"
        )


@functools.cache
def _words(pattern: str) -> tuple[tuple[str, bool], ...]:
    """(dim name, whether a smaller extent will do) of each dim."""
    return tuple((word.removeprefix("<="), word.startswith("<=")) for word in pattern.split())


def dtype(name: str, tensor: Tensor, accepted: Sequence[torch.dtype], source: str = "") -> None:
    if tensor.dtype not in accepted:
        expected = " or ".join(map(dtype_name, accepted))
        raise TypeError(f"{name}: expected {expected}{source}, got {dtype_name(tensor.dtype)}")


def device(reference: str, expected: torch.device, **tensors: Tensor | Scale) -> None:
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.device != expected:
            raise ValueError(f"{name}: expected device {expected} (from {reference}), got {tensor.device}")


def last_dim_contiguous(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name}: expected a contiguous last dim (stride 1), got stride {tensor.stride(-1)}")


def layout(value: str) -> None:
    if value not in LAYOUTS:
        raise ValueError(f"layout: expected one of {LAYOUTS}, got {value!r}")


def caches(dims: Dims, k_cache: Tensor, v_cache: Tensor, layout_name: str) -> None:
    layout(layout_name)
    rows = "page_size num_kv_heads" if layout_name == "NHD" else "num_kv_heads page_size"
    dims.check("k_cache", k_cache, f"num_pages {rows} head_dim")
    dims.check("v_cache", v_cache, f"num_pages {rows} head_dim_v")
    dtype("k_cache", k_cache, KV_DTYPES)
    dtype("v_cache", v_cache, (k_cache.dtype,), " (from k_cache)")
    last_dim_contiguous(k_cache=k_cache, v_cache=v_cache)
    for name, tensor in (("page_size", k_cache), ("head_dim", k_cache), ("head_dim_v", v_cache)):
        if dims[name] < 1:
            where = "k_cache" if tensor is k_cache else "v_cache"
            raise ValueError(f"{where}: expected {name} >= 1, got 0 in shape {tuple(tensor.shape)}")


def cache_dtype(name: str, tensor: Tensor, kv_dtype: torch.dtype) -> None:
    """q (or k) is fp16, bf16 or fp32; the cache has its dtype, or fp8 or int8."""
    dtype(name, tensor, FLOAT_DTYPES)
    if kv_dtype not in QUANT_MAX and kv_dtype != tensor.dtype:
        raise TypeError(
            f"k_cache: expected {dtype_name(tensor.dtype)} (from {name}), float8_e4m3fn, float8_e5m2 or int8, "
            f"got {dtype_name(kv_dtype)}"
        )


def scale(dims: Dims, name: str, value: Scale, kv_dtype: torch.dtype, *, per_request: bool) -> None:
    """A scale is needed for fp8 and int8; for a float cache only an explicit one is checked."""
    if value is None:
        if kv_dtype in QUANT_MAX:
            raise ValueError(f"{name}: a {dtype_name(kv_dtype)} cache needs a scale (pass 1.0 for none), got None")
        return
    if not isinstance(value, Tensor):
        return
    dense(name, value)
    dtype(name, value, (torch.float32,))
    heads, pages, page_size = dims["num_kv_heads"], dims["num_pages"], dims["page_size"]
    accepted = {"[]": (), "[num_kv_heads]": (heads,), "[num_pages, page_size, num_kv_heads]": (pages, page_size, heads)}
    if per_request:
        accepted["[batch_size, num_kv_heads]"] = (dims["batch_size"], heads)
    if tuple(value.shape) not in accepted.values():
        expected = ", ".join(f"{words} = {list(shape)}" for words, shape in accepted.items())
        raise ValueError(f"{name}: expected one of {expected}, got shape {tuple(value.shape)}")


def no_float_scale(kv_dtype: torch.dtype, **scales: Scale) -> None:
    """Appending never divides by the scale of a float cache, so one is refused rather than ignored."""
    for name, value in scales.items():
        if value is not None and kv_dtype not in QUANT_MAX:
            raise ValueError(f"{name}: a {dtype_name(kv_dtype)} cache stores real values, expected None")


def offsets(dims: Dims, cu_seqlens_q: Tensor, expected: torch.device) -> None:
    dims.check("cu_seqlens_q", cu_seqlens_q, "batch_size_plus_1")
    dtype("cu_seqlens_q", cu_seqlens_q, (torch.int32,))
    last_dim_contiguous(cu_seqlens_q=cu_seqlens_q)
    device("q", expected, cu_seqlens_q=cu_seqlens_q)
    if dims["batch_size_plus_1"] != dims["batch_size"] + 1:
        raise ValueError(
            f"cu_seqlens_q: expected [batch_size + 1] = [{dims['batch_size'] + 1}] (batch_size={dims['batch_size']} "
            f"from page_table), got [{dims['batch_size_plus_1']}]"
        )


def scale_number(name: str, value: Any, device: torch.device) -> Scale:
    """A number becomes a float, a tensor of one on the CPU too; any other tensor stays as it is, to be checked."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        ours = value.dtype == torch.float32 and value.device == device
        if ours or value.dim() > 0 or value.device.type != "cpu":
            return value
    return scalars.positive(name, value, "a finite float > 0 or a float32 tensor")


def modifiers(dims: Dims, q: Tensor, kv_dtype: torch.dtype, options: Options) -> Modifiers:
    """What the caller asked for, as kernels take it: numbers in the range where they mean something."""
    softcap = scalars.real("softcap", options.softcap)
    if softcap < 0:
        raise ValueError(f"softcap: expected >= 0 (0 = off), got {softcap}")
    scale_of_q = dims["head_dim"] ** -0.5 if options.softmax_scale is None else options.softmax_scale
    m = Modifiers(
        scalars.real("softmax_scale", scale_of_q), scalars.flag("causal", options.causal),
        *scalars.window(options.window_size), softcap, options.alibi_slopes, options.sinks,
        scale_number("k_scale", options.k_scale, q.device), scale_number("v_scale", options.v_scale, q.device),
        scalars.count("split_size", options.split_size, " tokens"), scalars.count("max_q_len", options.max_q_len),
    )  # fmt: skip
    if m.alibi_slopes is not None:
        one = isinstance(m.alibi_slopes, Tensor) and m.alibi_slopes.dim() == 1
        dims.check("alibi_slopes", m.alibi_slopes, "num_qo_heads" if one else "batch_size num_qo_heads")
        dtype("alibi_slopes", m.alibi_slopes, (torch.float32,))
    if m.sinks is not None:
        dims.check("sinks", m.sinks, "num_qo_heads")
        dtype("sinks", m.sinks, (torch.float32,))
    scale(dims, "k_scale", m.k_scale, kv_dtype, per_request=True)
    scale(dims, "v_scale", m.v_scale, kv_dtype, per_request=True)
    device("q", q.device, alibi_slopes=m.alibi_slopes, sinks=m.sinks, k_scale=m.k_scale, v_scale=m.v_scale)
    return m


def attention(
    dims: Dims, q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, seq_lens: Tensor, layout_name: str
) -> None:
    """Everything but q's own shape and the modifiers, which differ between decode and prefill."""
    caches(dims, k_cache, v_cache, layout_name)
    cache_dtype("q", q, k_cache.dtype)
    last_dim_contiguous(q=q)
    dims.check("page_table", page_table, "batch_size max_pages_per_seq")
    dims.check("seq_lens", seq_lens, "batch_size")
    dtype("page_table", page_table, (torch.int32,))
    dtype("seq_lens", seq_lens, (torch.int32,))
    last_dim_contiguous(page_table=page_table)
    device("q", q.device, k_cache=k_cache, v_cache=v_cache, page_table=page_table, seq_lens=seq_lens)
    group_size(dims["num_qo_heads"], dims["num_kv_heads"])


def group_size(num_qo_heads: int, num_kv_heads: int) -> None:
    if num_kv_heads < 1 or num_qo_heads % num_kv_heads:
        raise ValueError(
            f"q: expected num_qo_heads to be a multiple of num_kv_heads={num_kv_heads} (from k_cache), "
            f"got {num_qo_heads}"
        )


def out_and_lse(
    dims: Dims, q: Tensor, out: Tensor | None, lse: Tensor | None, rows: str, *, width: str = "head_dim_v"
) -> None:
    """Results of the caller: `out [rows, num_qo_heads, width]` in q's dtype or fp32, `lse [rows, num_qo_heads]`."""
    if out is not None:
        dims.check("out", out, f"{rows} num_qo_heads {width}")
        dtype("out", out, tuple(dict.fromkeys((q.dtype, torch.float32))), " (q's dtype or float32)")
        last_dim_contiguous(out=out)
    if lse is not None:
        dims.check("lse", lse, f"{rows} num_qo_heads")
        dtype("lse", lse, (torch.float32,))
    device("q", q.device, out=out, lse=lse)


def memory(
    results: Mapping[str, Tensor | None],
    inputs: Mapping[str, Tensor | Scale],
    in_place: Sequence[tuple[str, str]] = (),
    copied: Sequence[str] = (),
) -> list[str]:
    """Every result has memory of its own: no element twice, none of another result or an input.

    Args:
        in_place: (result, input) that may be the very same view, since each row is read before it is written.
        copied: inputs that may overlap, since the caller copies those that do: their names are returned.
    """
    found: list[str] = []
    written = [(name, result, *overlap.span(result)) for name, result in results.items() if result is not None]
    for i, (name, result, start, stop) in enumerate(written):
        if overlap.overlaps_itself(result):
            raise ValueError(
                f"{name}: expected memory of its own for each element, got stride {result.stride()} for shape "
                f"{tuple(result.shape)}"
            )
        for other, earlier, its_start, its_stop in written[:i]:
            if start < its_stop and its_start < stop and overlap.overlap(result, earlier):
                raise _overlapping(name, other)
    for other, tensor in inputs.items() if written else ():
        if not isinstance(tensor, Tensor):
            continue
        its_start, its_stop = overlap.span(tensor)
        for name, result, start, stop in written:
            if not (start < its_stop and its_start < stop and overlap.overlap(result, tensor)):
                continue
            if other in copied:
                found.append(other)
            elif (name, other) not in in_place or not overlap.same(result, tensor):
                raise _overlapping(name, other)
    return found


def _overlapping(name: str, other: str) -> ValueError:
    return ValueError(f"{name}: expected memory of its own, got a tensor that overlaps {other}")
