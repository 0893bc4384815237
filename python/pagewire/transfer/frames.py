"""Frames of the KV stream: what a sender (P) and a receiver (D) of packed KV say to each other.

A frame is, with little-endian integers around the body,

    prefix   magic "PWKV", version u16, min_version u16, features u32, frame_bytes u32, sequence u32
    body     MessagePack: a map from a class's field names, and `type`, to values; unknown names are skipped
    crc      CRC32C of everything before it, u32

`sequence` counts a sender's frames on one connection; see `codec`. `decode` returns values within their bounds, whose
frame then fits MAX_FRAME_BYTES, or raises FrameError; a frame beyond them cannot be sent.
"""

import struct
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args

import google_crc32c
from msgspec import Meta, MsgspecError, Struct, msgpack

MAGIC = b"PWKV"
VERSION = 3  # 1, without sequence numbers, and 2, of one group and whole caches, were never released
KNOWN_FEATURES = 0
MAX_FRAME_BYTES = 256 << 10  # a COMMIT with a digest for each of MAX_LAYERS takes half of it
MAX_GROUPS = 64
MAX_LAYERS = 4096  # also of all groups together
MAX_STAGING_SLOTS = 1 << 16
MAX_PAYLOAD_BYTES = 1 << 31
MAX_DEADLINE_MS = (1 << 32) - 1

Dtype = Literal["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8"]
ScaleKind = Literal["none", "tensor", "head", "token_head"]
ChecksumKind = Literal["none", "crc32c", "fletcher64"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
SCALED_DTYPES = DTYPES[3:]  # 8 bits: never without scales
Range = tuple[int, int]  # [start, stop)

_U32 = Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]
_U64 = Annotated[int, Meta(ge=0)]  # MessagePack has none above
_Key16 = Annotated[bytes, Meta(min_length=16, max_length=16)]
_Hash32 = Annotated[bytes, Meta(min_length=32, max_length=32)]
_Name = Annotated[str, Meta(max_length=128)]
_Group = Annotated[int, Meta(ge=0, lt=MAX_GROUPS)]
_Layer = Annotated[int, Meta(ge=0, le=MAX_LAYERS)]
_Head = Annotated[int, Meta(ge=0, le=4096)]
_HeadDim = Annotated[int, Meta(ge=1, le=4096)]
_HeadDimV = Annotated[int, Meta(ge=0, le=4096)]  # 0: V is a view of K and not packed
_Token = Annotated[int, Meta(ge=0, le=1 << 24)]
_Slot = Annotated[int, Meta(ge=0, lt=MAX_STAGING_SLOTS)]
crc32c: Callable[[Any], int] = google_crc32c.value  # of bytes or a contiguous numpy array


class FrameError(ValueError):
    """These bytes are not a frame we can act on, or these values none that may be sent; nothing was changed."""


def _expect(holds: bool, sentence: str) -> None:
    if not holds:
        raise FrameError(sentence)


class _Area:  # layers x heads
    __slots__ = ()

    def __post_init__(self: Any) -> None:
        _expect(self.layer_start < self.layer_stop, f"layer range: {self.layers}")
        _expect(self.head_start < self.head_stop, f"head range: {self.heads}")

    @property
    def layers(self: Any) -> Range:
        return self.layer_start, self.layer_stop

    @property
    def heads(self: Any) -> Range:
        return self.head_start, self.head_stop


class Held(_Area, Struct, frozen=True):
    """What a side holds of one group of layers, both counted over all ranks and stages; no layers: nothing of it."""

    layer_start: _Layer
    layer_stop: _Layer
    head_start: _Head
    head_stop: _Head
    head_dim: _HeadDim
    head_dim_v: _HeadDimV
    dtype: Dtype
    scale_kind: ScaleKind

    def __post_init__(self) -> None:
        layers, heads = self.layer_stop - self.layer_start, self.head_stop - self.head_start
        _expect(layers == heads == 0 or min(layers, heads) > 0, f"{layers} layers, {heads} heads")
        kind, scaled = self.scale_kind, self.dtype in SCALED_DTYPES
        _expect(scaled == (kind != "none"), f"scale_kind {kind} of {self.dtype}")


class Block(_Area, Struct, frozen=True):
    """Layers x heads of a group that one sender is to push."""

    group: _Group
    layer_start: _Layer
    layer_stop: _Layer
    head_start: _Head
    head_stop: _Head


class _OfRequest(Struct, frozen=True):
    request_id: _Name
    generation: _U64


class Hello(Struct, frozen=True, tag="hello"):
    """Both sides' first frame. D's speaks of the staging arena; P's has no staging slots."""

    role: Literal["prefill", "decode"]
    num_slots: Annotated[int, Meta(ge=0, le=MAX_STAGING_SLOTS)]  # all of them P's to write until a chunk names one
    slot_bytes: Annotated[int, Meta(ge=0, le=MAX_PAYLOAD_BYTES)]
    incarnation: _Key16  # random per process
    fingerprint: _Hash32  # of the model
    groups: Annotated[tuple[Held, ...], Meta(max_length=MAX_GROUPS)]
    wire_dtypes: Annotated[tuple[_Name, ...], Meta(min_length=1, max_length=32)] = DTYPES  # wanted most first
    tenant: _Name = ""
    staging: Annotated[bytes, Meta(max_length=16 << 10)] = b""  # how P reaches the arena, where that takes words

    def __post_init__(self) -> None:
        _expect(len(self.wire_dtypes) == len(set(self.wire_dtypes)), f"wire_dtypes {self.wire_dtypes}")
        num_layers = sum(held.layer_stop - held.layer_start for held in self.groups)
        _expect(1 <= num_layers <= MAX_LAYERS, f"{num_layers} layers, not 1 to {MAX_LAYERS}")


