"""Rows of one token by themselves: they all see the keys that are loaded for them.

A tile of rows of several tokens loads what any of them sees. If a value among that is not finite, it spoils the rows
that do not see it (0 * inf is NaN); then the tile's rows are computed again this way. Slow, and only there for a cache
that holds such values.
"""

import triton
import triton.language as tl

from pagewire.kernels.attend import attend, empty_state, logit_terms, rows_of, value_factor
from pagewire.kernels.common import load_q

FEWEST_ROWS = 16  # of a tensor core tile
FEWEST_KEYS = 16  # and no pipeline: the kernel has no registers to spare


@triton.jit
def attend_alone(
    token,  # of the request
    first_head,  # of the group
    tile_m,  # the row tile these rows are part of
    request,  # (index, row_start, q_len, seq_len)
    kv_head,
    q,  # these as the kernels have them
    k,
    v,
    pages,
    keys,  # (first, stop) that the token sees
    rule,
    spec: tl.constexpr,
):
    """((acc, maximum_log2, total), (place of the first row in the tile, token, head, row_ok)) of ALONE.BLOCK_M rows."""
    BLOCK_M: tl.constexpr = spec.BLOCK_M
    alone: tl.constexpr = spec.ALONE
    K_SCALE: tl.constexpr = spec.K_SCALE
    V_SCALE: tl.constexpr = spec.V_SCALE
    ROWS: tl.constexpr = alone.BLOCK_M
    index, row_start, q_len, seq_len = request
    in_group = first_head + tl.arange(0, ROWS)
    place = token * spec.GROUP_SIZE + first_head - tile_m * BLOCK_M
    row = place + tl.arange(0, ROWS)
    tokens = token + tl.zeros([ROWS], tl.int32)
    head = kv_head * spec.GROUP_SIZE + in_group
    row_ok = (in_group < spec.GROUP_SIZE) & (row >= 0) & (row < BLOCK_M) & (tokens < q_len)
    acc, maximum, total, lift, _ = attend(
        empty_state(alone), load_q(q, row_start + tokens, head, row_ok, alone),
        (rows_of(k, kv_head, K_SCALE), rows_of(v, kv_head, V_SCALE)), pages, keys, seq_len - q_len + tokens, rule,
        logit_terms(rule, k, index, kv_head, head, row_ok, alone), True, False, alone, 1,
    )  # fmt: skip
    acc *= value_factor(rule, v, lift, index, kv_head, alone)
    return (acc, maximum, total), (place, row_start + tokens, head, row_ok)
