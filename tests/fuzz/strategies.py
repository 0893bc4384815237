"""Hypothesis strategies: simplest value first, so that a failure shrinks towards the defaults of its problem.

Sizes stay small: an interpreted launch takes tenths of a second, and faults hide in corners, not in bulk.
"""

from __future__ import annotations

import sys

from hypothesis import strategies as st

from fuzz.formats import FLOATS, QUANTISED
from fuzz.problems import SPECIALS, Append, Attention, Merge, Pack, Side

SEEDS = st.integers(0, 2**16)
PAGE_SIZES = st.sampled_from([1, 3, 8, 16, 64])
WIDTHS = st.sampled_from([8, 16, 1, 3, 17, 20, 32, 40, 64, 80, 96, 128, 256])
NARROW = st.sampled_from([8, 1, 3, 16, 17, 20, 40, 64, 128])
LAYOUTS = st.sampled_from(["NHD", "HND"])
GAPS = st.sampled_from([0, 16, 3, 8])
OFFSETS = st.sampled_from([0, 16, 1, 8])
EXTREME = [2**31 - 1, 2**31, 2**31 - 5, 2**32, sys.maxsize, 2**63, 2**64 + 3, -(2**31) - 1, -(2**63)]


def rarely(*usual_first: object) -> st.SearchStrategy:
    """Three times in four the first value."""
    usual = st.just(usual_first[0])
    return st.one_of(usual, usual, usual, st.sampled_from(usual_first))


def one_of(*values: object) -> st.SearchStrategy:
    return st.sampled_from(values)


