"""A launch before its call is known, and what stands there for the call's own tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Place:
    """Where a tensor of the call goes, counted from the first, or an area of its scratch memory: -1, -2, ..."""

    index: int

    def of(self, values: Sequence[Any]) -> Any:
        return values[self.index]


@dataclass(frozen=True)
class MatrixPlace(Place):
    """The tensor as rows of a matrix that Hopper's TMA unit reads box by box; it has to lie on a 16-byte boundary."""

    shape: tuple[int, int]
    strides: tuple[int, int]  # elements; the second is 1
    box: tuple[int, int]

    def of(self, values: Sequence[Any]) -> Any:
        from triton.experimental.gluon.language import NVMMASharedLayout
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
        return TensorDescriptor(values[self.index], list(self.shape), list(self.strides), list(self.box), layout)


class Launch(NamedTuple):
    kernel: Any  # a triton.JITFunction
    grid: tuple[int, int, int]
    arguments: dict[str, Any]  # numbers, places, NamedTuples of both
    options: dict[str, Any]
