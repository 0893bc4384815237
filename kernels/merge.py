"""merge_state, merge_states: attention states over disjoint keys become one."""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from pagewire.kernels.place import Launch, Place
from pagewire.kernels.plan import Plan
from pagewire.kernels.quant import from_float32, to_float32

_TILE = 1024  # elements per program of 128 threads


class State(NamedTuple):
    out: Any  # [num_tokens, num_qo_heads, head_dim]
    stride_token: int
    stride_head: int
    lse: Any  # fp32 [num_tokens, num_qo_heads]
    stride_lse_token: int
    stride_lse_head: int


class States(NamedTuple):
    """The same, [n, ...]."""

    out: Any
    stride: int
    stride_token: int
    stride_head: int
    lse: Any
    stride_lse: int
    stride_lse_token: int
    stride_lse_head: int


def plan_two(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor) -> Plan:
    """Two states of separate tensors; out and lse may be out_a and lse_a, or out_b and lse_b."""
    return _plan(_merge_two_kernel, {"a": _state(0, out_a, lse_a), "b": _state(2, out_b, lse_b)}, 4, out, lse)


def plan(outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor) -> Plan:
    """outs [n, num_tokens, num_qo_heads, head_dim], lses [n, num_tokens, num_qo_heads]; any n, 0 gives empty rows."""
    states = States._make((Place(0), *outs.stride()[:3], Place(1), *lses.stride()))
    return _plan(_merge_kernel, {"states": states, "num_states": outs.shape[0]}, 2, out, lse)


def _plan(kernel: Any, states: dict[str, Any], place: int, out: Tensor, lse: Tensor) -> Plan:
    num_tokens, num_heads, dim = out.shape
    num_rows, width = num_tokens * num_heads, triton.next_power_of_2(max(dim, 1))
    rows = max(1, _TILE // width)
    arguments = states | {
        "merged": _state(place, out, lse), "num_rows": num_rows, "num_heads": num_heads,
        "DIM": dim, "WIDTH": width, "ROWS": rows,
    }  # fmt: skip
    launch = Launch(kernel, (triton.cdiv(num_rows, rows), 1, 1), arguments, {})
    return Plan([launch] if num_rows else (), out.device)


def _state(place: int, out: Tensor, lse: Tensor) -> State:
    return State._make((Place(place), *out.stride()[:2], Place(place + 1), *lse.stride()))


@triton.jit
def _merge_two_kernel(a, b, merged, num_rows, num_heads, DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """grid: [num_tiles]; a program merges ROWS (token, head) rows of two States. Bound by memory."""
    token, head, live, column, mask = _rows(num_rows, num_heads, DIM, WIDTH, ROWS)
    lse_a = _load_lse(a.lse, token * a.stride_lse_token + head * a.stride_lse_head, live)
    lse_b = _load_lse(b.lse, token * b.stride_lse_token + head * b.stride_lse_head, live)
    largest = _finite(tl.maximum(lse_a, lse_b))
    weight_a, weight_b = tl.exp(lse_a - largest), tl.exp(lse_b - largest)
    row_a = (token * a.stride_token + head * a.stride_head)[:, None] + column
    row_b = (token * b.stride_token + head * b.stride_head)[:, None] + column
    total = _weighted(a.out, row_a, lse_a, weight_a, mask)
    total += _weighted(b.out, row_b, lse_b, weight_b, mask)
    _store(merged, (token, head, column), live, mask, total, weight_a + weight_b, largest)


@triton.jit
def _merge_kernel(
    states, merged, num_states, num_rows, num_heads, DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr
):
    """grid: [num_tiles]; a program merges ROWS (token, head) rows of all States in order. Bound by memory."""
    token, head, live, column, mask = _rows(num_rows, num_heads, DIM, WIDTH, ROWS)
    lse_row = token * states.stride_lse_token + head * states.stride_lse_head
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    for n in range(num_states):
        offset = lse_row + tl.cast(n, tl.int64) * states.stride_lse
        largest = tl.maximum(largest, _load_lse(states.lse, offset, live))
    largest = _finite(largest)
    out_row = (token * states.stride_token + head * states.stride_head)[:, None] + column
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    weights = tl.zeros([ROWS], tl.float32)
    for n in range(num_states):
        state = tl.cast(n, tl.int64)
        lse = _load_lse(states.lse, lse_row + state * states.stride_lse, live)
        weight = tl.exp(lse - largest)
        total += _weighted(states.out, out_row + state * states.stride, lse, weight, mask)
        weights += weight
    _store(merged, (token, head, column), live, mask, total, weights, largest)


@triton.jit
def _rows(num_rows, num_heads, DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """(token, head [ROWS] int64, live [ROWS], column [1, WIDTH], mask [ROWS, WIDTH])."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < num_rows
    column = tl.arange(0, WIDTH)[None, :]
    token, head = (row // num_heads).to(tl.int64), (row % num_heads).to(tl.int64)
    return token, head, live, column, live[:, None] & (column < DIM)


@triton.jit
def _load_lse(lse_ptr, offset, live):
    lse = tl.load(lse_ptr + offset, mask=live, other=float("-inf"))
    return tl.where(lse == float("inf"), float("-inf"), lse)  # some libraries mark empty with +inf


@triton.jit
def _finite(largest):
    """0 for rows that are empty in every state, so that exp(-inf - 0) is 0 and not NaN."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def _weighted(out_ptr, offset, lse, weight, mask):
    """weight * out, fp32 [ROWS, WIDTH]; an empty state's out may hold anything and is not read."""
    out = tl.load(out_ptr + offset, mask=mask & (lse != float("-inf"))[:, None], other=0.0)
    return weight[:, None] * to_float32(out, "float", False)


@triton.jit
def _store(merged, place, live, mask, total, weights, largest):
    token, head, column = place
    empty = weights == 0.0  # and nothing else: NaN stays NaN
    divisor = tl.where(empty, 1.0, weights)
    out = from_float32(total / divisor[:, None], merged.out.dtype.element_ty)
    lse = tl.where(empty, float("-inf"), largest + tl.log(divisor))
    row = token * merged.stride_token + head * merged.stride_head
    # in place: every warp has read its states before any row of them is overwritten
    tl.debug_barrier()
    tl.store(merged.out + row[:, None] + column, out, mask=mask)
    tl.store(merged.lse + token * merged.stride_lse_token + head * merged.stride_lse_head, lse, mask=live)
