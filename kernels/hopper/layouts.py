"""How a warpgroup's threads hold what these kernels load, multiply and store."""

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def of_product(columns: int) -> Any:
    """Of wgmma's result, [64 or more rows, columns]."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.constexpr_function
def in_eights(width: int) -> Any:
    """[rows, width] in memory's order, 8 columns a thread: 16 bytes of 16 bits."""
    return gl.BlockedLayout([1, 8], [max(1, 256 // width), min(32, width // 8)], [4, 1], [1, 0])


@gluon.constexpr_function
def in_fours(width: int) -> Any:
    """[rows, width] in memory's order, 4 columns a thread: 16 bytes of fp32."""
    return gl.BlockedLayout([1, 4], [max(1, 128 // width), min(32, width // 4)], [4, 1], [1, 0])
