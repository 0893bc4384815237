"""Shared cases: what a call looks like, and how its tensors are made, poison included.

An id reads as the case: `B3-L37-Q1-H8/2-D64-P16-bf16-NHD`, followed by what is unusual about it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

import pagewire as pw
from pagewire.quant import quantise, token_head_scale
from pagewire.types import QUANT_MAX

SHORT = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2", torch.int8: "int8",
}  # fmt: skip
PADDING = 2147480000  # page-table entries past the end: never read, never valid


@dataclass(frozen=True)
class Attention:
    """One attention call. `q_lens` None: decode."""

    seq_lens: tuple[int, ...] = (37,)
    q_lens: tuple[int, ...] | None = None
    heads: tuple[int, int] = (4, 2)  # num_qo_heads, num_kv_heads
    head_dim: int = 64
    head_dim_v: int | None = None
    page_size: int = 16
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None
    layout: str = "NHD"
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: int = 0  # dims of alibi_slopes; 0: none
    sinks: bool = False
    scale: str | None = None  # "float" "tensor" "head" "batch_head" "token_head"
    split_size: int | None = None
    max_q_len: int | None = None
    shared_prefix: bool = False  # all requests share the pages of the first one as far as they go
    strided: bool = False  # q, caches and out are views with gaps
    padding_rows: int = 0
    out_dtype: torch.dtype | None = None
    note: str = ""

    @property
    def id(self) -> str:
        lens = "+".join(map(str, self.seq_lens)) if len(self.seq_lens) < 4 else f"max{max(self.seq_lens)}"
        parts = [f"B{len(self.seq_lens)}", f"L{lens}"]
        if self.q_lens is not None:
            parts.append("Q" + ("+".join(map(str, self.q_lens)) if len(self.q_lens) < 4 else f"max{max(self.q_lens)}"))
        parts += [f"H{self.heads[0]}/{self.heads[1]}", f"D{self.head_dim}", f"P{self.page_size}", SHORT[self.dtype]]
        if self.head_dim_v:
            parts[-2:-2] = [f"Dv{self.head_dim_v}"]
        if self.kv_dtype:
            parts.append(f"kv{SHORT[self.kv_dtype]}.{self.scale}")
        parts.append(self.layout)
        blank = Attention()
        for name in ("window", "softcap", "alibi", "split_size", "max_q_len", "padding_rows"):
            value = getattr(self, name)
            if value != getattr(blank, name):
                parts.append(f"{name}{value}".replace(" ", ""))
        parts += [name for name in ("sinks", "shared_prefix", "strided") if getattr(self, name)]
        parts += ["full"] * (self.q_lens is not None and not self.causal)
        parts += ["out32"] * (self.out_dtype is not None) + [self.note] * bool(self.note)
        return "-".join(parts)


@dataclass
class Call:
    """Tensors of a case: `args` positional, `kwargs` keyword, of pagewire.decode or pagewire.prefill."""

    case: Attention
    args: tuple[Tensor, ...]
    kwargs: dict = field(default_factory=dict)

    @property
    def op(self) -> str:
        return "decode" if self.case.q_lens is None else "prefill"

    def run(self, backend: str, **extra) -> tuple[Tensor, Tensor]:
        """(out, lse) in NaN-poisoned results."""
        q, _, v_cache = self.args[:3]
        out_dtype = self.case.out_dtype or q.dtype
        out = gaps(*q.shape[:-1], v_cache.shape[-1], dtype=out_dtype, device=q.device, on=self.case.strided)
        out.fill_(torch.nan)
        lse = torch.full(q.shape[:-1], torch.nan, device=q.device)
        keywords = {**self.kwargs, "out": out, "lse": lse, "return_lse": True, "backend": backend, **extra}
        if backend == "cuda" and self.op == "prefill" and keywords["max_q_len"] is None:
            promise_short_queries(self.case, keywords)
        return getattr(pw, self.op)(*self.args, **keywords)


def promise_short_queries(case: Attention, keywords: dict) -> None:
    """The cuda backend's prefill is for short queries and wants the caller's word for it."""
    longest = max(case.q_lens or (1,), default=1)
    if longest > 16:
        pytest.skip(f"the cuda backend refuses a prefill of {longest} query rows")
    keywords["max_q_len"] = 16


def gaps(*shape: int, dtype: torch.dtype, device: torch.device, on: bool) -> Tensor:
    """An uninitialised tensor; with `on`, a view into a larger one: every outer stride is free, the last dim dense, the
    rest NaN (int8: -1)."""
    if not on:
        return torch.empty(shape, dtype=dtype, device=device)
    wide = torch.empty((*(n + 1 for n in shape[:-1]), shape[-1] + 16), dtype=dtype, device=device)
    wide.view(torch.uint8).fill_(0xFF)
    return wide[tuple(slice(0, n) for n in shape)]


def random(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def build(case: Attention, device: torch.device | str = "cpu", seed: int = 0, backend: str = "") -> Call:
    """NaN (int8: a NaN scale or 127) in every slot that no request owns; permuted pages; padding in the table.

    `backend`: cuda has no fp32 queries and gets fp16 ones, the most exact it takes.
    """
    if backend == "cuda" and case.dtype == torch.float32:
        case = replace(case, dtype=torch.float16)
    device = torch.device(device)
    g = torch.Generator().manual_seed(seed)
    qo_heads, kv_heads = case.heads
    head_dim_v = case.head_dim_v or case.head_dim
    batch = len(case.seq_lens)
    q_lens = case.q_lens or (1,) * batch
    num_rows = sum(q_lens) + case.padding_rows

    table, owned, num_pages = _table(case, g)
    caches, scales = [], []
    for width in (case.head_dim, head_dim_v):
        cache, scale = _cache(case, width, num_pages, owned, kv_heads, g, device)
        caches.append(cache)
        scales.append(scale)
    q = gaps(num_rows, qo_heads, case.head_dim, dtype=case.dtype, device=device, on=case.strided)
    q.copy_(random(num_rows, qo_heads, case.head_dim, generator=g))

    args: tuple[Tensor, ...] = (q, *caches, table.to(device), _int32(case.seq_lens, device))
    kwargs: dict = {"layout": case.layout, "window_size": case.window, "softcap": case.softcap}
    if case.q_lens is not None:
        args += (_int32([0, *torch.tensor(q_lens).cumsum(0).tolist()], device),)
        kwargs.update(causal=case.causal, max_q_len=case.max_q_len)
    if case.alibi:
        shape = (qo_heads,) if case.alibi == 1 else (batch, qo_heads)
        kwargs["alibi_slopes"] = torch.rand(shape, generator=g).to(device)
    if case.sinks:
        kwargs["sinks"] = random(qo_heads, generator=g).to(device)
    if case.scale:
        kwargs["k_scale"], kwargs["v_scale"] = scales
    kwargs["split_size"] = case.split_size
    return Call(case, args, kwargs)


def _int32(values, device: torch.device) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32, device=device)


def _table(case: Attention, g: torch.Generator) -> tuple[Tensor, Tensor, int]:
    """(page_table, owned [num_pages, page_size] bool, num_pages); two pages belong to nobody."""
    needed = [-(-n // case.page_size) for n in case.seq_lens]
    num_pages = max(sum(needed), 1) + 2
    order = torch.randperm(num_pages, generator=g).tolist()
    table = torch.full((len(needed), max(needed, default=0) + 2), PADDING, dtype=torch.int32)
    owned = torch.zeros(num_pages, case.page_size, dtype=torch.bool)
    for b, (n, seq_len) in enumerate(zip(needed, case.seq_lens, strict=True)):
        row = [order.pop() for _ in range(n)]
        if case.shared_prefix and b:
            shared = min(seq_len, case.seq_lens[0]) // case.page_size
            row[:shared] = table[0, :shared].tolist()
        table[b, :n] = torch.tensor(row, dtype=torch.int32)
        for i, page in enumerate(row):
            owned[page, : min(case.page_size, seq_len - i * case.page_size)] = True
    return table, owned, num_pages


def _cache(case: Attention, width: int, num_pages: int, owned: Tensor, kv_heads: int, g, device):
    """(cache in the case's layout, scale or None)."""
    kv_dtype = case.kv_dtype or case.dtype
    values = random(num_pages, case.page_size, kv_heads, width, generator=g)
    scale: Tensor | float | None = None
    divisor: Tensor | float | None = None
    if case.scale == "token_head":
        scale = (
            token_head_scale(values, kv_dtype) if kv_dtype in QUANT_MAX else torch.rand(values.shape[:3], generator=g)
        )
        divisor = scale[..., None]
        scale = scale.masked_fill(~owned[..., None], torch.nan)
    elif case.scale is not None:
        base = 3.0 / QUANT_MAX.get(kv_dtype, 3.0)
        shape = {"float": (), "tensor": (), "head": (kv_heads,), "batch_head": (len(case.seq_lens), kv_heads)}[
            case.scale
        ]
        scale = base * (1 + torch.rand(shape, generator=g))
        divisor = base
        scale = float(scale) if case.scale == "float" else scale
    stored = quantise(values, divisor, kv_dtype)
    poison = 127.0 if kv_dtype == torch.int8 else torch.nan
    dirty = torch.full_like(stored.float(), poison).to(kv_dtype)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[kv_dtype.itemsize]
    stored = torch.where(owned[..., None, None], stored.view(bits), dirty.view(bits)).view(kv_dtype)
    if case.layout == "HND":
        stored = stored.transpose(1, 2)
    cache = gaps(*stored.shape, dtype=kv_dtype, device=device, on=case.strided)
    cache.view(bits).copy_(stored.view(bits))
    return cache, scale.to(device) if isinstance(scale, Tensor) else scale


# ------------------------------------------------------------------------------------------- the lists

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
e4m3, e5m2, int8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8

DECODE = (
    Attention((37,)),
    Attention((0, 1, 15, 16, 17), note="page_edges"),
    Attention((0,), sinks=True, note="all_empty"),
    Attention((33, 7, 64), dtype=bf16, layout="HND"),
    Attention((20, 3), dtype=fp16, heads=(3, 3)),
    Attention((31, 9), heads=(6, 2), page_size=3),
    Attention((29,), heads=(16, 1), page_size=1),
    Attention((40, 5), heads=(8, 1), page_size=64),
    Attention((19, 33), heads=(48, 1), head_dim=32, note="group48"),
    Attention((70,), head_dim=80, dtype=bf16),
    Attention((18,), head_dim=96, head_dim_v=40),
    Attention((21, 50), head_dim=128, page_size=128, dtype=bf16),
    Attention((17,), heads=(2, 1), head_dim=256, head_dim_v=64),
    Attention((1, 1000, 1, 2), heads=(2, 1), head_dim=16, note="skewed"),
    Attention((50, 40), shared_prefix=True, dtype=bf16),
    Attention((35, 18), strided=True),
    Attention((35, 18), strided=True, layout="HND", dtype=bf16),
    Attention((50, 8), window=(7, -1)),
    Attention((50, 8), window=(0, 0), sinks=True),
    Attention((34, 6), softcap=2.0),
    Attention((34, 6), alibi=1),
    Attention((34, 6), alibi=2, softcap=5.0, sinks=True, window=(12, 3)),
    Attention((34, 0, 6), sinks=True, dtype=bf16, out_dtype=fp32),
    Attention((45, 12), dtype=bf16, kv_dtype=e4m3, scale="float"),
    Attention((45, 12), dtype=fp16, kv_dtype=e5m2, scale="tensor"),
    Attention((45, 12), dtype=bf16, kv_dtype=e4m3, scale="head", layout="HND"),
    Attention((45, 12), kv_dtype=int8, scale="batch_head"),
    Attention((45, 12), dtype=bf16, kv_dtype=int8, scale="token_head", page_size=3),
    Attention((45, 12), dtype=bf16, kv_dtype=e5m2, scale="token_head", window=(20, 0), layout="HND"),
    Attention((45, 12), kv_dtype=e4m3, scale="token_head", strided=True, softcap=3.0),
    Attention((90, 12), split_size=16),
    Attention((90, 12), split_size=1000, sinks=True),
)

PREFILL = (
    Attention((37,), (37,)),
    Attention((21, 37), (5, 20), dtype=bf16),
    Attention((0, 1, 15, 16, 17), (0, 1, 3, 16, 2), note="page_edges"),
    Attention((3, 9), (7, 9), sinks=True, note="q_len>seq_len"),
    Attention((0, 0), (4, 0), note="all_empty"),
    Attention((40, 33), (11, 33), causal=False, dtype=fp16, layout="HND"),
    Attention((40, 3), (8, 3), heads=(6, 2), page_size=3),
    Attention((29,), (13,), heads=(16, 1), page_size=1, head_dim=32),
    Attention((35,), (35,), heads=(48, 1), head_dim=16, note="group48"),
    Attention((44,), (20,), head_dim=80, page_size=64, dtype=bf16),
    Attention((18,), (18,), head_dim=96, head_dim_v=40),
    Attention((21, 50), (21, 4), head_dim=128, page_size=128, dtype=bf16),
    Attention((17,), (9,), heads=(2, 1), head_dim=256, head_dim_v=64),
    Attention((1, 700, 1), (1, 2, 1), heads=(2, 1), head_dim=16, note="skewed"),
    Attention((50, 40), (10, 9), shared_prefix=True, padding_rows=5, dtype=bf16),
    Attention((35, 18), (20, 18), strided=True, padding_rows=2),
    Attention((35, 18), (20, 18), strided=True, layout="HND", dtype=bf16),
    Attention((150, 8), (90, 8), window=(7, -1), head_dim=32),
    Attention((50, 8), (40, 8), window=(3, 0), causal=False, sinks=True),
    Attention((50, 8), (40, 8), window=(4, 6), causal=False),
    Attention((34, 6), (30, 6), softcap=2.0),
    Attention((34, 6), (30, 6), alibi=1),
    Attention((34, 6), (30, 6), alibi=2, softcap=5.0, sinks=True, window=(12, 3), causal=False),
    Attention((34, 0, 6), (7, 0, 6), sinks=True, dtype=bf16, out_dtype=fp32, padding_rows=1),
    Attention((45, 12), (9, 12), dtype=bf16, kv_dtype=e4m3, scale="float"),
    Attention((45, 12), (9, 12), dtype=fp16, kv_dtype=e5m2, scale="tensor"),
    Attention((45, 12), (9, 12), dtype=bf16, kv_dtype=e4m3, scale="head", layout="HND"),
    Attention((45, 12), (9, 12), kv_dtype=int8, scale="batch_head"),
    Attention((45, 12), (9, 12), dtype=bf16, kv_dtype=int8, scale="token_head", page_size=3),
    Attention((45, 12), (9, 12), kv_dtype=e4m3, scale="token_head", strided=True, softcap=3.0),
    Attention((90, 12, 33), (4, 1, 2), max_q_len=4, heads=(8, 2), note="verify"),
    Attention((90, 12, 33), (4, 1, 2), max_q_len=16, dtype=bf16, split_size=32, sinks=True),
    Attention((200, 40), (1, 40), split_size=64, note="mixed"),
)


def matrix() -> list[Attention]:
    """The long list for `make test-slow`: every group meets every width, and every page size meets both."""
    cases = []
    pages = (1, 3, 16, 64, 128)
    for i, group in enumerate((1, 3, 4, 8, 16, 48)):
        for j, head_dim in enumerate((64, 80, 96, 128, 256)):
            k = (i + 2 * j) % len(pages)
            page_size = pages[k]
            turn = i + j + k
            kv_dtype, scale = ((None, None), (e4m3, "head"), (int8, "token_head"), (e5m2, "tensor"))[turn % 4]
            case = Attention(
                (page_size + 1, 0, 50 + 7 * turn),
                heads=(group * 2, 2),
                head_dim=head_dim,
                page_size=page_size,
                dtype=(bf16, fp16, fp32)[turn % 3],
                kv_dtype=kv_dtype,
                scale=scale,
                layout=("NHD", "HND")[turn % 2],
                sinks=turn % 5 == 0,
                window=(40, -1) if turn % 7 == 0 else (-1, -1),
            )
            cases.append(case)
            cases.append(replace(case, q_lens=(3, 0, 5 + 3 * turn), padding_rows=turn % 2))
    return cases
