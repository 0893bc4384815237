"""Problems as dataclasses: everything that is random about one call but its contents, which come from `seed`.

A repr names only what is not the default, so that it can be pasted into `check(Attention(...), backend="cpu")`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields


class Terse:
    """A dataclass that shows what is not the default."""

    def __repr__(self) -> str:
        given = [(f.name, getattr(self, f.name), f.default) for f in fields(self)]  # type: ignore[arg-type]
        said = ", ".join(f"{name}={value!r}" for name, value, usual in given if value != usual)
        return f"{type(self).__name__}({said})"


class Problem(Terse):
    """What `check` takes."""


@dataclass(frozen=True, repr=False)
class Attention(Problem):
    """decode (`q_lens` None) or prefill. Sizes are of the real values, not of the stored ones."""

    seq_lens: tuple[int, ...] = ()
    q_lens: tuple[int, ...] | None = None
    padding_rows: int = 0
    num_kv_heads: int = 1
    group_size: int = 1
    head_dim: int = 8
    head_dim_v: int = 8
    page_size: int = 1
    layout: str = "NHD"
    dtype: str = "fp32"
    kv_dtype: str = "fp32"
    k_scale: str = "none"  # "none" "float" "tensor" "head" "batch_head" "token_head"
    v_scale: str = "none"
    k_size: float = 1.0
    v_size: float = 1.0
    fill: bool = True  # stored values use their dtype's whole range
    zero_rows: bool = False  # every fifth token is zero, with a scale of 1
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    softmax_scale: float | None = None
    alibi: int = 0  # dims of alibi_slopes; 0: none
    slope: float = 1.0  # the largest
    sinks: str = "none"  # "none" "some" "large" "inf" "-inf"
    split_size: int | None = None
    max_q_len: int | None = None
    caches: str = "apart"  # "fused" "layers" "mla"
    gap: int = 0  # elements between rows of q, caches, scales and results
    offset: int = 0  # elements before them
    out_dtype: str | None = None  # None: no out= is given
    shared: str = "none"  # "prefix" "all": pages shared between requests
    padding_ids: str = "huge"  # page-table entries past the end: "huge" "negative" "valid"
    unowned: str = "nan"  # what lies in slots of no request: "nan" "inf" "number"
    poison: tuple[str, ...] = ()  # "k_nan" "k_inf" "v_nan" "v_inf", each in one owned key; "q_nan" in padding rows
    seed: int = 0


@dataclass(frozen=True, repr=False)
class Append(Problem):
    num_tokens: int = 0
    padding_rows: int = 0  # rows of k and v beyond the slot mapping
    skipped: int = 0  # negative slots
    num_kv_heads: int = 1
    head_dim: int = 8
    head_dim_v: int = 8
    page_size: int = 1
    layout: str = "NHD"
    dtype: str = "fp32"
    kv_dtype: str = "fp32"
    scale: str = "none"  # "none" "float" "tensor" "head" "token_head"
    size: float = 1.0  # of the real values
    scale_size: float = 1.0
    specials: bool = False  # NaN, infinities, zeros, subnormals, rows of nothing else
    odd_scales: bool = False  # 0, inf, NaN, negative, subnormal ones among them
    caches: str = "apart"
    gap: int = 0
    offset: int = 0
    slot_dtype: str = "int64"
    strided_slots: bool = False
    seed: int = 0


SPECIALS = ("empty", "inf", "nan_lse", "nan_out", "inf_out")  # one state of one row each


@dataclass(frozen=True, repr=False)
class Merge(Problem):
    num_states: int = 0
    num_tokens: int = 0
    num_heads: int = 1
    head_dim: int = 8
    dtype: str = "fp32"
    out_dtype: str | None = None
    lse_size: float = 1.0
    specials: tuple[str, ...] = ()  # of SPECIALS
    pair: bool = False  # merge_state of two
    in_place: bool = False
    gap: int = 0
    offset: int = 0
    seed: int = 0


@dataclass(frozen=True, repr=False)
class Side(Terse):
    """One cache of a pack or an unpack."""

    dtype: str = "fp32"
    scale: str = "none"  # "none" "tensor" "head" "token_head"
    layout: str = "NHD"
    page_size: int = 1
    more_heads: int = 0  # than travel, in front of them
    more_layers: int = 0
    caches: str = "apart"  # "fused" "layers"
    gap: int = 0
    offset: int = 0


@dataclass(frozen=True, repr=False)
class Pack(Problem):
    """Out of one cache, over the wire, into another one."""

    num_tokens: int = 0
    num_heads: int = 1
    num_layers: int = 1
    head_dim: int = 8
    head_dim_v: int = 8
    mla: bool = False  # V is a view of K on both sides
    source: Side = Side()
    target: Side = Side()
    wire_dtype: str | None = None  # None: the source's
    noise: bool = False  # random bytes, NaN and infinities among them, instead of numbers
    scale_size: float = 1.0
    repeated: bool = False  # slots to pack may repeat
    out: str = "none"  # "none" "buffer" "packed"
    seed: int = 0
