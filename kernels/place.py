"""A launch before its call is known, and what stands there for the call's own tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

SWIZZLE = 128  # bytes, at most


@dataclass(frozen=True)
class Place:
    """Where a tensor of the call goes, counted from the first, or an area of its scratch memory: -1, -2, ..."""

    index: int

    def of(self, values: Sequence[Any]) -> Any:
        return values[self.index]


@dataclass(frozen=True)
class MatrixPlace(Place):
    """The tensor as rows of a matrix that Hopper's TMA unit reads box by box; it has to lie on a 16-byte boundary.

    In shared memory a row lies in pieces of 128 bytes, or in one of 64 if it has no more; these are swizzled.
    """

    shape: tuple[int, int]
    strides: tuple[int, int]  # elements; the second is 1
    box: tuple[int, int]

    def of(self, values: Sequence[Any]) -> Any:
        from triton.experimental.gluon.language import NVMMASharedLayout
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        tensor = values[self.index]
        size = tensor.element_size()
        layout = NVMMASharedLayout(min(SWIZZLE, size * self.box[1]), 8 * size, rank=2)
        return TensorDescriptor(tensor, list(self.shape), list(self.strides), list(self.box), layout)


class Launch(NamedTuple):
    kernel: Any  # a triton.JITFunction
    grid: tuple[int, int, int]
    arguments: dict[str, Any]  # numbers, places, NamedTuples of both
    options: dict[str, Any]
