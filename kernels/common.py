"""Words and small steps that the attention kernels share: the compile-time spec, the dot, rows in and out.

Logits live in base 2 inside the kernels: log2(e) is folded into the scale, `exp2` is one
instruction. `*_log2` says so.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from pagewire.kernels.quant import from_float32, to_float32

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


class Spec(NamedTuple):
    """What a kernel is compiled for. No field depends on the batch, on a length or on the number of pages."""

    HEAD_DIM: int
    HEAD_DIM_V: int
    GROUP_SIZE: int
    PAGE_SIZE: int
    FORMAT: str  # what the cache stores: "float" (q's dtype), "e4m3", "e5m2", "int8"
    NATIVE_E4M3: bool  # the target has an e4m3 type (sm_89 and newer); without it the bits are decoded
    BLOCK_M: int  # packed rows, (token, head in group) with the head fastest
    BLOCK_N: int  # keys; tiles start at absolute multiples of it
    BLOCK_D: int  # head_dim, padded
    BLOCK_DV: int
    BLOCK_B: int  # requests looked at together when a program finds its work
    RAGGED: bool  # rows come from cu_seqlens_q; otherwise every request has one
    ROW_LIMIT: int  # requests with at most / more packed rows go to the decode / prefill kernel; 0: all to the one
    LEFT: bool  # a left window
    RIGHT: bool  # a right window; causal is the right window 0
    SOFTCAP: bool
    ALIBI: bool
    SINKS: bool
    LSE: bool
    K_SCALE: str  # quant.scale_kind; a "value" is folded into the softmax's scale, V's into out
    V_SCALE: str
    LIFTS: bool  # P times per-token V scales is multiplied in fp16, whose range it may leave
    EVICT: str  # of K and V in L2: "evict_first" where all rows of a request fit one tile, so that they are read once
    DEPENDENT: bool  # the merge is launched while the split attention runs, and waits for it (sm_90 and newer)
    REDO: bool  # prefill: only what another kernel has left over is computed
    SPLIT: bool  # split at multiples of split_size, so that no request's result depends on the rest of the batch
    STAGES: int = 0  # kernels/hopper/ only: tiles of K, and of V, in shared memory
    PARTS: bool = False  # of it: programs may share the keys of a row tile
    BOXES: bool = False  # of it: pages are boxes of the TMA unit
    KV_HEADS: int = 0  # of it
    TURNS: bool = False  # of it: prefill's consumers take turns, its programs take what comes next
    ALONE: Any = None  # the same in the smallest tiles, for rows of one token by themselves (`alone.py`)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in fp32; fp32 operands are multiplied exactly."""
    if INTERPRETED:  # it multiplies bf16 as the integers that hold the bits
        a = to_float32(a, "float", True)
        b = to_float32(b, "float", True)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def to_operand(stored, DTYPE: tl.constexpr, spec: tl.constexpr):
    """Stored K or V as the dot's operand, exactly; scales are applied elsewhere."""
    if spec.FORMAT == "float":
        return stored
    elif INTERPRETED:
        FORMAT: tl.constexpr = spec.FORMAT
        return from_float32(to_float32(stored, FORMAT, False), DTYPE)
    elif spec.FORMAT == "int8":
        return stored.to(DTYPE)
    elif spec.FORMAT == "e5m2":
        return stored.to(tl.float8e5, bitcast=True).to(DTYPE)
    elif spec.NATIVE_E4M3:
        return stored.to(tl.float8e4nv, bitcast=True).to(DTYPE)
    else:
        return to_float32(stored, "e4m3", False).to(DTYPE)


