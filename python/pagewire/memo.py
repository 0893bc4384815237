"""Checks are done once per kind of call: what makes two calls the same kind, and what was found of each.

Of a tensor: shape, strides, dtype and device, never its object, address or values. Of a number: value and type, since
1.0 is no integer. An argument that is anything else (a subclass of Tensor, a number of numpy) makes a call of no kind,
which is checked every time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")
Kind = tuple[Any, ...]

_MOST = 1024  # kinds; then all are forgotten: a server sees a few hundred
_NUMBERS = {int, float, bool, str, type(None)}
_MIXED = _NUMBERS | {Tensor}
_found: dict[Kind, Any] = {}


def kind(op: str, mixed: tuple[Any, ...], numbers: tuple[Any, ...]) -> Kind | None:
    """What the checks of a call may depend on; None: more than can be said here.

    Args:
        mixed: tensors whose values the checks do not read, or numbers. numbers: numbers, strings or None.
    """
    try:
        looks = [(x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else x for x in mixed]
    except RuntimeError:  # a layout without strides: the checks have a sentence for it
        return None
    return (op, (*map(type, mixed), *map(type, numbers)), numbers, *looks)


def once(of: Kind | None, check: Callable[[], T]) -> T:
    """What `check` returned for the first call of this kind; it raises for a call that is wrong, every time."""
    try:
        found = _found.get(of)  # type: ignore[arg-type]
    except TypeError:  # it cannot be hashed: something that is no number
        of = None
        found = None
    if found is None:
        found = check()
        if of is not None and _can_be_told_apart(of):
            if len(_found) >= _MOST:
                _found.clear()
            _found[of] = found
    return found


def _can_be_told_apart(of: Kind) -> bool:
    _, types, _, *looks = of
    return {*types[: len(looks)]} <= _MIXED and {*types[len(looks) :]} <= _NUMBERS


def forget() -> None:
    _found.clear()
