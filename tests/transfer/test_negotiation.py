"""Which dtype and scale kind KV has on the wire: what both HELLOs say decides, and both ends come to the same."""

import itertools
from dataclasses import replace

import pytest

from pagewire.transfer.codec import FrameCodec
from pagewire.transfer.frames import DTYPES, FrameError, Hello, encode
from pagewire.transfer.handoff import Stored
from pagewire.transfer.negotiation import negotiate

FLOATS = [Stored(dtype, "none") for dtype in DTYPES[:3]]
SCALED = [Stored(dtype, kind) for dtype in DTYPES[3:] for kind in ("tensor", "head", "token_head")]
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def hello(role: str, cache: Stored, *wire_dtypes: str) -> Hello:
    return Hello(role, *cache, 2, 2, 8, 8, 0, 0, b"i" * 16, b"f" * 32, wire_dtypes or DTYPES)


def both(p: Hello, d: Hello) -> Stored:
    """What each end finds from its own HELLO and the other's as it came."""
    at_p = negotiate(p, FrameCodec().decode(FrameCodec().encode(d)))
    at_d = negotiate(FrameCodec().decode(FrameCodec().encode(p)), d)
    assert at_p == at_d
    return at_p


@pytest.mark.parametrize(
    ("p", "d", "wire"),
    [
        (("bfloat16", "none"), ("bfloat16", "none"), ("bfloat16", "none")),
        (("float32", "none"), ("bfloat16", "none"), ("bfloat16", "none")),
        (("bfloat16", "none"), ("float32", "none"), ("bfloat16", "none")),
        (("float16", "none"), ("bfloat16", "none"), ("float16", "none")),  # as wide: P's
        (("int8", "head"), ("float8_e5m2", "tensor"), ("int8", "head")),
        (("int8", "tensor"), ("int8", "token_head"), ("int8", "tensor")),  # P's bytes as they are
        (("float32", "none"), ("int8", "tensor"), ("int8", "token_head")),  # P has no scales of its own
    ],
    ids=str,
)
def test_nobody_asks(p: tuple, d: tuple, wire: tuple) -> None:
    assert both(hello("prefill", Stored(*p)), hello("decode", Stored(*d))) == wire


def test_what_is_asked_for_is_taken_whoever_asks() -> None:
    for p, d, dtype in itertools.product(FLOATS + SCALED, FLOATS + SCALED, DTYPES):
        kind = p.scale_kind if dtype == p.dtype else "none" if dtype in BYTES else "token_head"
        ways = [((), (dtype,)), ((dtype,), ()), ((dtype,), (dtype,)), (DTYPES, (dtype,))]
        assert {both(hello("prefill", p, *of_p), hello("decode", d, *of_d)) for of_p, of_d in ways} == {(dtype, kind)}
        free = both(hello("prefill", p), hello("decode", d))
        assert BYTES.get(free.dtype, 1) == min(BYTES.get(cache.dtype, 1) for cache in (p, d))


def test_without_the_caches_dtypes_d_chooses() -> None:
    p = hello("prefill", FLOATS[0], "int8", "float16", "bfloat16")
    assert both(p, hello("decode", FLOATS[0], "float8_e5m2", "bfloat16", "int8")) == ("bfloat16", "none")
    assert both(p, hello("decode", FLOATS[1], "bfloat16", "float16")) == ("float16", "none")  # the wider cache's


def test_nothing_in_common_is_refused_at_both_ends() -> None:
    p, d = hello("prefill", FLOATS[0], "bfloat16"), hello("decode", FLOATS[0], "int8", "float16")
    with pytest.raises(ValueError, match="wire dtype: D takes int8, float16, P takes bfloat16"):
        negotiate(p, d)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"wire_dtypes": ()}, "wire_dtypes"),
        ({"wire_dtypes": ("int8", "int8")}, "wire_dtypes"),
        ({"cache_dtype": "int8"}, "cache_scale_kind none of int8"),
        ({"cache_scale_kind": "head"}, "cache_scale_kind head of float32"),
    ],
    ids=str,
)
def test_a_hello_that_makes_no_sense_is_no_frame(change: dict, sentence: str) -> None:
    with pytest.raises(FrameError, match=sentence):
        replace(hello("decode", FLOATS[0]), **change)


def test_a_dtype_of_a_later_version_is_not_in_common(monkeypatch: pytest.MonkeyPatch) -> None:
    from pagewire.transfer import frames

    data = encode(hello("decode", FLOATS[0], "int8", "float16"), 0)
    monkeypatch.setattr(frames, "DTYPES", DTYPES[:5])
    assert frames.decode(data)[0].wire_dtypes == ("float16",)
