"""Packing: whatever layers and tokens, what arrives is what was packed, and only what was verified."""

import msgspec
import pytest
import torch

import pagewire as pw
from pagewire.transfer import packing as module
from pagewire.transfer.frames import MAX_STAGING_SLOTS, Block, Chunk, Held
from pagewire.transfer.handoff import Wire
from pagewire.transfer.packing import MAX_CHUNK_BYTES, Packing, new_hello
from pagewire.transfer.shm import STAGING_ALIGN, Arena

LAYERS, HEADS, DIM, PAGE_SIZE, NUM_PAGES = 5, 2, 8, 4, 12
P_PAGES, D_PAGES = [7, 1, 10, 4], [3, 11, 0, 8]


def make(role: str = "decode", wire_dtype: str | None = None, kind: str = "crc32c", **geometry) -> Packing:
    fields = dict(num_layers=LAYERS, num_pages=NUM_PAGES, page_size=PAGE_SIZE, num_kv_heads=HEADS, head_dim=DIM)
    cache = pw.PagedKVCache.allocate(**{**fields, **geometry}, dtype=torch.float32, device="cpu")
    return packing_of(cache, role, wire_dtype, kind)


def packing_of(cache: pw.PagedKVCache, role: str, wire_dtype: str | None, kind: str = "crc32c") -> Packing:
    """For a peer that is like us."""
    ours = new_hello(role, cache, b"f" * 32, wire_dtype)
    return Packing(cache, ours, msgspec.structs.replace(ours, role="prefill" if role == "decode" else "decode"), kind)


def filled(packing: Packing) -> Packing:
    generator = torch.Generator().manual_seed(1)
    for cache in (*packing._caches[0].k, *packing._caches[0].v):
        cache.copy_(torch.randn(cache.shape, generator=generator).to(cache.dtype))
    return packing


def chunk_of(packing: Packing, layers: tuple[int, int], tokens: tuple[int, int], packed: tuple[int, int]) -> Chunk:
    wire, (num_bytes, checksum) = packing.wire, packed
    of = wire.groups[0]
    return Chunk(
        request_id="a", generation=1, capability=b"c" * 16, fingerprint=wire.fingerprint, group=0,
        layer_start=layers[0], layer_stop=layers[1], head_start=0, head_stop=HEADS, head_dim=DIM, head_dim_v=DIM,
        token_start=tokens[0], token_stop=tokens[1], dtype=of.dtype, scale_kind=of.scale_kind,
        checksum_kind=wire.checksum_kind, checksum=checksum, payload_bytes=num_bytes, slot=0,
    )  # fmt: skip


def block_of(layers: tuple[int, int]) -> Block:
    return Block(0, *layers, 0, HEADS)


def rows(packing: Packing, pages: list[int], tokens: tuple[int, int]) -> torch.Tensor:
    slots = pw.page_slots(torch.tensor(pages), *tokens, PAGE_SIZE)
    return torch.stack([cache.flatten(0, 1)[slots] for cache in (*packing._caches[0].k, *packing._caches[0].v)])


@pytest.mark.parametrize("wire", [None, "bfloat16"], ids=str)
@pytest.mark.parametrize("layers", [[(0, 5)], [(0, 2), (2, 3), (3, 5)], [(i, i + 1) for i in range(5)]])
def test_any_cut_into_layers_brings_the_same(layers: list, wire: str | None) -> None:
    p, d, arena = filled(make("prefill", wire)), make("decode", wire), Arena.create(1, 16384)
    for tokens in ((0, 7), (7, 14)):
        for of in layers:
            staging = arena.staging_slot(0)
            chunk = chunk_of(p, of, tokens, p.pack(P_PAGES, block_of(of), tokens, staging))
            assert chunk.payload_bytes == p.wire.packed_bytes(0, of[1] - of[0], HEADS, tokens[1] - tokens[0])
            assert d.unpack(chunk, D_PAGES, staging) is None
    expected = rows(p, P_PAGES, (0, 14))
    assert torch.equal(rows(d, D_PAGES, (0, 14)), expected.bfloat16().float() if wire else expected)
    digests = d.digests(D_PAGES, [block_of((0, 5))], (0, 14))
    assert digests == p.digests(P_PAGES, [block_of((0, 5))], (0, 14)) and len(set(digests)) == LAYERS


def test_a_payload_that_changes_while_it_is_read_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """P writes into the staging slot again at the worst moment: between the checksum and the unpacking."""
    p, d, arena = filled(make("prefill")), make(), Arena.create(1, 16384)
    staging = arena.staging_slot(0)
    chunk = chunk_of(p, (0, 5), (0, 14), p.pack(P_PAGES, block_of((0, 5)), (0, 14), staging))
    checksum = module.checksum

    def and_then_tampered(kind: str, payload: torch.Tensor) -> int:
        found = checksum(kind, payload)
        staging.fill_(255)
        return found

    monkeypatch.setattr(module, "checksum", and_then_tampered)
    assert d.unpack(chunk, D_PAGES, staging) is None
    assert torch.equal(rows(d, D_PAGES, (0, 14)), rows(p, P_PAGES, (0, 14)))


