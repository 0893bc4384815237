"""Launches planned once for all calls of a kind (`memo.py`): a call seen before costs little more than its addresses.

A plan has a `Place` wherever a call's own tensor goes. The first call goes through Triton, which finds or compiles the
kernels; the next start these without it (`again.py`). Of all that Triton compiles for, a kind fixes everything but
whether an address is a multiple of 16: a call with one that is not goes through Triton again.

Many kinds are seen once, a prefill's above all: what only serves the next call is made by the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

from pagewire.kernels.again import ALIGN, launches_again, specialised
from pagewire.kernels.counters import counters
from pagewire.kernels.place import Launch, Place
from pagewire.kernels.quant import as_stored


class Plan:
    def __init__(
        self,
        launches: Sequence[Launch],
        device: torch.device,
        scratch: Sequence[int] = (),
        aligned: Sequence[int] = (),
        unaligned: Plan | None = None,
        num_counters: int = 0,
    ) -> None:
        """scratch: fp32 values of each area. aligned: tensors that the kernels read only on 16-byte boundaries;
        unaligned: the plan where one lies elsewhere. num_counters: > 0: behind the call's tensors stand counters, its
        own and the next call's.
        """
        self.launches, self._device = tuple(launches), device
        self._aligned, self._unaligned = tuple(aligned), unaligned
        self._num_counters = num_counters
        self._cuda_index = device.index if device.type == "cuda" else None
        self._areas = [-(-n // ALIGN) * ALIGN for n in scratch]
        self._kernels: list[CompiledKernel] | None = None  # of the first call
        self._blank: Tensor | None = None  # like the scratch, of one element
        self._again: Any = None  # _host.Launches; False: only Triton starts these

    def run(self, *tensors: Any) -> None:
        """tensors: as the places count them; where there is no place, anything."""
        if not self.launches:
            return
        if self._aligned and any(tensors[index].data_ptr() % ALIGN for index in self._aligned):
            assert self._unaligned is not None
            self._unaligned.run(*tensors)
            return
        if self._cuda_index is not None and self._cuda_index != torch.cuda.current_device():
            with torch.cuda.device(self._device):
                return self.run(*tensors)
        scratch = self._scratch()
        if self._num_counters:
            tensors = (*tensors, *self._counters())
        if self._kernels is not None and not _is_watched():
            if self._again is None:
                self._again = launches_again(self.launches, self._kernels, self._areas) or False
                with torch.inference_mode(False):  # kept for calls in any mode
                    blank = torch.empty((), dtype=torch.float32, device=self._device)
                    self._blank = blank.expand(sum(self._areas))
            if self._again and self._again.start(tensors, scratch, _stream()):
                return
        kernels = [kernel[grid](**given, **options) for kernel, grid, given, options in self._bound(tensors, scratch)]
        # none under the interpreter, nor where launches are only noted (bench/ahead.py)
        if self._kernels is None and all(isinstance(kernel, CompiledKernel) for kernel in kernels):
            if all(tensors[index].data_ptr() % ALIGN == 0 for index in specialised(self.launches)):
                self._kernels = kernels

    def bound(self, *tensors: Any) -> list[Launch]:
        """The launches with these tensors in their places."""
        return self._bound((*tensors, *self._counters()), self._scratch())

    def _bound(self, tensors: Sequence[Any], scratch: Tensor | None) -> list[Launch]:
        areas = () if scratch is None else reversed(scratch.split(self._areas))
        values = [as_stored(x) if isinstance(x, Tensor) else x for x in (*tensors, *areas)]
        return [
            launch._replace(arguments={name: _filled(value, values) for name, value in launch.arguments.items()})
            for launch in self.launches
        ]

    def _counters(self) -> tuple[Tensor, ...]:
        if not self._num_counters:
            return ()
        return counters(self._device, 0 if self._cuda_index is None else _stream(), self._num_counters)

    def _scratch(self) -> Tensor | None:
        if not self._areas:
            return None
        if self._blank is not None:  # half of the time
            return torch.empty_like(self._blank, memory_format=torch.contiguous_format)
        return torch.empty(sum(self._areas), dtype=torch.float32, device=self._device)


def _filled(value: Any, values: Sequence[Any]) -> Any:
    if isinstance(value, Place):
        return value.of(values)
    if isinstance(value, tuple) and any(isinstance(x, Place) for x in value):
        return tuple.__new__(type(value), [x.of(values) if isinstance(x, Place) else x for x in value])
    return value


def _stream() -> int:
    active = driver.active
    return active.get_current_stream(active.get_current_device())  # type: ignore[no-any-return]


def _is_watched() -> bool:
    """Somebody, a profiler, wants to be told of launches, as Triton does it."""
    enter, leave = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    # chains of hooks, unless somebody has put a function or None there
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
