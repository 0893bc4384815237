"""Frames: what is encoded comes back, and bytes that are not a frame are refused before they mean anything."""

import struct
import tracemalloc
from typing import get_args

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec.structs import asdict, replace

from pagewire.transfer import frames
from pagewire.transfer.frames import (
    Abort,
    Ack,
    Block,
    Chunk,
    Commit,
    Credit,
    Frame,
    FrameError,
    Held,
    Hello,
    Reserve,
    crc32c,
)
from pagewire.types import StoredScaleKind

HELLO = Hello(
    "decode", 16, 1 << 20, b"i" * 16, b"f" * 32,
    (Held(15, 30, 0, 3, 64, 64, "bfloat16", "none"), Held(0, 2, 0, 1, 576, 0, "int8", "token_head")),
    ("float8_e4m3fn", "bfloat16"), "team-a", b"handle",
)  # fmt: skip
RESERVE = Reserve("cmpl-1-0", 7, b"c" * 16, 0, 300, 5000, (Block(0, 15, 20, 1, 3), Block(1, 0, 2, 0, 1)))
CHUNK = Chunk(
    request_id="cmpl-1-0", generation=7, capability=b"c" * 16, fingerprint=b"f" * 32, group=0,
    layer_start=3, layer_stop=4, head_start=0, head_stop=3, head_dim=64, head_dim_v=64,
    token_start=128, token_stop=256, dtype="bfloat16", scale_kind="none", checksum_kind="crc32c",
    checksum=0xDEADBEEF, payload_bytes=98304, slot=5,
)  # fmt: skip
COMMIT = Commit("cmpl-1-0", 7, b"c" * 16, 42, b"h" * 32, (b"d" * 32, b"e" * 32))
FRAMES: list[Frame] = [HELLO, RESERVE, CHUNK, COMMIT, Ack("r", 1), Credit(3), Abort("ü", 0, "too late")]
by_kind = pytest.mark.parametrize("frame", FRAMES, ids=lambda frame: type(frame).__name__)


def encode(frame: Frame) -> bytes:
    return frames.encode(frame, 0)


def decode(data: bytes) -> Frame:
    return frames.decode(data)[0]


def resealed(data: bytes) -> bytes:
    """The bytes with frame_bytes and CRC made right again, so that only the parser is in the way."""
    data = data[:12] + struct.pack("<I", len(data)) + data[16:-4]
    return data + struct.pack("<I", crc32c(data))


def sealed(body: bytes) -> bytes:
    return resealed(encode(CHUNK)[:20] + body + bytes(4))


@by_kind
def test_round_trip(frame: Frame) -> None:
    assert frames.decode(frames.encode(frame, 5)) == (frame, 5)


def test_the_bytes_are_what_the_format_says() -> None:
    data = frames.encode(Credit(0x0102), 0x0304)
    assert data[:20] == b"PWKV" + bytes([3, 0, 3, 0, 0, 0, 0, 0, 45, 0, 0, 0, 4, 3, 0, 0])
    assert data[20:-4] == b"\x82\xa4type\xa6credit\xa4slot\xcd\x01\x02"
    assert data[-4:] == struct.pack("<I", crc32c(data[:-4]))
    assert crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C


@by_kind
def test_every_flipped_bit_is_refused(frame: Frame) -> None:
    data = encode(frame)
    for i in range(len(data)):
        bad = bytearray(data)
        bad[i] ^= 1 << (i % 8)
        with pytest.raises(FrameError):
            decode(bytes(bad))


@by_kind
def test_every_truncation_and_any_tail_is_refused(frame: Frame) -> None:
    data = encode(frame)
    for end in range(len(data)):
        for cut in (data[:end], resealed(data[:end]) if end >= 24 else b""):
            with pytest.raises(FrameError):
                decode(cut)
    for tail in (data + b"\0", resealed(data[:-4] + b"\xc0" * 12)):
        with pytest.raises(FrameError):
            decode(tail)


@settings(max_examples=400, deadline=None)
@given(
    frame=st.sampled_from(FRAMES),
    edits=st.lists(st.tuples(st.integers(4, 400), st.binary(min_size=1, max_size=8)), max_size=4),
)
@example(frame=CHUNK, edits=[(20, b"\xff" * 8)])
def test_a_well_sealed_mutation_is_refused_or_within_bounds(frame: Frame, edits: list[tuple[int, bytes]]) -> None:
    data = bytearray(encode(frame))
    for at, piece in edits:
        at %= len(data)
        data[at : at + len(piece)] = piece
    try:
        parsed = decode(resealed(bytes(data)))
    except FrameError:
        return
    assert decode(encode(parsed)) == parsed  # within its bounds, which `faults.parser` writes out


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_noise_is_refused(data: bytes) -> None:
    for noise in (data, b"PWKV" + data):
        with pytest.raises(FrameError):
            decode(noise)


