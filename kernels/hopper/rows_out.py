"""What becomes of the sums of a block of rows: their softmax's end, out and lse."""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from pagewire.kernels.hopper.numbers import number
from pagewire.kernels.hopper.softmax import LN_2, LOG2_E, with_sinks


class Results(NamedTuple):
    out: Any  # [num_tokens, num_qo_heads, D]
    stride_token: Any
    stride_head: Any
    lse: Any  # fp32 [num_tokens, num_qo_heads]; LSE


@gluon.jit
def finish(acc, softmax):
    """(out, lse_log2) of rows; 0 and -inf of those that saw no key. As common.finish."""
    divisor = gl.where(softmax.total == 0.0, 1.0, softmax.total)
    lse_log2 = gl.where(softmax.total == 0.0, float("-inf"), softmax.maximum_log2 + gl.log2(divisor))
    return acc * (1.0 / divisor)[:, None], lse_log2  # at least about 1: so many divisions are another epilogue


@gluon.jit
def store_rows(acc, softmax, token, head, exists, call, rule, results, layout: gl.constexpr, spec: gl.constexpr):
    """acc: fp32 [M, D] of that layout, all that out is but for sinks and the division; token: int64 [M]."""
    dim = gl.arange(0, acc.shape[1], gl.SliceLayout(0, layout))
    if spec.SINKS:
        sink_log2 = gl.load(rule.sinks + head * rule.stride_sinks, mask=exists, other=float("-inf")) * LOG2_E
        acc, softmax = with_sinks(acc, softmax, sink_log2)
    values, lse_log2 = finish(acc, softmax)
    out = results.out + token * results.stride_token + head.to(gl.int64) * results.stride_head
    gl.store(out[:, None] + dim[None, :], values.to(out.dtype.element_ty), mask=exists[:, None])
    if spec.LSE:
        at = token * number(call.stride_lse_token) + head.to(gl.int64) * number(call.stride_lse_head)
        gl.store(results.lse + at, lse_log2 * LN_2, mask=exists)
