"""Powers of two that bring values into fp16's range, and back. As attend.py's."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

MOST_POWER = gl.constexpr(2.0**115)  # that fp16_power gives: its inverse is a normal number too


@gluon.jit
def fp16_power(x, AXIS: gl.constexpr):
    """2^n with the largest finite |x| along AXIS times it in [2^14, 2^15)."""
    size = gl.abs(x)
    largest = gl.max(gl.where(size < float("inf"), size, 0.0), AXIS)
    exponent = largest.to(gl.int32, bitcast=True) >> 23
    return (gl.minimum(268 - exponent, 242) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def inverse(power):
    """1 / power of a normal power of two."""
    return ((254 << 23) - power.to(gl.int32, bitcast=True)).to(gl.float32, bitcast=True)
