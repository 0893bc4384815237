"""Frames of the KV stream: what a sender (P) and a receiver (D) of packed KV say to each other.

Everything is little-endian. A frame is

    prefix   magic "PWKV", version u16, min_version u16, kind u16, num_tlvs u16, features u32,
             frame_bytes u32, sequence u32
    body     the kind's fixed fields, in the order of its class
    TLVs     num_tlvs times: tag u16, reserved u16, length u32, value; unknown tags are skipped
    crc      CRC32C of everything before it, u32

`sequence` counts a sender's frames on one connection, from 0, modulo 2^32; see `codec`. A reader
refuses a frame whose min_version is above its own version or whose feature bits it does not know.
Every length is bounded before it is believed: `decode` returns values within their bounds or raises
FrameError, and a frame beyond them cannot be made. Whatever fits its bounds fits MAX_FRAME_BYTES.
"""

import struct
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import google_crc32c

from pagewire.transfer.fields import (
    Field,
    FrameError,
    Record,
    Tlv,
    bounded,
    expect,
    layout,
    pack,
    records,
    text,
    unpack,
)

MAGIC = b"PWKV"
VERSION = 3  # 1, without sequence numbers, and 2, of one group and whole caches, were never released
KNOWN_FEATURES = 0

MAX_FRAME_BYTES = 256 << 10  # a COMMIT with a digest for each of MAX_LAYERS takes half of it
MAX_TLVS = 32
MAX_GROUPS = 64
MAX_LAYERS = 4096  # also of all groups together
MAX_HEADS = MAX_HEAD_DIM = 4096
MAX_TOKENS = 1 << 24
MAX_STAGING_SLOTS = 1 << 16
MAX_PAYLOAD_BYTES = 1 << 31
MAX_DEADLINE_MS = (1 << 32) - 1

DTYPES = ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8")
SCALED_DTYPES = DTYPES[3:]  # 8 bits: never without scales
SCALE_KINDS = ("none", "tensor", "head", "token_head")
CHECKSUM_KINDS = ("none", "crc32c", "fletcher64")
ROLES = ("prefill", "decode")

Range = tuple[int, int]  # [start, stop)


def crc32c(data: Any) -> int:
    """Of bytes or a contiguous numpy array."""
    checksum: int = google_crc32c.value(data)
    return checksum


class _Area(Record):
    """Layers x heads."""

    layer_start: int
    layer_stop: int
    head_start: int
    head_stop: int

    @property
    def layers(self) -> Range:
        return self.layer_start, self.layer_stop

    @property
    def heads(self) -> Range:
        return self.head_start, self.head_stop


_U32 = Annotated[int, Field("I", most=(1 << 32) - 1)]
_U64 = Annotated[int, Field("Q")]
_Key16 = Annotated[bytes, Field("16s")]
_Hash32 = Annotated[bytes, Field("32s")]
_Group = Annotated[int, Field("H", most=MAX_GROUPS - 1)]
_Layer = Annotated[int, Field("H", most=MAX_LAYERS)]
_Head = Annotated[int, Field("H", most=MAX_HEADS)]
_HeadDim = Annotated[int, Field("H", 1, MAX_HEAD_DIM)]
_HeadDimV = Annotated[int, Field("H", most=MAX_HEAD_DIM)]  # 0: V is a view of K and not packed
_Token = Annotated[int, Field("I", most=MAX_TOKENS)]
_Slot = Annotated[int, Field("I", most=MAX_STAGING_SLOTS - 1)]
_Dtype = Annotated[str, Field("B", names=DTYPES)]
_ScaleKind = Annotated[str, Field("B", names=SCALE_KINDS)]


@dataclass(frozen=True)
class Held(_Area):
    """What a side holds of one group of layers. The model's layers of the group and its kv heads are counted over all
    ranks and stages; no layers: it holds nothing of the group.
    """

    layer_start: _Layer
    layer_stop: _Layer
    head_start: _Head
    head_stop: _Head
    head_dim: _HeadDim
    head_dim_v: _HeadDimV
    dtype: _Dtype
    scale_kind: _ScaleKind

    _may_be_empty = True

    def _check(self) -> None:
        num_layers, num_heads = self.layer_stop - self.layer_start, self.head_stop - self.head_start
        whole = num_layers == num_heads == 0 or min(num_layers, num_heads) > 0
        expect(whole, f"{num_layers} layers, {num_heads} heads")
        scaled, kind = self.dtype in SCALED_DTYPES, self.scale_kind
        expect(scaled == (kind != "none"), f"scale_kind {kind} of {self.dtype}")


@dataclass(frozen=True)
class Block(_Area):
    """Layers x heads of a group that one sender is to push."""

    group: _Group
    layer_start: _Layer
    layer_stop: _Layer
    head_start: _Head
    head_stop: _Head


