"""Kernels for Hopper in Gluon: wgmma, the TMA unit and warps with roles of their own, said in Python.

Taken on sm_90 where they fit, unless PAGEWIRE_HOPPER is 0. Gluon is imported only then.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from pagewire.kernels.hopper.decode_launch import Decode
    from pagewire.kernels.hopper.prefill_launch import Prefill
    from pagewire.kernels.launch import Device, Tensors
    from pagewire.types import Modifiers

SWITCH = "PAGEWIRE_HOPPER"
BLOCK_M = 128  # packed rows of a prefill's program: two warpgroups'
MOST_PARTS = 8  # of a row tile's keys
FLAGS = 2  # of a tile and kv head: whether it is left over, each warpgroup's
_OFF = f"{SWITCH} is 0"


def _is_on() -> bool:
    return os.environ.get(SWITCH) != "0"


def is_ahead() -> bool:
    """Whether prefill is to take turns: on an H200 better for several prompts, worse for one."""
    return os.environ.get(SWITCH) == "2"


def why_no_prefill(t: Tensors, m: Modifiers, device: Device) -> str | None:
    """Why a prefill's long requests are not for the kernel here."""
    if not _is_on():
        return _OFF
    from pagewire.kernels.hopper import prefill_launch

    return prefill_launch.why_not(t, m, device)


def prefill_of(
    t: Tensors, m: Modifiers, arguments: dict[str, Any], scratch: tuple[int, ...], device: Device
) -> Prefill:
    """arguments: of `kernels/prefill.py`'s launch with BLOCK_M rows; scratch: what others have of it."""
    from pagewire.kernels.hopper import prefill_launch

    return prefill_launch.prefill_of(t, m, arguments, scratch, device)


def why_no_decode(t: Tensors, m: Modifiers, device: Device) -> str | None:
    if not _is_on():
        return _OFF
    from pagewire.kernels.hopper import decode_launch

    return decode_launch.why_not(t, m, device)


def decode_of(t: Tensors, m: Modifiers, error_word: Tensor, device: Device) -> Decode:
    from pagewire.kernels.hopper import decode_launch

    return decode_launch.decode_of(t, m, error_word, device)
