"""How decode's work is shared out on the device: all requests' units in one line, scanned BLOCK_B at a time."""

import triton
import triton.language as tl

from pagewire.kernels.spans import load_rows, load_seq_lens, record_spans, split_units


@triton.jit
def row_tiles(q_len, batch, spec: tl.constexpr):
    """Row tiles of a request; 0 if its rows are the prefill kernel's, or more than max_q_len."""
    packed = q_len * spec.GROUP_SIZE
    tiles = (packed + spec.BLOCK_M - 1) // spec.BLOCK_M
    if spec.RAGGED:
        tiles = tl.where(q_len > batch.max_q_len, 0, tiles)
    if spec.ROW_LIMIT > 0:
        tiles = tl.where(packed > spec.ROW_LIMIT, 0, tiles)
    return tiles


@triton.jit
def _chunk(request, first_row, batch, rule, spec: tl.constexpr):
    """Of BLOCK_B consecutive requests: (units, row start, row stop, whether the rows, the length had to be clamped)."""
    mask = request < batch.size
    seq_len, bad_seq_len = load_seq_lens(batch, request, mask)
    if spec.RAGGED:
        start, stop, bad_rows = load_rows(batch, request, mask, first_row)
    else:
        start, stop, bad_rows = request, request + 1, bad_seq_len
    _, _, num = split_units(stop - start, seq_len, rule, spec)
    return (tl.where(mask, num * row_tiles(stop - start, batch, spec), 0), start, stop, bad_rows, bad_seq_len)


@triton.jit
def count_units(batch, rule, records, spec: tl.constexpr):
    """All units of one kv head. records: this program leaves what was clamped in the error word."""
    BLOCK_B: tl.constexpr = spec.BLOCK_B
    total = 0
    first_row = 0
    for chunk in range(0, batch.size, BLOCK_B):
        request = chunk + tl.arange(0, BLOCK_B)
        units, start, stop, bad_rows, bad_seq_len = _chunk(request, first_row, batch, rule, spec)
        mask = request < tl.where(records, batch.size, 0)
        record_spans(batch, request, stop - start, bad_rows & mask, bad_seq_len & mask, mask, spec.RAGGED)
        total += tl.sum(units)
        first_row = tl.max(stop)
    return total


@triton.jit
def find_unit(unit, batch, rule, spec: tl.constexpr):
    """The request that `unit` belongs to: (request, its first unit, its first row)."""
    BLOCK_B: tl.constexpr = spec.BLOCK_B
    before = 0
    request = 0
    request_unit = 0
    row_start = 0
    first_row = 0
    for chunk in range(0, batch.size, BLOCK_B):
        index = chunk + tl.arange(0, BLOCK_B)
        units, _, stop, _, _ = _chunk(index, first_row, batch, rule, spec)
        passed = (before + tl.cumsum(units, 0) <= unit) & (index < batch.size)
        request += tl.sum(passed.to(tl.int32))
        request_unit += tl.sum(tl.where(passed, units, 0))
        row_start = tl.maximum(row_start, tl.max(tl.where(passed, stop, 0)))
        before += tl.sum(units)
        first_row = tl.max(stop)
    return request, request_unit, row_start


@triton.jit
def units_before(request, batch, rule, spec: tl.constexpr):
    """(first unit of `request`, its first row, all units)."""
    BLOCK_B: tl.constexpr = spec.BLOCK_B
    before = 0
    total = 0
    row_start = 0
    first_row = 0
    for chunk in range(0, batch.size, BLOCK_B):
        index = chunk + tl.arange(0, BLOCK_B)
        units, _, stop, _, _ = _chunk(index, first_row, batch, rule, spec)
        passed = index < request
        before += tl.sum(tl.where(passed, units, 0))
        row_start = tl.maximum(row_start, tl.max(tl.where(passed & (index < batch.size), stop, 0)))
        total += tl.sum(units)
        first_row = tl.max(stop)
    return before, row_start, total
