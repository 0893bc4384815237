"""Numbers as callers have them: Python's, numpy's, tensors of one element (one on a GPU is waited for); and a sentence
for everything else.
"""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import Any

import torch
from torch import Tensor

# Windows, splits and row counts from here on are unbounded: no request has as many tokens, and the sum of two such
# numbers stays within the kernels' 32 bits
UNBOUNDED = 1 << 30
_FLOAT32 = torch.finfo(torch.float32)


def integer(name: str, value: Any, *, least: int | None = None, what: str = "") -> int:
    """`value` as an int, at least `least`; floats are refused, whole ones too. what: more words for the message."""
    if type(value) is not int and not isinstance(value, (int, torch.SymInt)):
        try:
            value = operator.index(value)
        except (TypeError, ValueError):
            limit = "" if least is None else f" >= {least}"
            raise TypeError(f"{name}: expected an integer{limit}{what}, got {show(value)}") from None
    if least is not None and value < least:
        raise ValueError(f"{name}: expected >= {least}{what}, got {value}")
    number: int = value  # a SymInt passes for one
    return number


def count(name: str, value: Any, what: str = "") -> int | None:
    """An integer >= 1 or None; from UNBOUNDED on, more changes nothing."""
    if value is None:
        return None
    return min(integer(name, value, least=1, what=f"{what} or None"), UNBOUNDED)


def real(name: str, value: Any, expected: str = "a finite number") -> float:
    """`value` as a float that float32 can hold."""
    if type(value) is not float and type(value) is not int:
        if isinstance(value, (torch.SymInt, torch.SymFloat)):
            return value  # type: ignore[return-value]
        if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
            value = value.item()
        if not isinstance(value, Real):
            raise TypeError(f"{name}: expected {expected}, got {show(value)}")
    number = float(value) + 0.0  # -0 is 0
    if not abs(number) <= _FLOAT32.max:  # NaN too
        past = " (past float32)" if math.isfinite(number) else ""
        raise ValueError(f"{name}: expected {expected}, got {value!r}{past}")
    return number


def positive(name: str, value: Any, expected: str) -> float:
    """A number > 0 that is neither 0 nor, inverted, infinite in float32."""
    number = real(name, value, expected)
    if not _FLOAT32.tiny <= number <= 1 / _FLOAT32.tiny:
        past = " (past float32)" if number > 0 else ""
        raise ValueError(f"{name}: expected {expected}, got {value!r}{past}")
    return number


def pair(name: str, value: Any, words: str) -> tuple[int, int]:
    """Two integers in a tuple, list, array or tensor. words: their names, for the message."""
    if isinstance(value, Tensor) or type(value).__module__ == "numpy":
        value = value.tolist()
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name}: expected {words}, got {show(value)}")
    if len(value) != 2:
        raise ValueError(f"{name}: expected {words}, got {show(value)}")
    try:
        return integer(name, value[0]), integer(name, value[1])
    except TypeError:
        raise TypeError(f"{name}: expected {words} as integers, got {show(value)}") from None


def window(value: Any) -> tuple[int, int]:
    """(left, right), with -1 for every way to say unbounded."""
    left, right = pair("window_size", value, "(left, right)")
    return _side(left), _side(right)


def _side(keys: int) -> int:
    return keys if 0 <= keys < UNBOUNDED else -1


def for_schema(value: Any) -> Any:
    """A number on its way through a torch op, which asks again: within int64, and no branch on what may be a symbol."""
    if value is None or isinstance(value, (float, torch.SymFloat)):
        return value
    return torch.sym_max(torch.sym_min(value, UNBOUNDED), -UNBOUNDED)


def flag(name: str, value: Any) -> bool:
    if value is True or value is False:
        return value
    if (isinstance(value, Tensor) and value.numel() == 1) or type(value).__module__ == "numpy":
        value = value.item()
    if not isinstance(value, int) or value not in (0, 1):
        raise TypeError(f"{name}: expected True or False, got {show(value)}")
    return bool(value)


def show(value: Any) -> str:
    """For a message: a short value as it is, with its type where that is not obvious."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"a tensor of shape {tuple(value.shape)} {dtype}"
    text = repr(value)
    if len(text) > 80 or "\n" in text:
        return f"a {type(value).__name__}"
    plain = (bool, int, float, str, tuple, list, type(None), slice, range)
    return text if type(value) in plain else f"{text} ({type(value).__name__})"
