"""Split-KV attention of few rows per request over paged KV: decode, and the short requests of a prefill.

The work of a call is a line of units (KV tiles; with split_size, splits) over all requests, cut on the
device into equal pieces, one per program, whatever the mix of lengths. A program that has only a part
of a row tile's keys leaves a partial state, which `combine.py` merges. The grid depends on tensor
shapes alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from pagewire.kernels import combine, hopper, launch, tuning
from pagewire.kernels import error_codes as codes
from pagewire.kernels.alone import attend_alone
from pagewire.kernels.arguments import UNSPECIALISED, Heads, number, varying
from pagewire.kernels.attend import State, attend, empty_state, is_finite, logit_terms, pages_of, rows_of, value_factor
from pagewire.kernels.common import Spec, finish, load_q, store_whole, tile_rows
from pagewire.kernels.errors import record_error
from pagewire.kernels.launch import Tensors
from pagewire.kernels.partials import Partials, first_row, partial_of, store_partial
from pagewire.kernels.place import Launch, Place
from pagewire.kernels.plan import Plan
from pagewire.kernels.spans import (
    MAX_SPLITS,
    batch_of,
    inner_keys,
    load_row_stop,
    load_seq_lens,
    split_units,
    tile_keys,
)
from pagewire.kernels.work import count_units, find_unit, row_tiles

if TYPE_CHECKING:
    from pagewire.types import Modifiers

_PAGE = tl.constexpr((codes.DECODE_PAGE, codes.PREFILL_PAGE))  # [RAGGED]


@triton.jit(do_not_specialize=UNSPECIALISED)
def _decode_kernel(
    q,  # Heads
    k,  # Cache
    v,
    out,  # Heads
    lse,  # fp32 [num_tokens, num_qo_heads] or None
    page_table,  # int32 [batch_size, max_pages_per_seq]
    seq_lens,  # int32 [batch_size]
    cu_seqlens_q,  # int32 [batch_size + 1]; RAGGED only
    call,  # Call
    rule,  # Rule
    partials,  # Partials
    spec: tl.constexpr,
):
    """grid: [num_kv_heads, num_programs]; a program takes 1 / num_programs of all units of its kv head,
    and walks through the row tiles they belong to. Bound by KV bytes: each is read once for all query
    heads of its group, and again for the rows that do not fit the tile.
    """
    if spec.DEPENDENT:  # the merge's programs may take what room is left, find their rows, and wait
        gdc_launch_dependents()
    batch = batch_of(seq_lens, cu_seqlens_q, call, spec)
    lse_rows = Heads(lse, number(call.stride_lse_token), number(call.stride_lse_head))
    K_SCALE: tl.constexpr = spec.K_SCALE
    V_SCALE: tl.constexpr = spec.V_SCALE
    alone: tl.constexpr = spec.ALONE
    kv_head = tl.program_id(0)
    program = tl.program_id(1)
    records = (kv_head == 0) & (program == 0)
    num_units = count_units(batch, rule, records, spec)
    share = (num_units + tl.num_programs(1) - 1) // tl.num_programs(1)
    first_unit = program * share
    stop_unit = tl.minimum(first_unit + share, num_units)
    unit = first_unit
    request = 0
    request_unit = 0  # the request's first unit
    row_start = 0
    if unit < stop_unit:
        request, request_unit, row_start = find_unit(unit, batch, rule, spec)
    # the second bound: lengths that change under the kernel must not lead past the batch
    while (unit < stop_unit) & (request < batch.size):
        row_stop = row_start + 1
        if spec.RAGGED:
            row_stop = tl.maximum(row_start, load_row_stop(batch, request))
        q_len = row_stop - row_start
        seq_len = load_seq_lens(batch, request, True)[0]
        _, _, num = split_units(q_len, seq_len, rule, spec)
        num_tiles = row_tiles(q_len, batch, spec)
        if unit >= request_unit + num * num_tiles:
            request_unit += num * num_tiles
            request += 1
            row_start = row_stop
        else:
            tile_m, tokens, keys, skipped, taken = _piece(unit, stop_unit, request_unit, q_len, seq_len, rule, spec)
            token, head, row_ok = tile_rows(tile_m, q_len, kv_head, spec)

            q_rows = load_q(q, row_start + token, head, row_ok, spec)
            kv = (rows_of(k, kv_head, K_SCALE), rows_of(v, kv_head, V_SCALE))
            pages = pages_of(page_table, call, request)
            terms = logit_terms(rule, k, request, kv_head, head, row_ok, spec)
            position = seq_len - q_len + token
            inner_key, stop_inner_key = inner_keys(keys[0], keys[1], tokens[0], tokens[1], q_len, seq_len, rule, spec)
            stop_inner_key = tl.where(pages.num_pages > 0, stop_inner_key, inner_key)
            state = empty_state(spec)
            if spec.LEFT:
                state = attend(state, q_rows, kv, pages, (keys[0], inner_key), position, rule, terms, True, False, spec)
            acc, maximum, total, lift, bad_entry = attend(
                state, q_rows, kv, pages, (inner_key, stop_inner_key), position, rule, terms, False, True, spec
            )
            if tl.max(bad_entry) >= 0:  # a page does not exist: all over again, each page looked at
                acc, maximum, total, lift, bad_entry = empty_state(spec)
                stop_inner_key = keys[0]
            acc, maximum, total, lift, bad_entry = attend(
                State(acc, maximum, total, lift, bad_entry), q_rows, kv, pages, (stop_inner_key, keys[1]),
                position, rule, terms, True, False, spec,
            )  # fmt: skip
            record_error(batch.error_word, _PAGE[spec.RAGGED], request, bad_entry, bad_entry >= 0)
            partial = skipped
            if not spec.SPLIT:
                partial = partial_of(program, unit, share)
            row = first_row(partials, kv_head, request, row_start, tile_m, spec)
            row += partial.to(tl.int64) * number(partials.stride_partial)
            place = (taken == num, row)
            if not spec.RAGGED or is_finite(acc, total, row_ok, spec):
                acc *= value_factor(rule, v, lift, request, kv_head, spec)
                rows_of_it = (0, row_start + token, head, row_ok)
                _store((acc, maximum, total), rows_of_it, place, out, lse_rows, rule, partials, spec)
            else:
                # read again: through the loop above, registers hold only what it needs
                lone_q_len = tl.maximum(load_row_stop(batch, request) - row_start, 0)
                lone_seq_len = load_seq_lens(batch, request, True)[0]
                lone_tile, lone_tokens, all_keys, _skipped, _taken = _piece(
                    unit, stop_unit, request_unit, lone_q_len, lone_seq_len, rule, spec
                )
                whose = (request, row_start, lone_q_len, lone_seq_len)
                for lone in range(lone_tokens[0], lone_tokens[1] + 1):
                    first, stop = tile_keys(lone, lone, lone_q_len, lone_seq_len, rule, spec)
                    lone_keys = (tl.maximum(first, all_keys[0]), tl.minimum(stop, all_keys[1]))
                    for first_head in range(0, spec.GROUP_SIZE, alone.BLOCK_M):
                        lone_state, lone_rows = attend_alone(
                            lone, first_head, lone_tile, whose, kv_head, q, k, v, pages, lone_keys, rule, spec
                        )
                        _store(lone_state, lone_rows, place, out, lse_rows, rule, partials, alone)
            unit += taken


@triton.jit
def _piece(unit, stop_unit, request_unit, q_len, seq_len, rule, spec: tl.constexpr):
    """What a program does next of a request, from `unit` on: (row tile, (its first token, its last),
    (first key, stop key), units of the row tile skipped, units taken).
    """
    BLOCK_M: tl.constexpr = spec.BLOCK_M
    size, first, num = split_units(q_len, seq_len, rule, spec)
    tile_m = (unit - request_unit) // num
    skipped = (unit - request_unit) % num
    taken = tl.minimum(num - skipped, stop_unit - unit)
    if spec.SPLIT:
        taken = 1
    first_token = tile_m * BLOCK_M // spec.GROUP_SIZE
    last_token = tl.minimum((tile_m * BLOCK_M + BLOCK_M - 1) // spec.GROUP_SIZE, q_len - 1)
    first_key, stop_key = tile_keys(first_token, last_token, q_len, seq_len, rule, spec)
    first_key = tl.maximum(first_key, (first + skipped) * size)
    stop_key = tl.minimum(stop_key, (first + skipped + taken) * size)
    return tile_m, (first_token, last_token), (first_key, stop_key), skipped, taken


@triton.jit
def _store(state, rows_of_it, place, out, lse, rule, partials, spec: tl.constexpr):
    """Rows where they belong: in out and lse, or as a partial that waits to be merged.

    place: (whether it is all of the rows' keys, else: the row of the partials where the row tile begins).
    """
    whole, row = place
    if whole:
        store_whole(state, rows_of_it, out, lse, rule, spec)
    else:
        acc, maximum, total = state
        row_in_tile, _, _, row_ok = rows_of_it
        values, lse_log2 = finish(acc, maximum, total, maximum, False)
        store_partial(partials, row + row_in_tile, row_ok, values, lse_log2, spec)


def plan(t: Tensors, m: Modifiers, error_word: Tensor) -> Plan:
    """Of one row per request, or, with cu_seqlens_q, of requests of which max_q_len says that all are short."""
    if t.q.shape[0] == 0:
        return Plan((), t.q.device)
    launches, scratch = launches_of(t, m, error_word)
    split = Plan(launches, t.q.device, scratch)
    device = launch.device_of(t.q.device)
    if hopper.why_no_decode(t, m, device) is not None:
        return split
    whole, scratch, num_counters = hopper.decode_of(t, m, error_word, device)
    aligned = (launch.PLACES.k_cache.index, launch.PLACES.v_cache.index)
    return Plan([whole], t.q.device, scratch, aligned, unaligned=split, num_counters=num_counters)


def launches_of(
    t: Tensors,
    m: Modifiers,
    error_word: Tensor,
    row_limit: int = 0,  # > 0: requests with more packed rows are not ours, nor are the rows no request owns
) -> tuple[list[Launch], tuple[int, ...]]:
    """(split attention, and the merge that also writes every row nobody computed; what they need as scratch)."""
    batch_size, num_kv_heads, ragged = t.page_table.shape[0], t.k_cache.shape[2], t.cu_seqlens_q is not None
    device = launch.device_of(t.q.device)
    # packed rows of a request at most; never from num_tokens, on which no request's tiles may depend
    rows = row_limit or (m.max_q_len or 0 if ragged else 1) * (t.q.shape[1] // num_kv_heads)
    config = tuning.decode_config(launch.traits(t, device), rows)
    spec = launch.attention_spec(t, m, config, device.arch, row_limit=row_limit, read_once=rows <= config.BLOCK_M)
    arguments = launch.attention_arguments(t, m, error_word, spec)
    num_programs = max(2, device.num_processors * config.programs_per_processor // num_kv_heads)
    partials, scratch = _partials(t, m.split_size, spec, rows, num_programs)
    arguments["partials"] = partials
    with_padding = ragged and row_limit == 0
    lanes = min(spec.BLOCK_M, rows) if device.arch else 1
    merge = combine._combine_kernel
    launches = [
        Launch(_decode_kernel, (num_kv_heads, num_programs, 1), arguments, launch.options(config)),
        Launch(
            merge,
            (batch_size + with_padding, lanes, num_kv_heads),
            {name: arguments[name] for name in merge.arg_names},
            launch.options(tuning.COMBINE) | ({"launch_pdl": True} if spec.DEPENDENT else {}),
        ),
    ]
    return launches, scratch


def _partials(
    t: Tensors, split_size: int | None, spec: Spec, rows: int, num_programs: int
) -> tuple[Partials, tuple[int, int]]:
    """(with places in the scratch, whose areas are so large); rows: packed rows of a request at most."""
    num_tokens, batch_size = t.q.shape[0], t.page_table.shape[0]
    num_partials, partial_rows = 2 * num_programs, min(spec.BLOCK_M, rows)
    token_rows = request_rows = 0
    if split_size is not None:
        num_partials = min(MAX_SPLITS, -(-t.page_table.shape[1] * spec.PAGE_SIZE // split_size))
        partial_rows = min(num_tokens * spec.GROUP_SIZE, batch_size * rows)
        if partial_rows == num_tokens * spec.GROUP_SIZE:
            token_rows = spec.GROUP_SIZE
        else:
            request_rows = rows
    strides = varying((num_partials * partial_rows, partial_rows, token_rows, request_rows, num_programs))
    num_rows = t.k_cache.shape[2] * num_partials * partial_rows
    return Partials(Place(-1), Place(-2), *strides), (num_rows * spec.HEAD_DIM_V, num_rows)