class Reserve(_OfRequest, frozen=True, tag="reserve"):
    """D owns pages for the request; P may push tokens [num_cached, num_tokens) of the blocks."""

    capability: _Key16  # random; every later frame about this reservation repeats it
    num_cached: _Token
    num_tokens: _Token  # of the prompt
    deadline_ms: _U32  # how long either side waits without progress of the other
    blocks: Annotated[tuple[Block, ...], Meta(max_length=MAX_GROUPS)]  # none: others push it; COMMIT nevertheless

    def __post_init__(self) -> None:
        _expect(self.num_cached < self.num_tokens, f"num_cached {self.num_cached} of {self.num_tokens} tokens")
        groups = [block.group for block in self.blocks]
        _expect(groups == sorted(set(groups)), f"blocks of groups {groups}, not one each in order")


class Chunk(_Area, _OfRequest, frozen=True, tag="chunk"):
    """A staging slot holds packed KV, layers x heads x tokens of one request, described in full."""

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
    dtype: Dtype
    scale_kind: ScaleKind
    checksum_kind: ChecksumKind
    checksum: _U64
    payload_bytes: Annotated[int, Meta(ge=1, le=MAX_PAYLOAD_BYTES)]
    slot: _Slot

    def __post_init__(self) -> None:
        super().__post_init__()
        _expect(self.token_start < self.token_stop, f"token range: {self.tokens}")

    @property
    def block(self) -> Block:
        return Block(self.group, *self.layers, *self.heads)

    @property
    def tokens(self) -> Range:
        return self.token_start, self.token_stop


class Commit(_OfRequest, frozen=True, tag="commit"):
    """Everything was pushed: KV of the prompt with this hash, which `first_token` followed."""

    capability: _Key16
    first_token: _U32
    prompt_sha256: _Hash32  # of the token ids, u32 each
    digests: Annotated[tuple[_Hash32, ...], Meta(max_length=MAX_LAYERS)]  # SHA-256 per layer of each block, or ()


class Ack(_OfRequest, frozen=True, tag="ack"):
    """D has all that this P was to push and needs it no more; P may drop its pages."""


class Credit(Struct, frozen=True, tag="credit"):
    """D has consumed the staging slot's chunk; it is P's to write again."""

    slot: _Slot


class Abort(_OfRequest, frozen=True, tag="abort"):
    """Either side gives the reservation up. The side that sends it answers to the front."""

    reason: Annotated[str, Meta(max_length=256)]


Frame = Hello | Reserve | Chunk | Commit | Ack | Credit | Abort
_PREFIX = struct.Struct("<4sHHIII")
_CRC_BYTES = 4
_BODY = msgpack.Decoder(Frame)
_NO_BODY = (MsgspecError, UnicodeError, OverflowError, RecursionError)  # what msgspec raises for one


def encode(frame: Frame, sequence: int) -> bytes:
    """Raises FrameError for what a reader would refuse."""
    try:
        body = msgpack.encode(frame)
        _BODY.decode(body)  # a constructor does not look at bounds
    except _NO_BODY as error:
        raise FrameError(f"{type(frame).__name__}: {error}") from error
    frame_bytes = _PREFIX.size + len(body) + _CRC_BYTES
    data = _PREFIX.pack(MAGIC, VERSION, VERSION, KNOWN_FEATURES, frame_bytes, sequence) + body
    return data + crc32c(data).to_bytes(_CRC_BYTES, "little")


def decode(data: bytes) -> tuple[Frame, int]:
    """The frame in exactly these bytes, and its sequence. Raises FrameError naming what is wrong."""
    _expect(_PREFIX.size + _CRC_BYTES <= len(data) <= MAX_FRAME_BYTES, f"frame of {len(data)} bytes")
    magic, version, min_version, features, frame_bytes, sequence = _PREFIX.unpack_from(data)
    _expect(magic == MAGIC, f"magic: expected {MAGIC!r}, got {magic!r}")
    _expect(version >= VERSION >= min_version, f"version: expected {VERSION}, got {version} that needs {min_version}")
    _expect(features & ~KNOWN_FEATURES == 0, f"features: unknown bits {features:#x}")
    _expect(frame_bytes == len(data), f"frame_bytes: says {frame_bytes}, got {len(data)}")
    end = len(data) - _CRC_BYTES
    _expect(int.from_bytes(data[end:], "little") == crc32c(data[:end]), "frame CRC32C does not match")
    try:
        return _BODY.decode(data[_PREFIX.size : end]), sequence
    except _NO_BODY as error:
        raise FrameError(str(error)) from error
