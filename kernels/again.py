"""Compiled kernels started again without Triton: parameters laid out once, addresses filled in by C++ for each call.

A kernel's parameters are the leaves of its arguments that Triton did not compile in, in order, and two pointers to
scratch memory of Triton's own, null here; `src.signature` has their types (Triton 3.5 to 3.9). A matrix of the TMA unit
is one of 128 bytes, with its shape and strides behind it. What needs more than a grid and shared memory (clusters, a
dependent or cooperative launch, that scratch memory) is left to Triton.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from pagewire.kernels.place import SWIZZLE, Launch, MatrixPlace, Place

try:
    from pagewire import _host
except ImportError:  # not built: every call goes through Triton
    _host = None

if TYPE_CHECKING:
    from triton.compiler import CompiledKernel

ALIGN = 16  # bytes: what Triton compiles for
_BYTES_OF_FLOAT = 4
_SCRATCH = -1  # as Launches.start has it
_FORMATS = {"fp32": "<f", "fp64": "<d"}
_ELEMENTS = {"fp16": (6, 2), "bf16": (9, 2), "u8": (0, 1), "i8": (0, 1)}  # CUtensorMapDataType, bytes


class Parameters(NamedTuple):
    """Of a launch; places: (index of the parameter, tensor of the call or _SCRATCH, bytes behind it)."""

    values: list[int]  # bits
    places: list[tuple[int, int, int]]
    matrices: list[Any]  # _host.Matrix


def launches_again(
    launches: Sequence[Launch], kernels: Sequence[CompiledKernel], areas: Sequence[int]
) -> _host.Launches | None:
    """None: there is something to them that only Triton does.

    Args:
        areas: fp32 values of each area of the scratch memory.
    """
    if _host is None or not all(map(_is_plain, kernels)):
        return None
    made = [
        _host.Launch(
            name=kernel.metadata.name, function=kernel.function, grid=launch.grid,
            num_threads=32 * kernel.metadata.num_warps, shared_bytes=kernel.metadata.shared,
            **parameters(launch, kernel.src.signature, areas)._asdict(),
        )
        for launch, kernel in zip(launches, kernels, strict=True)
    ]  # fmt: skip
    return _host.Launches(made, specialised(launches))


def _is_plain(kernel: CompiledKernel) -> bool:
    of = kernel.metadata
    return not (
        of.num_ctas != 1 or of.launch_pdl or of.launch_cooperative_grid or of.global_scratch_size
        or of.profile_scratch_size or getattr(of, "gsan", False)
    )  # fmt: skip


def parameters(launch: Launch, signature: dict[str, Any], areas: Sequence[int]) -> Parameters:
    values: list[int] = []
    places, matrices = [], []
    for name, types in signature.items():
        for kind, value in _leaves(types, launch.arguments[name]):
            if isinstance(value, MatrixPlace):
                matrices.append(_matrix(len(values), value, kind))
                values += (0, *value.shape, *value.strides)
                continue
            if isinstance(value, Place):
                behind = 0 if value.index >= 0 else _BYTES_OF_FLOAT * sum(areas[: -1 - value.index])
                places.append((len(values), max(value.index, _SCRATCH), behind))
                value = 0
            values.append(_bits(kind, value))
    return Parameters([*values, 0, 0], places, matrices)


def _matrix(parameter: int, of: MatrixPlace, kind: str) -> Any:
    """kind: "tensordesc<bf16[...". In a box that is wider than its swizzle, Triton loads several."""
    element, size = next(of for name, of in _ELEMENTS.items() if kind.startswith(f"tensordesc<{name}["))
    swizzle = min(SWIZZLE, size * of.box[1])
    return _host.Matrix(
        parameter=parameter,
        place=of.index,
        type=element,
        shape=of.shape,
        row_bytes=size * of.strides[0],
        box=(of.box[0], swizzle // size),
        swizzle_bytes=swizzle,
    )


def _leaves(types: Any, value: Any) -> Iterator[tuple[str, Any]]:
    """(type, value) of what the kernel is given; types: as Triton nests them."""
    if isinstance(types, (tuple, list)):
        for of, x in zip(types, value, strict=True):
            yield from _leaves(of, x)
    elif types != "constexpr":
        yield types, value


def _bits(kind: str, value: Any) -> int:
    """As the lowest bytes of a parameter hold it."""
    if isinstance(value, Tensor):  # the same in every call: the plan's launches keep it
        return value.data_ptr()
    if kind in _FORMATS:
        return int.from_bytes(struct.pack(_FORMATS[kind], value), "little")
    assert not isinstance(value, float), kind
    return int(value) & (1 << 64) - 1


def specialised(launches: Sequence[Launch]) -> list[int]:
    """The tensors for whose alignment Triton compiles."""
    found = set()
    for launch in launches:
        for name, value in launch.arguments.items():
            if isinstance(value, Place) and name not in launch.kernel.do_not_specialize:
                found.add(value.index)
            elif isinstance(value, tuple):
                found |= {x.index for x in value if isinstance(x, Place)}
    return sorted(index for index in found if index >= 0)
