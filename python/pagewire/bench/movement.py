"""Append, pack, unpack and merge cases on a device. Moves are compared bitwise with the reference."""

from __future__ import annotations

import torch
from torch import Tensor

import pagewire as pw
from pagewire import moves
from pagewire.backends import reference
from pagewire.bench.cases import Append, Merge, Pack
from pagewire.bench.cold_memory import ColdMemory
from pagewire.bench.work import Contender, Verdict, Work
from pagewire.cache import nhd
from pagewire.cache_part import LayerViews
from pagewire.packed import PackedKV
from pagewire.types import QUANT_MAX, Layout

_MERGE_LIMIT = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def _caches(
    memory: ColdMemory,
    dtype: torch.dtype,
    layout: Layout,
    num_layers: int,
    pages: int,
    page_size: int,
    heads: int,
    head_dim: int,
) -> pw.PagedKVCache:
    """Random contents; quantised: one scale per token and head."""
    rows = (page_size, heads) if layout == "NHD" else (heads, page_size)
    tensors = memory.take(dtype, *[(pages, *rows, head_dim)] * (2 * num_layers))
    scales: list[Tensor] | None = None
    if dtype in QUANT_MAX:
        scales = [memory.random(pages, page_size, heads).abs() for _ in range(2 * num_layers)]
    return pw.PagedKVCache(
        tensors[::2],
        tensors[1::2],
        layout=layout,
        k_scales=scales[::2] if scales else None,
        v_scales=scales[1::2] if scales else None,
    )


def _slot_sets(memory: ColdMemory, copies: int, pages_each: int, page_size: int, num_tokens: int) -> tuple[Tensor, ...]:
    """Per copy the slots of `num_tokens` tokens in order over permuted pages, int64."""
    order = memory.permutation(copies * pages_each).view(copies, pages_each)
    offset = torch.arange(page_size, device=memory.device)
    slots = (order[:, :, None] * page_size + offset).flatten(1)
    return tuple(row.contiguous() for row in slots[:, :num_tokens])


