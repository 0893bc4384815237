"""Scales of an 8-bit cache as numbers and per head: where they enter."""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


class Scales(NamedTuple):
    """Of a request and kv head."""

    logit_log2: Any  # of q k, positive: see `scales_of`
    sign: Any  # of q
    value: Any  # of out


@gluon.jit
def scales_of(k, v, request, kv_head, rule, spec: gl.constexpr):
    """k, v: Cache or Boxes. Where nothing stands between product and maximum, a positive scale keeps the order, and the
    sign goes to q; of a scale of 0, -inf would make NaN.
    """
    logit_log2 = rule.scale_log2
    value = rule.v_factor
    if spec.K_SCALE == "head":
        logit_log2 *= _per_head(k, request, kv_head)
    if spec.V_SCALE == "head":
        value *= _per_head(v, request, kv_head)
    sign = 1.0
    if not spec.SOFTCAP and not spec.ALIBI:
        sign = gl.where(logit_log2 < 0, -1.0, 1.0)
        logit_log2 = gl.maximum(gl.abs(logit_log2), 1e-37)
    return Scales(logit_log2, sign, value)


@gluon.jit
def _per_head(cache, request, kv_head):
    row = request.to(gl.int64) * cache.stride_scale_page
    return gl.load(cache.scale + row + kv_head.to(gl.int64) * cache.stride_scale_head)
