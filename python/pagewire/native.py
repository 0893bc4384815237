"""torch's tensors looked at by C++ (pagewire._host); None or the same in Python where that is not to be had."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def _looker() -> Any:
    """None: the extension is not built, or this torch does not show its tensors this way (2.11 and 2.13 do)."""
    try:
        from pagewire._host import Looker

        return Looker(Tensor, Tensor.__dlpack_c_exchange_api__)
    except (ImportError, AttributeError, ValueError):
        return None


looker = _looker()


def _addresses(tensors: tuple[Tensor, ...]) -> tuple[int, ...]:
    """Where they lie, comparable."""
    return tuple(map(Tensor.data_ptr, tensors))


addresses: Callable[[tuple[Tensor, ...]], Any] = _addresses if looker is None else looker.addresses
