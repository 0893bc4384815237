"""The caller's paged cache, described: one K and one V tensor per layer of a group, and their scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any, TypeVar

import torch
from torch import Tensor

from pagewire import overlap, scalars, shared_kv, views
from pagewire.types import KV_DTYPES, LAYOUTS, QUANT_MAX, Layout, StoredScaleKind, dense, dispatches, dtype_name

CACHE_SCALES: tuple[str, ...] = ("none", "tensor", "head", "token_head")

T = TypeVar("T")


@dataclass(frozen=True)
class Geometry:
    """Everything about a cache but its contents."""

    num_layers: int
    num_pages: int
    page_size: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    dtype: torch.dtype
    layout: Layout
    scale: StoredScaleKind
    shares_kv: bool  # V is a view of K (MLA): one copy on the wire

    @property
    def num_slots(self) -> int:
        return self.num_pages * self.page_size

    @property
    def bytes_per_token(self) -> int:
        """K and V bytes of one token over all layers, scales not counted."""
        width = self.head_dim + (0 if self.shares_kv else self.head_dim_v)
        return self.num_layers * self.num_kv_heads * width * self.dtype.itemsize


class PagedKVCache:
    """One group of layers with the same heads, widths, dtype and page table. Wraps tensors, owns none.

    Args:
        k_caches, v_caches: per layer, `[num_pages, page_size, num_kv_heads, head_dim(_v)]` ("NHD") or
            `[num_pages, num_kv_heads, page_size, head_dim(_v)]` ("HND"); only the last dim must be contiguous.
            `v_caches` may be views of `k_caches` starting at the same element (MLA): then V is not packed.
        shares_kv: whether V is such a view; None looks at the pointers (under torch.compile: False).
            K and V then have one scale: the same values, or, per token and head, tensors that the ops keep equal.
        k_scales, v_scales: per layer fp32 `[]`, `[num_kv_heads]` or `[num_pages, page_size, num_kv_heads]` (in either
            layout); needed exactly when the dtype is fp8 or int8.
    Pickling, `copy.deepcopy`, `torch.save`, `to` and processes that share memory keep which tensors share what.

    Raises:
        ValueError, TypeError: lists of different lengths, layers of different shape or dtype, missing scales, two
            scales for one storage, shares_kv=True for tensors that do not.
    """

    def __init__(
        self,
        k_caches: Sequence[Tensor],
        v_caches: Sequence[Tensor],
        *,
        layout: Layout = "NHD",
        k_scales: Sequence[Tensor] | None = None,
        v_scales: Sequence[Tensor] | None = None,
        shares_kv: bool | None = None,
    ) -> None:
        self.k, self.v = _layers("k_caches", k_caches), _layers("v_caches", v_caches)
        self.layout: Layout = layout
        self.k_scale: tuple[Tensor | None, ...] = (None,) * len(self.k)
        self.v_scale: tuple[Tensor | None, ...] = (None,) * len(self.v)
        if k_scales is not None:
            self.k_scale = _layers("k_scales", k_scales)
        if v_scales is not None:
            self.v_scale = _layers("v_scales", v_scales)
        self.geometry = _geometry(self, shares_kv)

    @property
    def page_size(self) -> int:
        return self.geometry.page_size

    @property
    def num_layers(self) -> int:
        return self.geometry.num_layers

    @property
    def device(self) -> torch.device:
        return self.k[0].device

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by the name of the argument it came in."""
        found = {}
        for name in ("k", "v", "k_scale", "v_scale"):
            argument = f"{name}_caches" if len(name) == 1 else f"{name}s"
            for i, tensor in enumerate(getattr(self, name)):
                if tensor is not None:
                    found[f"{argument}[{i}]"] = tensor
        return found

    @cached_property
    def parts(self) -> dict[Any, Any]:
        """What calls found of some layers and heads (`cache_part.py`), for the next; nothing in it holds the cache."""
        return {}

    def forget(self) -> None:
        """All that was found by the addresses of tensors, which have others now."""
        for name in ("spans", "conflict", "parts"):
            self.__dict__.pop(name, None)

    @cached_property
    def foreign(self) -> str | None:
        """The first tensor of a kind that takes torch ops into its own hands, as fake ones do."""
        return next((name for name, t in self.tensors.items() if dispatches(type(t))), None)

    @cached_property
    def spans(self) -> tuple[overlap.Span, ...]:
        """The memory in which all tensors lie, as addresses [start, stop)."""
        return overlap.merged(map(overlap.span, self.tensors.values()))

    @cached_property
    def conflict(self) -> str | None:
        """Where writing tokens would write the same memory twice; None if nowhere."""
        written = {n: t for n, t in self.tensors.items() if "caches" in n or t.dim() == 3}
        if self.geometry.shares_kv:  # V is written with K, and one scale with the other
            for i, (k_scale, v_scale) in enumerate(zip(self.k_scale, self.v_scale, strict=True)):
                written.pop(f"v_caches[{i}]")
                if k_scale is not None and v_scale is not None and overlap.same(k_scale, v_scale):
                    written.pop(f"v_scales[{i}]", None)
        for name, tensor in written.items():
            if overlap.overlaps_itself(tensor):
                return f"{name} has stride {tensor.stride()} for shape {tuple(tensor.shape)}"
        placed = [(name, tensor, overlap.span(tensor)) for name, tensor in written.items()]
        for (name, tensor, span), (other, another, its_span) in combinations(placed, 2):
            if overlap.meet(span, its_span) and overlap.overlap(tensor, another):
                return f"{other} overlaps {name}"
        return None

    def to(self, device: torch.device | str) -> PagedKVCache:
        """This cache on `device`, itself if it is there already; what shares memory here shares it there."""
        target = torch.empty(0, device=device).device
        if target == self.device:
            return self
        return _joined(views.moved(self._parts, target), *self._rest)

    def share_memory_(self) -> PagedKVCache:
        """Moves the tensors of a CPU cache to memory that other processes can map; returns the cache itself."""
        for tensor in self.tensors.values():
            tensor.share_memory_()
        return self

    @property
    def _parts(self) -> views.Parts:
        return views.split(tuple(self.tensors.values()))

    @property
    def _rest(self) -> tuple[tuple[str, ...], Layout, bool]:
        """What `_joined` wants besides the tensors."""
        return tuple(self.tensors), self.layout, self.geometry.shares_kv

    def __reduce__(self) -> tuple[Any, ...]:
        return _joined, (self._parts, *self._rest)

    @classmethod
    def allocate(
        cls,
        *,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        layout: Layout = "NHD",
        head_dim_v: int | None = None,
        scale: StoredScaleKind = "none",
    ) -> PagedKVCache:
        """A zero-filled cache with tensors of its own; scales start at 1.

        Raises:
            ValueError: a count below 1, an unknown layout or scale, or fp8/int8 without a scale (or a scale without).
        """
        counts = {
            "num_layers": num_layers, "num_pages": num_pages, "page_size": page_size, "num_kv_heads": num_kv_heads,
            "head_dim": head_dim, "head_dim_v": head_dim if head_dim_v is None else head_dim_v,
        }  # fmt: skip
        num_layers, num_pages, page_size, num_kv_heads, head_dim, head_dim_v = (
            scalars.integer(name, value, least=1) for name, value in counts.items()
        )
        if dtype not in KV_DTYPES:
            accepted = ", ".join(map(dtype_name, KV_DTYPES))
            raise TypeError(f"dtype: expected one of {accepted}, got {scalars.show(dtype)}")
        if layout not in LAYOUTS:
            raise ValueError(f"layout: expected one of {LAYOUTS}, got {layout!r}")
        if scale not in CACHE_SCALES:
            raise ValueError(f"scale: expected one of {CACHE_SCALES}, got {scale!r}")
        rows = (page_size, num_kv_heads) if layout == "NHD" else (num_kv_heads, page_size)

        def stored(width: int) -> list[Tensor]:
            shape = (num_pages, *rows, width)
            return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]

        def scales() -> list[Tensor] | None:
            if scale == "none":
                return None
            shape = {"tensor": (), "head": (num_kv_heads,), "token_head": (num_pages, page_size, num_kv_heads)}[scale]
            return [torch.ones(shape, dtype=torch.float32, device=device) for _ in range(num_layers)]

        with torch.inference_mode(False):  # to be written in any mode
            tensors = stored(head_dim), stored(head_dim_v)
            return cls(*tensors, layout=layout, k_scales=scales(), v_scales=scales())


