"""The tile loop: online softmax of a block of packed rows over a run of KV tiles, read through the page table."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from pagewire.kernels.arguments import number
from pagewire.kernels.common import LN_2, LOG2_E, dot, per_head, to_operand
from pagewire.kernels.quant import from_float32, to_float32


class Pages(NamedTuple):
    """Of a request."""

    ptr: Any  # at its row of the page table
    num_pages: Any


class State(NamedTuple):
    """Of the softmax of a block of packed rows, and what was wrong on the way."""

    acc: Any  # fp32 [BLOCK_M, BLOCK_DV], times lift
    maximum_log2: Any  # fp32 [BLOCK_M]
    total: Any  # fp32 [BLOCK_M]
    lift: Any  # fp32 []
    bad_entry: Any  # int32 [BLOCK_N]: the last table entry that each lane found out of range, -1 for none


class Rows(NamedTuple):
    """Of K or V, of one head."""

    ptr: Any
    stride_page: Any
    stride_token: Any
    scale: Any  # per token
    stride_scale_page: Any
    stride_scale_token: Any


@triton.jit
def rows_of(cache, kv_head, SCALE: tl.constexpr):
    ptr = cache.ptr + kv_head.to(tl.int64) * cache.stride_head
    scale = ptr  # None: Triton 3.6 returns none in a tuple
    if SCALE == "token":
        scale = cache.scale + kv_head.to(tl.int64) * cache.stride_scale_head
    return Rows(ptr, cache.stride_page, cache.stride_token, scale, cache.stride_scale_page, cache.stride_scale_token)


@triton.jit
def pages_of(page_table, call, request):
    return Pages(page_table + request.to(tl.int64) * number(call.stride_table), number(call.num_pages))


@triton.jit
def pages_in_range(pages, first_key, stop_key, spec: tl.constexpr):
    """Whether every page of these keys exists."""
    BLOCK: tl.constexpr = spec.BLOCK_B
    ptr, num_pages = pages
    stop_entry = (stop_key + spec.PAGE_SIZE - 1) // spec.PAGE_SIZE
    bad = tl.zeros([BLOCK], tl.int32)
    for start in range(first_key // spec.PAGE_SIZE, stop_entry, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        page = tl.load(ptr + entry, mask=entry < stop_entry, other=0)
        bad |= ((page < 0) | (page >= num_pages)) & (entry < stop_entry)
    return tl.max(bad) == 0


@triton.jit
def logit_terms(rule, k, request, kv_head, head, row_ok, spec: tl.constexpr):
    """What turns q k into a base-2 logit: (scale, ALiBi's slope [BLOCK_M])."""
    BLOCK_M: tl.constexpr = spec.BLOCK_M
    scale_log2 = rule.scale_log2
    if spec.K_SCALE == "head":
        scale_log2 *= per_head(k, request, kv_head)
    slope_log2 = tl.zeros([BLOCK_M], tl.float32)
    if spec.ALIBI:
        slopes = rule.alibi + request.to(tl.int64) * rule.stride_alibi_request + head * rule.stride_alibi_head
        slope_log2 = tl.load(slopes, mask=row_ok, other=0.0) * LOG2_E
    return scale_log2, slope_log2


@triton.jit
def value_factor(rule, v, lift, request, kv_head, spec: tl.constexpr):
    """What out is still to be multiplied by."""
    factor = rule.v_factor
    if spec.V_SCALE == "token":
        factor *= _inverse(lift)
    if spec.V_SCALE == "head":
        factor *= per_head(v, request, kv_head)
    return factor


@triton.jit
def empty_state(spec: tl.constexpr):
    """State before any key."""
    BLOCK_M: tl.constexpr = spec.BLOCK_M
    BLOCK_DV: tl.constexpr = spec.BLOCK_DV
    BLOCK_N: tl.constexpr = spec.BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    lift = tl.full([], _MOST_LIFT if spec.LIFTS else 1.0, tl.float32)
    return State(acc, maximum, tl.zeros([BLOCK_M], tl.float32), lift, tl.full([BLOCK_N], -1, tl.int32))


@triton.jit
def is_finite(acc, total, row_ok, spec: tl.constexpr):
    """Whether the sums are, of all rows that exist and whose weights are; True where all rows see the same keys."""
    if spec.LEFT or spec.RIGHT:
        bad = (tl.abs(acc) < float("inf")) == 0  # NaN too
        row_ok &= tl.abs(total) < float("inf")  # a row with a NaN logit is NaN, whatever it sees
        return tl.max(tl.max((bad & row_ok[:, None]).to(tl.int32), 1), 0) == 0
    else:
        return True


@triton.jit
def attend(
    state,  # State
    q,  # [BLOCK_M, BLOCK_D]
    kv,  # (Rows of K, Rows of V)
    pages,  # Pages
    keys,  # (first, stop): the keys that take part
    position,  # int32 [BLOCK_M]: key index of each row's own token
    rule,  # Rule
    terms,  # as logit_terms has them
    MASKED: tl.constexpr,  # False: every row sees every key of every tile
    CLAMPED: tl.constexpr,  # not MASKED: a page out of range is read as the nearest and noticed; False: none is
    spec: tl.constexpr,
    STAGES: tl.constexpr = None,  # of the loop's pipeline; None: the kernel's
):
    """Tiles of BLOCK_N keys at absolute multiples of BLOCK_N, from the first that touches `keys` to the last.

    A key that takes part counts in every row, whether it sees it or not, if its value is not finite: 0 * inf is NaN.
    `is_finite` tells; then `alone` makes tiles of rows that see the same keys.
    spec.EVICT reaches an asynchronous copy on sm_90 with Triton 3.9; 3.6 drops it there, and both on sm_80.
    """
    # The scale enters after the maximum and inside exp2, as one multiply-add, where nothing else comes between
    SCALE_LAST: tl.constexpr = not spec.SOFTCAP and not spec.ALIBI
    BLOCK_M: tl.constexpr = spec.BLOCK_M
    BLOCK_N: tl.constexpr = spec.BLOCK_N
    BLOCK_D: tl.constexpr = spec.BLOCK_D
    BLOCK_DV: tl.constexpr = spec.BLOCK_DV
    PAGE_SIZE: tl.constexpr = spec.PAGE_SIZE
    EVICT: tl.constexpr = spec.EVICT
    acc, maximum, total, lift, bad_entry = state
    k, v = kv
    table_ptr, num_pages = pages
    first_key, stop_key = keys
    scale_log2, slope_log2 = terms
    # 8-bit values are one conversion away from fp16, two from bf16: q goes there, each row times a power of two
    NARROW: tl.constexpr = spec.FORMAT != "float" and q.dtype == tl.bfloat16
    if SCALE_LAST:  # a positive scale keeps the order: its sign goes to q
        q = from_float32(to_float32(q, "float", True) * tl.where(scale_log2 < 0, -1.0, 1.0), q.dtype)
        scale_log2 = tl.abs(scale_log2)
    if NARROW:
        q = to_float32(q, "float", True)
        power = _fp16_power(q, 1)
        q = (q * power[:, None]).to(tl.float16)
        unscale = _inverse(power)
        if spec.K_SCALE != "token":
            scale_log2 *= unscale
    if SCALE_LAST:  # of a scale of 0, -inf would make NaN
        scale_log2 = tl.maximum(scale_log2, 1e-37)
    BY_ROW: tl.constexpr = NARROW and spec.K_SCALE != "token"
    scale_of_rows = scale_log2[:, None] if BY_ROW else scale_log2
    dim = tl.arange(0, BLOCK_D)
    dim_v = tl.arange(0, BLOCK_DV)
    k_ptrs = k.ptr + dim[None, :]
    v_ptrs = v.ptr + dim_v[None, :]
    first_tile = first_key // BLOCK_N
    stop_tile = tl.where(stop_key > first_key, (stop_key + BLOCK_N - 1) // BLOCK_N, first_tile)
    next_page = _load_pages(table_ptr, first_tile, stop_tile, keys, MASKED, spec)
    for tile in tl.range(first_tile, stop_tile, num_stages=STAGES):
        key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        taking_part = (key >= first_key) & (key < stop_key)
        # one tile ahead, so that no load of K or V waits for the page table
        page = next_page
        next_page = _load_pages(table_ptr, tile + 1, stop_tile, keys, MASKED, spec)
        if MASKED:
            out_of_range = (page < 0) | (page >= num_pages)
            bad_entry = tl.maximum(bad_entry, tl.where(taking_part & out_of_range, key // PAGE_SIZE, -1))
            # != 0: the interpreter broadcasts a scalar bool to integers
            taking_part = (tl.where(out_of_range, 0, taking_part.to(tl.int32))) != 0
        elif CLAMPED:
            inside = tl.minimum(tl.maximum(page, 0), num_pages - 1)
            bad_entry = tl.maximum(bad_entry, tl.where(inside != page, 0, -1))
            page = inside
        page = page.to(tl.int64)
        offset = _offsets(tile, key, spec).to(tl.int64)

        k_offset = page * k.stride_page + offset * k.stride_token
        k_tile = _load_rows(k_ptrs + k_offset[:, None], taking_part, dim, spec.HEAD_DIM, MASKED, EVICT)
        qk = dot(q, tl.trans(to_operand(k_tile, q.dtype, spec)), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))

        if spec.K_SCALE == "token":
            if NARROW:  # first: a scale of 2^90 times the power would be infinite
                qk *= unscale[:, None]
            qk *= _token_scale(k, page, offset, taking_part, MASKED)[None, :]
        if not SCALE_LAST:
            qk *= scale_of_rows
        if spec.SOFTCAP:
            # scale_log2 holds 2 log2(e) / softcap times the logit's scale
            qk = (rule.softcap * LOG2_E) * _tanh_of_log2(qk)
        if spec.ALIBI:
            qk -= slope_log2[:, None] * tl.abs(position[:, None] - key[None, :]).to(tl.float32)
        if MASKED:
            visible = taking_part[None, :]
            if spec.LEFT:
                visible &= position[:, None] - key[None, :] <= rule.window_left
            if spec.RIGHT:
                visible &= key[None, :] - position[:, None] <= rule.window_right
            qk = tl.where(visible, qk, float("-inf"))

        largest = tl.max(qk, 1)
        if SCALE_LAST:
            largest *= scale_log2
        if q.dtype == tl.float16:
            largest = _below_in_fp16(largest, spec)
        new_maximum = tl.maximum(maximum, largest)
        # a row whose logits were all -inf so far, or that has seen no key: exp2(-inf - 0), not exp2(-inf + inf)
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        if SCALE_LAST:
            p = tl.exp2(qk * scale_of_rows - shift[:, None])
        else:
            p = tl.exp2(qk - shift[:, None])
        rescale = tl.exp2(maximum - shift)
        total = total * rescale + tl.sum(p, 1)
        maximum = new_maximum
        v_offset = page * v.stride_page + offset * v.stride_token
        if spec.V_SCALE == "token":
            factor = _token_scale(v, page, offset, taking_part, MASKED)
            if spec.LIFTS:
                if tl.max((factor == 1.0).to(tl.int32), 0) > 0:
                    rows = v_ptrs + v_offset[:, None]
                    factor = _without_empty_rows(factor, rows, taking_part, dim_v, MASKED, spec)
                new_lift = tl.minimum(lift, _fp16_power(factor, 0))
                rescale *= new_lift * _inverse(lift)
                lift = new_lift
                factor *= lift
            p *= factor[None, :]

        v_tile = _load_rows(v_ptrs + v_offset[:, None], taking_part, dim_v, spec.HEAD_DIM_V, MASKED, EVICT)
        acc = dot(from_float32(p, q.dtype), to_operand(v_tile, q.dtype, spec), acc * rescale[:, None])
    return State(acc, maximum, total, lift, bad_entry)


@triton.jit
def _below_in_fp16(largest, spec: tl.constexpr):
    """What exponents are relative to, so that fp16 holds the weights: the heaviest is 2^15, one 2^39 times lighter is
    not lost yet. Any reference serves `finish`; near 2^24 its own rounding would carry a weight out of fp16.
    """
    if spec.LIFTS:  # the per-token scales bring a power of their own
        return largest
    else:
        return tl.where(tl.abs(largest) < 2.0**20, largest - 15.0, largest)


@triton.jit
def _tanh_of_log2(y):
    """tanh(x) of y = 2 log2(e) x. As 1 - 2 / (exp(2 x) + 1) it cancels near 0: there by its series."""
    x = y * (0.5 * LN_2)
    square = x * x
    series = x + x * square * (-1 / 3 + square * (2 / 15 - square * (17 / 315)))
    return tl.where(tl.abs(y) < 0.5, series, 1.0 - 2.0 / (tl.exp2(y) + 1.0))


# fp16 holds weights times per-token scales only if these are about 1: P is lifted by a power of two, chosen by the
# largest scale so far, and acc with it. A weight of 1 keeps its digits at scales down to 2^-28 of that.
_MOST_LIFT = tl.constexpr(2.0**115)


@triton.jit
def _fp16_power(x, AXIS: tl.constexpr):
    """2^n with the largest finite |x| along AXIS times it in [2^14, 2^15); 2^31 times less keeps its digits."""
    size = tl.abs(x)
    largest = tl.max(tl.where(size < float("inf"), size, 0.0), AXIS)
    exponent = largest.to(tl.int32, bitcast=True) >> 23
    # biased: 127 + 14 - (exponent - 127); at most 2^115, whose inverse is a normal number too
    return (tl.minimum(268 - exponent, 242) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _without_empty_rows(factor, ptrs, taking_part, dim, MASKED: tl.constexpr, spec: tl.constexpr):
    """factor with 0 for rows of zeros: these have scale 1, which need not be near the others'."""
    # named: Triton 3.6 passes no string on that is read from a tuple in the call
    EVICT: tl.constexpr = spec.EVICT
    FORMAT: tl.constexpr = spec.FORMAT
    rows = _load_rows(ptrs, taking_part, dim, spec.HEAD_DIM_V, MASKED, EVICT)
    some = tl.max((to_float32(rows, FORMAT, spec.NATIVE_E4M3) != 0).to(tl.int32), 1) > 0
    return tl.where((factor == 1.0) & (some == 0), 0.0, factor)


@triton.jit
def _inverse(power):
    """1 / power of a normal power of two."""
    return ((254 << 23) - power.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def _load_pages(table_ptr, tile, stop_tile, keys, MASKED: tl.constexpr, spec: tl.constexpr):
    """Page indices of a tile's keys, [BLOCK_N], or one scalar where a tile lies within a page; 0 past the last tile."""
    BLOCK_N: tl.constexpr = spec.BLOCK_N
    if spec.PAGE_SIZE % BLOCK_N == 0:
        return tl.load(table_ptr + tile * BLOCK_N // spec.PAGE_SIZE, mask=tile < stop_tile, other=0)
    else:
        first_key, stop_key = keys
        key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        needed = key < stop_key
        if MASKED:
            needed &= key >= first_key
        entry = key // spec.PAGE_SIZE
        if BLOCK_N % spec.PAGE_SIZE == 0:
            # no signed division; and: of an index that only counts, LLVM makes a pointer that counts, and ptxas then
            # runs wgmma one by one (C7515)
            PAGES: tl.constexpr = BLOCK_N // spec.PAGE_SIZE
            entry = (tile * PAGES + tl.arange(0, BLOCK_N) // spec.PAGE_SIZE) & 0x3FFFFFFF
        return tl.load(table_ptr + entry, mask=needed, other=0)


@triton.jit
def _offsets(tile, key, spec: tl.constexpr):
    """Of a tile's keys in their pages, [BLOCK_N]: from constants, where tiles and pages divide each other."""
    BLOCK_N: tl.constexpr = spec.BLOCK_N
    if BLOCK_N % spec.PAGE_SIZE == 0:
        return tl.arange(0, BLOCK_N) % spec.PAGE_SIZE
    elif spec.PAGE_SIZE % BLOCK_N == 0:
        TILES: tl.constexpr = spec.PAGE_SIZE // BLOCK_N
        return (tile % TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
    else:
        return key % spec.PAGE_SIZE


@triton.jit
def _load_rows(ptrs, taking_part, dim, WIDTH: tl.constexpr, MASKED: tl.constexpr, EVICT: tl.constexpr):
    """[BLOCK_N, BLOCK_D or BLOCK_DV]; 0 where masked: an unowned slot may hold NaN, and 0 * NaN is NaN."""
    PADDED: tl.constexpr = WIDTH != dim.shape[0]
    if MASKED and PADDED:
        mask = taking_part[:, None] & (dim < WIDTH)[None, :]
        return tl.load(ptrs, mask=mask, other=0.0, eviction_policy=EVICT)
    elif MASKED:
        return tl.load(ptrs, mask=taking_part[:, None], other=0.0, eviction_policy=EVICT)
    elif PADDED:
        return tl.load(ptrs, mask=(dim < WIDTH)[None, :], other=0.0, eviction_policy=EVICT)
    else:
        return tl.load(ptrs, eviction_policy=EVICT)


@triton.jit
def _token_scale(rows, page, offset, taking_part, MASKED: tl.constexpr):
    """[BLOCK_N] fp32."""
    ptrs = rows.scale + page * rows.stride_scale_page + offset * rows.stride_scale_token
    if MASKED:
        return tl.load(ptrs, mask=taking_part, other=0.0)
    else:
        return tl.load(ptrs)
