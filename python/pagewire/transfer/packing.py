"""Between paged caches and packed buffers: the part of the KV stream that touches tensors."""

import functools
import hashlib
import secrets
from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor

import pagewire as pw
from pagewire.transfer.checksum import checksum
from pagewire.transfer.frames import DTYPES, MAX_STAGING_SLOTS, Block, ChecksumKind, Chunk, Dtype, Held, Hello, Range
from pagewire.transfer.handoff import Wire
from pagewire.transfer.negotiation import negotiate
from pagewire.transfer.transport import STAGING_ALIGN
from pagewire.types import dtype_name

MAX_CHUNK_BYTES = 4 << 20  # also of a staging slot, unless one token of one layer is more
Caches = pw.PagedKVCache | Sequence[pw.PagedKVCache | None]  # one per group of layers; None: this side has none of it


def held(cache: pw.PagedKVCache, layer_start: int = 0, head_start: int = 0) -> Held:
    """What a rank or stage holds whose cache begins with this layer of its group and this kv head of the model."""
    of = pw.packed_shape(cache, 1)
    layers, heads = (layer_start, layer_start + of.num_layers), (head_start, head_start + of.num_heads)
    return Held(*layers, *heads, of.head_dim, of.head_dim_v, cast(Dtype, dtype_name(of.dtype)), of.scale_kind)


def new_hello(
    role: Literal["prefill", "decode"], caches: Caches, fingerprint: bytes, wire_dtype: str | None = None, *,
    groups: tuple[Held, ...] | None = None, tenant: str = "",
) -> Hello:  # fmt: skip
    """Of a side that takes `wire_dtype` on the wire, or any. D adds its staging arena. groups: what the caches hold;
    None: they are the whole model's.
    """
    groups = groups or tuple(held(cache) for cache in _each(caches) if cache)
    wire_dtypes = (wire_dtype,) if wire_dtype else DTYPES
    return Hello(role, 0, 0, secrets.token_bytes(16), fingerprint, groups, wire_dtypes, tenant)