def _dtypes_from_bytes(data: bytes) -> tuple[str, ...]:
    return tuple(DTYPES[i] for i in data if i < len(DTYPES))  # a later version's are not for us


_RequestId = Annotated[str, Tlv(1, *text(128))]
_Digests = Annotated[
    tuple[bytes, ...], Tlv(2, b"".join, lambda data: tuple(data[i : i + 32] for i in range(0, len(data), 32)))
]
_Reason = Annotated[str, Tlv(3, *text(1024))]
_Dtypes = Annotated[tuple[str, ...], Tlv(4, lambda dtypes: bytes(map(DTYPES.index, dtypes)), _dtypes_from_bytes)]
_Groups = Annotated[tuple[Held, ...], Tlv(5, *records(Held, MAX_GROUPS))]
_Tenant = Annotated[str, Tlv(6, *text(128))]
_Staging = Annotated[bytes, Tlv(7, *[partial(bounded, 16 << 10)] * 2)]
_Blocks = Annotated[tuple[Block, ...], Tlv(8, *records(Block, MAX_GROUPS))]


@dataclass(frozen=True)
class Hello(Record):
    """Both sides' first frame. D's speaks of the staging arena; P's has no staging slots."""

    role: Annotated[str, Field("B", names=ROLES)]
    num_slots: Annotated[int, Field("I", most=MAX_STAGING_SLOTS)]  # all of them P's to write until a chunk names one
    slot_bytes: Annotated[int, Field("I", most=MAX_PAYLOAD_BYTES)]
    incarnation: _Key16  # random per process
    fingerprint: _Hash32  # of the model
    groups: _Groups
    wire_dtypes: _Dtypes = DTYPES  # that it takes, what it wants most first; see `negotiation`
    tenant: _Tenant = ""
    staging: _Staging = b""  # how P reaches the arena, where the transport needs words for it

    def _check(self) -> None:
        expect(len(self.wire_dtypes) == len(set(self.wire_dtypes)) > 0, f"wire_dtypes {self.wire_dtypes}")
        expect(1 <= len(self.groups) <= MAX_GROUPS, f"{len(self.groups)} groups, not 1 to {MAX_GROUPS}")
        num_layers = sum(held.layer_stop - held.layer_start for held in self.groups)
        expect(1 <= num_layers <= MAX_LAYERS, f"{num_layers} layers, not 1 to {MAX_LAYERS}")


@dataclass(frozen=True)
class Reserve(Record):
    """D owns pages for the request; P may push tokens [num_cached, num_tokens) of the blocks.

    No blocks: another sender pushes what this one holds; it is to COMMIT nevertheless.
    """

    request_id: _RequestId
    generation: _U64
    capability: _Key16  # random; every later frame about this reservation repeats it
    num_cached: _Token
    num_tokens: _Token  # of the prompt
    deadline_ms: _U32  # how long either side waits without progress of the other
    blocks: _Blocks

    def _check(self) -> None:
        expect(self.num_cached < self.num_tokens, f"num_cached {self.num_cached} of {self.num_tokens} tokens")
        groups = [block.group for block in self.blocks]
        expect(groups == sorted(set(groups)), f"blocks of groups {groups}, not one each in order")


@dataclass(frozen=True)
class Chunk(Record):
    """A staging slot holds packed KV, layers x heads x tokens of one request, described in full."""

    request_id: _RequestId
    generation: _U64
    capability: _Key16
    fingerprint: _Hash32
    group: _Group
    layer_start: _Layer
    layer_stop: _Layer
    head_start: _Head
    head_stop: _Head
    head_dim: _HeadDim
    head_dim_v: _HeadDimV
    token_start: _Token
    token_stop: _Token
    dtype: _Dtype
    scale_kind: _ScaleKind
    checksum_kind: Annotated[str, Field("B", names=CHECKSUM_KINDS)]
    checksum: _U64
    payload_bytes: Annotated[int, Field("Q", 1, MAX_PAYLOAD_BYTES)]
    slot: _Slot

    @property
    def block(self) -> Block:
        return Block(self.group, self.layer_start, self.layer_stop, self.head_start, self.head_stop)

    @property
    def tokens(self) -> Range:
        return self.token_start, self.token_stop


@dataclass(frozen=True)
class Commit(Record):
    """Everything was pushed: KV of the prompt with this hash, which `first_token` followed."""

    request_id: _RequestId
    generation: _U64
    capability: _Key16
    first_token: _U32
    prompt_sha256: _Hash32  # of the token ids, u32 each
    digests: _Digests  # SHA-256 per layer of each block, or ()

    def _check(self) -> None:
        expect(len(self.digests) <= MAX_LAYERS, f"{len(self.digests)} digests, at most {MAX_LAYERS}")
        expect(all(len(digest) == 32 for digest in self.digests), "digests are not SHA-256")


