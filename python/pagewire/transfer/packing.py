"""Between a paged cache and packed buffers: the part of the KV stream that touches tensors."""

import dataclasses
import functools
import hashlib

import torch
from torch import Tensor

import pagewire as pw
from pagewire.transfer.frames import MAX_STAGING_SLOTS, Chunk, Range, crc32c
from pagewire.transfer.handoff import Wire
from pagewire.transfer.shm import STAGING_ALIGN
from pagewire.types import dtype_name

MAX_CHUNK_BYTES = 4 << 20  # also of a staging slot, unless one token of one layer is more


class Packing:
    """Packs tokens of a request's pages into wire buffers, and unpacks what came."""

    def __init__(self, cache: pw.PagedKVCache, fingerprint: bytes, wire_dtype: torch.dtype | None = None) -> None:
        self._cache = cache
        self._dtype = wire_dtype or cache.geometry.dtype
        one = self._one = pw.packed_shape(cache, 1, dtype=self._dtype)
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
        slots = self._slots(tuple(pages), *tokens)
        num_bytes = pw.pack_kv(self._cache, slots, layers=layers, dtype=self._dtype, out=out).num_bytes
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
        """SHA-256 per layer of tokens [0, num_tokens) as they are packed for the wire."""
        digests = []
        for layer in range(self.wire.num_layers):
            num_bytes = self._packed_bytes(1, self.wire.num_kv_heads, num_tokens)
            buffer = torch.empty(num_bytes, dtype=torch.uint8)
            self.pack(pages, (layer, layer + 1), (0, num_tokens), buffer)
            digests.append(hashlib.sha256(buffer.numpy().data).digest())
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

    def _packed_bytes(self, num_layers: int, num_heads: int, num_tokens: int) -> int:
        return self._shape(num_layers, num_heads, num_tokens).num_bytes

    def _new_shape(self, num_layers: int, num_heads: int, num_tokens: int) -> pw.PackedShape:
        return dataclasses.replace(self._one, num_layers=num_layers, num_heads=num_heads, num_tokens=num_tokens)

    def _new_slots(self, pages: tuple[int, ...], start: int, stop: int) -> Tensor:
        return pw.page_slots(torch.tensor(pages), start, stop, self._cache.page_size)
