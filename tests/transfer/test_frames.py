"""Frames: what is encoded comes back, and bytes that are not a frame are refused before they mean anything."""

import struct
from dataclasses import fields, replace
from typing import get_args

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

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
    data = data[:16] + struct.pack("<I", len(data)) + data[20:-4]
    return data + struct.pack("<I", crc32c(data))


def in_bounds(frame: Frame) -> bool:
    for field in fields(frame):
        value = getattr(frame, field.name)
        sizes = {"request_id": 128, "reason": 1024, "capability": 16, "incarnation": 16, "fingerprint": 32,
                 "tenant": 128, "staging": 16 << 10}  # fmt: skip
        if field.name in sizes:
            data = value.encode() if isinstance(value, str) else value
            if len(data) > sizes[field.name]:
                return False
        elif isinstance(value, int) and not 0 <= value < 1 << 64:
            return False
    type(frame)(**{field.name: getattr(frame, field.name) for field in fields(frame)})  # bounds
    return True


@by_kind
def test_round_trip(frame: Frame) -> None:
    assert frames.decode(frames.encode(frame, 5)) == (frame, 5)


def test_the_bytes_are_what_the_format_says() -> None:
    data = frames.encode(Credit(0x0102), 0x0304)
    assert data[:20] == b"PWKV" + bytes([3, 0, 3, 0, 6, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0, 0])
    assert data[20:28] == bytes([4, 3, 0, 0, 2, 1, 0, 0])
    assert data[28:] == struct.pack("<I", crc32c(data[:28]))
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
        for cut in (data[:end], resealed(data[:end]) if end >= 28 else b""):
            with pytest.raises(FrameError):
                decode(cut)
    for tail in (data + b"\0", resealed(data[:-4] + b"\0" * 12)):
        with pytest.raises(FrameError):
            decode(tail)


@settings(max_examples=400, deadline=None)
@given(
    frame=st.sampled_from(FRAMES),
    edits=st.lists(st.tuples(st.integers(4, 400), st.binary(min_size=1, max_size=8)), max_size=4),
)
@example(frame=CHUNK, edits=[(24, b"\xff" * 8)])
def test_a_well_sealed_mutation_is_refused_or_within_bounds(frame: Frame, edits: list[tuple[int, bytes]]) -> None:
    data = bytearray(encode(frame))
    for at, piece in edits:
        at %= len(data)
        data[at : at + len(piece)] = piece
    try:
        parsed = decode(resealed(bytes(data)))
    except FrameError:
        return
    assert in_bounds(parsed)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_noise_is_refused(data: bytes) -> None:
    for noise in (data, b"PWKV" + data):
        with pytest.raises(FrameError):
            decode(noise)


def test_unknown_tlvs_are_skipped() -> None:
    data = encode(CHUNK)[:-4]
    extra = struct.pack("<HHI", 999, 0, 5) + b"later"
    num_tlvs = struct.unpack_from("<H", data, 10)[0]
    data = data[:10] + struct.pack("<H", num_tlvs + 1) + data[12:] + extra + b"crc!"
    assert decode(resealed(data)) == CHUNK


@pytest.mark.parametrize(
    ("offset", "value", "reason"),
    [
        (0, b"XXXX", "magic"),
        (6, b"\x04\0", "version: expected 3, got 3 that needs 4"),
        (4, b"\x02\0\x02\0", "version: expected 3, got 2 that needs 2"),
        (8, b"\x63\0", "kind"),
        (10, b"\xff\xff", "num_tlvs"),
        (12, b"\x01\0\0\0", "features: unknown bits 0x1"),
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
    ],
    ids=lambda change: f"{next(iter(change))}={str(next(iter(change.values())))[:9]}",
)
def test_values_out_of_bounds_can_neither_be_made_nor_sent(change: dict) -> None:
    with pytest.raises(FrameError):
        encode(replace(CHUNK, **change))


@by_kind
def test_whatever_is_within_its_bounds_fits_a_frame(frame: Frame) -> None:
    longest = {
        "request_id": "x" * 128, "reason": "x" * 1024, "digests": (b"d" * 32,) * frames.MAX_LAYERS,
        "tenant": "x" * 128, "staging": b"x" * (16 << 10), "groups": HELLO.groups[:1] * 64,
        "blocks": tuple(Block(group, 0, 1, 0, 1) for group in range(64)),
    }  # fmt: skip
    frame = replace(frame, **{name: value for name, value in longest.items() if hasattr(frame, name)})
    data = encode(frame)
    assert len(data) <= frames.MAX_FRAME_BYTES and decode(data) == frame
    for name in longest.keys() & vars(frame).keys():
        with pytest.raises(FrameError):
            encode(replace(frame, **{name: getattr(frame, name) + longest[name][:1]}))


@pytest.mark.parametrize(
    ("frame", "change", "reason"),
    [
        (HELLO, {"groups": ()}, "0 groups"),
        (HELLO, {"groups": (Held(0, 0, 0, 0, 64, 64, "bfloat16", "none"),)}, "0 layers"),
        (HELLO, {"groups": (Held(0, 4096, 0, 1, 64, 64, "bfloat16", "none"),) * 2}, "8192 layers"),
        (RESERVE, {"num_cached": 300}, "num_cached 300 of 300"),
        (RESERVE, {"blocks": RESERVE.blocks[::-1]}, r"groups \[1, 0\]"),
        (RESERVE, {"blocks": (Block(0, 0, 1, 0, 1), Block(0, 0, 1, 0, 1))}, r"groups \[0, 0\]"),
        (COMMIT, {"digests": (b"d" * 31,)}, "not SHA-256"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_values_that_do_not_go_together_are_no_frame(frame: Frame, change: dict, reason: str) -> None:
    with pytest.raises(FrameError, match=reason):
        replace(frame, **change)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (lambda: Held(0, 0, 0, 1, 64, 64, "bfloat16", "none"), "0 layers, 1 heads"),
        (lambda: Held(3, 2, 0, 1, 64, 64, "bfloat16", "none"), "-1 layers"),
        (lambda: Held(0, 1, 0, 1, 64, 64, "int8", "none"), "scale_kind none of int8"),
        (lambda: Held(0, 1, 0, 1, 0, 64, "bfloat16", "none"), "head_dim: 0"),
        (lambda: Block(0, 1, 1, 0, 1), r"layer range: \[1, 1\)"),
        (lambda: Block(0, 0, 1, 2, 1), r"head range: \[2, 1\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_area_that_is_none_cannot_be_made(record, reason: str) -> None:
    with pytest.raises(FrameError, match=reason):
        record()


def test_scale_kinds_are_those_of_packed_rows():
    """Written out there, since the front reads frames without torch."""
    assert get_args(StoredScaleKind) == frames.SCALE_KINDS