@dataclass(frozen=True)
class Ack(Record):
    """D has all that this P was to push and needs it no more; P may drop its pages."""

    request_id: _RequestId
    generation: _U64


@dataclass(frozen=True)
class Credit(Record):
    """D has consumed the staging slot's chunk; it is P's to write again."""

    slot: _Slot


@dataclass(frozen=True)
class Abort(Record):
    """Either side gives the reservation up. The side that sends it answers to the front."""

    request_id: _RequestId
    generation: _U64
    reason: _Reason


Frame = Hello | Reserve | Chunk | Commit | Ack | Credit | Abort
_KINDS: dict[int, type[Frame]] = dict(enumerate((Hello, Reserve, Chunk, Commit, Ack, Credit, Abort), start=1))
_KIND_OF = {cls: kind for kind, cls in _KINDS.items()}


_PREFIX = struct.Struct("<4sHHHHIII")
_TLV_HEAD = struct.Struct("<HHI")
_CRC = struct.Struct("<I")


def encode(frame: Frame, sequence: int) -> bytes:
    """Raises FrameError when a text is longer than a reader accepts."""
    tlvs = layout(type(frame)).tlvs
    parts = [pack(frame)]
    for name, tlv in tlvs.items():
        data = tlv.to_bytes(getattr(frame, name))
        parts.append(_TLV_HEAD.pack(tlv.tag, 0, len(data)) + data)
    frame_bytes = _PREFIX.size + sum(map(len, parts)) + _CRC.size
    assert frame_bytes <= MAX_FRAME_BYTES, frame_bytes
    kind = _KIND_OF[type(frame)]
    prefix = _PREFIX.pack(MAGIC, VERSION, VERSION, kind, len(tlvs), KNOWN_FEATURES, frame_bytes, sequence)
    data = b"".join((prefix, *parts))
    return data + _CRC.pack(crc32c(data))


def decode(data: bytes) -> tuple[Frame, int]:
    """The frame in exactly these bytes, and its sequence. Raises FrameError naming what is wrong."""
    expect(_PREFIX.size + _CRC.size <= len(data) <= MAX_FRAME_BYTES, f"frame of {len(data)} bytes")
    magic, version, min_version, kind, num_tlvs, features, frame_bytes, sequence = _PREFIX.unpack_from(data)
    expect(magic == MAGIC, f"magic: expected {MAGIC!r}, got {magic!r}")
    expect(version >= VERSION >= min_version, f"version: expected {VERSION}, got {version} that needs {min_version}")
    expect(features & ~KNOWN_FEATURES == 0, f"features: unknown bits {features:#x}")
    expect(frame_bytes == len(data), f"frame_bytes: says {frame_bytes}, got {len(data)}")
    expect(num_tlvs <= MAX_TLVS, f"num_tlvs: expected at most {MAX_TLVS}, got {num_tlvs}")
    end = len(data) - _CRC.size
    expect(_CRC.unpack_from(data, end)[0] == crc32c(data[:end]), "frame CRC32C does not match")
    cls = _KINDS.get(kind)
    if cls is None:
        raise FrameError(f"kind: expected one of {sorted(_KINDS)}, got {kind}")
    at = _PREFIX.size + layout(cls).body.size
    expect(at <= end, f"{cls.__name__}: the body is cut short")
    return cls(**unpack(cls, data, _PREFIX.size), **_decode_tlvs(cls, data, at, end, num_tlvs)), sequence


def _decode_tlvs(cls: type[Frame], data: bytes, at: int, end: int, num_tlvs: int) -> dict[str, Any]:
    known = {tlv.tag: (name, tlv) for name, tlv in layout(cls).tlvs.items()}
    values: dict[str, Any] = {}
    for _ in range(num_tlvs):
        expect(at + _TLV_HEAD.size <= end, f"{cls.__name__}: a TLV is cut short")
        tag, _, length = _TLV_HEAD.unpack_from(data, at)
        at += _TLV_HEAD.size
        expect(length <= end - at, f"{cls.__name__}: TLV {tag}: {length} bytes, {end - at} left")
        if tag in known:
            name, tlv = known[tag]
            expect(name not in values, f"{cls.__name__}.{name}: given twice")
            values[name] = tlv.from_bytes(data[at : at + length])
        at += length
    expect(at == end, f"{cls.__name__}: {end - at} bytes behind the last TLV")
    missing = [name for name, _ in known.values() if name not in values]
    expect(not missing, f"{cls.__name__}: {', '.join(missing)} missing")
    return values
