"""What is timed: plain values. `bytes` is what must move at least once, `flops` what must be computed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from pagewire.bench import batch as batches
from pagewire.types import QUANT_MAX, Layout

SHORT = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2", torch.int8: "int8",
}  # fmt: skip


def _dtypes(dtype: torch.dtype, other: torch.dtype) -> str:
    return SHORT[dtype] if dtype == other else f"{SHORT[dtype]}>{SHORT[other]}"


def _count(n: int) -> str:
    return f"{n // 1024}k" if n >= 1024 and n % 1024 == 0 else str(n)


@dataclass(frozen=True)
class Attention:
    """One decode (every query one row) or prefill call, causal, K/V in a permuted paged NHD cache."""

    group: str  # how the suite prints it: decode, prefill, mixed, skewed
    batch: str
    heads: tuple[int, int] = (32, 8)  # num_qo_heads, num_kv_heads
    head_dim: int = 128
    page_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype | None = None  # None: dtype

    roof = "read"  # K/V are read; the result is small

    @property
    def id(self) -> str:
        return (
            f"{self.group} {self.batch} H{self.heads[0]}/{self.heads[1]} D{self.head_dim} "
            f"P{self.page_size} {_dtypes(self.dtype, self.stored)}"
        )

    @property
    def stored(self) -> torch.dtype:
        return self.kv_dtype or self.dtype

    @cached_property
    def requests(self) -> tuple[batches.Request, ...]:
        return batches.parse(self.batch)

    @property
    def op(self) -> str:
        return "decode" if all(r.q_len == 1 for r in self.requests) else "prefill"

    @property
    def num_tokens(self) -> int:
        return sum(r.q_len for r in self.requests)

    @property
    def num_pages(self) -> int:
        return sum(-(-r.seq_len // self.page_size) for r in self.requests)

    @property
    def uniform(self) -> bool:
        return len(set(self.requests)) == 1

    @property
    def cold_bytes(self) -> int:
        """Bytes of the caches that one call reads."""
        tokens = sum(r.seq_len for r in self.requests)
        return 2 * tokens * self.heads[1] * self.head_dim * self.stored.itemsize

    @property
    def bytes(self) -> int:
        return self.cold_bytes + 2 * self.num_tokens * self.heads[0] * self.head_dim * self.dtype.itemsize

    @property
    def flops(self) -> int:
        pairs = sum(r.q_len * r.seq_len - r.q_len * (r.q_len - 1) // 2 for r in self.requests)
        return 4 * self.heads[0] * self.head_dim * pairs


@dataclass(frozen=True)
class Append:
    """New tokens into their slots, quantised when the cache says so (fp8 and int8: one scale per token and head)."""

    num_tokens: int
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    layout: Layout = "NHD"
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype | None = None

    group = op = "append"
    roof = "copy"
    flops = 0

    @property
    def id(self) -> str:
        return (
            f"append {_count(self.num_tokens)}t H{self.num_kv_heads} D{self.head_dim} P{self.page_size} "
            f"{self.layout} {_dtypes(self.dtype, self.stored)}"
        )

    @property
    def stored(self) -> torch.dtype:
        return self.kv_dtype or self.dtype

    @property
    def cold_bytes(self) -> int:
        values = 2 * self.num_tokens * self.num_kv_heads * self.head_dim
        scales = 2 * self.num_tokens * self.num_kv_heads * 4 * (self.stored in QUANT_MAX)
        return values * (self.dtype.itemsize + self.stored.itemsize) + scales

    bytes = cold_bytes


@dataclass(frozen=True)
class Pack:
    """Tokens of all layers gathered into one contiguous buffer (pack), or scattered from one (unpack)."""

    op: str  # "pack", "unpack"
    num_tokens: int
    num_layers: int = 1
    num_kv_heads: int = 8
    heads: int = 8  # how many of them travel: 1 of 8 is a tensor-parallel slice
    head_dim: int = 128
    page_size: int = 16
    layout: Layout = "NHD"
    dtype: torch.dtype = torch.bfloat16  # the cache's
    wire: torch.dtype | None = None

    roof = "copy"
    flops = 0

    @property
    def group(self) -> str:
        return self.op

    @property
    def id(self) -> str:
        ends = (self.dtype, self.packed) if self.op == "pack" else (self.packed, self.dtype)
        return (
            f"{self.op} {_count(self.num_tokens)}t L{self.num_layers} H{self.num_kv_heads}>{self.heads} "
            f"D{self.head_dim} P{self.page_size} {self.layout} {_dtypes(*ends)}"
        )

    @property
    def packed(self) -> torch.dtype:
        return self.wire or self.dtype

    @property
    def cache_bytes(self) -> int:
        """Bytes of the caches that hold the tokens, all heads."""
        width = self.num_kv_heads * self.head_dim * self.dtype.itemsize
        return 2 * self.num_layers * self.num_tokens * width

    @property
    def cold_bytes(self) -> int:
        rows = 2 * self.num_layers * self.num_tokens * self.heads
        scales = 4 * rows * (self.packed in QUANT_MAX)
        return rows * self.head_dim * (self.dtype.itemsize + self.packed.itemsize) + scales

    bytes = cold_bytes


@dataclass(frozen=True)
class Merge:
    """`num_states` attention states over disjoint keys into one."""

    num_states: int
    num_tokens: int
    num_heads: int = 32
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16

    group = op = "merge"
    roof = "copy"
    flops = 0

    @property
    def id(self) -> str:
        count = f"{self.num_states}x{_count(self.num_tokens)}t"
        return f"merge {count} H{self.num_heads} D{self.head_dim} {SHORT[self.dtype]}"

    @property
    def cold_bytes(self) -> int:
        rows = self.num_tokens * self.num_heads
        return (self.num_states + 1) * rows * (self.head_dim * self.dtype.itemsize + 4)

    bytes = cold_bytes


Case = Attention | Append | Pack | Merge