@triton.jit
def finish(acc, maximum_log2, total, sink_log2, SINKS: tl.constexpr):
    """acc: fp32 [BLOCK_M, BLOCK_DV], sum of P V; maximum_log2, total, sink_log2: fp32 [BLOCK_M] -> (out, lse_log2).

    A row that saw no key has total 0 and maximum -inf: out = 0, lse_log2 = the sink or -inf.
    """
    if SINKS:
        joint = tl.maximum(maximum_log2, sink_log2)
        joint = tl.where(joint == float("-inf"), 0.0, joint)
        rescale = tl.exp2(maximum_log2 - joint)
        acc = acc * rescale[:, None]
        # a sink of +inf takes all of the weight
        sink_weight = tl.where(sink_log2 == float("inf"), 1.0, tl.exp2(sink_log2 - joint))
        total = total * rescale + sink_weight
        maximum_log2 = joint
    divisor = tl.where(total == 0.0, 1.0, total)
    return acc / divisor[:, None], tl.where(total == 0.0, float("-inf"), maximum_log2 + tl.log2(divisor))


@triton.jit
def tile_rows(tile_m, q_len, kv_head, spec: tl.constexpr):
    """The packed rows of a tile: (token in request, query head, whether the row exists), each [BLOCK_M]."""
    BLOCK_M: tl.constexpr = spec.BLOCK_M
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    token = row // spec.GROUP_SIZE
    return token, kv_head * spec.GROUP_SIZE + row % spec.GROUP_SIZE, token < q_len


@triton.jit
def load_q(q, token, head, row_ok, spec: tl.constexpr):
    """[BLOCK_M, BLOCK_D], 0 where there is no row or no dim; q: Heads."""
    BLOCK_D: tl.constexpr = spec.BLOCK_D
    dim = tl.arange(0, BLOCK_D)
    offset = token.to(tl.int64) * q.stride_token + head.to(tl.int64) * q.stride_head
    mask = row_ok[:, None] & (dim < spec.HEAD_DIM)[None, :]
    return tl.load(q.ptr + offset[:, None] + dim[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(out, lse, values, lse_log2, token, head, row_ok, spec: tl.constexpr):
    """values: fp32 [n, BLOCK_DV], lse_log2: [n] to the n rows (token, head) of out and lse (Heads)."""
    BLOCK_DV: tl.constexpr = spec.BLOCK_DV
    dim = tl.arange(0, BLOCK_DV)
    offset = token.to(tl.int64) * out.stride_token + head.to(tl.int64) * out.stride_head
    mask = row_ok[:, None] & (dim < spec.HEAD_DIM_V)[None, :]
    rounded = from_float32(values, out.ptr.dtype.element_ty)
    tl.store(out.ptr + offset[:, None] + dim[None, :], rounded, mask=mask)
    if spec.LSE:
        offset = token.to(tl.int64) * lse.stride_token + head.to(tl.int64) * lse.stride_head
        tl.store(lse.ptr + offset, lse_log2 * LN_2, mask=row_ok)


@triton.jit
def per_head(cache, request, head):
    """The cache's scale."""
    row = request.to(tl.int64) * cache.stride_scale_page
    return tl.load(cache.scale + row + head.to(tl.int64) * cache.stride_scale_head)


@triton.jit
def load_sinks(rule, head, row_ok, spec: tl.constexpr):
    """Base-2 logits of the rows' sinks, fp32 of head's shape; -inf without sinks."""
    if spec.SINKS:
        sinks = rule.sinks + head * rule.stride_sinks
        return tl.load(sinks, mask=row_ok, other=float("-inf")) * LOG2_E
    else:
        return tl.full(head.shape, float("-inf"), tl.float32)


@triton.jit
def store_whole(state, rows, out, lse, rule, spec: tl.constexpr):
    """state: (acc, maximum_log2, total) over all keys of rows: (place in the tile, token, head, whether it exists)."""
    acc, maximum, total = state
    _, token, head, row_ok = rows
    sink_log2 = load_sinks(rule, head, row_ok, spec)
    values, lse_log2 = finish(acc, maximum, total, sink_log2, spec.SINKS)
    store_rows(out, lse, values, lse_log2, token, head, row_ok, spec)
