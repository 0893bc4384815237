"""The queries of a request as columns of a product: in shared memory, and what turns the product into logits."""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from pagewire.kernels.hopper.from_bytes import reordered
from pagewire.kernels.hopper.layouts import in_eights, of_product
from pagewire.kernels.hopper.powers import fp16_power, inverse
from pagewire.kernels.hopper.softmax import LOG2_E
from pagewire.kernels.hopper.words import barrier


class Terms(NamedTuple):
    """Between a product of q and k and its weight: of the call, and of each row."""

    softcap: Any
    unscale: Any  # fp32 [ROWS]; K's scales are per token
    scale_log2: Any  # fp32 [ROWS]
    slope_log2: Any  # fp32 [ROWS]; ALIBI


@gluon.jit
def load_queries(tile, q, scales, request, kv_head, rule, spec: gl.constexpr):
    """A request's queries into shared memory, 0 beyond the group; their Terms."""
    R: gl.constexpr = spec.BLOCK_M
    D: gl.constexpr = spec.BLOCK_D
    layout: gl.constexpr = in_eights(D)
    by_column: gl.constexpr = gl.SliceLayout(0, of_product(R))
    row = gl.arange(0, R, gl.SliceLayout(1, layout))
    dim = gl.arange(0, D, gl.SliceLayout(0, layout))
    exists = row < spec.GROUP_SIZE
    head = kv_head * spec.GROUP_SIZE + row
    ptr = q.ptr + request.to(gl.int64) * q.stride_token
    at = head.to(gl.int64) * q.stride_head
    values = gl.load(ptr + at[:, None] + dim[None, :], mask=exists[:, None], other=0.0).to(gl.float32)
    values *= scales.sign
    scale_log2 = scales.logit_log2 + (row * 0).to(gl.float32)
    unscale = scale_log2
    if spec.FORMAT != "float":  # in fp16, each row times a power of two
        power = fp16_power(values, 1)
        values = reordered(values * power[:, None])
        unscale = inverse(power)
        if spec.K_SCALE != "token":  # else first: a scale of 2^90 times the power would be infinite
            scale_log2 *= unscale
    slope_log2 = scale_log2
    if spec.ALIBI:
        slopes = rule.alibi + request.to(gl.int64) * rule.stride_alibi_request + head * rule.stride_alibi_head
        slope_log2 = gl.load(slopes, mask=exists, other=0.0) * LOG2_E
    barrier()  # everybody is done with the queries before
    tile.store(values.to(tile.dtype))
    fence_async_shared()
    barrier()
    return Terms(
        rule.softcap, gl.convert_layout(unscale, by_column), gl.convert_layout(scale_log2, by_column),
        gl.convert_layout(slope_log2, by_column),
    )  # fmt: skip
