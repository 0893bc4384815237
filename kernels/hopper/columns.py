"""A partition of one warpgroup: a request's queries, as columns, times the keys of its piece.

        K Q'   [BLOCK_N keys, ROWS]   K as it lies, queries as columns: 8 of them instead of the 64 rows of wgmma
        P'     [BLOCK_N keys, ROWS]   through shared memory: the right operand of the next product
        V' P'  [D, ROWS]              V as it lies, transposed by the tensor core

One after the other: a tile takes a fifth of the time that its bytes take, and the second program of a processor fills
the gaps. (Operands from registers may not be made while a product is under way: ptxas then waits after each
instruction.) The maximum of a row is one over all four warps; its total stays apart, key by key, to the end.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma

from pagewire.kernels import error_codes as codes
from pagewire.kernels.hopper.errors import record_error
from pagewire.kernels.hopper.from_bytes import in_order, keys_operand, values_operand
from pagewire.kernels.hopper.layouts import in_eights, in_fours, of_product
from pagewire.kernels.hopper.merging import merge_in
from pagewire.kernels.hopper.pages import last_bad_entry
from pagewire.kernels.hopper.pieces import beginning, behind, keys_of, parts_of, piece_of
from pagewire.kernels.hopper.powers import MOST_POWER, fp16_power, inverse
from pagewire.kernels.hopper.queries import load_queries
from pagewire.kernels.hopper.ring import release, stage_of, tile_of, wait_full
from pagewire.kernels.hopper.rows_out import store_rows
from pagewire.kernels.hopper.scales import scales_of
from pagewire.kernels.hopper.softmax import LOG2_E, Softmax, below_in_fp16, tanh_of_log2
from pagewire.kernels.hopper.words import barrier

_PAGE = gl.constexpr(codes.DECODE_PAGE)


class Tiles(NamedTuple):
    """In shared memory."""

    q: Any  # [ROWS, D]
    p: Any  # [ROWS, BLOCK_N]
    k: Any  # Ring
    v: Any
    k_scales: Any  # fp32 [STAGES, BLOCK_N], in K's stages, where scales are per token
    v_scales: Any


class Sums(NamedTuple):
    acc: Any  # fp32 [D, ROWS], times lift
    lift: Any  # a power of two, so that fp16 holds weights times V's scales per token, as in attend.py
    maximum_log2: Any  # fp32 [ROWS]
    total: Any  # fp32 [BLOCK_N, ROWS], by place in the tile


@gluon.jit
def consume(tiles, q, k, v, share, line, call, rule, results, partials, spec: gl.constexpr):
    """Every piece of the program's share."""
    R: gl.constexpr = spec.BLOCK_M
    D: gl.constexpr = spec.BLOCK_D
    N: gl.constexpr = spec.BLOCK_N
    layout: gl.constexpr = of_product(R)
    by_rows: gl.constexpr = in_fours(D)
    kv_head = line.kv_head
    at = beginning(share)
    done = 0
    while at.unit < share.stop:
        piece = piece_of(at, share, line, call, rule, spec)
        scales = scales_of(k, v, piece.request, kv_head, rule, spec)
        terms = load_queries(tiles.q, q, scales, piece.request, kv_head, rule, spec)
        keys = keys_of(piece, line, call)
        bad_entry = last_bad_entry(keys, spec)
        record_error(call.error_word, _PAGE, piece.request, bad_entry, bad_entry >= 0)
        sums = Sums(
            gl.zeros([D, R], gl.float32, layout),
            gl.full([], MOST_POWER, gl.float32),
            gl.full([R], float("-inf"), gl.float32, gl.SliceLayout(0, layout)),
            gl.zeros([N, R], gl.float32, layout),
        )
        for j in range(piece.num_tiles):
            first = (piece.first_tile + j) * N
            sums = _add_tile(done + j, first, sums, tiles, keys, piece.seq_len - 1, terms, bad_entry >= 0, spec)
        done += piece.num_tiles
        value = scales.value
        if spec.V_SCALE == "token":
            value *= inverse(sums.lift)
        acc, softmax = _rows(sums.acc * value, sums, by_rows, spec)
        row = gl.arange(0, R, gl.SliceLayout(1, by_rows))
        parts = parts_of(piece, at, share, line, spec)
        whole, acc, softmax = merge_in(acc, softmax, parts, row < spec.GROUP_SIZE, partials, by_rows)
        if whole:
            token = piece.request.to(gl.int64) + row * 0
            head = kv_head * spec.GROUP_SIZE + row
            store_rows(acc, softmax, token, head, row < spec.GROUP_SIZE, call, rule, results, by_rows, spec)
        at = behind(at, piece)