def lengths(page_size: int, longest: int) -> st.SearchStrategy[int]:
    pages = st.integers(0, longest // page_size)
    edges = st.tuples(pages, st.sampled_from([0, 1, -1])).map(lambda x: max(0, x[0] * page_size + x[1]))
    return st.one_of(st.integers(0, min(longest, 20)), edges, st.integers(0, longest))


def scale_kinds(kv_dtype: str, *kinds: str) -> st.SearchStrategy[str]:
    given = st.sampled_from(kinds)
    return given if kv_dtype in QUANTISED else st.one_of(st.just("none"), st.just("none"), given)


@st.composite
def attention(draw, backend: str) -> Attention:
    page_size = draw(PAGE_SIZES)
    slow, slowest = backend in ("triton", "cuda"), backend == "triton"
    longest = 130 if page_size == 64 else 40 if slowest else 60
    longest = draw(rarely(longest, 130 if slow else 500))
    most_requests = draw(rarely(3, 5)) if slowest else 5
    seq_lens = tuple(draw(st.lists(lengths(page_size, longest), max_size=most_requests)))
    q_lens, max_q_len = None, None
    if draw(st.booleans()):
        # the cuda backend's prefill is for short queries: a few longer ones show that it says so
        most = draw(rarely(4 if slowest else 9 if slow else 20, 20 if slowest else 40))
        q_lens = tuple(draw(st.one_of(st.integers(0, min(n, most)), st.integers(0, most))) for n in seq_lens)
        longest_q = max((*q_lens, 1))
        sensible = [x for x in (16, longest_q, None, 2**40) if x is None or x >= longest_q]
        max_q_len = draw(rarely(*sensible) if backend == "cuda" else st.sampled_from(sensible[::-1]))
    dtype = draw(st.sampled_from(("bf16", "fp16") if backend == "cuda" else FLOATS))
    kv_dtype = draw(st.one_of(st.just(dtype), st.sampled_from(QUANTISED)))
    forms = ("float", "tensor", "head", "batch_head", "token_head")
    caches = draw(st.sampled_from(["apart", "fused", "layers", "mla"]))
    head_dim = draw(NARROW if slow else WIDTHS)
    head_dim_v = draw(st.one_of(st.just(head_dim), NARROW))
    head_dim_v = min(head_dim, head_dim_v) if caches == "mla" else head_dim_v
    k_scale = draw(scale_kinds(kv_dtype, *forms))
    sinks = draw(rarely("none", "some", "large", "inf", "-inf"))
    poisons = ["k_nan", "v_nan", "v_inf", "k_inf", "q_nan"]
    return Attention(
        seq_lens=seq_lens,
        q_lens=q_lens,
        padding_rows=draw(rarely(0, 1, 5)) if q_lens is not None else 0,
        num_kv_heads=draw(rarely(1, 2, 3) if slowest else st.integers(1, 3)),
        group_size=draw((rarely if slowest else one_of)(1, 2, 3, 4, 8, 17)),
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        page_size=page_size,
        layout=draw(LAYOUTS),
        dtype=dtype,
        kv_dtype=kv_dtype,
        k_scale=k_scale,
        v_scale=k_scale if caches == "mla" else draw(scale_kinds(kv_dtype, *forms)),
        k_size=draw(rarely(1.0, 1e-6, 30.0, 1e3)),
        v_size=draw(rarely(1.0, 1e-6, 1e-20, 1e4, 1e20)),
        fill=draw(st.sampled_from([True, False])),
        zero_rows=draw(st.booleans()),
        causal=draw(st.booleans()) if q_lens is not None else True,
        window=(draw(windows()), draw(windows())),
        softcap=draw(rarely(0.0, 30.0, 0.5, 1e-3, 1e5, 1e8)),
        softmax_scale=draw(rarely(None, 1.0, 0.0, -0.7, 1e-3, 5.0)),
        alibi=draw(rarely(0, 1, 2)),
        slope=draw(st.sampled_from([1.0, -1.0, 1e-3, 100.0])),
        sinks=sinks,
        split_size=draw(rarely(None, 1, 7, 16, 100, 2**20, *EXTREME[:7])),
        max_q_len=max_q_len,
        caches=caches,
        gap=draw(GAPS),
        offset=draw(OFFSETS),
        out_dtype=draw(st.sampled_from([None, dtype, "fp32"])),
        shared=draw(rarely("none", "prefix", "all")),
        padding_ids=draw(st.sampled_from(["huge", "negative", "valid"])),
        unowned=draw(st.sampled_from(["nan", "inf", "number"])),
        poison=tuple(draw(rarely((), *((p,) for p in poisons), tuple(poisons)))),
        seed=draw(SEEDS),
    )


def windows() -> st.SearchStrategy[int]:
    return st.one_of(st.just(-1), st.just(-1), st.integers(0, 30), st.sampled_from(EXTREME))


@st.composite
def append(draw, backend: str) -> Append:
    kv_dtype = draw(st.sampled_from(("fp32", "bf16", "fp16", *QUANTISED, *QUANTISED)))
    head_dim = draw(NARROW)
    caches = draw(st.sampled_from(["apart", "fused", "layers", "mla"]))
    head_dim_v = draw(st.one_of(st.just(head_dim), NARROW))
    num_tokens = draw(st.integers(0, 12))
    forms = ("token_head", "float", "tensor", "head")
    sizes = (1.0, 1e-6, 1e-42, 1e4, 1e30)
    return Append(
        num_tokens=num_tokens,
        padding_rows=draw(rarely(0, 1, 4)),
        skipped=draw(st.integers(0, num_tokens)),
        num_kv_heads=draw(st.integers(1, 4)),
        head_dim=head_dim,
        head_dim_v=min(head_dim, head_dim_v) if caches == "mla" else head_dim_v,
        page_size=draw(PAGE_SIZES),
        layout=draw(LAYOUTS),
        dtype=draw(st.sampled_from(FLOATS)) if kv_dtype in QUANTISED else kv_dtype,
        kv_dtype=kv_dtype,
        scale=draw(st.sampled_from(forms)) if kv_dtype in QUANTISED else "none",
        size=draw(rarely(*sizes)),
        scale_size=draw(rarely(*sizes)),
        specials=draw(st.booleans()),
        odd_scales=draw(st.booleans()),
        caches=caches,
        gap=draw(GAPS),
        offset=draw(OFFSETS),
        slot_dtype=draw(st.sampled_from(["int64", "int32"])),
        strided_slots=draw(st.booleans()),
        seed=draw(SEEDS),
    )


@st.composite
def merge(draw, backend: str) -> Merge:
    pair = draw(st.booleans())
    dtype = draw(st.sampled_from(FLOATS))
    return Merge(
        num_states=2 if pair else draw(st.integers(0, 5)),
        num_tokens=draw(st.integers(0, 6)),
        num_heads=draw(st.integers(1, 5)),
        head_dim=draw(WIDTHS),
        dtype=dtype,
        out_dtype=draw(st.sampled_from([None, dtype, "fp32"])),
        lse_size=draw(rarely(1.0, 20.0, 300.0, 1e5, 1e30)),
        specials=tuple(sorted(draw(st.sets(st.sampled_from(SPECIALS))))),
        pair=pair,
        in_place=pair and draw(st.booleans()),
        gap=draw(GAPS),
        offset=draw(OFFSETS),
        seed=draw(SEEDS),
    )


@st.composite
def sides(draw, mla: bool) -> Side:
    dtype = draw(st.sampled_from((*FLOATS, *QUANTISED)))
    return Side(
        dtype=dtype,
        scale=draw(st.sampled_from(["tensor", "head", "token_head"])) if dtype in QUANTISED else "none",
        layout=draw(LAYOUTS),
        page_size=draw(PAGE_SIZES),
        more_heads=draw(st.integers(0, 2)),
        more_layers=draw(st.integers(0, 2)),
        caches="apart" if mla else draw(st.sampled_from(["apart", "fused", "layers"])),
        gap=draw(GAPS),
        offset=draw(OFFSETS),
    )


@st.composite
def pack(draw, backend: str) -> Pack:
    mla = draw(rarely(False, True))
    head_dim = draw(NARROW)
    head_dim_v = draw(NARROW)
    return Pack(
        num_tokens=draw(st.integers(0, 9)),
        num_heads=draw(st.integers(1, 3)),
        num_layers=draw(st.integers(1, 3)),
        head_dim=head_dim,
        head_dim_v=min(head_dim, head_dim_v) if mla else head_dim_v,
        mla=mla,
        source=draw(sides(mla)),
        target=draw(sides(mla)),
        wire_dtype=draw(st.one_of(st.none(), st.sampled_from((*FLOATS, *QUANTISED)))),
        noise=draw(st.booleans()),
        scale_size=draw(rarely(1.0, 1e-6, 1e-40, 1e4, 1e30)),
        repeated=draw(st.booleans()),
        out=draw(st.sampled_from(["none", "buffer", "packed"])),
        seed=draw(SEEDS),
    )


FAMILIES = {"attention": attention, "append": append, "merge": merge, "pack": pack}
