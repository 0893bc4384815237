"""Stored values to fp32 and back, bit for bit as `pagewire/quant.py` has it, on every GPU and in the interpreter.

A FORMAT is "float" (the tile has its own float dtype), "e4m3", "e5m2" or "int8". fp8 tiles are uint8 here: Triton has
no e4m3 type below sm_89, and its casts to fp8 round through fp16 below sm_90 and are inexact in the interpreter.
NATIVE selects the hardware conversions (sm_90 and newer); without it the same bits come from integer arithmetic.
"""

import torch
import triton
import triton._C.libtriton as libtriton
import triton.language as tl

FORMATS = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2", torch.int8: "int8"}
ELEMENTS = {  # what a kernel loads and stores
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float8_e4m3fn: tl.uint8,
    torch.float8_e5m2: tl.uint8,
    torch.int8: tl.int8,
}

# The interpreter truncates fp32 -> bf16 and mistakes bf16 subnormals: there the casts are done on the bits.
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
# and before Triton 3.9 its fma rounds twice: there a division stays one
_FMA_ROUNDS_ONCE = tl.constexpr(not triton.knobs.runtime.interpret or hasattr(libtriton.interpreter, "fma_fp32"))
_INF_BITS = tl.constexpr(0x7F800000)
_SMALL, _LARGE = tl.constexpr(2.0**-60), tl.constexpr(2.0**60)
_TINY, _HUGE = tl.constexpr(2.0**-80), tl.constexpr(2.0**80)
_ROUND_TO_INT = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves no fraction bits


def format_of(dtype: torch.dtype) -> str:
    return FORMATS.get(dtype, "float")


def scale_kind(scale: torch.Tensor | float | None) -> str:
    """ "none"; "value", a number; "head", a tensor of one value, by head or by request and head; "token", by row."""
    if not isinstance(scale, torch.Tensor):
        return "none" if scale is None else "value"
    return "token" if scale.dim() == 3 else "head"


def as_stored(x: torch.Tensor) -> torch.Tensor:
    """fp8 as the bytes the kernels see."""
    return x.view(torch.uint8) if ELEMENTS.get(x.dtype) == tl.uint8 else x


