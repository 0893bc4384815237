"""Checks are done once per kind of call: what makes two calls the same kind, and what was found of each.

Of a tensor: shape, strides, dtype and device, never its object, address or values. Of a number: value and type, since
1.0 is no integer. An argument that is anything else (a subclass of Tensor, a number of numpy) makes a call of no kind,
which is checked every time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, strided

from pagewire import native

T = TypeVar("T")
Kind = bytes | tuple[Any, ...]

_MOST = 1024  # kinds; then all are forgotten: a server sees a few hundred
_NUMBERS = {int, float, bool, str, type(None)}
_MIXED = _NUMBERS | {Tensor}
_found: dict[Kind, Any] = {}


def _kind(op: str, mixed: tuple[Any, ...], numbers: tuple[Any, ...]) -> Kind | None:
    """What the checks of a call may depend on; None: more than can be said here.

    Args:
        mixed: tensors whose values the checks do not read, or numbers. numbers: numbers, strings or None.
    """
    types = *map(type, mixed), *map(type, numbers)
    if not ({*types[: len(mixed)]} <= _MIXED and {*types[len(mixed) :]} <= _NUMBERS):
        return None
    if any(isinstance(x, Tensor) and x.layout != strided for x in mixed):  # the checks have a sentence for it
        return None
    looks = [(x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else x for x in mixed]
    return (op, types, numbers, *looks)


# the same as bytes, in a quarter of the time
kind = _kind if native.looker is None else native.looker.kind


def once(of: Kind | None, check: Callable[[], T]) -> T:
    """What `check` returned for the first call of this kind; it raises for a call that is wrong, every time."""
    found = _found.get(of) if of is not None else None
    if found is None:
        found = check()
        if of is not None:
            if len(_found) >= _MOST:
                _found.clear()
            _found[of] = found
    return found


def forget() -> None:
    _found.clear()
