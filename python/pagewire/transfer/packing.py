"""Between a paged cache and packed buffers: the part of the KV stream that touches tensors."""

import dataclasses
import functools
import hashlib
import secrets
from typing import cast

import torch
from torch import Tensor

import pagewire as pw
from pagewire.transfer.frames import DTYPES, MAX_STAGING_SLOTS, Chunk, Hello, Range, crc32c
from pagewire.transfer.handoff import Stored, Wire
from pagewire.transfer.shm import STAGING_ALIGN
from pagewire.types import StoredScaleKind, dtype_name

MAX_CHUNK_BYTES = 4 << 20  # also of a staging slot, unless one token of one layer is more


def new_hello(role: str, cache: pw.PagedKVCache, fingerprint: bytes, wire_dtype: str | None = None) -> Hello:
    """Of a side that takes `wire_dtype` on the wire, or any. D adds its staging arena."""
    one = pw.packed_shape(cache, 1)
    return Hello(
        role, dtype_name(one.dtype), one.scale_kind, one.num_layers, one.num_heads, one.head_dim, one.head_dim_v,
        num_slots=0, slot_bytes=0, incarnation=secrets.token_bytes(16), fingerprint=fingerprint,
        wire_dtypes=(wire_dtype,) if wire_dtype else DTYPES,
    )  # fmt: skip