def native_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def to_float32(stored, FORMAT: tl.constexpr, NATIVE: tl.constexpr):
    """Stored values as fp32, exactly; scales are not applied."""
    if FORMAT == "e4m3":
        return _e4m3_to_float32(stored, NATIVE)
    elif FORMAT == "e5m2":
        # e5m2 is the upper byte of fp16
        return (stored.to(tl.int16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    elif _INTERPRETED and stored.dtype == tl.bfloat16:
        bits = stored.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True)
    else:
        return stored.to(tl.float32)


@triton.jit
def _e4m3_to_float32(stored, NATIVE: tl.constexpr):
    if NATIVE:
        return stored.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        return _e4m3_bits_to_float32(stored)


@triton.jit
def _e4m3_bits_to_float32(stored):
    bits = stored.to(tl.int32)
    # the exponent lands 120 too low, subnormals included: one multiplication mends both
    magnitude = ((bits & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    magnitude = tl.where((bits & 0x7F) == 0x7F, float("nan"), magnitude)
    # the sign goes in as a bit: Triton 3.6 negates as 0 - x and would lose -0
    bits = magnitude.to(tl.int32, bitcast=True) | ((bits & 0x80) << 24)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def from_float32(x, DTYPE: tl.constexpr):
    """fp32 as a float dtype, rounded to nearest even."""
    if _INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where((bits & 0x7FFFFFFF) > _INF_BITS, (bits >> 16) | 0x40, rounded)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def token_head_scale(x, FORMAT: tl.constexpr):
    """x: fp32 [ROWS, WIDTH], 0 where masked -> fp32 [ROWS]: finite amax / largest stored value, 1 where that is 0."""
    magnitude = tl.abs(x)
    magnitude = tl.where(magnitude < float("inf"), magnitude, 0.0)  # NaN too
    amax = tl.max(magnitude, axis=1)
    scale = tl.div_rn(amax, _largest(FORMAT) + tl.zeros_like(amax))
    return tl.where(scale == 0.0, 1.0, scale)


@triton.jit
def quantise(x, scale, FORMAT: tl.constexpr, NATIVE: tl.constexpr):
    """fp32 `x / scale`, IEEE, to nearest even, saturated; NaN is 0x7F (int8: 0). scale: fp32, [ROWS, 1]."""
    if _FMA_ROUNDS_ONCE:
        y = _quotient(x, scale)
    else:
        y = tl.div_rn(x, scale)
    limit = _largest(FORMAT)
    clamped = tl.clamp(y, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    if FORMAT == "int8":
        clamped = tl.where(y == y, clamped, 0.0)
        return ((clamped + _ROUND_TO_INT) - _ROUND_TO_INT).to(tl.int8)
    else:
        code = _to_fp8(clamped, FORMAT, NATIVE)
        return code if NATIVE else tl.where(y == y, code, 0x7F).to(tl.uint8)


@triton.jit
def _quotient(x, divisor):
    """`x / divisor`, IEEE wherever it decides a code: with one division a row. divisor: fp32 [ROWS, 1].

    Markstein's correction: with r = 1 / d to nearest and q = x * r, the remainder x - q * d is exact in one fma, and
    q + remainder * r rounds to the quotient (P. Markstein, IBM J. Res. Dev. 34, 1990). Where q is too large for that
    it saturates, and where it is too small, or a zero with a sign, its code is zero. Divisors near the ends of the
    range are scaled into the middle, and x with them.
    """
    factor = tl.where(tl.abs(divisor) < _SMALL, _HUGE, tl.where(tl.abs(divisor) > _LARGE, _TINY, 1.0))
    divisor *= factor
    x *= factor
    reciprocal = tl.div_rn(1.0 + tl.zeros_like(divisor), divisor)
    q = x * reciprocal
    divisor, reciprocal = divisor + tl.zeros_like(q), reciprocal + tl.zeros_like(q)
    corrected = tl.fma(tl.fma(-q, divisor, x), reciprocal, q)
    return tl.where((tl.abs(q) > 2.0**-20) & (tl.abs(q) < 2.0**30), corrected, q)


@triton.jit
def _to_fp8(x, FORMAT: tl.constexpr, NATIVE: tl.constexpr):
    if FORMAT == "e4m3":
        if NATIVE:
            return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        else:
            return _round_to_fp8(x, 3, 7)
    elif NATIVE:
        return x.to(tl.float8e5).to(tl.uint8, bitcast=True)
    else:
        return _round_to_fp8(x, 2, 15)


@triton.jit
def _largest(FORMAT: tl.constexpr):
    if FORMAT == "e4m3":
        return 448.0
    elif FORMAT == "e5m2":
        return 57344.0
    else:
        return 127.0


@triton.jit
def _round_to_fp8(x, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """fp32 within the finite range -> uint8 code, to nearest even; NaN gives anything."""
    SHIFT: tl.constexpr = 23 - MANTISSA
    MAGIC: tl.constexpr = 1 << (24 - BIAS - MANTISSA)  # its last place is one subnormal step
    MAGIC_BITS: tl.constexpr = (127 + 24 - BIAS - MANTISSA) << 23
    SMALLEST_NORMAL_BITS: tl.constexpr = (128 - BIAS) << 23
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    half = ((magnitude >> SHIFT) & 1) + ((1 << (SHIFT - 1)) - 1)
    normal = ((magnitude + half) >> SHIFT) - ((127 - BIAS) << MANTISSA)
    subnormal = (tl.abs(x) + MAGIC).to(tl.int32, bitcast=True) - MAGIC_BITS
    code = tl.where(magnitude < SMALLEST_NORMAL_BITS, subnormal, normal)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)