def body(frame: Frame, **more) -> bytes:
    """As a map that says more, or other things."""
    return msgspec.msgpack.encode(msgspec.msgpack.decode(encode(frame)[20:-4]) | more)


LATER = [5, 1.5, "text", b"bytes", [1, {"a": None}], {"slot": 9}, msgspec.msgpack.Ext(5, b"x")]


@pytest.mark.parametrize("later", LATER, ids=lambda later: type(later).__name__)
def test_unknown_fields_are_skipped(later: object) -> None:
    assert decode(sealed(body(CHUNK, later=later))) == CHUNK


def entry(name: str, raw: bytes) -> bytes:
    """CREDIT of slot 3 with one more name, whose value is these bytes."""
    return b"\x83" + encode(Credit(3))[21:-4] + msgspec.msgpack.encode(name) + raw


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "truncated"),
        (body(Credit(3)) + b"\xc0", "trailing"),
        (msgspec.msgpack.encode({"slot": 3}), "missing required field `type`"),
        (msgspec.msgpack.encode({"type": "credit"}), "missing required field `slot`"),
        (body(Credit(3), type="grant"), "Invalid value 'grant'"),
        (msgspec.msgpack.encode(["credit", 3]), "got `array`"),
        (body(Credit(3), slot="3"), "Expected `int`, got `str`"),
        (body(Credit(3), slot=True), "Expected `int`, got `bool`"),
        (body(Credit(3), slot=3.0), "Expected `int`, got `float`"),
        (body(Credit(3), slot=-1), "Expected `int` >= 0"),
        (entry("slot", b"\xd4\x05x"), "Expected `int`, got `ext`"),
        (entry("slot", b"\xce\0\x01\0\0"), "<= 65535"),
        (entry("type", b"\xa3ack"), "Invalid value 'ack'"),
        (body(Ack("r", 1), request_id=b"r"), "Expected `str`, got `bytes`"),
        (body(Ack("r", 1)).replace(b"\xa1r", b"\xa1\xff"), "invalid start byte"),
        (body(COMMIT, capability="c" * 16), "Expected `bytes`, got `str`"),
        (body(COMMIT, capability=b"c" * 15), "length >= 16 - at `\\$.capability`"),
        (body(CHUNK, dtype="float64"), "Invalid enum value 'float64'"),
        (body(CHUNK, layer_stop=3), r"layer range: \(3, 3\)"),
        (entry("later", b"\x91" * 200_000 + b"\xc0"), "recursion"),
        (entry("later", b"\x81\xa1a" * 60_000 + b"\xc0"), "recursion"),
        (entry("later", b"\xdd\xff\xff\xff\xff" + b"\x01" * 99), "truncated"),
        (entry("later", b"\xdb\xff\xff\xff\xff" + b"x" * 99), "truncated"),
        (entry("later", b"\xc9\xff\xff\xff\xff\x05" + b"x" * 99), "truncated"),
        (b"\xdf\xff\xff\xff\xff" + body(Credit(3))[1:], "truncated"),
        (body(COMMIT, digests=[]).replace(b"digests\x90", b"digests\xdd\xff\xff\xff\xff"), "length <= 4096"),
        (body(COMMIT, digests=[]).replace(b"digests\x90", b"digests\xdd\0\0\x10\0"), "truncated"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_body_that_is_no_frame_is_refused_at_no_cost(data: bytes, reason: str) -> None:
    frame = sealed(data)
    tracemalloc.start()
    with pytest.raises(FrameError, match=reason):
        decode(frame)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 4 * len(frame) + (1 << 16), "a length was believed"


def test_of_a_name_that_comes_twice_every_value_is_checked_and_the_last_one_counts() -> None:
    assert decode(sealed(entry("slot", b"\x05"))) == Credit(5)
    assert decode(sealed(entry("slot", b"\xd3" + bytes(7) + b"\x05"))) == Credit(5)  # of any width
    twice = b"\x83\xa4type\xa6credit\xa4slot\xff\xa4slot\x03"
    with pytest.raises(FrameError, match=">= 0"):
        decode(sealed(twice))


@pytest.mark.parametrize(
    ("offset", "value", "reason"),
    [
        (0, b"XXXX", "magic"),
        (6, b"\x04\0", "version: expected 3, got 3 that needs 4"),
        (4, b"\x02\0\x02\0", "version: expected 3, got 2 that needs 2"),
        (8, b"\x01\0\0\0", "features: unknown bits 0x1"),
    ],
)
def test_a_refusal_names_its_reason(offset: int, value: bytes, reason: str) -> None:
    data = encode(RESERVE)
    data = data[:offset] + value + data[offset + len(value) :]
    with pytest.raises(FrameError, match=reason):
        decode(resealed(data))


def test_a_newer_version_that_still_speaks_ours_is_read() -> None:
    data = encode(RESERVE)
    assert decode(resealed(data[:4] + b"\x09\0" + data[6:])) == RESERVE


@pytest.mark.parametrize(
    "change",
    [
        {"layer_stop": 3},
        {"layer_stop": 5000},
        {"head_start": 3},
        {"token_stop": 128},
        {"token_stop": (1 << 24) + 1},
        {"payload_bytes": 0},
        {"payload_bytes": 1 << 40},
        {"head_dim": 0},
        {"slot": 1 << 20},
        {"group": 64},
        {"checksum": 1 << 64},
        {"request_id": "x" * 129},
        {"request_id": "\ud800"},
        {"checksum": -1},
        {"slot": True},
    ],
    ids=lambda change: f"{next(iter(change))}={str(next(iter(change.values())))[:9]}",
)
def test_values_out_of_bounds_can_neither_be_made_nor_sent(change: dict) -> None:
    with pytest.raises(FrameError):
        encode(replace(CHUNK, **change))


@by_kind
def test_whatever_is_within_its_bounds_fits_a_frame(frame: Frame) -> None:
    longest = {
        "request_id": "\U0001f642" * 128, "reason": "ü" * 256, "digests": (b"d" * 32,) * frames.MAX_LAYERS,
        "tenant": "x" * 128, "staging": b"x" * (16 << 10), "groups": HELLO.groups[:1] * 64,
        "blocks": tuple(Block(group, 0, 1, 0, 1) for group in range(64)),
    }  # fmt: skip
    frame = replace(frame, **{name: value for name, value in longest.items() if hasattr(frame, name)})
    data = encode(frame)
    assert len(data) <= frames.MAX_FRAME_BYTES and decode(data) == frame
    for name in longest.keys() & asdict(frame).keys():
        with pytest.raises(FrameError):
            encode(replace(frame, **{name: getattr(frame, name) + longest[name][:1]}))


@pytest.mark.parametrize(
    ("frame", "change", "reason"),
    [
        (HELLO, {"groups": ()}, "0 layers"),
        (HELLO, {"groups": (Held(0, 0, 0, 0, 64, 64, "bfloat16", "none"),)}, "0 layers"),
        (HELLO, {"groups": (Held(0, 4096, 0, 1, 64, 64, "bfloat16", "none"),) * 2}, "8192 layers"),
        (RESERVE, {"num_cached": 300}, "num_cached 300 of 300"),
        (RESERVE, {"blocks": RESERVE.blocks[::-1]}, r"groups \[1, 0\]"),
        (RESERVE, {"blocks": (Block(0, 0, 1, 0, 1), Block(0, 0, 1, 0, 1))}, r"groups \[0, 0\]"),
        (COMMIT, {"digests": (b"d" * 31,)}, r"length >= 32 - at `\$.digests\[0\]`"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_values_that_do_not_go_together_are_no_frame(frame: Frame, change: dict, reason: str) -> None:
    with pytest.raises(FrameError, match=reason):
        encode(replace(frame, **change))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (lambda: Held(0, 0, 0, 1, 64, 64, "bfloat16", "none"), "0 layers, 1 heads"),
        (lambda: Held(3, 2, 0, 1, 64, 64, "bfloat16", "none"), "-1 layers"),
        (lambda: Held(0, 1, 0, 1, 64, 64, "int8", "none"), "scale_kind none of int8"),
        (lambda: Block(0, 1, 1, 0, 1), r"layer range: \(1, 1\)"),
        (lambda: Block(0, 0, 1, 2, 1), r"head range: \(2, 1\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_area_that_is_none_cannot_be_made(record, reason: str) -> None:
    with pytest.raises(FrameError, match=reason):
        record()


def test_scale_kinds_are_those_of_packed_rows():
    """Written out there, since the front reads frames without torch."""
    assert get_args(StoredScaleKind) == get_args(frames.ScaleKind)
