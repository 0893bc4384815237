"""Random memory that every case takes its caches from: filled once per dtype, large enough to be cold."""

from __future__ import annotations

import torch
from torch import Tensor

from pagewire.bench.work import DoesNotFit
from pagewire.quant import quantise
from pagewire.types import QUANT_MAX

# odd, so that no two pages hold the same values: a kernel that reads the wrong page must not find the right numbers
_PERIOD = (1 << 20) + 7
_COPIES = 1024


class ColdMemory:
    """Flat random values per dtype on one device, at most `limit` bytes in all.

    Args:
        device: "cpu" or "cuda".
        cold: bytes a call must not see again until that many others went by.
        limit: bytes this run may hold.
    """

    def __init__(self, device: str, cold: int, limit: int, seed: int = 0) -> None:
        self.device, self.cold, self.limit = device, cold, limit
        self._flat: dict[torch.dtype, Tensor] = {}
        self.generator = torch.Generator(device=device).manual_seed(seed)

    def copies(self, case_bytes: int, memory_bytes: int | None = None) -> int:
        """How many sets of buffers make a case cold.

        Args:
            case_bytes: what one call touches. memory_bytes: what one set occupies, if that is more.
        Raises:
            DoesNotFit: one set is more than `limit`.
        """
        memory_bytes = memory_bytes or case_bytes
        if memory_bytes > self.limit:
            raise DoesNotFit(f"needs {memory_bytes / 2**30:.1f} GiB, {self.limit / 2**30:.1f} GiB are free")
        wanted = -(-self.cold // max(case_bytes, 1)) + 1
        return max(1, min(wanted, _COPIES, self.limit // max(memory_bytes, 1)))

    def take(self, dtype: torch.dtype, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Contiguous tensors side by side, not initialised anew: what an earlier case wrote is still random values."""
        sizes = [torch.Size(shape).numel() for shape in shapes]
        flat = self._grown(dtype, sum(sizes))
        parts, at = [], 0
        for size, shape in zip(sizes, shapes, strict=True):
            parts.append(flat[at : at + size].view(shape))
            at += size
        return tuple(parts)

    def random(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).to(dtype)

    def permutation(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self.generator, device=self.device)

    def release(self) -> None:
        self._flat.clear()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def _grown(self, dtype: torch.dtype, count: int) -> Tensor:
        found = self._flat.get(dtype)
        if found is not None and found.numel() >= count:
            return found
        del found
        self._flat.pop(dtype, None)
        held = sum(t.numel() * t.element_size() for t in self._flat.values())
        if held + count * dtype.itemsize > self.limit:
            self.release()
        if count * dtype.itemsize > self.limit:
            raise DoesNotFit(f"needs {count * dtype.itemsize / 2**30:.1f} GiB, {self.limit / 2**30:.1f} GiB are free")
        self._flat[dtype] = self._filled(dtype, count)
        return self._flat[dtype]

    def _filled(self, dtype: torch.dtype, count: int) -> Tensor:
        values = self.random(min(_PERIOD, max(count, 1)))
        period = quantise(values, None, dtype) if dtype in QUANT_MAX else values.to(dtype)
        # not every torch copies fp8 slices: bytes
        raw = torch.uint8 if dtype.itemsize == 1 else dtype
        flat = torch.empty(count, dtype=raw, device=self.device)
        for at in range(0, count, _PERIOD):
            part = flat[at : at + _PERIOD]
            part.copy_(period.view(raw)[: part.numel()])
        return flat.view(dtype)