def _layers(name: str, tensors: Sequence[T]) -> tuple[T, ...]:
    found: tuple[T, ...]
    try:
        found = tuple(tensors)
    except TypeError:
        found = ()
    accepted = (Tensor, type(None)) if name.endswith("scales") else Tensor
    if not found or not all(isinstance(t, accepted) for t in found):
        expected = "a sequence with a tensor for each layer"
        raise TypeError(f"{name}: expected {expected}, got {scalars.show(tensors)}")
    return found


def _joined(parts: views.Parts, names: Sequence[str], layout: Layout, shares_kv: bool) -> PagedKVCache:
    """A cache over tensors that were taken apart; names: of each, `argument[layer]`."""
    lists: dict[str, Any] = {}
    for name, tensor in zip(names, views.join(parts), strict=True):
        lists.setdefault(name.partition("[")[0], []).append(tensor)
    return PagedKVCache(**lists, layout=layout, shares_kv=shares_kv)


def nhd(cache: Tensor, layout: Layout) -> Tensor:
    """A view in NHD order, `[num_pages, page_size, num_kv_heads, head_dim]`: below the API, layout is strides."""
    return cache if layout == "NHD" else cache.transpose(1, 2)


def _geometry(cache: PagedKVCache, shares_kv: bool | None) -> Geometry:
    num_layers = len(cache.k)
    for name, tensors in (("v_caches", cache.v), ("k_scales", cache.k_scale), ("v_scales", cache.v_scale)):
        if len(tensors) != num_layers:
            raise ValueError(f"{name}: expected {num_layers} layers (from k_caches), got {len(tensors)}")
    if cache.layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {LAYOUTS}, got {cache.layout!r}")
    k0, v0 = cache.k[0], cache.v[0]
    names = "[num_pages, page_size, num_kv_heads, head_dim]"
    if cache.layout == "HND":
        names = "[num_pages, num_kv_heads, page_size, head_dim]"
    for kind, tensors, first in (("k", cache.k, k0), ("v", cache.v, v0)):
        for i, t in enumerate(tensors):
            where = f"{kind}_caches[{i}]"
            if t.dim() != 4:
                raise ValueError(f"{where}: expected {names}, got shape {tuple(t.shape)}")
            if t.dtype not in KV_DTYPES:
                accepted = ", ".join(map(dtype_name, KV_DTYPES))
                raise TypeError(f"{where}: expected one of {accepted}, got {dtype_name(t.dtype)}")
            if t.shape != first.shape or t.dtype != k0.dtype or t.device != k0.device:
                raise ValueError(
                    f"{where}: expected {tuple(first.shape)} {dtype_name(k0.dtype)} on {k0.device} (from layer 0), "
                    f"got {tuple(t.shape)} {dtype_name(t.dtype)} on {t.device}"
                )
            if t.stride(-1) != 1 and t.shape[-1] > 1:
                raise ValueError(f"{where}: expected a contiguous last dim (stride 1), got stride {t.stride(-1)}")
    if v0.shape[:3] != k0.shape[:3]:
        raise ValueError(
            f"v_caches[0]: expected {names} = {tuple(k0.shape[:3])} + (head_dim_v,), got {tuple(v0.shape)}"
        )
    k_nhd = nhd(k0, cache.layout)
    num_pages, page_size, num_kv_heads, head_dim = k_nhd.shape
    for name, extent in (
        ("page_size", page_size), ("num_kv_heads", num_kv_heads), ("head_dim", head_dim), ("head_dim_v", v0.shape[-1])
    ):  # fmt: skip
        if extent < 1:
            raise ValueError(
                f"k_caches, v_caches: expected {name} >= 1, got shapes {tuple(k0.shape)} and {tuple(v0.shape)}"
            )
    scale = _cache_scale(cache, num_pages, page_size, num_kv_heads)
    shares_kv = _shares_kv(cache, shares_kv)
    if shares_kv and scale in ("tensor", "head") and _has_memory(k0):
        for i, (k_scale, v_scale) in enumerate(zip(cache.k_scale, cache.v_scale, strict=True)):
            shared_kv.one_scale(f"v_scales[{i}]", k_scale, v_scale, may_wait=True)
    return Geometry(
        num_layers, num_pages, page_size, num_kv_heads, head_dim, v0.shape[-1], k0.dtype, cache.layout, scale, shares_kv
    )


