"""Launches planned once for all calls of a kind (`memo.py`): a call seen before costs little more than its addresses.

A plan has a `Place` wherever a call's own tensor goes. The first call goes through Triton, which finds or compiles the
kernels; the next hand addresses to these themselves. Of all that Triton compiles for, a kind fixes everything but
whether an address is a multiple of 16: a call with one that is not goes through Triton again.

Many kinds are seen once, a prefill's above all: what only serves the next call is made by the second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

from pagewire.kernels.quant import as_stored

_ALIGN = 16  # bytes


@dataclass(frozen=True)
class Place:
    """Where a tensor of the call goes, counted from the first, or an area of its scratch memory: -1, -2, ..."""

    index: int


class Launch(NamedTuple):
    kernel: Any  # a triton.JITFunction
    grid: tuple[int, int, int]
    arguments: dict[str, Any]  # numbers, places, NamedTuples of both
    options: dict[str, Any]


class Plan:
    def __init__(self, launches: Sequence[Launch], device: torch.device, scratch: Sequence[int] = ()) -> None:
        """scratch: fp32 values of each area."""
        self.launches, self._device = tuple(launches), device
        self._cuda_index = device.index if device.type == "cuda" else None
        self._areas = [-(-n // _ALIGN) * _ALIGN for n in scratch]
        self._kernels: list[CompiledKernel] | None = None  # of the first call
        self._blank: Tensor | None = None  # like the scratch, of one element
        self._again: Again | None = None

    def run(self, *tensors: Any) -> None:
        """tensors: as the places count them; where there is no place, anything."""
        if not self.launches:
            return
        if self._cuda_index is not None and self._cuda_index != torch.cuda.current_device():
            with torch.cuda.device(self._device):
                return self.run(*tensors)
        scratch = self._scratch()
        if self._kernels is not None and not _is_watched():
            if self._again is None:
                self._again = _again(self.launches, self._kernels, self._areas)
                with torch.inference_mode(False):  # kept for calls in any mode
                    blank = torch.empty((), dtype=torch.float32, device=self._device)
                    self._blank = blank.expand(sum(self._areas))
            if self._again(tensors, scratch):
                return
        kernels = [kernel[grid](**given, **options) for kernel, grid, given, options in self._bound(tensors, scratch)]
        # none under the interpreter, nor where launches are only noted (bench/ahead.py)
        if self._kernels is None and all(isinstance(kernel, CompiledKernel) for kernel in kernels):
            if all(tensors[index].data_ptr() % _ALIGN == 0 for index in _specialised(self.launches)):
                self._kernels = kernels

    def bound(self, *tensors: Any) -> list[Launch]:
        """The launches with these tensors in their places."""
        return self._bound(tensors, self._scratch())

    def _bound(self, tensors: Sequence[Any], scratch: Tensor | None) -> list[Launch]:
        areas = () if scratch is None else reversed(scratch.split(self._areas))
        values = [as_stored(x) if isinstance(x, Tensor) else x for x in (*tensors, *areas)]
        return [
            launch._replace(arguments={name: _filled(value, values) for name, value in launch.arguments.items()})
            for launch in self.launches
        ]

    def _scratch(self) -> Tensor | None:
        if not self._areas:
            return None
        if self._blank is not None:  # half of the time
            return torch.empty_like(self._blank, memory_format=torch.contiguous_format)
        return torch.empty(sum(self._areas), dtype=torch.float32, device=self._device)


def _filled(value: Any, values: Sequence[Any]) -> Any:
    if isinstance(value, Place):
        return values[value.index]
    if _has_places(value):
        return tuple.__new__(type(value), [values[x.index] if type(x) is Place else x for x in value])
    return value


def _has_places(value: Any) -> bool:
    return isinstance(value, tuple) and Place in map(type, value)


def _is_watched() -> bool:
    """Somebody, a profiler, wants to be told of launches, as Triton does it."""
    enter, leave = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    # chains of hooks, unless somebody has put a function or None there
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


# ---------------------------------------------------------------------------------------------- without Triton's run


Again = Callable[[Sequence[Any], Any], bool]  # (tensors, scratch) -> whether it has launched


def _specialised(launches: Sequence[Launch]) -> list[int]:
    """The tensors for whose alignment Triton compiles."""
    found = set()
    for launch in launches:
        for name, value in launch.arguments.items():
            if isinstance(value, Place) and name not in launch.kernel.do_not_specialize:
                found.add(value.index)
            elif isinstance(value, tuple):
                found |= {x.index for x in value if isinstance(x, Place)}
    return sorted(index for index in found if index >= 0)


def _again(launches: Sequence[Launch], kernels: Sequence[CompiledKernel], areas: Sequence[int]) -> Again:
    """Launches compiled kernels, unless an address they are specialised for is no multiple of 16.

    A function made of source, as `namedtuple` makes its classes: what is the same for every call is a constant in it.
    """
    source = _Source()
    calls = []
    for launch, kernel in zip(launches, kernels, strict=True):
        given = [source.of(launch.arguments[name]) for name in launch.kernel.arg_names]
        run, function, packed = map(source.constant, (kernel.run, kernel.function, kernel.packed_metadata))
        # as JITFunction.run calls it (Triton 3.5 to 3.9), without metadata and hooks, for nobody watches
        calls.append(f"{run}({', '.join([*map(str, launch.grid), 'stream', function, packed, *['None'] * 3, *given])})")
    device, stream = map(source.constant, (driver.active.get_current_device, driver.active.get_current_stream))
    lines = [
        *(f"p{index} = tensors[{index}].data_ptr()" for index in sorted(source.used) if index >= 0),
        f"if ({' | '.join(f'p{index}' for index in _specialised(launches)) or 0}) % {_ALIGN}:",
        "    return False",
        *(["start = scratch.data_ptr()"] if areas else []),
        *(f"s{i} = start + {4 * sum(areas[:i])}" for i in range(len(areas))),
        *source.tuples.values(),
        f"stream = {stream}({device}())",
        *calls,
        "return True",
    ]
    space = dict(source.constants)
    exec("def again(tensors, scratch):\n" + "\n".join(f"    {line}" for line in lines), space)
    return cast(Again, space["again"])


class _Source:
    """Of values: places as p<tensor> or s<area>, constants and tuples with places by names of their own."""

    def __init__(self) -> None:
        self.used: set[int] = set()
        self.constants: dict[str, Any] = {}
        self.tuples: dict[Any, str] = {}  # value -> the line that makes it; what launches share is made once

    def of(self, value: Any) -> str:
        if isinstance(value, Place):
            self.used.add(value.index)
            return f"p{value.index}" if value.index >= 0 else f"s{-1 - value.index}"
        if not _has_places(value):
            return self.constant(value)
        if value not in self.tuples:
            self.tuples[value] = f"t{len(self.tuples)} = {', '.join(map(self.of, value))},"
        return self.tuples[value].partition(" ")[0]

    def constant(self, value: Any) -> str:
        if type(value) is int:
            return repr(value)
        name = f"c{len(self.constants)}"
        self.constants[name] = _addresses(value)
        return name


def _addresses(value: Any) -> Any:
    """For tensors, which are the same in every call: the plan's launches keep them."""
    if isinstance(value, tuple) and any(isinstance(x, Tensor) for x in value):
        return tuple(map(_addresses, value))
    return value.data_ptr() if isinstance(value, Tensor) else value
