"""A launch before its call is known, and what stands there for the call's own tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Place:
    """Where a tensor of the call goes, counted from the first, or an area of its scratch memory: -1, -2, ..."""

    index: int


class Launch(NamedTuple):
    kernel: Any  # a triton.JITFunction
    grid: tuple[int, int, int]
    arguments: dict[str, Any]  # numbers, places, NamedTuples of both
    options: dict[str, Any]