def _at(cache: Tensor, layout: Layout, slots: Tensor) -> Tensor:
    """The stored bytes of the given slots, `[num_tokens, heads, bytes]`."""
    view = nhd(cache, layout)
    raw = view.view(torch.uint8)
    return raw[slots // view.shape[1], slots % view.shape[1]]


def _differing(got: list[Tensor], expected: list[Tensor]) -> Verdict:
    wrong = sum(int((g != e).sum()) for g, e in zip(got, expected, strict=True))
    total = sum(e.numel() for e in expected)
    return Verdict(wrong == 0, wrong / max(total, 1), f"{wrong} of {total} bytes differ" if wrong else "")


class AppendWork(Work):
    def __init__(self, case: Append, memory: ColdMemory) -> None:
        self.case: Append = case
        pages = -(-case.num_tokens // case.page_size)
        stored = 2 * pages * case.page_size * case.num_kv_heads * case.head_dim * case.stored.itemsize
        source = 2 * case.num_tokens * case.num_kv_heads * case.head_dim * case.dtype.itemsize
        self.copies = memory.copies(case.cold_bytes, stored + source)
        shape = (self.copies, case.num_tokens, case.num_kv_heads, case.head_dim)
        self.cache = _caches(
            memory, case.stored, case.layout, 1, pages * self.copies, case.page_size, case.num_kv_heads, case.head_dim
        )
        k, v = (memory.random(*shape[1:], dtype=case.dtype).expand(shape).clone() for _ in range(2))
        self.k, self.v = k, v  # [copies, num_tokens, num_kv_heads, head_dim]
        self.slots = _slot_sets(memory, self.copies, pages, case.page_size, case.num_tokens)

    def ours(self, backend: str) -> Contender:
        cache = self.cache

        def call(copy: int) -> None:
            pw.append_kv(
                self.k[copy], self.v[copy], cache.k[0], cache.v[0], self.slots[copy], layout=cache.layout,
                k_scale=cache.k_scale[0], v_scale=cache.v_scale[0], backend=backend,
            )  # fmt: skip

        return Contender(backend, call, version=pw.__version__)

    def _stored(self) -> list[Tensor]:
        cache, slots = self.cache, self.slots[0]
        found = [_at(t, cache.layout, slots) for t in (cache.k[0], cache.v[0])]
        for scale in (cache.k_scale[0], cache.v_scale[0]):
            if scale is not None:
                found.append(scale.flatten(0, 1)[slots].view(torch.uint8))
        return found

    def _poison(self) -> None:
        page, offset = self.slots[0] // self.cache.page_size, self.slots[0] % self.cache.page_size
        for t in (self.cache.k[0], self.cache.v[0]):
            nhd(t, self.cache.layout).view(torch.uint8)[page, offset] = 0x55

    def check(self, contender: Contender) -> Verdict:
        cache = self.cache
        self._poison()
        k, v = (nhd(t, cache.layout) for t in (cache.k[0], cache.v[0]))
        scales = cache.k_scale[0], cache.v_scale[0]
        reference.move(moves.append(self.k[0], self.v[0], k, v, self.slots[0], *scales), {})
        expected = self._stored()
        self._poison()
        contender.once(0)
        return _differing(self._stored(), expected)


class PackWork(Work):
    """Pack and unpack: `packed[copy]` is the wire's buffer, `slots[copy]` the tokens' places in the cache."""

    def __init__(self, case: Pack, memory: ColdMemory) -> None:
        self.case: Pack = case
        pages = -(-case.num_tokens // case.page_size)
        occupied = case.cache_bytes * pages * case.page_size // case.num_tokens + case.cold_bytes
        self.copies = min(memory.copies(case.cold_bytes, occupied), 64)
        self.cache = _caches(
            memory, case.dtype, case.layout, case.num_layers, pages * self.copies, case.page_size, case.num_kv_heads,
            case.head_dim,
        )  # fmt: skip
        self.slots = _slot_sets(memory, self.copies, pages, case.page_size, case.num_tokens)
        # the last heads: a slice that starts in the middle of every token
        self.heads = (case.num_kv_heads - case.heads, case.num_kv_heads)
        shape = pw.packed_shape(self.cache, case.num_tokens, heads=self.heads, dtype=case.packed)
        self.packed = tuple(PackedKV.empty(shape, memory.device) for _ in range(self.copies))
        if case.op == "unpack":  # every byte a value that has an inverse: what the reference packs
            self._reference_pack(self.packed[0], self.slots[0])
            for packed in self.packed[1:]:
                packed.buffer.copy_(self.packed[0].buffer)

    def _views(self) -> LayerViews:
        taken = slice(*self.heads)
        k, v = ([nhd(t, self.cache.layout)[:, :, taken] for t in ts] for ts in (self.cache.k, self.cache.v))
        return LayerViews(k, v, [], [])

    def _reference_pack(self, packed: PackedKV, slots: Tensor) -> None:
        reference.move(moves.pack(self._views(), slots, packed), {})

    def ours(self, backend: str) -> Contender:
        def pack(copy: int) -> PackedKV:
            return pw.pack_kv(
                self.cache, self.slots[copy], heads=self.heads, dtype=self.case.packed, out=self.packed[copy],
                backend=backend,
            )  # fmt: skip

        def unpack(copy: int) -> None:
            pw.unpack_kv(self.packed[copy], self.cache, self.slots[copy], heads=self.heads, backend=backend)

        return Contender(backend, pack if self.case.op == "pack" else unpack, version=pw.__version__)

    def _stored(self) -> list[Tensor]:
        views = self._views()
        return [_at(t, "NHD", self.slots[0]) for t in (*views.k, *views.v)]

    def _poison(self) -> None:
        page, offset = self.slots[0] // self.cache.page_size, self.slots[0] % self.cache.page_size
        for t in (*self._views().k, *self._views().v):
            t.view(torch.uint8)[page, offset] = 0x55

    def check(self, contender: Contender) -> Verdict:
        if self.case.op == "pack":
            expected = PackedKV.empty(self.packed[0].shape, self.packed[0].buffer.device)
            expected.buffer.fill_(0)
            self._reference_pack(expected, self.slots[0])
            self.packed[0].buffer.fill_(0)  # padding in front of the scales stays equal
            self.packed[0].k.view(torch.uint8).fill_(0x55)
            contender.once(0)
            return _differing([self.packed[0].buffer], [expected.buffer])
        self._poison()
        reference.move(moves.unpack(self.packed[0], self._views(), self.slots[0]), {})
        stored = self._stored()
        self._poison()
        contender.once(0)
        return _differing(self._stored(), stored)


class MergeWork(Work):
    def __init__(self, case: Merge, memory: ColdMemory) -> None:
        self.case: Merge = case
        self.copies = min(memory.copies(case.cold_bytes), 64)
        states = (case.num_states, case.num_tokens, case.num_heads)
        self.outs = tuple(memory.random(*states, case.head_dim, dtype=case.dtype) for _ in range(self.copies))
        self.lses = tuple(3 * memory.random(*states) for _ in range(self.copies))

    def ours(self, backend: str) -> Contender:
        out, lse = torch.empty_like(self.outs[0][0]), torch.empty_like(self.lses[0][0])
        out.fill_(torch.nan)

        def two(copy: int) -> Tensor:
            (out_a, out_b), (lse_a, lse_b) = self.outs[copy], self.lses[copy]
            pw.merge_state(out_a, lse_a, out_b, lse_b, out=out, lse=lse, backend=backend)
            return out

        def many(copy: int) -> Tensor:
            pw.merge_states(self.outs[copy], self.lses[copy], out=out, lse=lse, backend=backend)
            return out

        return Contender(backend, two if self.case.num_states == 2 else many, version=pw.__version__)

    def check(self, contender: Contender) -> Verdict:
        got = contender.once(0).double()
        weights = torch.softmax(self.lses[0].double(), 0)[..., None]
        exact = (weights * self.outs[0].double()).sum(0)
        error = float((got - exact).norm() / exact.norm())
        limit = _MERGE_LIMIT[self.case.dtype]
        ok = error <= limit  # NaN is not
        return Verdict(ok, error, "" if ok else f"relative error {error:.1e} above {limit}")