@gluon.jit
def _add_tile(i, first, sums, tiles, keys, position, terms, some_are_bad, spec: gl.constexpr):
    """The share's i-th tile, of keys from `first` on."""
    N: gl.constexpr = spec.BLOCK_N
    R: gl.constexpr = spec.BLOCK_M
    OPERAND: gl.constexpr = tiles.q.dtype
    layout: gl.constexpr = of_product(R)
    masked = some_are_bad | (first < keys.first) | (first + N > keys.stop)

    wait_full(tiles.k, i, True)
    k = _keys_operand(tile_of(tiles.k, i), layout, spec)
    if spec.K_SCALE == "token":
        k_scale = tiles.k_scales.index(stage_of(tiles.k, i)).load(gl.SliceLayout(1, layout))
    if spec.V_SCALE == "token":
        v_scale = tiles.v_scales.index(stage_of(tiles.k, i)).load(gl.SliceLayout(1, layout))
    zeros = gl.zeros([N, R], gl.float32, layout)
    qk = warpgroup_mma(k, tiles.q.permute([1, 0]), zeros, use_acc=False)
    release(tiles.k, i)
    key = first + gl.arange(0, N, gl.SliceLayout(1, layout))
    if spec.K_SCALE == "token":
        qk = qk * terms.unscale[None, :] * k_scale[:, None]
    logit = _logits(qk, key, position, terms, spec)
    if masked:
        logit = gl.where(_seen(key, keys, spec)[:, None], logit, float("-inf"))
    FP16: gl.constexpr = OPERAND == gl.float16 and spec.V_SCALE != "token"  # else lift brings a power of its own
    p, maximum_log2, rescale = _weights(logit, sums.maximum_log2, terms, FP16, spec)
    total = sums.total * rescale[None, :] + p

    wait_full(tiles.v, i, True)
    if masked:
        _clear_unseen(tile_of(tiles.v, i), first, keys, spec)
    lift = sums.lift
    if spec.V_SCALE == "token":
        v_scale = _without_empty_rows(v_scale, tile_of(tiles.v, i), layout, spec)
        lift = gl.minimum(lift, fp16_power(v_scale, 0))
        rescale *= lift * inverse(sums.lift)
        p *= (v_scale * lift)[:, None]
    tiles.p.store(gl.permute(p, [1, 0]).to(OPERAND))  # the maximum's barrier lies behind the product that read it
    fence_async_shared()
    barrier()
    v = _values_operand(tile_of(tiles.v, i), layout, spec)
    acc = warpgroup_mma(v, tiles.p.permute([1, 0]), sums.acc * rescale[None, :])
    release(tiles.v, i)
    return Sums(acc, lift, maximum_log2, total)


@gluon.jit
def _keys_operand(tile, layout: gl.constexpr, spec: gl.constexpr):
    if spec.FORMAT == "float":
        return tile
    else:
        return keys_operand(tile, layout, spec)


@gluon.jit
def _values_operand(tile, layout: gl.constexpr, spec: gl.constexpr):
    if spec.FORMAT == "float":
        return tile.permute([1, 0])
    else:
        return values_operand(tile, layout, spec)


@gluon.jit
def _logits(qk, key, position, terms, spec: gl.constexpr):
    """In base 2, but for the scale where `_weights` brings it."""
    if spec.SOFTCAP or spec.ALIBI:
        qk *= terms.scale_log2[None, :]
    if spec.SOFTCAP:
        qk = (terms.softcap * LOG2_E) * tanh_of_log2(qk)
    if spec.ALIBI:
        qk -= terms.slope_log2[None, :] * gl.abs(position - key).to(gl.float32)[:, None]
    return qk


@gluon.jit
def _seen(key, keys, spec: gl.constexpr):
    """Keys that take part, and whose page exists."""
    seen = (key >= keys.first) & (key < keys.stop)
    page = gl.load(keys.table + key // spec.PAGE_SIZE, mask=seen, other=0)
    return seen & (page >= 0) & (page < keys.num_pages)


@gluon.jit
def _clear_unseen(tile, first, keys, spec: gl.constexpr):
    """0 instead of whatever nobody owns: it may be NaN, and 0 * NaN is NaN."""
    N: gl.constexpr = tile.shape[0]
    D: gl.constexpr = tile.shape[1]
    layout: gl.constexpr = in_eights(D)
    seen = _seen(first + gl.arange(0, N, gl.SliceLayout(1, layout)), keys, spec)
    x = tile.load(layout)
    tile.store(gl.where(seen[:, None], x, gl.zeros([N, D], tile.dtype, layout)))


@gluon.jit
def _without_empty_rows(scale, tile, layout: gl.constexpr, spec: gl.constexpr):
    """As attend._without_empty_rows: 0 for rows of zeros, whose scale is 1 and need not be near the others'."""
    D: gl.constexpr = tile.shape[1]
    loaded: gl.constexpr = in_eights(D)
    if gl.max((scale == 1.0).to(gl.int32), 0) > 0:
        barrier()  # of those that cleared
        bits = tile.load(loaded).to(gl.int32)
        if spec.FORMAT != "int8":
            bits = bits & 0x7F  # -0 is 0
        some = gl.convert_layout(gl.max((bits != 0).to(gl.int32), 1), gl.SliceLayout(1, layout))
        scale = gl.where((scale == 1.0) & (some == 0), 0.0, scale)
    return scale


@gluon.jit
def _weights(logit, maximum_log2, terms, FP16: gl.constexpr, spec: gl.constexpr):
    """(weights, maximum with them, what sums so far are to be multiplied by)"""
    SCALE_LAST: gl.constexpr = not spec.SOFTCAP and not spec.ALIBI  # one multiply-add with the maximum, inside exp2
    largest = gl.max(logit, 0)
    if SCALE_LAST:
        largest *= terms.scale_log2
    if FP16:
        largest = below_in_fp16(largest)
    maximum = gl.maximum(maximum_log2, largest)
    shift = gl.where(maximum == float("-inf"), 0.0, maximum)
    if SCALE_LAST:
        p = gl.exp2(logit * terms.scale_log2[None, :] - shift[None, :])
    else:
        p = gl.exp2(logit - shift[None, :])
    return p, maximum, gl.exp2(maximum_log2 - shift)


@gluon.jit
def _rows(acc, sums, by_rows: gl.constexpr, spec: gl.constexpr):
    """Sums as rows: (acc [ROWS, D], Softmax)"""
    by_row: gl.constexpr = gl.SliceLayout(1, by_rows)
    if spec.FORMAT != "float":
        acc = in_order(acc)
    acc = gl.convert_layout(gl.permute(acc, [1, 0]), by_rows)
    total = gl.convert_layout(gl.sum(sums.total, 0), by_row)
    return acc, Softmax(gl.convert_layout(sums.maximum_log2, by_row), total)
