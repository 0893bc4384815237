"""Records of fixed fields with bounds: what annotations say of a frame's fields, and how these become bytes."""

import struct
from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple, get_type_hints


class FrameError(ValueError):
    """These bytes are not a frame we can act on; nothing was changed."""


def expect(holds: bool, sentence: str) -> None:
    if not holds:
        raise FrameError(sentence)


class Field(NamedTuple):
    """What an annotation says of a fixed field."""

    code: str  # struct format
    least: int = 0
    most: int = (1 << 64) - 1
    names: tuple[str, ...] = ()  # of an enumeration; its index travels


class Tlv(NamedTuple):
    """What an annotation says of a field that is a TLV; each is required, exactly once."""

    tag: int
    to_bytes: Callable[[Any], bytes]
    from_bytes: Callable[[bytes], Any]


class Record:
    """Fixed fields within their bounds, each `*_start` below its `*_stop`."""

    def __post_init__(self) -> None:
        of = layout(type(self))
        for name, field in of.bounded:
            if not field.least <= (value := getattr(self, name)) <= field.most:
                raise FrameError(f"{name}: {value}, not {field.least} to {field.most}")
        for name in of.ranges:
            start, stop = getattr(self, f"{name}_start"), getattr(self, f"{name}_stop")
            if start >= stop and not self._may_be_empty:
                raise FrameError(f"{name} range: [{start}, {stop})")
        self._check()

    _may_be_empty = False

    def _check(self) -> None:
        """Raises FrameError for values that do not go together."""


class Layout(NamedTuple):
    fixed: dict[str, Field]
    tlvs: dict[str, Tlv]
    body: struct.Struct
    bounded: list[tuple[str, Field]]
    ranges: list[str]  # `layer`, of layer_start and layer_stop


_LAYOUTS: dict[type[Any], Layout] = {}


def layout(cls: type[Any]) -> Layout:
    if cls not in _LAYOUTS:
        hints = get_type_hints(cls, include_extras=True)
        of = {field.name: hints[field.name].__metadata__[0] for field in fields(cls)}
        fixed = {name: what for name, what in of.items() if isinstance(what, Field)}
        tlvs = {name: what for name, what in of.items() if isinstance(what, Tlv)}
        body = struct.Struct("<" + "".join(field.code for field in fixed.values()))
        bounded = [(name, field) for name, field in fixed.items() if field.code in "HIQ"]
        ranges = [name.removesuffix("_stop") for name in fixed if name.endswith("_stop")]
        _LAYOUTS[cls] = Layout(fixed, tlvs, body, bounded, ranges)
    return _LAYOUTS[cls]


def pack(record: Record) -> bytes:
    of = layout(type(record))
    values = ((getattr(record, name), field.names) for name, field in of.fixed.items())
    return of.body.pack(*(names.index(value) if names else value for value, names in values))


def unpack(cls: type[Any], data: bytes, at: int) -> dict[str, Any]:
    of = layout(cls)
    values = dict(zip(of.fixed, of.body.unpack_from(data, at), strict=True))
    for name, field in of.fixed.items():
        if field.names:
            expect(values[name] < len(field.names), f"{cls.__name__}.{name}: unknown value {values[name]}")
            values[name] = field.names[values[name]]
    return values


def bounded(max_bytes: int, data: bytes) -> bytes:
    expect(len(data) <= max_bytes, f"{len(data)} bytes, at most {max_bytes}")
    return data


def text(max_bytes: int) -> tuple[Callable[[str], bytes], Callable[[bytes], str]]:
    def from_bytes(data: bytes) -> str:
        try:
            return bounded(max_bytes, data).decode()
        except UnicodeDecodeError:
            raise FrameError("text is not UTF-8") from None

    return lambda text: bounded(max_bytes, text.encode()), from_bytes


def records(
    cls: type[Record], most: int
) -> tuple[Callable[[tuple[Any, ...]], bytes], Callable[[bytes], tuple[Any, ...]]]:
    def from_bytes(data: bytes) -> tuple[Any, ...]:
        size = layout(cls).body.size
        expect(len(data) % size == 0 and len(data) <= size * most, f"{len(data)} bytes of {cls.__name__}")
        return tuple(cls(**unpack(cls, data, at)) for at in range(0, len(data), size))

    return lambda records: b"".join(map(pack, records)), from_bytes