def test_where_p_cannot_write_the_payload_is_unpacked_from_its_slot() -> None:
    p, d, arena = filled(make("prefill")), make(), Arena.create(2, 16384)
    for slot in (1, 0, 1):
        staging = arena.staging_slot(slot)
        chunk = chunk_of(p, (0, 5), (0, 14), p.pack(P_PAGES, block_of((0, 5)), (0, 14), staging))
        d._private.fill_(255)
        assert d.unpack(chunk, D_PAGES, staging, shared=False) is None
        assert torch.equal(rows(d, D_PAGES, (0, 14)), rows(p, P_PAGES, (0, 14)))
        assert (d._private == 255).all()
        for part in (*d._caches[0].k, *d._caches[0].v):
            part.zero_()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("kind", "other"), [("crc32c", "fletcher64"), ("fletcher64", "crc32c")])
def test_a_payload_that_is_not_what_was_packed_changes_nothing(kind: str, other: str, shared: bool) -> None:
    p, d, arena = filled(make("prefill", kind=kind)), filled(make(kind=kind)), Arena.create(1, 16384)
    before = rows(d, D_PAGES, (0, 14))
    staging = arena.staging_slot(0)
    chunk = chunk_of(p, (0, 5), (0, 14), p.pack(P_PAGES, block_of((0, 5)), (0, 14), staging))
    staging[chunk.payload_bytes - 1] ^= 1
    assert f"{kind.upper()}: expected 0x" in d.unpack(chunk, D_PAGES, staging, shared=shared)
    for change, words in (
        ({"checksum_kind": "none"}, "got none"),
        ({"checksum_kind": other}, f"got {other}"),
        ({"payload_bytes": 16385}, "slot of 16384, got 16385"),
    ):
        assert words in d.unpack(msgspec.structs.replace(chunk, **change), D_PAGES, staging, shared=shared)
    assert torch.equal(rows(d, D_PAGES, (0, 14)), before)


def test_slots_are_computed_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    p, calls, page_slots = make("prefill"), [], pw.page_slots
    monkeypatch.setattr(module.pw, "page_slots", lambda *args: calls.append(args) or page_slots(*args))
    buffer = torch.empty(16384, dtype=torch.uint8)
    for layer in range(LAYERS):
        for tokens in ((0, 7), (7, 14)):
            p.pack(P_PAGES, block_of((layer, layer + 1)), tokens, buffer)
    assert len(calls) == 2


@pytest.mark.parametrize("head_dim_v", [0, 8])
@pytest.mark.parametrize("kind", ["none", "tensor", "head", "token_head"])
def test_a_wire_knows_the_bytes_of_packed_rows(kind: str, head_dim_v: int) -> None:
    dtype = "bfloat16" if kind == "none" else "int8"
    wire = Wire(b"f" * 32, (Held(0, 1, 0, 1, 5, head_dim_v, dtype, kind),))
    for layers, heads, tokens in ((1, 1, 1), (3, 2, 7), (2, 5, 16)):
        shape = pw.PackedShape(layers, heads, tokens, 5, head_dim_v, getattr(torch, dtype), kind)
        assert wire.packed_bytes(0, layers, heads, tokens) == shape.num_bytes


@pytest.mark.parametrize(
    ("staging_bytes", "chunk_tokens", "slot_bytes"),
    [
        (64 << 20, 8, 8 * LAYERS * HEADS * 2 * DIM * 4),  # every layer of a whole forward
        (64 << 20, 100_000, MAX_CHUNK_BYTES),
        (8 << 20, 100_000, 2 << 20),  # a quarter
        (4 * 128, 100_000, 128),  # one token of one layer
    ],
)
def test_a_staging_slot_holds_a_chunk(staging_bytes: int, chunk_tokens: int, slot_bytes: int) -> None:
    assert make().staging(staging_bytes, chunk_tokens) == (staging_bytes // slot_bytes, slot_bytes)


def test_slots_are_aligned_and_no_more_than_hello_can_say() -> None:
    packing = make(num_kv_heads=1, head_dim=1, num_layers=1)
    num_slots, slot_bytes = packing.staging(64 << 20, 1)
    assert (num_slots, slot_bytes) == (MAX_STAGING_SLOTS, STAGING_ALIGN)
    with pytest.raises(ValueError, match="staging_bytes: expected at least"):
        make().staging(4 * 64, 1)
