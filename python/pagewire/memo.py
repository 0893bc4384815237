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

_MOST = 4096  # kinds; then all are forgotten: a server sees a few hundred
_NUMBERS = {int, float, bool, str, type(None)}
_found: dict[Kind, Any] = {}
_plain: set[Kind] = set()  # (how many are tensors or numbers, types of all) that can be told apart


def kind(op: str, mixed: tuple[Any, ...], numbers: tuple[Any, ...]) -> Kind | None:
    """What the checks of a call may depend on; None: more than can be said here.

    Args:
        mixed: tensors whose values the checks do not read, or numbers. numbers: numbers, strings or None.
    """
    types = (len(mixed), *map(type, mixed), *map(type, numbers))
    if types not in _plain:
        if not {*types[1 : len(mixed) + 1]} <= _NUMBERS | {Tensor} or not {*types[len(mixed) + 1 :]} <= _NUMBERS:
            return None
        _plain.add(types)
    try:
        looks = [(x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else x for x in mixed]
    except RuntimeError:  # a layout without strides: the checks have a sentence for it
        return None
    return (op, types, numbers, *looks)


def once(of: Kind | None, check: Callable[[], T]) -> T:
    """What `check` returned for the first call of this kind; it raises for a call that is wrong, every time."""
    if of is None:
        return check()
    found = _found.get(of)
    if found is None:
        found = check()
        if len(_found) >= _MOST:
            _found.clear()
        _found[of] = found
    return found


def forget() -> None:
    _found.clear()
