"""The first wrong element, in a sentence: where, got, expected, allowed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fuzz.formats import bits, decode, same
from fuzz.oracle import Expected
from fuzz.tensors import beside, storage


def close(name: str, got: Tensor, expected: Expected) -> None:
    values = got.detach().cpu().double().numpy()
    wrong = expected.wrong(values)
    if wrong.any():
        at = _first(wrong)
        kind = " (or any non-finite)" if expected.either[at] else ""
        raise AssertionError(
            f"{name}{list(at)}: got {float(values[at])!r}, expected {float(expected.value[at])!r}{kind}, "
            f"allowed error {expected.allowed[at]:.3g}; {wrong.sum()} of {wrong.size} wrong"
        )


def same_elements(name: str, got: Tensor, expected: Tensor, dtype: str, *, exact: bool) -> None:
    """Bit for bit; without `exact` one NaN is as good as another. What lies beside the view is compared as bytes."""
    got = got.cpu() if got.device.type != "cpu" else got
    have, want = bits(got), bits(expected)
    wrong = have != want if exact else ~same(have, want, dtype)
    if wrong.any():
        at = _first(wrong)
        values = (float(decode(have[at].reshape(1), dtype)[0]), float(decode(want[at].reshape(1), dtype)[0]))
        raise AssertionError(
            f"{name}{list(at)}: got {have[at]:#x} = {values[0]}, expected {want[at]:#x} = {values[1]}, "
            f"allowed: none; {wrong.sum()} of {wrong.size} wrong"
        )


def unchanged(name: str, got: Tensor, given: Tensor, *, around: bool = False) -> None:
    """No byte of the storage differs; `around`: none beside the view."""
    have, want = (beside(t) if around else storage(t).cpu() for t in (got, given))
    if not torch.equal(have, want):
        at = int((have != want).nonzero()[0])
        where = "beside the view" if around else "of an input"
        raise AssertionError(
            f"{name}: byte {at} {where} was written: got {int(have[at]):#x}, expected {int(want[at]):#x}"
        )


def _first(wrong: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argwhere(wrong)[0])
