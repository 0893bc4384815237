"""merge_state, merge_states: attention states over disjoint keys become one."""

import triton
import triton.language as tl
from torch import Tensor

from pagewire.kernels.device import current
from pagewire.kernels.quant import from_float32, to_float32

_TILE = 1024  # elements per program of 128 threads


def merge_state(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor) -> None:
    """Two states of separate tensors; out and lse may be out_a and lse_a, or out_b and lse_b."""
    rows, width, grid = _tiles(out)
    if grid[0] == 0:
        return
    with current(out.device):
        _merge_two_kernel[grid](
            out_a, *out_a.stride()[:2], lse_a, *lse_a.stride(),
            out_b, *out_b.stride()[:2], lse_b, *lse_b.stride(),
            out, *out.stride()[:2], lse, *lse.stride(),
            out.shape[0] * out.shape[1], out.shape[1], DIM=out.shape[2], WIDTH=width, ROWS=rows,
        )  # fmt: skip


def merge_states(outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor) -> None:
    """outs [n, num_tokens, num_qo_heads, head_dim], lses [n, num_tokens, num_qo_heads]; any n, 0 gives empty rows."""
    rows, width, grid = _tiles(out)
    if grid[0] == 0:
        return
    with current(out.device):
        _merge_kernel[grid](
            outs, *outs.stride()[:3], lses, *lses.stride(),
            out, *out.stride()[:2], lse, *lse.stride(),
            outs.shape[0], out.shape[0] * out.shape[1], out.shape[1],
            DIM=out.shape[2], WIDTH=width, ROWS=rows,
        )  # fmt: skip


def _tiles(out: Tensor) -> tuple[int, int, tuple[int]]:
    """(rows per program, padded head_dim, grid)."""
    width = triton.next_power_of_2(max(out.shape[2], 1))
    rows = max(1, _TILE // width)
    return rows, width, (triton.cdiv(out.shape[0] * out.shape[1], rows),)


@triton.jit
def _merge_two_kernel(
    out_a_ptr, stride_oa_t, stride_oa_h, lse_a_ptr, stride_la_t, stride_la_h,
    out_b_ptr, stride_ob_t, stride_ob_h, lse_b_ptr, stride_lb_t, stride_lb_h,
    out_ptr, stride_o_t, stride_o_h, lse_ptr, stride_l_t, stride_l_h,
    num_rows, num_heads, DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """grid: [num_tiles]; a program merges ROWS (token, head) rows."""
    token, head, live, column, mask = _rows(num_rows, num_heads, DIM, WIDTH, ROWS)
    lse_a = _load_lse(lse_a_ptr, token * stride_la_t + head * stride_la_h, live)
    lse_b = _load_lse(lse_b_ptr, token * stride_lb_t + head * stride_lb_h, live)
    largest = _finite(tl.maximum(lse_a, lse_b))
    weight_a, weight_b = tl.exp(lse_a - largest), tl.exp(lse_b - largest)
    row_a = (token * stride_oa_t + head * stride_oa_h)[:, None] + column
    row_b = (token * stride_ob_t + head * stride_ob_h)[:, None] + column
    total = _weighted(out_a_ptr, row_a, lse_a, weight_a, mask)
    total += _weighted(out_b_ptr, row_b, lse_b, weight_b, mask)
    _store(
        out_ptr, (token * stride_o_t + head * stride_o_h)[:, None] + column, mask,
        lse_ptr, token * stride_l_t + head * stride_l_h, live, total, weight_a + weight_b, largest,
    )  # fmt: skip


@triton.jit
def _merge_kernel(
    outs_ptr, stride_os_n, stride_os_t, stride_os_h, lses_ptr, stride_ls_n, stride_ls_t, stride_ls_h,
    out_ptr, stride_o_t, stride_o_h, lse_ptr, stride_l_t, stride_l_h,
    num_states, num_rows, num_heads, DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """grid: [num_tiles]; a program merges ROWS (token, head) rows of all states in order."""
    token, head, live, column, mask = _rows(num_rows, num_heads, DIM, WIDTH, ROWS)
    lse_row = token * stride_ls_t + head * stride_ls_h
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    for n in range(num_states):
        offset = lse_row + tl.cast(n, tl.int64) * stride_ls_n
        largest = tl.maximum(largest, _load_lse(lses_ptr, offset, live))
    largest = _finite(largest)
    out_row = (token * stride_os_t + head * stride_os_h)[:, None] + column
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    weights = tl.zeros([ROWS], tl.float32)
    for n in range(num_states):
        state = tl.cast(n, tl.int64)
        lse = _load_lse(lses_ptr, lse_row + state * stride_ls_n, live)
        weight = tl.exp(lse - largest)
        total += _weighted(outs_ptr, out_row + state * stride_os_n, lse, weight, mask)
        weights += weight
    _store(
        out_ptr, (token * stride_o_t + head * stride_o_h)[:, None] + column, mask,
        lse_ptr, token * stride_l_t + head * stride_l_h, live, total, weights, largest,
    )  # fmt: skip


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
def _store(out_ptr, out_offset, mask, lse_ptr, lse_offset, live, total, weights, largest):
    empty = weights == 0.0  # and nothing else: NaN stays NaN
    divisor = tl.where(empty, 1.0, weights)
    out = total / divisor[:, None]
    lse = tl.where(empty, float("-inf"), largest + tl.log(divisor))
    # in place: every warp has read its states before any row of them is overwritten
    tl.debug_barrier()
    tl.store(out_ptr + out_offset, from_float32(out, out_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + lse_offset, lse, mask=live)
