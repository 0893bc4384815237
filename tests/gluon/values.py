"""Numbers, tiles and pointers of a simulated kernel: torch tensors held to what Triton promises of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

_INTEGERS = (torch.int8, torch.int32, torch.int64)


class Value:
    """A scalar or a tile. int32 must not overflow, nothing negative is divided: Triton truncates, Python does not."""

    def __init__(self, x: Any, dtype: torch.dtype | None = None) -> None:
        if dtype is None and isinstance(x, int) and not isinstance(x, bool):
            dtype = torch.int32 if -(2**31) <= x < 2**31 else torch.int64
        self.x = torch.as_tensor(x, dtype=dtype)

    dtype = property(lambda self: self.x.dtype)
    shape = property(lambda self: list(self.x.shape))

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Value:
        return Value(self.x.view(dtype) if bitcast else self.x.to(dtype))

    def __getitem__(self, index: Any) -> Value:
        return Value(self.x[index])

    def __index__(self) -> int:
        assert self.x.dim() == 0
        return int(self.x)

    def __bool__(self) -> bool:
        assert self.x.dim() == 0, "a tile decides nothing"
        return bool(self.x)

    def __repr__(self) -> str:
        return f"Value({self.x})"

    def __add__(self, other: Any) -> Any:
        return other + self if isinstance(other, Pointer) else _exact(torch.add, self, other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Value:
        return _exact(torch.sub, self, other)

    def __rsub__(self, other: Any) -> Value:
        return _exact(torch.sub, other, self)

    def __mul__(self, other: Any) -> Value:
        return _exact(torch.mul, self, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Value:
        return Value(self.x / plain(other))

    def __rtruediv__(self, other: Any) -> Value:
        return Value(plain(other) / self.x)

    def __floordiv__(self, other: Any) -> Value:
        return _divided(torch.floor_divide, self, other)

    def __mod__(self, other: Any) -> Value:
        return _divided(torch.remainder, self, other)

    def __neg__(self) -> Value:
        return Value(-self.x)

    def __and__(self, other: Any) -> Value:
        return Value(self.x & plain(other))

    __rand__ = __and__

    def __or__(self, other: Any) -> Value:
        return Value(self.x | plain(other))

    def __xor__(self, other: Any) -> Value:
        return Value(self.x ^ plain(other))

    def __rshift__(self, count: int) -> Value:
        return Value(self.x >> count)

    def __lshift__(self, count: int) -> Value:
        return Value(self.x << count)

    def __lt__(self, other: Any) -> Value:
        return Value(self.x < plain(other))

    def __le__(self, other: Any) -> Value:
        return Value(self.x <= plain(other))

    def __gt__(self, other: Any) -> Value:
        return Value(self.x > plain(other))

    def __ge__(self, other: Any) -> Value:
        return Value(self.x >= plain(other))

    def __eq__(self, other: Any) -> Value:  # type: ignore[override]
        return Value(self.x == plain(other))

    def __ne__(self, other: Any) -> Value:  # type: ignore[override]
        return Value(self.x != plain(other))

    __hash__ = None  # type: ignore[assignment]


def plain(x: Any) -> Any:
    assert isinstance(x, (Value, Tensor, int, float)), f"a {type(x).__name__} is no value (yet): was it waited for?"
    return x.x if isinstance(x, Value) else x


def _exact(op: Any, a: Any, b: Any) -> Value:
    a = a if isinstance(a, Value) else Value(a)  # a number has a type there too
    found = op(a.x, plain(b))
    if found.dtype == torch.int32:
        wide = op(torch.as_tensor(plain(a)).long(), torch.as_tensor(plain(b)).long())
        assert torch.equal(found.long(), wide), "int32 overflows"
    return Value(found)


def _divided(op: Any, a: Value, b: Any) -> Value:
    divisor = torch.as_tensor(plain(b))
    assert a.x.dtype in _INTEGERS and (a.x >= 0).all() and (divisor > 0).all(), "a negative number is divided"
    return Value(op(a.x, plain(b)))


class Pointer:
    """Into a tensor's storage, in elements."""

    def __init__(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.flat = torch.empty(0, dtype=tensor.dtype).set_(storage, 0, (storage.nbytes() // tensor.element_size(),))
        self.at = Value(tensor.storage_offset(), torch.int64)
        self.dtype = SimpleNamespace(element_ty=tensor.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return self._moved(self.at + Value(plain(offset)).to(torch.int64))

    __radd__ = __add__

    def __getitem__(self, index: Any) -> Pointer:
        return self._moved(self.at[index])

    def _moved(self, at: Value) -> Pointer:
        moved = object.__new__(Pointer)
        moved.flat, moved.at, moved.dtype = self.flat, at, self.dtype
        return moved

    def load(self, mask: Any, other: Any) -> Value:
        at, taken = self._masked(mask)
        found = self.flat[torch.where(taken, at, 0)].clone()
        if mask is None:
            return Value(found)
        return Value(torch.where(taken, found, torch.as_tensor(plain(other), dtype=found.dtype)))

    def store(self, value: Any, mask: Any) -> None:
        at, taken = self._masked(mask)
        at, taken, x = torch.broadcast_tensors(at, taken, torch.as_tensor(plain(value)))
        self.flat[at[taken]] = x[taken].to(self.flat.dtype)

    def _masked(self, mask: Any) -> tuple[Tensor, Tensor]:
        taken = torch.as_tensor(True if mask is None else plain(mask))
        at, taken = torch.broadcast_tensors(self.at.x, taken)
        inside = (at >= 0) & (at < self.flat.numel())
        assert bool((inside | ~taken).all()), "an address outside its tensor"
        return at, taken
