"""Frames of the KV stream: what a sender (P) and a receiver (D) of packed KV say to each other.

Everything is little-endian. A frame is

    prefix   magic "PWKV", version u16, min_version u16, kind u16, num_tlvs u16, features u32,
             frame_bytes u32, sequence u32
    body     the kind's fixed fields, in the order of `_LAYOUTS`
    TLVs     num_tlvs times: tag u16, reserved u16, length u32, value; unknown tags are skipped
    crc      CRC32C of everything before it, u32

`sequence` counts a sender's frames on one connection, from 0, modulo 2^32; see `codec`. A reader
refuses a frame whose min_version is above its own version or whose feature bits it does not know.
Every length is bounded before it is believed: `decode` returns values within their bounds or raises
FrameError. Whatever fits its bounds fits MAX_FRAME_BYTES.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import google_crc32c

MAGIC = b"PWKV"
VERSION = 2  # 1, without sequence numbers, was never released
KNOWN_FEATURES = 0

MAX_FRAME_BYTES = 256 << 10  # a COMMIT with a digest for each of MAX_LAYERS takes half of it
MAX_TLVS = 32
MAX_REQUEST_ID_BYTES = 128
MAX_REASON_BYTES = 1024
MAX_LAYERS = 4096
MAX_HEADS = 4096
MAX_HEAD_DIM = 4096
MAX_TOKENS = 1 << 24
MAX_STAGING_SLOTS = 1 << 16
MAX_PAYLOAD_BYTES = 1 << 31
MAX_DEADLINE_MS = (1 << 32) - 1

DTYPES = ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8")
SCALED_DTYPES = DTYPES[3:]  # 8 bits: never without scales
SCALE_KINDS = ("none", "tensor", "head", "token_head")
CHECKSUM_KINDS = ("none", "crc32c")
ROLES = ("prefill", "decode")

Range = tuple[int, int]  # [start, stop)


class FrameError(ValueError):
    """These bytes are not a frame we can act on; nothing was changed."""


def crc32c(data: Any) -> int:
    """Of bytes or a contiguous numpy array."""
    checksum: int = google_crc32c.value(data)
    return checksum


def _expect(holds: bool, sentence: str) -> None:
    if not holds:
        raise FrameError(sentence)


@dataclass(frozen=True)
class Hello:
    """Both sides' first frame. D's carries the staging arena's descriptor; P's has no staging slots."""

    role: str
    cache_dtype: str
    cache_scale_kind: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    num_slots: int  # every staging slot of the arena is P's to write until a chunk names it
    slot_bytes: int
    incarnation: bytes  # 16, random per process
    fingerprint: bytes  # 32, of the model
    wire_dtypes: tuple[str, ...] = DTYPES  # that it takes, what it wants most first; see `negotiation`

    def __post_init__(self) -> None:
        scaled, kind = self.cache_dtype in SCALED_DTYPES, self.cache_scale_kind
        _expect(scaled == (kind != "none"), f"cache_scale_kind {kind} of {self.cache_dtype}")
        _expect(len(self.wire_dtypes) == len(set(self.wire_dtypes)) > 0, f"wire_dtypes {self.wire_dtypes}")
        _expect(1 <= self.num_layers <= MAX_LAYERS, f"num_layers {self.num_layers}")
        _expect(1 <= self.num_kv_heads <= MAX_HEADS, f"num_kv_heads {self.num_kv_heads}")
        _expect(1 <= self.head_dim <= MAX_HEAD_DIM, f"head_dim {self.head_dim}")
        _expect(0 <= self.head_dim_v <= MAX_HEAD_DIM, f"head_dim_v {self.head_dim_v}")
        _expect(0 <= self.num_slots <= MAX_STAGING_SLOTS, f"num_slots {self.num_slots}")
        _expect(0 <= self.slot_bytes <= MAX_PAYLOAD_BYTES, f"slot_bytes {self.slot_bytes}")


@dataclass(frozen=True)
class Reserve:
    """D owns pages for the request; P may push tokens [num_cached, num_tokens) of it."""

    request_id: str
    generation: int
    capability: bytes  # 16, random; every later frame about this reservation repeats it
    num_cached: int
    num_tokens: int  # of the prompt
    deadline_ms: int  # how long either side waits without progress of the other

    def __post_init__(self) -> None:
        _expect(0 <= self.num_cached < self.num_tokens <= MAX_TOKENS, "num_cached, num_tokens")


@dataclass(frozen=True)
class Chunk:
    """A staging slot holds packed KV, layers x heads x tokens of one request, described in full."""

    request_id: str
    generation: int
    capability: bytes
    fingerprint: bytes
    group: int
    layer_start: int
    layer_stop: int
    head_start: int
    head_stop: int
    head_dim: int
    head_dim_v: int  # 0: V is a view of K and not packed
    token_start: int
    token_stop: int
    dtype: str
    scale_kind: str
    checksum_kind: str
    checksum: int
    payload_bytes: int
    slot: int

    @property
    def block(self) -> tuple[Range, Range, Range]:
        """Its layers, heads and tokens."""
        heads, tokens = (self.head_start, self.head_stop), (self.token_start, self.token_stop)
        return (self.layer_start, self.layer_stop), heads, tokens

    def __post_init__(self) -> None:
        _expect(self.layer_start < self.layer_stop <= MAX_LAYERS, "layer range")
        _expect(self.head_start < self.head_stop <= MAX_HEADS, "head range")
        _expect(self.token_start < self.token_stop <= MAX_TOKENS, "token range")
        _expect(1 <= self.head_dim <= MAX_HEAD_DIM, f"head_dim {self.head_dim}")
        _expect(0 <= self.head_dim_v <= MAX_HEAD_DIM, f"head_dim_v {self.head_dim_v}")
        _expect(1 <= self.payload_bytes <= MAX_PAYLOAD_BYTES, f"payload_bytes {self.payload_bytes}")
        _expect(self.slot < MAX_STAGING_SLOTS, f"slot {self.slot}")


@dataclass(frozen=True)
class Commit:
    """Everything was pushed: KV of the prompt with this hash, which `first_token` followed."""

    request_id: str
    generation: int
    capability: bytes
    first_token: int
    prompt_sha256: bytes  # 32, of the token ids, u32 each
    digests: tuple[bytes, ...]  # SHA-256 per layer of the packed prompt, or ()

    def __post_init__(self) -> None:
        _expect(len(self.digests) <= MAX_LAYERS, f"{len(self.digests)} digests, at most {MAX_LAYERS}")
        _expect(all(len(digest) == 32 for digest in self.digests), "digests are not SHA-256")


@dataclass(frozen=True)
class Ack:
    """D owns the request now; P may drop its pages."""

    request_id: str
    generation: int


@dataclass(frozen=True)
class Credit:
    """D has consumed the staging slot's chunk; it is P's to write again."""

    slot: int

    def __post_init__(self) -> None:
        _expect(self.slot < MAX_STAGING_SLOTS, f"slot {self.slot}")


@dataclass(frozen=True)
class Abort:
    """Either side gives the reservation up. The side that sends it answers to the front."""

    request_id: str
    generation: int
    reason: str


Frame = Hello | Reserve | Chunk | Commit | Ack | Credit | Abort


class _Field(NamedTuple):
    code: str  # struct format
    names: tuple[str, ...] = ()  # of an enumeration; its index travels


class _Tlv(NamedTuple):
    tag: int
    to_bytes: Callable[[Any], bytes]
    from_bytes: Callable[[bytes], Any]


class _Layout(NamedTuple):
    kind: int
    fixed: dict[str, _Field]
    tlvs: dict[str, _Tlv]  # all of them required, each exactly once


def _text(max_bytes: int) -> tuple[Callable[[str], bytes], Callable[[bytes], str]]:
    def to_bytes(text: str) -> bytes:
        data = text.encode()
        _expect(len(data) <= max_bytes, f"text of {len(data)} bytes, at most {max_bytes}")
        return data

    def from_bytes(data: bytes) -> str:
        _expect(len(data) <= max_bytes, f"text of {len(data)} bytes, at most {max_bytes}")
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise FrameError("text is not UTF-8") from None

    return to_bytes, from_bytes


def _dtypes_to_bytes(dtypes: tuple[str, ...]) -> bytes:
    return bytes(map(DTYPES.index, dtypes))


def _dtypes_from_bytes(data: bytes) -> tuple[str, ...]:
    return tuple(DTYPES[i] for i in data if i < len(DTYPES))  # a later version's are not for us


def _digests_from_bytes(data: bytes) -> tuple[bytes, ...]:
    return tuple(data[i : i + 32] for i in range(0, len(data), 32))


_U16, _U32, _U64 = _Field("H"), _Field("I"), _Field("Q")
_KEY16, _HASH32 = _Field("16s"), _Field("32s")
_DTYPE, _SCALE_KIND = _Field("B", DTYPES), _Field("B", SCALE_KINDS)
_CHECKSUM_KIND = _Field("B", CHECKSUM_KINDS)
_REQUEST_ID = _Tlv(1, *_text(MAX_REQUEST_ID_BYTES))
_DIGESTS = _Tlv(2, b"".join, _digests_from_bytes)
_REASON = _Tlv(3, *_text(MAX_REASON_BYTES))
_WIRE_DTYPES = _Tlv(4, _dtypes_to_bytes, _dtypes_from_bytes)

_LAYOUTS: dict[type[Frame], _Layout] = {
    Hello: _Layout(1, dict(
        role=_Field("B", ROLES), cache_dtype=_DTYPE, cache_scale_kind=_SCALE_KIND, num_layers=_U16,
        num_kv_heads=_U16, head_dim=_U16, head_dim_v=_U16, num_slots=_U32, slot_bytes=_U32,
        incarnation=_KEY16, fingerprint=_HASH32,
    ), dict(wire_dtypes=_WIRE_DTYPES)),
    Reserve: _Layout(2, dict(
        generation=_U64, capability=_KEY16, num_cached=_U32, num_tokens=_U32, deadline_ms=_U32,
    ), dict(request_id=_REQUEST_ID)),
    Chunk: _Layout(3, dict(
        generation=_U64, capability=_KEY16, fingerprint=_HASH32, group=_U16, layer_start=_U16,
        layer_stop=_U16, head_start=_U16, head_stop=_U16, head_dim=_U16, head_dim_v=_U16,
        token_start=_U32, token_stop=_U32, dtype=_DTYPE, scale_kind=_SCALE_KIND,
        checksum_kind=_CHECKSUM_KIND, checksum=_U32, payload_bytes=_U64, slot=_U32,
    ), dict(request_id=_REQUEST_ID)),
    Commit: _Layout(4, dict(generation=_U64, capability=_KEY16, first_token=_U32, prompt_sha256=_HASH32),
                    dict(request_id=_REQUEST_ID, digests=_DIGESTS)),
    Ack: _Layout(5, dict(generation=_U64), dict(request_id=_REQUEST_ID)),
    Credit: _Layout(6, dict(slot=_U32), {}),
    Abort: _Layout(7, dict(generation=_U64), dict(request_id=_REQUEST_ID, reason=_REASON)),
}  # fmt: skip
_BY_KIND = {layout.kind: cls for cls, layout in _LAYOUTS.items()}
_FIXED = {
    cls: struct.Struct("<" + "".join(field.code for field in layout.fixed.values())) for cls, layout in _LAYOUTS.items()
}
_PREFIX = struct.Struct("<4sHHHHIII")
_TLV_HEAD = struct.Struct("<HHI")
_CRC = struct.Struct("<I")
assert all({*w.fixed, *w.tlvs} == {f.name for f in fields(c)} for c, w in _LAYOUTS.items())


def encode(frame: Frame, sequence: int) -> bytes:
    """Raises FrameError when a text is longer than a reader accepts."""
    layout = _LAYOUTS[type(frame)]
    values = []
    for name, field in layout.fixed.items():
        value = getattr(frame, name)
        values.append(field.names.index(value) if field.names else value)
    parts = [_FIXED[type(frame)].pack(*values)]
    for name, tlv in layout.tlvs.items():
        data = tlv.to_bytes(getattr(frame, name))
        parts.append(_TLV_HEAD.pack(tlv.tag, 0, len(data)) + data)
    frame_bytes = _PREFIX.size + sum(map(len, parts)) + _CRC.size
    assert frame_bytes <= MAX_FRAME_BYTES, frame_bytes
    prefix = _PREFIX.pack(MAGIC, VERSION, VERSION, layout.kind, len(layout.tlvs), KNOWN_FEATURES, frame_bytes, sequence)
    data = b"".join((prefix, *parts))
    return data + _CRC.pack(crc32c(data))


def decode(data: bytes) -> tuple[Frame, int]:
    """The frame in exactly these bytes, and its sequence. Raises FrameError naming what is wrong."""
    _expect(_PREFIX.size + _CRC.size <= len(data) <= MAX_FRAME_BYTES, f"frame of {len(data)} bytes")
    magic, version, min_version, kind, num_tlvs, features, frame_bytes, sequence = _PREFIX.unpack_from(data)
    _expect(magic == MAGIC, f"magic: expected {MAGIC!r}, got {magic!r}")
    _expect(version >= VERSION >= min_version, f"version: expected {VERSION}, got {version} that needs {min_version}")
    _expect(features & ~KNOWN_FEATURES == 0, f"features: unknown bits {features:#x}")
    _expect(frame_bytes == len(data), f"frame_bytes: says {frame_bytes}, got {len(data)}")
    _expect(num_tlvs <= MAX_TLVS, f"num_tlvs: expected at most {MAX_TLVS}, got {num_tlvs}")
    end = len(data) - _CRC.size
    _expect(_CRC.unpack_from(data, end)[0] == crc32c(data[:end]), "frame CRC32C does not match")
    cls = _BY_KIND.get(kind)
    if cls is None:
        raise FrameError(f"kind: expected one of {sorted(_BY_KIND)}, got {kind}")
    values, at = _decode_fixed(cls, data, _PREFIX.size, end)
    values |= _decode_tlvs(cls, data, at, end, num_tlvs)
    return cls(**values), sequence


def _decode_fixed(cls: type[Frame], data: bytes, at: int, end: int) -> tuple[dict[str, Any], int]:
    stop = at + _FIXED[cls].size
    _expect(stop <= end, f"{cls.__name__}: the body is cut short")
    values = {}
    raw = _FIXED[cls].unpack_from(data, at)
    for (name, field), value in zip(_LAYOUTS[cls].fixed.items(), raw, strict=True):
        if field.names:
            _expect(value < len(field.names), f"{cls.__name__}.{name}: unknown value {value}")
            value = field.names[value]
        values[name] = value
    return values, stop


def _decode_tlvs(cls: type[Frame], data: bytes, at: int, end: int, num_tlvs: int) -> dict[str, Any]:
    known = {tlv.tag: (name, tlv) for name, tlv in _LAYOUTS[cls].tlvs.items()}
    values: dict[str, Any] = {}
    for _ in range(num_tlvs):
        _expect(at + _TLV_HEAD.size <= end, f"{cls.__name__}: a TLV is cut short")
        tag, _, length = _TLV_HEAD.unpack_from(data, at)
        at += _TLV_HEAD.size
        _expect(length <= end - at, f"{cls.__name__}: TLV {tag}: {length} bytes, {end - at} left")
        if tag in known:
            name, tlv = known[tag]
            _expect(name not in values, f"{cls.__name__}.{name}: given twice")
            values[name] = tlv.from_bytes(data[at : at + length])
        at += length
    _expect(at == end, f"{cls.__name__}: {end - at} bytes behind the last TLV")
    missing = [name for name in _LAYOUTS[cls].tlvs if name not in values]
    _expect(not missing, f"{cls.__name__}: {', '.join(missing)} missing")
    return values
