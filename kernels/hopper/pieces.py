"""How decode's work is shared out: the tiles of all requests in one line, cut into equal shares, as `kernels/work.py`.

A request that sees no key has a tile as well, of no keys: what is to be written for it needs no other way.
Partitions walk through a share on their own. Lengths that change meanwhile may lead them to different tiles, but not to
a different number of them: neither waits for ever.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from pagewire.kernels import error_codes as codes
from pagewire.kernels.hopper.errors import record_error
from pagewire.kernels.hopper.merging import Parts
from pagewire.kernels.hopper.numbers import number
from pagewire.kernels.hopper.pages import Keys

_SEQ_LEN = gl.constexpr(codes.DECODE_SEQ_LEN)


class Line(NamedTuple):
    """Of the tiles of a kv head, request after request."""

    kv_head: Any
    page_table: Any  # pointer
    seq_lens: Any


class Share(NamedTuple):
    size: Any  # units, tiles of a kv head, of every program but the last ones
    first: Any
    stop: Any
    request: Any  # that the first unit is of
    request_unit: Any  # the first of this request's


class At(NamedTuple):
    """Where a walk through a share is."""

    unit: Any
    request: Any
    request_unit: Any  # the request's first


class Piece(NamedTuple):
    """What a program has of a request."""

    request: Any
    seq_len: Any
    first_tile: Any
    num_tiles: Any
    first_key: Any
    stop_key: Any
    first_unit: Any  # the request's, not the piece's
    num_units: Any


@gluon.jit
def share_of(line, call, rule, spec: gl.constexpr):
    """One program leaves lengths that are no lengths in the error word."""
    records = (line.kv_head == 0) & (gl.program_id(1) == 0)
    total = 0
    for chunk in range(0, number(call.batch_size), spec.BLOCK_B):
        request, seq_len, num, bad = _chunk(chunk, line.seq_lens, call, rule, spec)
        record_error(call.error_word, _SEQ_LEN, request, request * 0, bad & records)
        total += gl.sum(num, 0)
    size = (total + gl.num_programs(1) - 1) // gl.num_programs(1)
    first = gl.minimum(gl.program_id(1) * size, total)
    request = 0
    request_unit = 0
    before = 0
    for chunk in range(0, number(call.batch_size), spec.BLOCK_B):
        _, _, num, _ = _chunk(chunk, line.seq_lens, call, rule, spec)
        passed = (before + gl.associative_scan(num, 0, _plus) <= first) & (num > 0)
        request += gl.sum(passed.to(gl.int32), 0)
        request_unit += gl.sum(gl.where(passed, num, 0), 0)
        before += gl.sum(num, 0)
    return Share(size, first, gl.minimum(first + size, total), request, request_unit)


@gluon.jit
def _plus(a, b):
    return a + b


@gluon.jit
def _chunk(chunk, seq_lens, call, rule, spec: gl.constexpr):
    """Of BLOCK_B consecutive requests: (index, length, tiles, whether the length had to be clamped)."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    request = chunk + gl.arange(0, spec.BLOCK_B, layout)
    exists = request < number(call.batch_size)
    at = seq_lens + request.to(gl.int64) * number(call.stride_seq_lens)
    found = gl.load(at, mask=exists, other=0)
    seq_len = gl.minimum(gl.maximum(found, 0), number(call.max_pages) * spec.PAGE_SIZE)
    _, num = _tiles(seq_len, rule, spec)
    return request, seq_len, gl.where(exists, num, 0), found != seq_len


@gluon.jit
def _tiles(seq_len, rule, spec: gl.constexpr):
    """(the first tile of keys that the request's row sees, how many)"""
    first = seq_len * 0
    if spec.LEFT:
        first = gl.maximum(seq_len - 1 - rule.window_left, 0) // spec.BLOCK_N
    return first, gl.maximum((seq_len + spec.BLOCK_N - 1) // spec.BLOCK_N - first, 1)


@gluon.jit
def beginning(share):
    return At(share.first, share.request, share.request_unit)


@gluon.jit
def behind(at, piece):
    return At(at.unit + piece.num_tiles, at.request + 1, at.request_unit + piece.num_units)


@gluon.jit
def piece_of(at, share, line, call, rule, spec: gl.constexpr):
    """From there on, of the request there."""
    N: gl.constexpr = spec.BLOCK_N
    request = gl.minimum(at.request, number(call.batch_size) - 1)
    seq_len = gl.load(line.seq_lens + request.to(gl.int64) * number(call.stride_seq_lens))
    seq_len = gl.minimum(gl.maximum(seq_len, 0), number(call.max_pages) * spec.PAGE_SIZE)
    first, num = _tiles(seq_len, rule, spec)
    skipped = at.unit - at.request_unit
    taken = gl.maximum(gl.minimum(num - skipped, share.stop - at.unit), 1)
    first_tile = first + skipped
    first_key = first_tile * N
    if spec.LEFT:
        first_key = gl.maximum(first_key, seq_len - 1 - rule.window_left)
    stop_key = gl.minimum((first_tile + taken) * N, seq_len)
    return Piece(request, seq_len, first_tile, taken, first_key, stop_key, at.request_unit, num)


@gluon.jit
def keys_of(piece, line, call):
    table = line.page_table + piece.request.to(gl.int64) * number(call.stride_table)
    return Keys(table, number(call.num_pages), piece.first_key, piece.stop_key)


@gluon.jit
def parts_of(piece, at, share, line, spec: gl.constexpr):
    """A program has two places: of the request that began before its share or with it, and of the one that goes on
    beyond it. A request is counted where its first unit lies, as only one begins in a share and goes on beyond it.
    """
    G: gl.constexpr = spec.GROUP_SIZE
    program = gl.program_id(1)
    first_program = piece.first_unit // share.size
    num = (piece.first_unit + piece.num_units - 1) // share.size - first_program + 1
    num = gl.minimum(num, gl.num_programs(1) - first_program)  # of a length that changed: no place beyond the last
    places = line.kv_head.to(gl.int64) * (2 * gl.num_programs(1))
    own = places + 2 * program + (at.unit != program * share.size).to(gl.int32)
    first = places + 2 * first_program + (piece.first_unit != first_program * share.size).to(gl.int32)
    second = places + 2 * (first_program + 1)
    counter = line.kv_head * gl.num_programs(1) + first_program
    return Parts(num, own * G, first * G, second * G, 2 * G, counter)
