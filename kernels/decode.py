"""Split-KV attention of few rows per request over paged KV: decode, and the short requests of a prefill.

The work of a call is a line of units (KV tiles; with split_size, splits) over all requests, cut on the
device into equal pieces, one per program, whatever the mix of lengths. A program that has only a part
of a row tile's keys leaves a partial state, which `combine.py` merges. The grid depends on tensor
shapes alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagewire.kernels import combine, launch, tuning
from pagewire.kernels import error_codes as codes
from pagewire.kernels.alone import attend_alone
from pagewire.kernels.attend import at_kv_head, at_request, attend, empty_state, is_finite, logit_terms, value_factor
from pagewire.kernels.common import finish, load_q, store_whole, tile_rows
from pagewire.kernels.errors import record_error
from pagewire.kernels.launch import Launch, run
from pagewire.kernels.spans import MAX_SPLITS, inner_keys, load_row_stop, load_seq_lens, split_units, tile_keys
from pagewire.kernels.work import count_units, find_unit, row_tiles

_PAGE = tl.constexpr((codes.DECODE_PAGE, codes.PREFILL_PAGE))  # [RAGGED]


@triton.jit(do_not_specialize=launch.PER_CALL)
def _decode_kernel(
    q,  # (pointer, stride_token, stride_head)
    k,  # (pointer, stride_page, stride_token, stride_head)
    v,
    k_scale,  # (pointer, stride_request, stride_head), or with K_SCALE "token" as k
    v_scale,
    alibi,  # (pointer, stride_request, stride_head)
    sinks,  # (pointer, stride_head)
    out,  # (pointer, stride_token, stride_head)
    lse,  # fp32 [num_tokens, num_qo_heads] or None
    lse_stride_token,
    lse_stride_head,
    page_table,  # int32 [batch_size, max_pages_per_seq]
    table_stride,
    num_pages,
    seq_lens,  # int32 [batch_size]
    seq_lens_stride,
    max_seq_len,
    cu_seqlens_q,  # int32 [batch_size + 1]; RAGGED only
    num_tokens,
    max_q_len,
    part_out,  # fp32 [num_kv_heads, head_rows, HEAD_DIM_V]
    part_lse,  # fp32 [num_kv_heads, head_rows], base 2
    head_rows,
    part_rows,  # from one partial to the next
    token_rows,  # SPLIT only: combine.split_row
    request_rows,
    error_word,
    split_size,
    batch_size,
    window_left,
    window_right,
    scale_log2,
    softcap,
    v_factor,
    spec: tl.constexpr,
    alone: tl.constexpr,  # of rows of one token, computed again where a value is not finite
):
    """grid: [num_kv_heads, num_programs]; a program takes 1 / num_programs of all units of its kv head,
    and walks through the row tiles they belong to. Bound by KV bytes: each is read once for all query
    heads of its group, and again for the rows that do not fit the tile.
    """
    lse_rows = (lse, lse_stride_token, lse_stride_head)
    table = (page_table, table_stride, num_pages)
    lengths = (seq_lens, seq_lens_stride, max_seq_len)
    rows = (cu_seqlens_q, num_tokens, max_q_len)
    partials = (part_out, part_lse, head_rows, part_rows)
    windows = (window_left, window_right)
    logit = (scale_log2, softcap, v_factor)
    BLOCK_M: tl.constexpr = spec.BLOCK_M
    kv_head = tl.program_id(0)
    program = tl.program_id(1)
    records = (kv_head == 0) & (program == 0)
    num_units = count_units(lengths, rows, batch_size, window_left, split_size, error_word, records, spec)
    share = (num_units + tl.num_programs(1) - 1) // tl.num_programs(1)
    first_unit = program * share
    stop_unit = tl.minimum(first_unit + share, num_units)
    unit = first_unit
    request = 0
    request_unit = 0  # the request's first unit
    row_start = 0
    if unit < stop_unit:
        request, request_unit, row_start = find_unit(unit, lengths, rows, batch_size, window_left, split_size, spec)
    # the second bound: lengths that change under the kernel must not lead past the batch
    while (unit < stop_unit) & (request < batch_size):
        row_stop = row_start + 1
        if spec.RAGGED:
            row_stop = tl.maximum(row_start, load_row_stop(rows, request))
        q_len = row_stop - row_start
        seq_len = load_seq_lens(lengths, request, True)[0]
        _, _, num = split_units(q_len, seq_len, window_left, split_size, spec)
        num_tiles = row_tiles(q_len, rows, spec)
        if unit >= request_unit + num * num_tiles:
            request_unit += num * num_tiles
            request += 1
            row_start = row_stop
        else:
            tile_m, tokens, keys, skipped, taken = _piece(
                unit, stop_unit, request_unit, q_len, seq_len, windows, split_size, spec
            )
            token, head, row_ok = tile_rows(tile_m, q_len, kv_head, spec)

            q_rows = load_q(q, row_start + token, head, row_ok, spec)
            k_here = at_kv_head(k, kv_head)
            v_here = at_kv_head(v, kv_head)
            k_scale_here = at_kv_head(k_scale, kv_head) if spec.K_SCALE == "token" else None
            v_scale_here = at_kv_head(v_scale, kv_head) if spec.V_SCALE == "token" else None
            terms = logit_terms(logit, k_scale, alibi, request, kv_head, head, row_ok, spec)
            here = at_request(table, request)
            position = seq_len - q_len + token
            inner_key, stop_inner_key = inner_keys(
                keys[0], keys[1], tokens[0], tokens[1], q_len, seq_len, windows, spec
            )
            stop_inner_key = tl.where(num_pages > 0, stop_inner_key, inner_key)
            state = empty_state(spec)
            if spec.LEFT:
                state = attend(
                    state, q_rows, k_here, v_here, k_scale_here, v_scale_here, here, (keys[0], inner_key),
                    position, windows, terms, True, False, spec,
                )  # fmt: skip
            acc, maximum, total, lift, bad_entry = attend(
                state, q_rows, k_here, v_here, k_scale_here, v_scale_here, here, (inner_key, stop_inner_key),
                position, windows, terms, False, True, spec,
            )  # fmt: skip
            if tl.max(bad_entry) >= 0:  # a page does not exist: all over again, each page looked at
                acc, maximum, total, lift, bad_entry = empty_state(spec)
                stop_inner_key = keys[0]
            state = attend(
                (acc, maximum, total, lift, bad_entry), q_rows, k_here, v_here, k_scale_here, v_scale_here, here,
                (stop_inner_key, keys[1]), position, windows, terms, True, False, spec,
            )  # fmt: skip
            acc, maximum, total, lift, bad_entry = state
            record_error(error_word, _PAGE[spec.RAGGED], request, bad_entry, bad_entry >= 0)
            part = skipped
            part_row = 0
            if spec.SPLIT:
                part_row = combine.split_row(request, row_start, token_rows, request_rows)
                part_row += tile_m * BLOCK_M
            else:
                part = 2 * program + (unit != first_unit).to(tl.int32)
            place = (taken == num, part, part_row)
            if not spec.RAGGED or is_finite(acc, total, row_ok, spec):
                acc *= value_factor(logit, v_scale, lift, request, kv_head, spec)
                rows_of_it = (0, row_start + token, head, row_ok)
                _store((acc, maximum, total), rows_of_it, place, out, lse_rows, sinks, partials, kv_head, spec)
            else:
                # read again: through the loop above, registers hold only what it needs
                lone_q_len = tl.maximum(load_row_stop(rows, request) - row_start, 0)
                lone_seq_len = load_seq_lens(lengths, request, True)[0]
                lone_tile, lone_tokens, all_keys, _skipped, _taken = _piece(
                    unit, stop_unit, request_unit, lone_q_len, lone_seq_len, windows, split_size, spec
                )
                whose = (request, row_start, lone_q_len, lone_seq_len)
                for lone in range(lone_tokens[0], lone_tokens[1] + 1):
                    first, stop = tile_keys(lone, lone, lone_q_len, lone_seq_len, windows, spec)
                    lone_keys = (tl.maximum(first, all_keys[0]), tl.minimum(stop, all_keys[1]))
                    for first_head in range(0, spec.GROUP_SIZE, alone.BLOCK_M):
                        lone_state, lone_rows = attend_alone(
                            lone, first_head, lone_tile, whose, kv_head, q, k, v, k_scale, v_scale, table,
                            lone_keys, windows, logit, alibi, spec, alone,
                        )  # fmt: skip
                        _store(lone_state, lone_rows, place, out, lse_rows, sinks, partials, kv_head, alone)
            unit += taken


@triton.jit
def _piece(unit, stop_unit, request_unit, q_len, seq_len, windows, split_size, spec: tl.constexpr):
    """What a program does next of a request, from `unit` on: (row tile, (its first token, its last),
    (first key, stop key), units of the row tile skipped, units taken).
    """
    BLOCK_M: tl.constexpr = spec.BLOCK_M
    size, first, num = split_units(q_len, seq_len, windows[0], split_size, spec)
    tile_m = (unit - request_unit) // num
    skipped = (unit - request_unit) % num
    taken = tl.minimum(num - skipped, stop_unit - unit)
    if spec.SPLIT:
        taken = 1
    first_token = tile_m * BLOCK_M // spec.GROUP_SIZE
    last_token = tl.minimum((tile_m * BLOCK_M + BLOCK_M - 1) // spec.GROUP_SIZE, q_len - 1)
    first_key, stop_key = tile_keys(first_token, last_token, q_len, seq_len, windows, spec)
    first_key = tl.maximum(first_key, (first + skipped) * size)
    stop_key = tl.minimum(stop_key, (first + skipped + taken) * size)
    return tile_m, (first_token, last_token), (first_key, stop_key), skipped, taken


@triton.jit
def _store(state, rows_of_it, place, out, lse_rows, sinks, partials, kv_head, spec: tl.constexpr):
    """Rows where they belong: in out and lse, or as a part of them that waits to be merged.

    place: (whether it is all of the rows' keys, else: the part, the row of it where the tile begins).
    """
    whole, part, part_row = place
    if whole:
        store_whole(state, rows_of_it, out, lse_rows, sinks, spec)
    else:
        acc, maximum, total = state
        first_row, _, _, row_ok = rows_of_it
        values, lse_log2 = finish(acc, maximum, total, maximum, False)
        row = part_row + first_row
        combine.store_partial(partials, values, lse_log2, kv_head, part, row, row_ok, spec)


def decode(
    q: Tensor,  # [batch_size, num_qo_heads, head_dim]
    k_cache: Tensor,  # [num_pages, page_size, num_kv_heads, head_dim], free strides
    v_cache: Tensor,
    page_table: Tensor,  # [batch_size, max_pages_per_seq] int32
    seq_lens: Tensor,  # [batch_size] int32
    m: Any,
    out: Tensor,  # [batch_size, num_qo_heads, head_dim_v]
    lse: Tensor | None,  # [batch_size, num_qo_heads] fp32
    error_word: Tensor,  # int64 [1]
) -> None:
    if q.shape[0] > 0:
        run(plan(q, k_cache, v_cache, page_table, seq_lens, None, m, out, lse, error_word), q.device)


def plan(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor | None,  # None: one row per request
    m: Any,
    out: Tensor,
    lse: Tensor | None,
    error_word: Tensor,
    row_limit: int = 0,  # > 0: requests with more packed rows are not ours, nor are the rows no request owns
) -> list[Launch]:
    """The two launches of a call: split attention, and the merge that also writes every row nobody computed."""
    batch_size, num_kv_heads = page_table.shape[0], k_cache.shape[2]
    device = launch.device_of(q.device)
    # packed rows of a request at most; never from num_tokens, on which no request's tiles may depend
    rows = row_limit or (1 if cu_seqlens_q is None else m.max_q_len) * (q.shape[1] // num_kv_heads)
    config = tuning.decode_config(launch.problem(q, k_cache, v_cache, device), rows)
    ragged = cu_seqlens_q is not None
    spec = launch.attention_spec(
        q, k_cache, v_cache, m, lse, config, device.arch,
        ragged=ragged, row_limit=row_limit, read_once=rows <= config.BLOCK_M,
    )  # fmt: skip
    arguments = launch.attention_arguments(
        q, k_cache, v_cache, page_table, seq_lens, cu_seqlens_q, m, out, lse, error_word, spec
    )
    num_programs = max(2, device.num_processors * config.programs_per_processor // num_kv_heads)
    # a program leaves at most two partials: of the tile it begins in, of the tile it ends in
    part_rows, num_parts = min(spec.BLOCK_M, rows), 2 * num_programs
    token_rows = request_rows = 0
    if spec.SPLIT:
        num_parts = min(MAX_SPLITS, -(-page_table.shape[1] * spec.PAGE_SIZE // m.split_size))
        # as many rows as can exist: all tokens', or the most that every request can have
        group_size = q.shape[1] // num_kv_heads
        part_rows = min(q.shape[0] * group_size, batch_size * rows)
        if part_rows == q.shape[0] * group_size:
            token_rows = group_size
        else:
            request_rows = rows
    partials = (num_kv_heads, num_parts * part_rows)
    arguments["part_out"] = torch.empty((*partials, spec.HEAD_DIM_V), dtype=torch.float32, device=q.device)
    arguments["part_lse"] = torch.empty(partials, dtype=torch.float32, device=q.device)
    arguments["head_rows"] = partials[1]
    arguments["part_rows"] = part_rows
    arguments["token_rows"] = token_rows
    arguments["request_rows"] = request_rows
    arguments["split_size"] = min(m.split_size or 0, 1 << 30)
    options = launch.options(config)
    with_padding = ragged and row_limit == 0
    lanes = min(spec.BLOCK_M, rows) if device.arch else 1
    shared = {name: arguments[name] for name in combine.SHARED}
    return [
        Launch(_decode_kernel, (num_kv_heads, num_programs), arguments, options),
        Launch(
            combine._combine_kernel,
            (batch_size + with_padding, lanes, num_kv_heads),
            {**shared, "num_programs": num_programs},
            launch.options(tuning.COMBINE),
        ),
    ]
