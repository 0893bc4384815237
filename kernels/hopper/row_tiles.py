"""Which blocks of packed rows a program has, and which tiles of keys these see: as `kernels/prefill.py` and `spans.py`.

Blocks of all requests and kv heads stand in a line, a request's heaviest first, all heads of a block side by side. A
program has one of every num_programs(0), there and back (0 1 2, 2 1 0, 0 1 2): so none has the heavy ones only. With
TURNS, which suits requests of different lengths better, one that is done takes the next.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from pagewire.kernels.hopper.numbers import number
from pagewire.kernels.hopper.pages import Keys


class Batch(NamedTuple):
    page_table: Any  # pointers
    seq_lens: Any
    cu_seqlens_q: Any


class Item(NamedTuple):
    """What a program computes at a time."""

    kv_head: Any
    rows: Any  # Rows
    walk: Any  # Walk
    num_parts: Any  # programs that share its keys; this one has part program_id(2) of them


class Rows(NamedTuple):
    """BLOCK_M packed rows of a request, (token, head in group) with the head fastest."""

    request: Any
    row_start: Any  # its first token in q
    q_len: Any
    seq_len: Any  # -1: there is no such tile
    tile: Any  # of all of the call's
    first: Any  # its first packed row


class Walk(NamedTuple):
    """Tiles of BLOCK_N keys that some row sees, from the last to the first: masked ones, whole ones, masked ones."""

    last: Any  # index of the tile that comes first
    num_right: Any  # at least 1
    num_inner: Any  # of which every row sees every key
    num: Any
    first_key: Any
    stop_key: Any


@gluon.jit
def most_items(call, spec: gl.constexpr):
    """That there can be: of every request that is long a block may be begun."""
    rows = number(call.num_tokens) * spec.GROUP_SIZE
    tiles = rows // spec.BLOCK_M + gl.minimum(number(call.batch_size), rows // (spec.ROW_LIMIT + 1))
    return gl.maximum(tiles, 1) * spec.KV_HEADS


@gluon.jit
def item_of(index, batch, call, rule, FEWEST: gl.constexpr, spec: gl.constexpr):
    """(the line's index-th, how many there are); `rows.seq_len` is -1 if there are not so many."""
    rows, num_tiles = find_rows(index // spec.KV_HEADS, batch.seq_lens, batch.cu_seqlens_q, call, spec)
    walk = walk_of(rows, rule, spec)
    num_parts = 1
    if spec.PARTS:
        num_parts, walk = part_of(walk, gl.num_programs(2), FEWEST, gl.program_id(2), spec)
    return Item(index % spec.KV_HEADS, rows, walk, num_parts), num_tiles * spec.KV_HEADS


@gluon.jit
def keys_of(item, batch, call):
    table = batch.page_table + item.rows.request.to(gl.int64) * number(call.stride_table)
    return Keys(table, number(call.num_pages), item.walk.first_key, item.walk.stop_key)


@gluon.jit
def find_rows(index, seq_lens, cu_seqlens_q, call, spec: gl.constexpr):
    """(rows of the index-th tile, how many there are): request after request, under causal the heavy ones first."""
    request = 0
    first_tile = 0
    row_start = 0
    row_stop = 0
    seq_len = 0
    num = 0
    before = 0
    first_row = 0
    for chunk in range(0, number(call.batch_size), spec.BLOCK_B):
        which, start, stop, found, tiles = _chunk(chunk, first_row, seq_lens, cu_seqlens_q, call, spec)
        reached = before + gl.associative_scan(tiles, 0, _plus)
        passed = (reached <= index) & (which < number(call.batch_size))
        ours = (reached > index) & (reached - tiles <= index)
        request += gl.sum(passed.to(gl.int32), 0)
        first_tile += gl.sum(gl.where(passed, tiles, 0), 0)
        row_start += gl.sum(gl.where(ours, start, 0), 0)
        row_stop += gl.sum(gl.where(ours, stop, 0), 0)
        seq_len += gl.sum(gl.where(ours, found, 0), 0)
        num += gl.sum(gl.where(ours, tiles, 0), 0)
        before += gl.sum(tiles, 0)
        first_row = gl.max(stop, 0)
    q_len = row_stop - row_start
    seq_len = gl.where(q_len > number(call.max_q_len), 0, seq_len)
    tile = gl.maximum(num - 1 - (index - first_tile), 0)
    seq_len = gl.where(num > 0, seq_len, -1)
    return Rows(request, row_start, q_len, seq_len, first_tile + tile, tile * spec.BLOCK_M), before


@gluon.jit
def _chunk(chunk, first_row, seq_lens, cu_seqlens_q, call, spec: gl.constexpr):
    """Of BLOCK_B consecutive requests: (index, rows' start, stop, length, row tiles), clamped as `spans` has it."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    request = chunk + gl.arange(0, spec.BLOCK_B, layout)
    mask = request < number(call.batch_size)
    num_tokens = number(call.num_tokens)
    found = gl.load(seq_lens + request.to(gl.int64) * number(call.stride_seq_lens), mask=mask, other=0)
    stop = gl.load(cu_seqlens_q + request + 1, mask=mask, other=0)
    stop = gl.associative_scan(gl.minimum(gl.maximum(stop, 0), num_tokens), 0, _larger)
    stop = gl.maximum(stop, first_row)
    start = gl.load(cu_seqlens_q + request, mask=mask & (request > 0), other=0)
    start = gl.associative_scan(gl.minimum(gl.maximum(start, 0), num_tokens), 0, _larger)
    start = gl.where(mask, gl.maximum(start, first_row), stop)
    packed = (stop - start) * spec.GROUP_SIZE
    tiles = gl.where(packed > spec.ROW_LIMIT, (packed + spec.BLOCK_M - 1) // spec.BLOCK_M, 0)
    seq_len = gl.minimum(gl.maximum(found, 0), number(call.max_pages) * spec.PAGE_SIZE)
    return request, start, stop, seq_len, tiles


@gluon.jit
def _plus(a, b):
    return a + b


@gluon.jit
def _larger(a, b):
    return gl.maximum(a, b)


@gluon.jit
def walk_of(rows, rule, spec: gl.constexpr):
    N: gl.constexpr = spec.BLOCK_N
    first_token = rows.first // spec.GROUP_SIZE
    last_token = gl.minimum((rows.first + spec.BLOCK_M - 1) // spec.GROUP_SIZE, rows.q_len - 1)
    before = rows.seq_len - rows.q_len  # position of the first token
    first = 0
    stop = rows.seq_len
    inner = 0
    stop_inner = gl.maximum(rows.seq_len, 0)
    if spec.LEFT:
        first = gl.maximum(before + first_token - rule.window_left, 0)
        inner = gl.maximum(before + last_token - rule.window_left, 0)
    if spec.RIGHT:
        stop = gl.minimum(stop, before + last_token + rule.window_right + 1)
        stop_inner = gl.maximum(gl.minimum(stop_inner, before + first_token + rule.window_right + 1), 0)
    stop = gl.maximum(stop, first)
    first_tile = first // N
    stop_tile = gl.maximum((stop + N - 1) // N, first_tile + 1)
    inner_tile = (inner + N - 1) // N
    stop_inner_tile = gl.minimum(stop_inner // N, stop_tile - 1)  # the last one is masked in any case
    num_inner = gl.maximum(stop_inner_tile - inner_tile, 0)
    num = stop_tile - first_tile
    num_right = gl.where(num_inner > 0, stop_tile - stop_inner_tile, num)
    return Walk(stop_tile - 1, num_right, num_inner, num, first, stop)


@gluon.jit
def part_of(walk, most_parts, FEWEST: gl.constexpr, index, spec: gl.constexpr):
    """(how many programs share the walk, with at least FEWEST tiles each; the index-th's part of it)"""
    size = (walk.num + most_parts - 1) // most_parts
    size = gl.maximum(size, FEWEST)
    num_parts = (walk.num + size - 1) // size
    first = gl.minimum(index, num_parts - 1) * size
    num = gl.minimum(size, walk.num - first)
    last = walk.last - first
    num_right = gl.minimum(gl.maximum(walk.num_right - first, 1), num)  # the first one is masked in any case
    inner = gl.minimum(gl.maximum(walk.num_right + walk.num_inner - first, num_right), num)
    first_key = gl.maximum(walk.first_key, (last + 1 - num) * spec.BLOCK_N)
    stop_key = gl.minimum(walk.stop_key, (last + 1) * spec.BLOCK_N)
    return num_parts, Walk(last, num_right, inner - num_right, num, first_key, stop_key)
