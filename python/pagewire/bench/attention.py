"""Decode and prefill cases on a device: a cold permuted cache, our call, and the check against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import pagewire as pw
from pagewire.backends import reference
from pagewire.bench.cases import Attention
from pagewire.bench.cold_memory import ColdMemory
from pagewire.bench.work import Contender, Verdict, Work
from pagewire.types import QUANT_MAX, Modifiers

_WINDOW = 32  # query rows compared at a time, at a request's start, middle and end
_KEYS = 1 << 16  # keys times kv heads compared at a time: bounds the fp64 copies of a long sequence
# how far a peer may be from fp64, by the precision it computes in: peers round where they like
_PEER_LIMIT = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 2e-2}
_SCALE = 0.5  # of quantised caches: not 1, so that forgetting it is seen


class AttentionWork(Work):
    """`page_tables[copy]` are disjoint random sets of pages of one pool; everything else is shared by the copies."""

    def __init__(self, case: Attention, memory: ColdMemory) -> None:
        self.case: Attention = case
        self.device = memory.device
        num_qo_heads, num_kv_heads = case.heads
        page_bytes = case.page_size * num_kv_heads * case.head_dim * case.stored.itemsize
        self.copies = memory.copies(case.cold_bytes, 2 * case.num_pages * page_bytes)
        shape = (self.copies * case.num_pages, case.page_size, num_kv_heads, case.head_dim)
        self.k_cache, self.v_cache = memory.take(case.stored, shape, shape)
        self.q = memory.random(case.num_tokens, num_qo_heads, case.head_dim, dtype=case.dtype)
        order = memory.permutation(shape[0]).to(torch.int32).view(self.copies, case.num_pages)
        self.page_tables = tuple(_table(case, row) for row in order)
        self.seq_lens = self._int32([r.seq_len for r in case.requests])
        ends = torch.tensor([0] + [r.q_len for r in case.requests]).cumsum(0).tolist()
        self.rows: list[int] = ends  # request b has query rows rows[b] .. rows[b + 1]
        self.cu_seqlens_q = self._int32(ends)
        self.max_q_len = max(r.q_len for r in case.requests)
        self.max_seq_len = max(r.seq_len for r in case.requests)
        self.softmax_scale = case.head_dim**-0.5
        self.kv_scale = _SCALE if case.stored in QUANT_MAX else None

    def _int32(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def ours(self, backend: str) -> Contender:
        out = torch.empty_like(self.q)
        scales: dict[str, Any] = {"k_scale": self.kv_scale, "v_scale": self.kv_scale}
        if self.case.op == "decode":

            def decode(copy: int) -> Tensor:
                pw.decode(
                    self.q, self.k_cache, self.v_cache, self.page_tables[copy], self.seq_lens,
                    out=out, backend=backend, **scales,
                )  # fmt: skip
                return out

            return Contender(backend, _poisoned(decode, out), version=pw.__version__)

        def prefill(copy: int) -> Tensor:
            pw.prefill(
                self.q, self.k_cache, self.v_cache, self.page_tables[copy], self.seq_lens, self.cu_seqlens_q,
                max_q_len=self.max_q_len, out=out, backend=backend, **scales,
            )  # fmt: skip
            return out

        return Contender(backend, _poisoned(prefill, out), version=pw.__version__)

    def gather(self, copy: int, request: int) -> tuple[Tensor, Tensor]:
        """Dense K and V of one request in q's dtype, `[seq_len, num_kv_heads, head_dim]`."""
        seq_len = self.case.requests[request].seq_len
        pages = self.page_tables[copy][request, : -(-seq_len // self.case.page_size)].long()
        found = []
        for cache in (self.k_cache, self.v_cache):
            dense = cache.index_select(0, pages).flatten(0, 1)[:seq_len]
            found.append(dense if self.kv_scale is None else dense.to(self.case.dtype) * self.kv_scale)
        return found[0], found[1]

    def check(self, contender: Contender) -> Verdict:
        """Rows of the first, the last and the longest request, against fp64; the rest must be finite."""
        out = contender.once(0)
        if tuple(out.shape) != tuple(self.q.shape):
            return Verdict(False, float("inf"), f"expected shape {tuple(self.q.shape)}, got {tuple(out.shape)}")
        if not bool(out.isfinite().all()):
            return Verdict(False, float("inf"), "NaN or inf in the result")
        ours = contender.name in pw.backends(self.device)
        lens = [r.seq_len for r in self.case.requests]
        difference = norm = 0.0
        for request in sorted({0, len(lens) - 1, lens.index(max(lens))}):
            for start, stop in _windows(self.case.requests[request].q_len):
                got, exact, naive = self._compare(out, request, start, stop)
                error = (got - exact).abs()
                limit = 2 * float((naive - exact).abs().max()) + 1e-5
                if ours and float(error.max()) > limit:
                    reason = f"request {request} rows {start}:{stop}: error {float(error.max()):.2e} > {limit:.2e}"
                    return Verdict(False, float(error.norm() / exact.norm()), reason)
                difference += float(error.square().sum())
                norm += float(exact.square().sum())
        relative = (difference / norm) ** 0.5
        ok = relative <= _PEER_LIMIT[self.case.dtype]
        return Verdict(ok, relative, "" if ok else f"relative error {relative:.1e}")

    def _compare(self, out: Tensor, request: int, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """(result, fp64, naive in q's dtype) of rows [start, stop) of a request, for as many heads as fit, in fp64.

        Under causal, rows up to `stop` see what a request that ends there sees.
        """
        case = self.case
        q_len, seq_len = case.requests[request]
        seen = seq_len - q_len + stop
        kv_heads = max(1, min(case.heads[1], _KEYS // seen))
        group_size = case.heads[0] // case.heads[1]
        rows = slice(self.rows[request] + start, self.rows[request] + stop)
        # the last heads: a wrong stride grows with the head
        heads = slice(case.heads[0] - kv_heads * group_size, None)
        q = self.q[rows, heads]
        arguments = (
            q, self.k_cache[:, :, -kv_heads:], self.v_cache[:, :, -kv_heads:],
            self.page_tables[0][request : request + 1], self._int32([seen]), self._int32([0, stop - start]),
        )  # fmt: skip
        modifiers = Modifiers(self.softmax_scale, causal=True, k_scale=self.kv_scale, v_scale=self.kv_scale)
        results = []
        for dtype in (torch.float64, case.dtype):
            result = torch.empty(q.shape, dtype=torch.float64, device=self.device)
            reference.prefill(*arguments, modifiers, result, None, compute_dtype=dtype)
            results.append(result)
        # a result in q's dtype is rounded once more than the naive evaluation
        return out[rows, heads].double(), results[0], results[1].to(case.dtype).double()


def _poisoned(call: Callable[[int], Tensor], out: Tensor) -> Callable[[int], Tensor]:
    out.fill_(torch.nan)  # the first call is the checked one: what it leaves out stays NaN
    return call


def _table(case: Attention, pages: Tensor) -> Tensor:
    """[batch_size, max_pages_per_seq] int32 from the pages in order; padding 0, since some peers load it."""
    counts = [-(-r.seq_len // case.page_size) for r in case.requests]
    if len(set(counts)) == 1:
        return pages.view(len(counts), counts[0])
    table = torch.zeros(len(counts), max(counts), dtype=torch.int32, device=pages.device)
    at = 0
    for row, count in zip(table, counts, strict=True):
        row[:count] = pages[at : at + count]
        at += count
    return table


def _windows(q_len: int) -> list[tuple[int, int]]:
    if q_len <= 3 * _WINDOW:
        return [(0, q_len)]
    middle = q_len // 2
    return [(0, _WINDOW), (middle, middle + _WINDOW), (q_len - _WINDOW, q_len)]
