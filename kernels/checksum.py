"""fletcher64 of a payload on its device: two sums of its 16-bit words modulo the prime 2^31 - 1, plain and weighted.

Grid: (blocks of BLOCK words). A block adds its two partial sums to those of the payload. Roof: one read of the payload.
What the sums are, and why they are enough, is in `pagewire.transfer.checksum`, which has the slow version.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagewire.kernels.device import current

PRIME = tl.constexpr((1 << 31) - 1)
BLOCK = 4096


def sums(words: Tensor) -> Tensor:
    """words: int16, contiguous, on any alignment. Returns int64 [2]: the two sums, below 2^63 and not yet reduced."""
    out = torch.zeros(2, dtype=torch.int64, device=words.device)
    with current(words.device):
        _sums[(triton.cdiv(words.numel(), BLOCK),)](words, out, words.numel(), BLOCK=BLOCK, num_warps=8)
    return out


@triton.jit
def _sums(words, out, num_words, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = tl.arange(0, BLOCK)
    word = tl.load(words + start + at, mask=start + at < num_words, other=0).to(tl.int64) & 0xFFFF
    plain = tl.sum(word, 0)  # < 2^28
    # a weight is the word's number, from 1; both products are below 2^59
    weighted = tl.sum(word * (at + 1), 0) + (start % PRIME) * plain
    tl.atomic_add(out, plain)
    tl.atomic_add(out + 1, weighted % PRIME)
