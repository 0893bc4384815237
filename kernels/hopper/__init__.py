"""Kernels for Hopper in Gluon: wgmma, the TMA unit and warps with roles of their own, said in Python.

Asked for by PAGEWIRE_HOPPER=1 until a GPU has measured them. Gluon is imported only then.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pagewire.kernels.launch import Device, Tensors
    from pagewire.kernels.place import Launch
    from pagewire.types import Modifiers

SWITCH = "PAGEWIRE_HOPPER"
BLOCK_M = 128  # packed rows of a program: two warpgroups'
FLAGS = 3  # of a tile and kv head, whether it is left over: each warpgroup's, and one for pages


def why_not(t: Tensors, m: Modifiers, device: Device) -> str | None:
    """Why a prefill's long requests are not for the kernel here."""
    if os.environ.get(SWITCH) != "1":
        return f"{SWITCH} is not 1: it has not been measured"
    from pagewire.kernels.hopper import planning

    return planning.why_not(t, m, device)


def launch_of(t: Tensors, m: Modifiers, arguments: dict[str, Any], grid: tuple[int, int, int]) -> Launch:
    """arguments, grid: of `kernels/prefill.py`'s launch with BLOCK_M rows."""
    from pagewire.kernels.hopper import planning

    return planning.launch_of(t, m, arguments, grid)
