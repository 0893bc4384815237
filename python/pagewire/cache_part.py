"""The layers and heads of a cache that pack_kv reads or unpack_kv writes, and the buffer that goes with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from pagewire import scalars, shared_kv
from pagewire.cache import PagedKVCache, nhd
from pagewire.native import addresses
from pagewire.overlap import meet, overlap, same, span, touches
from pagewire.packed import PackedKV, PackedShape
from pagewire.types import KV_DTYPES, QUANT_MAX, dense, dispatches, dtype_name

T = TypeVar("T")

_MOST = 256  # parts of a cache, and what is remembered of each; then all of it is forgotten


class LayerViews(NamedTuple):
    """Per layer: NHD caches [num_pages, page_size, num_heads, head_dim] and scales; lists may be empty."""

    k: list[Tensor]
    v: list[Tensor]  # empty when V is a view of K
    k_scale: list[Tensor]
    v_scale: list[Tensor]


class Addressed(NamedTuple):
    """What was found of a part, as long as its tensors are where they were (`tensor.data = ...` moves one)."""

    layers: tuple[int, int]
    heads: tuple[int, int]
    found: dict[Any, Any]
    device: torch.device
    tensors: tuple[Tensor, ...]
    addresses: Any  # None: they have none, or may have others in the next call

    @classmethod
    def of(cls, cache: PagedKVCache, layers: Any, heads: Any) -> Addressed:
        g = cache.geometry
        taken, columns = _range("layers", layers, g.num_layers), _range("heads", heads, g.num_kv_heads)
        lists = (cache.k, cache.v, cache.k_scale, cache.v_scale)
        tensors = tuple(t for given in lists for t in given[slice(*taken)] if t is not None)
        known = not torch.compiler.is_compiling() and cache.foreign is None and not any(t.is_meta for t in tensors)
        return cls(taken, columns, {}, cache.device, tensors, addresses(tensors) if known else None)


class CachePart(NamedTuple):
    cache: PagedKVCache
    layers: tuple[int, int]  # (start, stop)
    heads: tuple[int, int]
    found: dict[Any, Any]  # for earlier calls
    device: torch.device
    traced: bool  # by torch.compile: a tensor has no address

    @classmethod
    def of(cls, cache: Any, layers: Any, heads: Any) -> CachePart:
        """None: all of them."""
        if not isinstance(cache, PagedKVCache):
            raise TypeError(f"cache: expected a PagedKVCache, got {type(cache).__name__}")
        known = None
        traced = torch.compiler.is_compiling()
        plain = not traced and _is_plain(layers) and _is_plain(heads)
        if plain:
            known = cache.parts.get((layers, heads))
            if known is not None and known.addresses != addresses(known.tensors):
                cache.forget()
                known = None
        if known is None:
            known = Addressed.of(cache, layers, heads)
            if plain and known.addresses is not None:
                if len(cache.parts) >= _MOST:
                    cache.parts.clear()
                cache.parts[layers, heads] = known
        return cls(cache, known.layers, known.heads, known.found, known.device, traced)

    def once(self, key: Any, find: Callable[[], T]) -> T:
        """What `find` returned for this key, which must be all that it depends on besides the part."""
        known = self.found.get(key)
        if known is None:
            known = find()
            if len(self.found) >= _MOST:
                self.found.clear()
            self.found[key] = known
        return known

    @property
    def head_dim_v(self) -> int:
        """Of a packed row of V; 0: it is within K's."""
        g = self.cache.geometry
        return 0 if g.shares_kv else g.head_dim_v

    def packed_shape(self, num_tokens: int, dtype: Any) -> PackedShape:
        if self.traced or type(num_tokens) is not int:
            return self._packed_shape(num_tokens, dtype)
        return self.once(("shape", num_tokens, dtype), lambda: self._packed_shape(num_tokens, dtype))

    def _packed_shape(self, num_tokens: int, dtype: Any) -> PackedShape:
        g = self.cache.geometry
        dtype = g.dtype if dtype is None else dtype
        if dtype not in KV_DTYPES:
            accepted = ", ".join(map(dtype_name, KV_DTYPES))
            raise TypeError(f"dtype: expected one of {accepted}, got {scalars.show(dtype)}")
        kind = g.scale if dtype == g.dtype else "token_head" if dtype in QUANT_MAX else "none"
        num_tokens = scalars.integer("num_tokens", num_tokens)
        if not self.traced and num_tokens < 0:
            raise ValueError(f"num_tokens: expected >= 0, got {num_tokens}")
        num_layers, num_heads = (stop - start for start, stop in (self.layers, self.heads))
        return PackedShape(num_layers, num_heads, num_tokens, g.head_dim, self.head_dim_v, dtype, kind)

    @property
    def views(self) -> LayerViews:
        shared, cache = self.cache.geometry.shares_kv, self.cache
        return LayerViews(
            self._rows(cache.k), [] if shared else self._rows(cache.v),
            self._scales(cache.k_scale), [] if shared else self._scales(cache.v_scale),
        )  # fmt: skip

    def second_scales(self) -> LayerViews | None:
        """V's own scale tensors of a cache whose V is a view of K: K's rows once more, with these to be written."""
        cache = self.cache
        if not cache.geometry.shares_kv or cache.geometry.scale != "token_head":
            return None
        k_scale, v_scale = self._scales(cache.k_scale), self._scales(cache.v_scale)
        # a tracer sees no addresses: there the rows are written twice in any case
        if not self.traced and all(map(same, k_scale, v_scale)):
            return None
        return LayerViews(self._rows(cache.k), [], v_scale, [])

    def _rows(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        all_heads = [nhd(t, self.cache.layout) for t in tensors[slice(*self.layers)]]
        if self.heads == (0, self.cache.geometry.num_kv_heads):
            return all_heads
        return [t[:, :, slice(*self.heads)] for t in all_heads]

    def _scales(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        columns = slice(*self.heads)
        given = [s for s in tensors[slice(*self.layers)] if s is not None]
        return [s if s.dim() == 0 else s[..., columns] for s in given]

    # ---------------------------------------------------------------------------------------- checks

    def check_slots(self, slots: Any) -> None:
        if not isinstance(slots, Tensor):
            raise TypeError(f"slots: expected a torch.Tensor [num_tokens] int64, got {scalars.show(slots)}")
        if not self.traced and not dispatches(type(slots)):
            foreign = self.cache.foreign
            if foreign is not None:
                kind = type(self.cache.tensors[foreign]).__name__
                raise TypeError(f"{foreign} of the cache: expected a plain torch.Tensor like slots, got {kind}")
            dense("slots", slots)
        if slots.dim() != 1 or slots.dtype != torch.int64:
            raise ValueError(f"slots: expected [num_tokens] int64, got {tuple(slots.shape)} {dtype_name(slots.dtype)}")
        if slots.device != self.device:
            raise ValueError(f"slots: expected device {self.device} (from the cache), got {slots.device}")

    def check_shared_scales(self, slots: Tensor) -> None:
        """V within K has K's scales: others would not travel."""
        cache = self.cache
        if not cache.geometry.shares_kv or cache.geometry.scale != "token_head":
            return
        pairs = zip(self._scales(cache.k_scale), self._scales(cache.v_scale), strict=True)
        for layer, (k_scale, v_scale) in enumerate(pairs, self.layers[0]):
            shared_kv.same_token_scales(k_scale, v_scale, slots, layer)

    def buffer(self, out: Any, shape: PackedShape, slots: Tensor) -> PackedKV:
        """`out` as the PackedKV that receives, or a new one."""
        if out is None:
            return PackedKV.empty(shape, self.device)
        if isinstance(out, PackedKV):
            if out.shape is not shape and out.shape != shape:
                raise ValueError(f"out: expected {shape}, got {out.shape}")
        elif not isinstance(out, Tensor):
            raise TypeError(f"out: expected a uint8 tensor or a PackedKV, got {scalars.show(out)}")
        buffer = out.buffer if isinstance(out, PackedKV) else out
        self._check_place("out", buffer)
        packed = out if isinstance(out, PackedKV) else PackedKV.wrap(buffer, shape)
        self._check_apart("out", packed.buffer, slots)
        return packed

    def check_packed(self, packed: Any, slots: Tensor) -> None:
        if not isinstance(packed, PackedKV):
            raise TypeError(f"packed: expected a PackedKV, got {scalars.show(packed)}")
        shape, num_tokens = packed.shape, slots.shape[0]
        if self.found.get("fits") is not shape or shape.num_tokens != num_tokens:
            self._check_shape(shape, num_tokens)
            self.found["fits"] = shape  # unpacked with it again and again, by a server above all
        self._check_place("packed", packed.buffer)

    def _check_shape(self, shape: PackedShape, num_tokens: int) -> None:
        g = self.cache.geometry
        expected = (
            self.layers[1] - self.layers[0], self.heads[1] - self.heads[0], num_tokens, g.head_dim, self.head_dim_v
        )  # fmt: skip
        got = shape.num_layers, shape.num_heads, shape.num_tokens, shape.head_dim, shape.head_dim_v
        if expected != got:
            raise self._other_shape(expected, got)
        if (shape.dtype in QUANT_MAX) != (shape.scale_kind != "none"):
            raise ValueError(f"packed: scale kind {shape.scale_kind!r} does not go with {dtype_name(shape.dtype)}")

    def _other_shape(self, expected: tuple[int, ...], got: tuple[int, ...]) -> ValueError:
        sources = {
            "num_layers": f"layers={self.layers}", "num_heads": f"heads={self.heads}", "num_tokens": "slots",
            "head_dim": "the cache", "head_dim_v": "the cache; 0 = V is a view of K",
        }  # fmt: skip
        name, e, g = next((n, e, g) for n, e, g in zip(sources, expected, got, strict=True) if e != g)
        return ValueError(f"packed: expected {name}={e} (from {sources[name]}), got {g}")

    def check_writable(self, packed: PackedKV, slots: Tensor) -> None:
        """unpack_kv writes each element once, and nothing that it still has to read."""
        conflict = self.cache.conflict
        if conflict is not None:
            raise ValueError(f"cache: expected memory of its own for each element, but {conflict}")
        self._check_apart("packed", packed.buffer, slots)

    def _check_place(self, name: str, buffer: Tensor) -> None:
        device = self.device
        if buffer.device != device and not (device.type == "cuda" and buffer.is_pinned()):
            raise ValueError(f"{name}: expected device {device} (from the cache) or pinned memory, got {buffer.device}")

    def _check_apart(self, name: str, buffer: Tensor, slots: Tensor) -> None:
        if self.traced or dispatches(type(buffer)):
            return
        its = span(buffer)
        if meet(its, span(slots)) and overlap(buffer, slots):
            raise ValueError(f"{name}: expected memory of its own, got a tensor that overlaps slots")
        if not touches(self.cache.spans, its):
            return
        for where, tensor in self.cache.tensors.items():
            if overlap(buffer, tensor):
                raise ValueError(f"{name}: expected memory of its own, got a tensor that overlaps {where} of the cache")


def _is_plain(given: Any) -> bool:
    """None or a pair of integers: equal ones are the same to every check."""
    return given is None or type(given) is tuple and all(type(x) is int for x in given)


def _range(name: str, given: Any, extent: int) -> tuple[int, int]:
    if given is None:
        return 0, extent
    start, stop = scalars.pair(name, given, "(start, stop)")
    if not 0 <= start < stop <= extent:
        raise ValueError(f"{name}: expected (start, stop) with 0 <= start < stop <= {extent}, got {given}")
    return start, stop
