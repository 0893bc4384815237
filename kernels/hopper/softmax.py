"""Online softmax of a warpgroup's tile of logits, as `kernels/attend.py` has it."""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

LOG2_E = gl.constexpr(1.4426950408889634)
LN_2 = gl.constexpr(0.6931471805599453)


class Terms(NamedTuple):
    """Between a product of q and k and its weight: of the call, and of a warpgroup's rows."""

    scale_log2: Any
    softcap: Any
    slope_log2: Any  # [M]; ALIBI
    position: Any  # int32 [M]: key index of each row's own token
    first_key: Any  # int32 [M]: the keys that the row sees
    stop_key: Any


class Softmax(NamedTuple):
    """So far, of each row."""

    maximum_log2: Any  # fp32 [M]
    total: Any


@gluon.jit
def terms_of(rows, walk, row, kv_head, scale_log2, rule, spec: gl.constexpr):
    """row: int32 [M], packed."""
    token = row // spec.GROUP_SIZE
    head = kv_head * spec.GROUP_SIZE + row % spec.GROUP_SIZE
    slope_log2 = row.to(gl.float32)
    if spec.ALIBI:
        slopes = rule.alibi + rows.request.to(gl.int64) * rule.stride_alibi_request + head * rule.stride_alibi_head
        slope_log2 = gl.load(slopes, mask=token < rows.q_len, other=0.0) * LOG2_E
    position = rows.seq_len - rows.q_len + token
    first_key = walk.first_key + row * 0
    stop_key = walk.stop_key + row * 0
    if spec.LEFT:
        first_key = gl.maximum(first_key, position - rule.window_left)
    if spec.RIGHT:
        stop_key = gl.minimum(stop_key, position + rule.window_right + 1)
    return Terms(scale_log2, rule.softcap, slope_log2, position, first_key, stop_key)


@gluon.jit
def logits(qk, key, t, MASKED: gl.constexpr, spec: gl.constexpr):
    """In base 2, but for the scale where `weights` brings it; -inf where a row does not see a key."""
    if spec.SOFTCAP or spec.ALIBI:
        qk *= t.scale_log2
    if spec.SOFTCAP:
        qk = (t.softcap * LOG2_E) * tanh_of_log2(qk)
    if spec.ALIBI:
        qk -= t.slope_log2[:, None] * gl.abs(t.position[:, None] - key[None, :]).to(gl.float32)
    if MASKED:
        seen = key[None, :] < t.stop_key[:, None]
        if spec.LEFT:
            seen = seen & (key[None, :] >= t.first_key[:, None])
        qk = gl.where(seen, qk, float("-inf"))
    return qk


@gluon.jit
def weights(logit, softmax, t, FP16: gl.constexpr, spec: gl.constexpr):
    """(weights, Softmax with them, what sums so far are to be multiplied by)"""
    SCALE_LAST: gl.constexpr = not spec.SOFTCAP and not spec.ALIBI  # one multiply-add with the maximum, inside exp2
    largest = gl.max(logit, 1)
    if SCALE_LAST:
        largest *= t.scale_log2
    if FP16:
        largest = below_in_fp16(largest)
    maximum = gl.maximum(softmax.maximum_log2, largest)
    shift = gl.where(maximum == float("-inf"), 0.0, maximum)
    if SCALE_LAST:
        p = gl.exp2(logit * t.scale_log2 - shift[:, None])
    else:
        p = gl.exp2(logit - shift[:, None])
    rescale = gl.exp2(softmax.maximum_log2 - shift)
    return p, Softmax(maximum, softmax.total * rescale + gl.sum(p, 1)), rescale


@gluon.jit
def below_in_fp16(largest):
    """As attend._below_in_fp16."""
    return gl.where(gl.abs(largest) < 1048576.0, largest - 15.0, largest)


@gluon.jit
def tanh_of_log2(y):
    """As attend._tanh_of_log2."""
    x = y * (0.5 * LN_2)
    square = x * x
    series = x + x * square * (-1 / 3 + square * (2 / 15 - square * (17 / 315)))
    return gl.where(gl.abs(y) < 0.5, series, 1.0 - 2.0 / (gl.exp2(y) + 1.0))


@gluon.jit
def with_sinks(acc, softmax, sink_log2):
    """(acc, Softmax) as common.finish has it."""
    joint = gl.maximum(softmax.maximum_log2, sink_log2)
    joint = gl.where(joint == float("-inf"), 0.0, joint)
    rescale = gl.exp2(softmax.maximum_log2 - joint)
    weight = gl.where(sink_log2 == float("inf"), 1.0, gl.exp2(sink_log2 - joint))
    return acc * rescale[:, None], Softmax(joint, softmax.total * rescale + weight)
