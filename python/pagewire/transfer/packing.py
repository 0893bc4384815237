"""Between a paged cache and packed buffers: the part of the KV stream that touches tensors."""

import hashlib

import torch
from torch import Tensor

import pagewire as pw
from pagewire.transfer.frames import Chunk, crc32c
from pagewire.transfer.handoff import Wire
from pagewire.transfer.shm import STAGING_ALIGN
from pagewire.types import dtype_name


class Packing:
    """Packs tokens of a request's pages into wire buffers, and unpacks what came."""

    def __init__(self, cache: pw.PagedKVCache, fingerprint: bytes, wire_dtype: torch.dtype | None = None) -> None:
        self._cache = cache
        self._dtype = wire_dtype or cache.geometry.dtype
        one = pw.packed_shape(cache, 1, dtype=self._dtype)
        self.wire = Wire(
            fingerprint, one.num_layers, one.num_heads, one.head_dim, one.head_dim_v,
            dtype_name(one.dtype), one.scale_kind, self._packed_bytes,
        )  # fmt: skip

    def pack(self, pages: list[int], layer: int, start: int, stop: int, out: Tensor) -> int:
        """One layer of tokens [start, stop) into the head of `out`, uint8; returns the bytes used."""
        slots = self._slots(pages, start, stop)
        packed = pw.pack_kv(self._cache, slots, layers=(layer, layer + 1), dtype=self._dtype, out=out)
        return packed.num_bytes

    def unpack(self, chunk: Chunk, pages: list[int], buffer: Tensor) -> None:
        """The chunk's payload, at the head of `buffer`, into its pages."""
        layers, heads, tokens = chunk.block
        packed = pw.PackedKV.wrap(buffer, self._shape(*(stop - start for start, stop in chunk.block)))
        pw.unpack_kv(packed, self._cache, self._slots(pages, *tokens), layers=layers, heads=heads)

    def digests(self, pages: list[int], num_tokens: int) -> tuple[bytes, ...]:
        """SHA-256 per layer of tokens [0, num_tokens) as they are packed for the wire."""
        digests = []
        for layer in range(self.wire.num_layers):
            num_bytes = self._packed_bytes(1, self.wire.num_kv_heads, num_tokens)
            buffer = torch.empty(num_bytes, dtype=torch.uint8)
            self.pack(pages, layer, 0, num_tokens, buffer)
            digests.append(hashlib.sha256(buffer.numpy().data).digest())
        return tuple(digests)

    def staging(self, staging_bytes: int, chunk_tokens: int) -> tuple[int, int]:
        """(num_staging_slots, staging_slot_bytes): one holds a layer of `chunk_tokens`, or a quarter of the arena.

        Raises ValueError when that is not even one token of one layer.
        """
        token_bytes = self._packed_bytes(1, self.wire.num_kv_heads, 1)
        wanted = -(-token_bytes * chunk_tokens // STAGING_ALIGN) * STAGING_ALIGN
        staging_slot_bytes = min(wanted, staging_bytes // 4 // STAGING_ALIGN * STAGING_ALIGN)
        if staging_slot_bytes < token_bytes:
            raise ValueError(
                f"staging_bytes: expected at least {4 * (token_bytes + STAGING_ALIGN)} "
                f"(4 tokens of one layer), got {staging_bytes}"
            )
        return staging_bytes // staging_slot_bytes, staging_slot_bytes

    def _packed_bytes(self, num_layers: int, num_heads: int, num_tokens: int) -> int:
        return self._shape(num_layers, num_heads, num_tokens).num_bytes

    def _shape(self, num_layers: int, num_heads: int, num_tokens: int) -> pw.PackedShape:
        one = pw.packed_shape(self._cache, 1, dtype=self._dtype)
        return pw.PackedShape(
            num_layers, num_heads, num_tokens, one.head_dim, one.head_dim_v, one.dtype, one.scale_kind
        )

    def _slots(self, pages: list[int], start: int, stop: int) -> Tensor:
        row = torch.tensor(pages, dtype=torch.int64)
        return pw.page_slots(row, start, stop, self._cache.page_size)


def checksum_problem(chunk: Chunk, payload: bytes) -> str | None:
    """Why `payload` is not what the chunk's sender packed."""
    if chunk.checksum_kind != "crc32c":
        return f"CHUNK: checksum_kind: expected crc32c, got {chunk.checksum_kind}"
    found = crc32c(payload)
    if found != chunk.checksum:
        return f"CHUNK: payload CRC32C: expected {chunk.checksum:#010x}, got {found:#010x}"
    return None
