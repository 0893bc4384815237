"""Which dtype and scale kind KV has on the wire: what both HELLOs say decides, and both ends come to the same."""

import itertools
from typing import NamedTuple

import pytest
from msgspec.structs import replace

from pagewire.transfer.codec import FrameCodec
from pagewire.transfer.frames import DTYPES, FrameError, Held, Hello, encode
from pagewire.transfer.negotiation import negotiate


class Stored(NamedTuple):
    dtype: str
    scale_kind: str


FLOATS = [Stored(dtype, "none") for dtype in DTYPES[:3]]
SCALED = [Stored(dtype, kind) for dtype in DTYPES[3:] for kind in ("tensor", "head", "token_head")]
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def hello(role: str, cache: Stored, *wire_dtypes: str) -> Hello:
    return holding(role, Held(0, 2, 0, 2, 8, 8, *cache), wire_dtypes=wire_dtypes or DTYPES)


def holding(role: str, *groups: Held, **fields) -> Hello:
    return Hello(role, 0, 0, b"i" * 16, b"f" * 32, groups, **fields)


def both(p: Hello, d: Hello) -> Stored:
    """What each end finds from its own HELLO and the other's as it came."""
    at_p = negotiate(p, FrameCodec().decode(FrameCodec().encode(d)))
    at_d = negotiate(d, FrameCodec().decode(FrameCodec().encode(p)))
    assert at_p == at_d and at_p.fingerprint == b"f" * 32
    return Stored(at_p.groups[0].dtype, at_p.groups[0].scale_kind)


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


@pytest.mark.parametrize("wire_dtypes", [(), ("int8", "int8")])
def test_a_hello_that_makes_no_sense_is_no_frame(wire_dtypes: tuple) -> None:
    with pytest.raises(FrameError, match="wire_dtypes"):
        encode(replace(hello("decode", FLOATS[0]), wire_dtypes=wire_dtypes), 0)


A, B = Held(0, 8, 0, 4, 8, 8, *FLOATS[0]), Held(0, 2, 0, 1, 64, 0, "int8", "token_head")
NONE = Held(0, 0, 0, 0, 1, 0, "float32", "none")


def test_every_group_is_what_both_hold_and_has_a_dtype_of_its_own() -> None:
    p = holding("prefill", A, B)
    d = holding("decode", replace(A, layer_start=6, layer_stop=12, head_start=1, head_stop=2, dtype="bfloat16"), B)
    found = negotiate(p, d)
    assert found == negotiate(d, p)
    assert found.groups == (Held(6, 8, 1, 2, 8, 8, "bfloat16", "none"), B)
    stage = holding("decode", NONE, B)  # of other layers: nothing of the first group, whatever its width
    assert negotiate(stage, p).groups[1] == B and negotiate(stage, p).groups[0].layers == (0, 0)


@pytest.mark.parametrize(
    ("theirs", "sentence"),
    [
        ({"fingerprint": b"g" * 32}, "fingerprint: expected 6666666666666666, got 6767676767676767"),
        ({"tenant": "b"}, "tenant: expected a, got b"),
        ({"groups": (A, B)}, "groups: expected 1, got 2"),
        ({"groups": (replace(A, head_dim=16),)}, "group 0: head_dim: expected 8, got 16"),
        ({"groups": (replace(A, head_dim_v=0),)}, "group 0: head_dim_v: expected 8, got 0"),
        (
            {"groups": (replace(A, head_start=4, head_stop=8),)},
            r"nothing is held by both: layers \(0, 8\) x heads \(0, 4\) here, layers \(0, 8\) x heads \(4, 8\) there",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_two_that_cannot_be_joined_are_refused_with_both_values(theirs: dict, sentence: str) -> None:
    ours = holding("decode", A, tenant="a")
    with pytest.raises(ValueError, match=sentence):
        negotiate(ours, replace(ours, role="prefill", **theirs))


def test_a_dtype_of_a_later_version_is_not_in_common() -> None:
    d, p = hello("decode", FLOATS[0], "int4", "float16"), hello("prefill", FLOATS[0], "float16", "int4")
    assert both(p, d) == ("float16", "none")
    with pytest.raises(ValueError, match="wire dtype: D takes int4, P takes int4"):
        negotiate(hello("decode", FLOATS[0], "int4"), hello("prefill", FLOATS[0], "int4"))
