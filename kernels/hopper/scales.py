"""Scales of a cache: of all of it or of a head, and where these enter; of a token and head."""

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


@gluon.jit
def per_token(cache, keys, tile, kv_head, spec: gl.constexpr):
    """Of each key of a tile, fp32 [BLOCK_N]; 1 of those that do not take part or have no page."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    key = tile * spec.BLOCK_N + gl.arange(0, spec.BLOCK_N, layout)
    seen = (key >= keys.first) & (key < keys.stop)
    page = gl.load(keys.table + key // spec.PAGE_SIZE, mask=seen, other=0)
    exists = seen & (page >= 0) & (page < keys.num_pages)
    at = page.to(gl.int64) * cache.stride_scale_page
    at += (key % spec.PAGE_SIZE).to(gl.int64) * cache.stride_scale_token
    return gl.load(cache.scale + kv_head.to(gl.int64) * cache.stride_scale_head + at, mask=exists, other=1.0)