class Packing:
    """Packs tokens of a request's pages into wire buffers, and unpacks what came, over one link."""

    def __init__(self, caches: Caches, ours: Hello, theirs: Hello, checksum_kind: ChecksumKind = "crc32c") -> None:
        """All caches have the same pages. Raises ValueError as `negotiate` does."""
        self.wire = negotiate(ours, theirs, checksum_kind)
        self._caches = _each(caches)
        self._ours = ours.groups
        self._kept = theirs.groups if ours.role == "prefill" else None  # what D's cache is: the digests are of that
        most = max(self.wire.packed_bytes(g, 1, of.head_stop - of.head_start, 1) for g, of in enumerate(self._ours))
        self._any = next(cache for cache in self._caches if cache)
        num_bytes, device = max(MAX_CHUNK_BYTES, most), self._any.device
        on_gpu = device.type == "cuda"
        # next to staging slots in host memory; pages of memory that nobody touches are none
        self._private = torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=on_gpu)
        # next to the caches
        self._scratch = torch.empty(num_bytes, dtype=torch.uint8, device=device) if on_gpu else self._private
        # neither refers to us: the mapping of staging slots ends with the link
        self._payload = functools.lru_cache(256)(functools.partial(_payload, self.wire))
        self._slots = functools.lru_cache(64)(functools.partial(_slots, self._any))

    def pack(self, pages: list[int], block: Block, tokens: Range, out: Tensor) -> tuple[int, int]:
        """Into the head of `out`, uint8; returns the bytes used and their checksum, when they are all there."""
        through_host = self._through_host(out)
        packed = self._payload(self._scratch if through_host else out, *_extents(block, tokens))
        self._pack(pages, block, tokens, packed)
        payload = out[: packed.num_bytes] if through_host else packed.buffer
        if through_host:
            payload.copy_(packed.buffer)
        return packed.num_bytes, checksum(self.wire.checksum_kind, payload)

    def unpack(self, chunk: Chunk, pages: list[int], staging: Tensor, *, shared: bool = True) -> str | None:
        """The chunk's payload, at the head of `staging`, into its pages; or why not.

        Where P can still write there, `shared`, it is read once: what is unpacked is the very copy that was verified.
        """
        if chunk.checksum_kind != self.wire.checksum_kind:
            return f"CHUNK: checksum_kind: expected {self.wire.checksum_kind}, got {chunk.checksum_kind}"
        block, tokens = chunk.block, chunk.tokens
        num_bytes = self.wire.block_bytes(block, tokens[1] - tokens[0])
        if not chunk.payload_bytes == num_bytes <= len(staging):
            expected = f"{num_bytes} in a staging slot of {len(staging)}"
            return f"CHUNK: payload_bytes: expected {expected}, got {chunk.payload_bytes}"
        through_host = self._through_host(staging)
        packed = self._payload(self._scratch if shared or through_host else staging, *_extents(block, tokens))
        payload = staging[:num_bytes]
        if shared:
            payload = (self._private if through_host else self._scratch)[:num_bytes].copy_(payload)
        kind, found = chunk.checksum_kind, checksum(chunk.checksum_kind, payload)
        if found != chunk.checksum:
            return f"CHUNK: payload {kind.upper()}: expected {chunk.checksum:#010x}, got {found:#010x}"
        if through_host:
            packed.buffer.copy_(payload)
        cache, slots = self._cache(block.group), self._slots(tuple(pages), *tokens)
        layers, heads = self._local(block)
        pw.unpack_kv(packed, cache, slots, layers=layers, heads=heads)
        return None

    def digests(self, pages: list[int], blocks: Sequence[Block], tokens: Range) -> tuple[bytes, ...]:
        """SHA-256 per layer of each block of what D's cache keeps of the tokens, packed as it is. P finds it out by
        unpacking its own. Without the blocks where it cannot, since D's scales belong to more than a token or V lies
        within K.
        """
        slots, digests = self._slots(tuple(pages), *tokens), []
        for block in blocks:
            kept = (self._kept or self._ours)[block.group]
            if kept.scale_kind in ("tensor", "head") or not kept.head_dim_v:
                continue
            for layer in range(*block.layers):
                one = Block(block.group, layer, layer + 1, *block.heads)
                if self._kept is None:
                    of_layer, heads = self._local(one)
                    packed = pw.pack_kv(self._cache(block.group), slots, layers=of_layer, heads=heads)
                else:
                    packed = _as_kept(self._pack(pages, one, tokens), kept)
                digests.append(hashlib.sha256(packed.buffer.cpu().numpy().data).digest())
        return tuple(digests)

    def staging(self, staging_bytes: int, chunk_tokens: int) -> tuple[int, int]:
        """(num_staging_slots, staging_slot_bytes): one holds all layers of `chunk_tokens`, or MAX_CHUNK_BYTES, or a
        quarter of the arena, whichever is least.

        Raises ValueError when that is not even one token of one layer.
        """
        blocks = [Block(number, *of.layers, *of.heads) for number, of in enumerate(self.wire.groups) if of.layer_stop]
        token_bytes = max(self.wire.packed_bytes(of.group, 1, of.head_stop - of.head_start, 1) for of in blocks)
        all_layers = max(self.wire.block_bytes(block, chunk_tokens) for block in blocks)
        wanted = min(all_layers, max(MAX_CHUNK_BYTES, token_bytes))
        aligned = -(-wanted // STAGING_ALIGN) * STAGING_ALIGN
        staging_slot_bytes = min(aligned, staging_bytes // 4 // STAGING_ALIGN * STAGING_ALIGN)
        if staging_slot_bytes < token_bytes:
            raise ValueError(
                f"staging_bytes: expected at least {4 * (token_bytes + STAGING_ALIGN)} "
                f"(4 tokens of one layer), got {staging_bytes}"
            )
        return min(staging_bytes // staging_slot_bytes, MAX_STAGING_SLOTS), staging_slot_bytes

    def _through_host(self, staging: Tensor) -> bool:
        """Whether its bytes are verified in host memory, and packed and unpacked elsewhere."""
        return self._scratch is not self._private and not staging.is_cuda

    def _cache(self, group: int) -> pw.PagedKVCache:
        cache = self._caches[group]
        assert cache is not None, f"group {group} is not held here"
        return cache

    def _local(self, block: Block) -> tuple[Range, Range]:
        """Layers and heads as our cache of the group counts them."""
        of = self._ours[block.group]
        layers = block.layer_start - of.layer_start, block.layer_stop - of.layer_start
        return layers, (block.head_start - of.head_start, block.head_stop - of.head_start)

    def _pack(self, pages: list[int], block: Block, tokens: Range, out: pw.PackedKV | None = None) -> pw.PackedKV:
        of, slots = self.wire.groups[block.group], self._slots(tuple(pages), *tokens)
        layers, heads = self._local(block)
        dtype = getattr(torch, of.dtype)
        return pw.pack_kv(self._cache(block.group), slots, layers=layers, heads=heads, dtype=dtype, out=out)


def _extents(block: Block, tokens: Range) -> tuple[int, int, int, int]:
    """Its group, and how many layers, heads and tokens."""
    layers, heads = block.layer_stop - block.layer_start, block.head_stop - block.head_start
    return block.group, layers, heads, tokens[1] - tokens[0]


def _payload(wire: Wire, buffer: Tensor, group: int, num_layers: int, num_heads: int, num_tokens: int) -> pw.PackedKV:
    of = wire.groups[group]
    dtype = getattr(torch, of.dtype)
    shape = pw.PackedShape(num_layers, num_heads, num_tokens, of.head_dim, of.head_dim_v, dtype, of.scale_kind)
    return pw.PackedKV.wrap(buffer, shape)


def _slots(cache: pw.PagedKVCache, pages: tuple[int, ...], start: int, stop: int) -> Tensor:
    return pw.page_slots(torch.tensor(pages, device=cache.device), start, stop, cache.page_size)


def _each(caches: Caches) -> tuple[pw.PagedKVCache | None, ...]:
    return (caches,) if isinstance(caches, pw.PagedKVCache) else tuple(caches)


def _as_kept(packed: pw.PackedKV, kept: Held) -> pw.PackedKV:
    """A layer as a cache like D's gives it back."""
    _, num_heads, num_tokens, _ = packed.k.shape
    like_d = pw.PagedKVCache.allocate(
        num_layers=1, num_pages=1, page_size=num_tokens, num_kv_heads=num_heads, head_dim=kept.head_dim,
        head_dim_v=kept.head_dim_v, dtype=getattr(torch, kept.dtype), device=packed.buffer.device,
        scale=kept.scale_kind,
    )  # fmt: skip
    pw.unpack_kv(packed, like_d, slots := torch.arange(num_tokens, device=packed.buffer.device))
    return pw.pack_kv(like_d, slots)
