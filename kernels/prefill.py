"""Attention of many rows per request over paged KV.

Requests with few rows (tuning.row_limit) are left to the decode kernel, which splits their KV: a call is
up to three launches, of which those with nothing to do end at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from pagewire.kernels import decode, hopper, launch, tuning
from pagewire.kernels import error_codes as codes
from pagewire.kernels.alone import attend_alone
from pagewire.kernels.arguments import UNSPECIALISED, Heads, number
from pagewire.kernels.attend import (
    attend,
    empty_state,
    is_finite,
    logit_terms,
    pages_in_range,
    pages_of,
    rows_of,
    value_factor,
)
from pagewire.kernels.common import load_q, store_whole, tile_rows
from pagewire.kernels.errors import record_error
from pagewire.kernels.launch import Tensors
from pagewire.kernels.place import Launch
from pagewire.kernels.plan import Plan
from pagewire.kernels.spans import batch_of, inner_keys, load_rows, load_seq_lens, record_spans, tile_keys

if TYPE_CHECKING:
    from pagewire.types import Modifiers

_PAGE = tl.constexpr(codes.PREFILL_PAGE)
_FLAGS = tl.constexpr(hopper.FLAGS)
_GLANCE = tl.constexpr(64)  # tiles


@triton.jit
def _long_tiles(start, stop, spec: tl.constexpr):
    """Row tiles of requests with rows [start, stop); 0 if the decode kernel has them."""
    packed = (stop - start) * spec.GROUP_SIZE
    return tl.where(packed > spec.ROW_LIMIT, (packed + spec.BLOCK_M - 1) // spec.BLOCK_M, 0)


@triton.jit
def _count_tiles(batch, records, spec: tl.constexpr):
    """(row tiles of all long requests, end of the last request's rows); records: leave what was clamped in the word."""
    BLOCK_B: tl.constexpr = spec.BLOCK_B
    total = 0
    row_stop = 0
    for chunk in range(0, batch.size, BLOCK_B):
        request = chunk + tl.arange(0, BLOCK_B)
        start, stop, bad_rows = load_rows(batch, request, request < batch.size, row_stop)
        total += tl.sum(_long_tiles(start, stop, spec))
        row_stop = tl.max(stop)
        if records:
            mask = request < batch.size
            _, bad_seq_len = load_seq_lens(batch, request, mask)
            record_spans(batch, request, stop - start, bad_rows, bad_seq_len, mask, True)
    return total, row_stop


@triton.jit
def _find_tile(tile, batch, spec: tl.constexpr):
    """The request that a row tile belongs to: (request, its first tile, its rows' start and stop)."""
    BLOCK_B: tl.constexpr = spec.BLOCK_B
    before = 0
    request = 0
    request_tile = 0
    row_start = 0
    row_stop = 0
    first_row = 0
    for chunk in range(0, batch.size, BLOCK_B):
        index = chunk + tl.arange(0, BLOCK_B)
        start, stop, _ = load_rows(batch, index, index < batch.size, first_row)
        tiles = _long_tiles(start, stop, spec)
        reached = before + tl.cumsum(tiles, 0)
        passed = (reached <= tile) & (index < batch.size)
        request += tl.sum(passed.to(tl.int32))
        request_tile += tl.sum(tl.where(passed, tiles, 0))
        ours = (reached > tile) & (reached - tiles <= tile)
        row_start += tl.sum(tl.where(ours, start, 0))
        row_stop += tl.sum(tl.where(ours, stop, 0))
        before += tl.sum(tiles)
        first_row = tl.max(stop)
    return request, request_tile, row_start, row_stop


@triton.jit
def _is_flagged(flags, mask):
    found = 0.0
    for i in tl.static_range(_FLAGS):
        found += tl.load(flags + i, mask=mask, other=0.0)
    return found > 0


@triton.jit
def _some_left_over(redo, num_tiles, most_tiles, kv_head):
    """Whether one of the tiles is that this program has: all at a glance, as it nearly never is."""
    found = 0
    step = tl.num_programs(0)
    for first in range(0, most_tiles, step * _GLANCE):
        tile = num_tiles - 1 - first - tl.program_id(0) - step * tl.arange(0, _GLANCE)
        flags = redo + (tile * tl.num_programs(1) + kv_head) * _FLAGS
        found += tl.sum(_is_flagged(flags, tile >= 0).to(tl.int32))
    return found > 0


@triton.jit(do_not_specialize=UNSPECIALISED)
def _prefill_kernel(
    q,  # as the decode kernel has them
    k,
    v,
    out,
    lse,
    page_table,
    seq_lens,
    cu_seqlens_q,
    call,
    rule,
    redo,  # fp32 [tiles, num_kv_heads, FLAGS], of hopper/prefill.py; REDO only
    spec: tl.constexpr,
):
    """grid: [num_tokens * group_size // BLOCK_M + batch_size + 1, num_kv_heads]; a program computes one
    row tile, a block of BLOCK_M packed rows of one request, over all keys its rows see. Bound by the
    tensor cores. Long requests' tiles come in reverse, so that under causal the heavy ones start first;
    then those of the rows that no request owns, left empty. REDO: [fewer, num_kv_heads], each of many tiles.
    """
    batch = batch_of(seq_lens, cu_seqlens_q, call, spec)
    kv_head = tl.program_id(1)
    records = (kv_head == 0) & (tl.program_id(0) == 0)
    num_tiles, owned_rows = _count_tiles(batch, records, spec)
    rows = (q, k, v, Heads(lse, number(call.stride_lse_token), number(call.stride_lse_head)), out)
    if spec.REDO:
        most_tiles = batch.num_tokens * spec.GROUP_SIZE // spec.BLOCK_M + batch.size + 1
        if _some_left_over(redo, num_tiles, most_tiles, kv_head) | (owned_rows < batch.num_tokens):
            for first in range(0, most_tiles, tl.num_programs(0)):
                tile = num_tiles - 1 - first - tl.program_id(0)
                flags = redo + (tile * tl.num_programs(1) + kv_head) * _FLAGS
                if (tile < 0) | _is_flagged(flags, tile >= 0):
                    _compute(tile, owned_rows, rows, page_table, batch, call, rule, spec)
    else:
        _compute(num_tiles - 1 - tl.program_id(0), owned_rows, rows, page_table, batch, call, rule, spec)


@triton.jit
def _compute(tile, owned_rows, rows, page_table, batch, call, rule, spec: tl.constexpr):
    """A row tile, or, where it is negative, one of the rows from `owned_rows` on."""
    q, k, v, lse_rows, out = rows
    BLOCK_M: tl.constexpr = spec.BLOCK_M
    K_SCALE: tl.constexpr = spec.K_SCALE
    V_SCALE: tl.constexpr = spec.V_SCALE
    alone: tl.constexpr = spec.ALONE
    kv_head = tl.program_id(1)
    if tile >= 0:
        request, request_tile, row_start, row_stop = _find_tile(tile, batch, spec)
        q_len = row_stop - row_start
        seq_len = load_seq_lens(batch, request, True)[0]
        seq_len = tl.where(q_len > batch.max_q_len, 0, seq_len)
        tile_m = tile - request_tile
    else:
        request = 0
        row_start = owned_rows
        q_len = batch.num_tokens - owned_rows
        seq_len = 0
        tile_m = -1 - tile
    if tile_m * BLOCK_M < q_len * spec.GROUP_SIZE:
        token, head, row_ok = tile_rows(tile_m, q_len, kv_head, spec)
        first_token = tile_m * BLOCK_M // spec.GROUP_SIZE
        last_token = tl.minimum((tile_m * BLOCK_M + BLOCK_M - 1) // spec.GROUP_SIZE, q_len - 1)
        first_key, stop_key = tile_keys(first_token, last_token, q_len, seq_len, rule, spec)
        inner_key, stop_inner_key = inner_keys(first_key, stop_key, first_token, last_token, q_len, seq_len, rule, spec)
        pages = pages_of(page_table, call, request)
        if not pages_in_range(pages, inner_key, stop_inner_key, spec):
            inner_key = first_key
            stop_inner_key = first_key

        q_rows = load_q(q, row_start + token, head, row_ok, spec)
        kv = (rows_of(k, kv_head, K_SCALE), rows_of(v, kv_head, V_SCALE))
        terms = logit_terms(rule, k, request, kv_head, head, row_ok, spec)
        position = seq_len - q_len + token
        state = empty_state(spec)
        if spec.LEFT:
            keys = (first_key, inner_key)
            state = attend(state, q_rows, kv, pages, keys, position, rule, terms, True, False, spec)
        keys = (inner_key, stop_inner_key)
        state = attend(state, q_rows, kv, pages, keys, position, rule, terms, False, False, spec)
        keys = (stop_inner_key, stop_key)
        state = attend(state, q_rows, kv, pages, keys, position, rule, terms, True, False, spec)
        acc, maximum, total, lift, bad_entry = state
        record_error(batch.error_word, _PAGE, request, bad_entry, bad_entry >= 0)
        if is_finite(acc, total, row_ok, spec):
            acc *= value_factor(rule, v, lift, request, kv_head, spec)
            rows_of_it = (0, row_start + token, head, row_ok)
            store_whole((acc, maximum, total), rows_of_it, out, lse_rows, rule, spec)
        else:
            whose = (request, row_start, q_len, seq_len)
            for lone in range(first_token, last_token + 1):
                lone_keys = tile_keys(lone, lone, q_len, seq_len, rule, spec)
                for first_head in range(0, spec.GROUP_SIZE, alone.BLOCK_M):
                    lone_state, lone_rows = attend_alone(
                        lone, first_head, tile_m, whose, kv_head, q, k, v, pages, lone_keys, rule, spec
                    )
                    store_whole(lone_state, lone_rows, out, lse_rows, rule, alone)


def all_short(t: Tensors, m: Modifiers, row_limit: int) -> bool:
    """Whether max_q_len says that every request's rows are few: decode's work."""
    group_size = t.q.shape[1] // t.k_cache.shape[2]
    return m.max_q_len is not None and m.max_q_len * group_size <= row_limit


def plan(t: Tensors, m: Modifiers, error_word: Tensor) -> Plan:
    """One launch for the long requests, two for the short ones; only the two if max_q_len says that all are short, only
    the one for a request that is alone.

    On Hopper two launches for the long ones, of which the second computes what the first has left over.
    """
    return _plan(t, m, error_word, may_be_hopper=True)


def _plan(t: Tensors, m: Modifiers, error_word: Tensor, *, may_be_hopper: bool) -> Plan:
    if t.page_table.shape[0] == 0:  # rows that no request owns have no slopes and scales either
        m = m._replace(alibi_slopes=None, k_scale=None, v_scale=None)
        t = t._replace(alibi_slopes=None, k_scale=None, v_scale=None)
    num_tokens, num_qo_heads, _ = t.q.shape
    batch_size, num_kv_heads = t.page_table.shape[0], t.k_cache.shape[2]
    group_size = num_qo_heads // num_kv_heads
    device = launch.device_of(t.q.device)
    traits = launch.traits(t, device)
    row_limit = tuning.row_limit(traits)
    if num_tokens == 0 or all_short(t, m, row_limit):
        return decode.plan(t, m, error_word)
    if batch_size == 1 and num_tokens * group_size > row_limit and m.split_size is None:
        row_limit = 0  # nearly always it is long: it is not asked whether it is not
    config = tuning.prefill_config(traits)
    on_hopper = may_be_hopper and batch_size > 0 and hopper.why_no_prefill(t, m, device) is None
    if on_hopper:  # both kernels count tiles alike
        config = config._replace(BLOCK_M=hopper.BLOCK_M)
    spec = launch.attention_spec(t, m, config, device.arch, row_limit=row_limit, redo=on_hopper)
    arguments = launch.attention_arguments(t, m, error_word, spec)
    most_tiles = num_tokens * group_size // spec.BLOCK_M + batch_size + 1
    programs = min(most_tiles, -(-device.num_processors // num_kv_heads)) if on_hopper else most_tiles
    grid = (programs, num_kv_heads, 1)
    short, scratch = decode.launches_of(t, m, error_word, row_limit) if batch_size and row_limit else ([], ())
    arguments["redo"] = None
    long = Launch(_prefill_kernel, grid, arguments, launch.options(config))
    if not on_hopper:
        return Plan([long, *short], t.q.device, scratch)
    first, arguments["redo"], scratch, num_counters = hopper.prefill_of(t, m, arguments, scratch, device)
    aligned = (launch.PLACES.k_cache.index, launch.PLACES.v_cache.index)
    unaligned = _plan(t, m, error_word, may_be_hopper=False)  # now: a plan keeps no tensors to make it of
    return Plan([first, long, *short], t.q.device, scratch, aligned, unaligned, num_counters)
