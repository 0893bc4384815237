"""Numbers of a call, as kernels are given them."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def number(x):
    """Of a Varying (arguments.py)."""
    return (x >> 32).to(gl.int32)
