"""Which block of packed rows a program has, and which tiles of keys it sees: as `kernels/prefill.py` and `spans.py`."""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


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
    exists: Any  # whether all of its pages do


@gluon.jit
def number(x):
    """Of a Varying (arguments.py)."""
    return (x >> 32).to(gl.int32)


@gluon.jit
def find_rows(index, seq_lens, cu_seqlens_q, call, spec: gl.constexpr):
    """Rows of the tile that is `index` tiles before the last: under causal the heaviest come first."""
    tile = _count_tiles(cu_seqlens_q, call, spec) - 1 - index
    request, first_tile, row_start, row_stop = _find(tile, cu_seqlens_q, call, spec)
    q_len = row_stop - row_start
    seq_len = -1
    if tile >= 0:
        found = gl.load(seq_lens + request.to(gl.int64) * number(call.stride_seq_lens))
        found = gl.minimum(gl.maximum(found, 0), number(call.max_pages) * spec.PAGE_SIZE)
        seq_len = gl.where(q_len > number(call.max_q_len), 0, found)
    return Rows(request, row_start, q_len, seq_len, tile, gl.maximum(tile - first_tile, 0) * spec.BLOCK_M)


@gluon.jit
def _count_tiles(cu_seqlens_q, call, spec: gl.constexpr):
    total = 0
    first_row = 0
    for chunk in range(0, number(call.batch_size), spec.BLOCK_B):
        _, _, stop, tiles = _chunk(chunk, first_row, cu_seqlens_q, call, spec)
        total += gl.sum(tiles, 0)
        first_row = gl.max(stop, 0)
    return total


@gluon.jit
def _find(tile, cu_seqlens_q, call, spec: gl.constexpr):
    """(request, its first tile, its rows' start and stop)."""
    request = 0
    first_tile = 0
    row_start = 0
    row_stop = 0
    before = 0
    first_row = 0
    for chunk in range(0, number(call.batch_size), spec.BLOCK_B):
        index, start, stop, tiles = _chunk(chunk, first_row, cu_seqlens_q, call, spec)
        reached = before + gl.associative_scan(tiles, 0, _plus)
        passed = (reached <= tile) & (index < number(call.batch_size))
        ours = (reached > tile) & (reached - tiles <= tile)
        request += gl.sum(passed.to(gl.int32), 0)
        first_tile += gl.sum(gl.where(passed, tiles, 0), 0)
        row_start += gl.sum(gl.where(ours, start, 0), 0)
        row_stop += gl.sum(gl.where(ours, stop, 0), 0)
        before += gl.sum(tiles, 0)
        first_row = gl.max(stop, 0)
    return request, first_tile, row_start, row_stop


@gluon.jit
def _chunk(chunk, first_row, cu_seqlens_q, call, spec: gl.constexpr):
    """Of BLOCK_B consecutive requests: (index, rows' start, stop, row tiles), clamped as `spans.load_rows` has it."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    request = chunk + gl.arange(0, spec.BLOCK_B, layout)
    mask = request < number(call.batch_size)
    num_tokens = number(call.num_tokens)
    stop = gl.load(cu_seqlens_q + request + 1, mask=mask, other=0)
    stop = gl.associative_scan(gl.minimum(gl.maximum(stop, 0), num_tokens), 0, _larger)
    stop = gl.maximum(stop, first_row)
    start = gl.load(cu_seqlens_q + request, mask=mask & (request > 0), other=0)
    start = gl.associative_scan(gl.minimum(gl.maximum(start, 0), num_tokens), 0, _larger)
    start = gl.where(mask, gl.maximum(start, first_row), stop)
    packed = (stop - start) * spec.GROUP_SIZE
    tiles = gl.where(packed > spec.ROW_LIMIT, (packed + spec.BLOCK_M - 1) // spec.BLOCK_M, 0)
    return request, start, stop, tiles


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
    return Walk(stop_tile - 1, num_right, num_inner, num, first, stop, True)


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
    return num_parts, Walk(last, num_right, inner - num_right, num, first_key, stop_key, walk.exists)


@gluon.jit
def nothing(walk, exists):
    """The walk, or, where its pages do not exist, one tile of no keys: partitions have something to hand each other."""
    return Walk(
        gl.where(exists, walk.last, 0), gl.where(exists, walk.num_right, 1), gl.where(exists, walk.num_inner, 0),
        gl.where(exists, walk.num, 1), gl.where(exists, walk.first_key, 0), gl.where(exists, walk.stop_key, 0), exists,
    )  # fmt: skip
