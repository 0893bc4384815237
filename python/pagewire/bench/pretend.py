"""A GPU that need not be there: the public ops walked with tensors that hold nothing, as Triton would launch them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget

from pagewire import memo, registry
from pagewire.bench.cases import Case
from pagewire.bench.cold_memory import ColdMemory
from pagewire.bench.machine import MIB
from pagewire.bench.movement import PackWork
from pagewire.bench.peers import vllm_triton
from pagewire.bench.suite import _work
from pagewire.bench.work import Contender, Work
from pagewire.kernels import append, launch, pack, tables

# an H100's: they decide how many copies of its buffers a case walks through, and with that which addresses it sees
_COLD = 256 * MIB
_LIMIT = 32 << 10  # MiB
# addresses of equal buffers side by side repeat modulo 16, all that a compilation knows of an address
_ADDRESSES = 16


class NoDevice:
    """As much of a Triton driver as compiling needs. utils: Triton's own, where a C launcher is wanted too."""

    def __init__(self, arch: int, utils: Any = None) -> None:
        self.arch, self.utils = arch, utils

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


class Blank(ColdMemory):
    """Tensors of the right shapes and alignments whose values nobody reads; on "meta" they take no memory."""

    def __init__(self, device: str, cold: int = _COLD) -> None:
        self.device, self.cold, self.limit = device, cold, _LIMIT * MIB
        self._flat: dict[torch.dtype, Tensor] = {}

    def random(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def permutation(self, n: int) -> Tensor:
        return torch.zeros(n, dtype=torch.int64, device=self.device)

    def _filled(self, dtype: torch.dtype, count: int) -> Tensor:
        return torch.empty(count, dtype=dtype, device=self.device)


@contextmanager
def gpu(arch: int, num_processors: int = 132) -> Iterator[None]:
    """Inside, the public ops hand tensors of whatever device to the Triton launchers as those of a GPU.

    What the launchers ask a device is answered here; which Triton driver takes their launches is the caller's choice.
    """
    device = launch.Device(arch, num_processors)
    (triton_backend,) = (b.load() for b in registry.BACKENDS if b.name == "triton")
    replaced: list[tuple[Any, str, Any]] = [
        (launch, "device_of", lambda of: device),
        (append, "native_fp8", lambda of: arch >= 90),
        (pack, "native_fp8", lambda of: arch >= 90),
        (pack, "device_table", functools.cache(tables._write)),
        (registry, "choose", lambda problem, backend: triton_backend),
        (PackWork, "_reference_pack", lambda work, packed, slots: None),  # it reads values
        (torch.cuda, "get_device_capability", lambda of=None: divmod(arch, 10)),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    memo.forget()  # plans for another device
    try:
        for owner, name, value in replaced:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
        memo.forget()


def prepared(case: Case, memory: ColdMemory) -> tuple[Work, Contender]:
    """A case as the suite prepares it, on the backend "triton"."""
    work = _work(case, memory)
    return work, work.ours("triton")


def triton_peers(work: Work) -> list[Contender]:
    """The peers of a case that are Triton kernels too, where they are there: they compile at the same expense."""
    wanted = (
        peer
        for peer in vllm_triton.PEERS
        if peer.missing("cuda") is None and work.case.op in peer.ops and peer.refuses(work.case) is None
    )
    return [peer.prepare(work) for peer in wanted]


def call_each(work: Work, contender: Contender) -> None:
    """The call on every copy of the buffers that can differ from the others to a compilation."""
    for copy in range(min(work.copies, _ADDRESSES)):
        contender.call(copy)
