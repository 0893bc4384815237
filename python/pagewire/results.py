"""Results that the caller did not give: made for every call of a kind, out and lse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Result:
    """A result that the caller did not give, new for each call of a kind."""

    __slots__ = ("_blank", "_device", "_dtype", "_is_first", "_shape")

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self._shape, self._dtype, self._device = shape, dtype, device
        self._blank: Tensor | None = None
        self._is_first = True

    def new(self) -> Tensor:
        if self._is_first:
            self._is_first = False
            return torch.empty(self._shape, dtype=self._dtype, device=self._device)
        if self._blank is None:
            with torch.inference_mode(False):  # kept for calls in any mode; of one element, whatever the shape
                self._blank = torch.empty((), dtype=self._dtype, device=self._device).expand(self._shape)
        # half of the time of torch.empty
        return torch.empty_like(self._blank, memory_format=torch.contiguous_format)


class Results(NamedTuple):
    out: Result
    lse: Result

    @classmethod
    def of(cls, x: Tensor, rows: Sequence[int], width: int) -> Results:
        """Of x's dtype and device."""
        return cls(Result((*rows, width), x.dtype, x.device), Result(tuple(rows), torch.float32, x.device))

    def given(self, out: Tensor | None, lse: Tensor | None, return_lse: bool) -> tuple[Tensor, Tensor | None]:
        """Those of the caller, else new ones."""
        if lse is None and return_lse:
            lse = self.lse.new()
        return self.out.new() if out is None else out, lse