def _has_memory(x: Tensor) -> bool:
    return not torch.compiler.is_compiling() and not x.is_meta and type(x) is Tensor


def _shares_kv(cache: PagedKVCache, said: bool | None) -> bool:
    """Every V is a prefix view of its K: the MLA layout. What cannot be seen is taken as said."""
    if not _has_memory(cache.k[0]) or cache.k[0].numel() == 0:
        return bool(said)
    seen = all(map(overlap.is_prefix, cache.v, cache.k))
    if said and not seen:
        raise ValueError(
            "shares_kv=True: expected each of v_caches to be the first columns of its k_caches, got memory of its own"
        )
    return seen if said is None else said


def _cache_scale(cache: PagedKVCache, num_pages: int, page_size: int, num_kv_heads: int) -> StoredScaleKind:
    quantised = cache.k[0].dtype in QUANT_MAX
    kinds: set[StoredScaleKind] = set()
    shapes: dict[tuple[int, ...], StoredScaleKind] = {
        (): "tensor", (num_kv_heads,): "head", (num_pages, page_size, num_kv_heads): "token_head"
    }  # fmt: skip
    for kind, scales in (("k", cache.k_scale), ("v", cache.v_scale)):
        for i, s in enumerate(scales):
            if s is None:
                kinds.add("none")
                continue
            where = f"{kind}_scales[{i}]"
            dense(where, s)
            if s.dtype != torch.float32:
                raise TypeError(f"{where}: expected float32, got {dtype_name(s.dtype)}")
            if s.device != cache.k[0].device:
                raise ValueError(f"{where}: expected device {cache.k[0].device} (from k_caches), got {s.device}")
            if tuple(s.shape) not in shapes:
                raise ValueError(
                    f"{where}: expected [], [{num_kv_heads}] (num_kv_heads) or [{num_pages}, {page_size}, "
                    f"{num_kv_heads}] (num_pages, page_size, num_kv_heads), got {tuple(s.shape)}"
                )
            kinds.add(shapes[tuple(s.shape)])
    if len(kinds) != 1:
        raise ValueError(f"k_scales, v_scales: expected one kind for all layers and for K and V, got {sorted(kinds)}")
    (found,) = kinds
    if quantised != (found != "none"):
        expected = "k_scales and v_scales (1.0 for none)" if quantised else "no scales"
        raise ValueError(f"scale: a {dtype_name(cache.k[0].dtype)} cache needs {expected}, got scale kind {found!r}")
    return found