class Packing:
    """Packs tokens of a request's pages into wire buffers, and unpacks what came."""

    def __init__(
        self, cache: pw.PagedKVCache, fingerprint: bytes, wire: Stored | None = None, kept: Stored | None = None
    ) -> None:
        """
        wire: as negotiated; None: the cache's own. A Packing that packs must be of the side whose scales these are.
        kept: of P, what D's cache is: its digests are of that.
        """
        self._cache = cache
        self._kept = kept
        self._dtype = getattr(torch, wire.dtype) if wire else cache.geometry.dtype
        one = self._one = pw.packed_shape(cache, 1, dtype=self._dtype)
        if wire:
            one = self._one = dataclasses.replace(one, scale_kind=cast(StoredScaleKind, wire.scale_kind))
        # what `unpack` reads into, and as what chunk; pages of memory that nobody touches are none
        self._private = torch.empty(max(MAX_CHUNK_BYTES, one.num_bytes), dtype=torch.uint8)
        self._payload = functools.lru_cache(64)(lambda *block: pw.PackedKV.wrap(self._private, self._shape(*block)))
        self._shape = functools.lru_cache(256)(self._new_shape)
        self._slots = functools.lru_cache(64)(self._new_slots)
        self.wire = Wire(
            fingerprint, one.num_layers, one.num_heads, one.head_dim, one.head_dim_v,
            dtype_name(one.dtype), one.scale_kind, self._packed_bytes,
        )  # fmt: skip

    def pack(self, pages: list[int], layers: Range, tokens: Range, out: Tensor) -> tuple[int, int]:
        """Into the head of `out`, uint8; returns the bytes used and their CRC32C."""
        num_bytes = self._pack(pages, layers, tokens, out).num_bytes
        return num_bytes, crc32c(out[:num_bytes].numpy())

    def unpack(self, chunk: Chunk, pages: list[int], staging: Tensor) -> str | None:
        """The chunk's payload, at the head of `staging`, into its pages; or why not.

        It is read once: P can still write there, so what is unpacked is the very copy that was verified.
        """
        if chunk.checksum_kind != "crc32c":
            return f"CHUNK: checksum_kind: expected crc32c, got {chunk.checksum_kind}"
        packed = self._payload(*(stop - start for start, stop in chunk.block))
        if not chunk.payload_bytes == packed.num_bytes <= len(staging):
            expected = f"{packed.num_bytes} in a staging slot of {len(staging)}"
            return f"CHUNK: payload_bytes: expected {expected}, got {chunk.payload_bytes}"
        packed.buffer.copy_(staging[: packed.num_bytes])
        found = crc32c(packed.buffer.numpy())
        if found != chunk.checksum:
            return f"CHUNK: payload CRC32C: expected {chunk.checksum:#010x}, got {found:#010x}"
        layers, heads, tokens = chunk.block
        pw.unpack_kv(packed, self._cache, self._slots(tuple(pages), *tokens), layers=layers, heads=heads)
        return None

    def digests(self, pages: list[int], num_tokens: int) -> tuple[bytes, ...]:
        """SHA-256 per layer of what D's cache keeps of tokens [0, num_tokens), packed as it is. P finds it out by
        unpacking its own; () where it cannot, since D's scales belong to more than a token or V lies within K.
        """
        layers = [(layer, layer + 1) for layer in range(self.wire.num_layers)]
        if self._kept is None:
            slots = self._slots(tuple(pages), 0, num_tokens)
            return tuple(_sha256(pw.pack_kv(self._cache, slots, layers=layer)) for layer in layers)
        geometry = self._cache.geometry
        if self._kept.scale_kind in ("tensor", "head") or geometry.shares_kv:
            return ()
        like_d = pw.PagedKVCache.allocate(
            num_layers=1, num_pages=1, page_size=num_tokens, num_kv_heads=geometry.num_kv_heads,
            head_dim=geometry.head_dim, head_dim_v=geometry.head_dim_v, dtype=getattr(torch, self._kept.dtype),
            device=self._cache.device, scale=cast(StoredScaleKind, self._kept.scale_kind),
        )  # fmt: skip
        digests, slots = [], torch.arange(num_tokens)
        for layer in layers:
            pw.unpack_kv(self._pack(pages, layer, (0, num_tokens)), like_d, slots)
            digests.append(_sha256(pw.pack_kv(like_d, slots)))
        return tuple(digests)

    def staging(self, staging_bytes: int, chunk_tokens: int) -> tuple[int, int]:
        """(num_staging_slots, staging_slot_bytes): one holds all layers of `chunk_tokens`, or MAX_CHUNK_BYTES, or a
        quarter of the arena, whichever is least.

        Raises ValueError when that is not even one token of one layer.
        """
        heads = self.wire.num_kv_heads
        token_bytes = self._packed_bytes(1, heads, 1)
        wanted = min(self._packed_bytes(self.wire.num_layers, heads, chunk_tokens), max(MAX_CHUNK_BYTES, token_bytes))
        aligned = -(-wanted // STAGING_ALIGN) * STAGING_ALIGN
        staging_slot_bytes = min(aligned, staging_bytes // 4 // STAGING_ALIGN * STAGING_ALIGN)
        if staging_slot_bytes < token_bytes:
            raise ValueError(
                f"staging_bytes: expected at least {4 * (token_bytes + STAGING_ALIGN)} "
                f"(4 tokens of one layer), got {staging_bytes}"
            )
        return min(staging_bytes // staging_slot_bytes, MAX_STAGING_SLOTS), staging_slot_bytes

    def _pack(self, pages: list[int], layers: Range, tokens: Range, out: Tensor | None = None) -> pw.PackedKV:
        slots = self._slots(tuple(pages), *tokens)
        packed = pw.pack_kv(self._cache, slots, layers=layers, dtype=self._dtype, out=out)
        if packed.scale_kind != self.wire.scale_kind:
            raise ValueError(f"wire: this cache packs scale kind {packed.scale_kind}, not {self.wire.scale_kind}")
        return packed

    def _packed_bytes(self, num_layers: int, num_heads: int, num_tokens: int) -> int:
        return self._shape(num_layers, num_heads, num_tokens).num_bytes

    def _new_shape(self, num_layers: int, num_heads: int, num_tokens: int) -> pw.PackedShape:
        return dataclasses.replace(self._one, num_layers=num_layers, num_heads=num_heads, num_tokens=num_tokens)

    def _new_slots(self, pages: tuple[int, ...], start: int, stop: int) -> Tensor:
        return pw.page_slots(torch.tensor(pages), start, stop, self._cache.page_size)


def _sha256(packed: pw.PackedKV) -> bytes:
    return hashlib.sha256(packed.buffer.numpy().data).digest()
