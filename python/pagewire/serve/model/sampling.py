"""Drawing tokens. (seed, position) decides every draw: the batch around a request never does."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pagewire.serve.messages import Sampling

# top_p almost always ends within this many tokens; sorting a whole vocabulary costs far more.
_TOP_P_CANDIDATES = 1024


def sample(logits: Tensor, samplings: Sequence[Sampling], positions: Sequence[int]) -> list[int]:
    """One token id per row.

    Temperature divides the logits, top_k keeps the k largest, top_p then keeps the smallest set of
    the most probable whose probability reaches top_p (always at least one; ties with the last one
    kept stay in). What is left is drawn by inverse CDF in vocabulary order.

    Args:
        logits: [num_rows, vocab_size].
        samplings: one per row; temperature 0 takes the largest logit (the first of equals).
        positions: one per row: the index in its request of the token being drawn.
    Raises:
        ValueError: the counts differ, or a row holds NaN or +inf.
    """
    if not len(samplings) == len(positions) == logits.shape[0]:
        raise ValueError(
            f"expected one sampling and one position per row of logits ({logits.shape[0]}), "
            f"got {len(samplings)} and {len(positions)}"
        )
    largest = logits.amax(dim=-1)  # NaN if any is
    if not bool(largest.isfinite().all()):
        raise ValueError(f"logits: expected finite numbers, got {largest[~largest.isfinite()][0]}")
    token_ids = logits.argmax(dim=-1).tolist()
    for row, (sampling, position) in enumerate(zip(samplings, positions, strict=True)):
        if sampling.temperature > 0:
            token_ids[row] = _draw(logits[row], sampling, uniform(sampling.seed, position))
    return token_ids


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) of (seed, position). A seed is any integer, taken modulo 2^64."""
    generator = np.random.Philox(key=seed % (1 << 64), counter=position)
    return float(np.random.Generator(generator).random())


def _draw(logits: Tensor, sampling: Sampling, u: float) -> int:
    logits = logits.double()
    probabilities = torch.softmax((logits - logits.max()) / sampling.temperature, dim=-1)
    if 0 < sampling.top_k < probabilities.numel():
        last_kept = probabilities.topk(sampling.top_k).values[-1]
        probabilities = torch.where(probabilities >= last_kept, probabilities, 0.0)
    if sampling.top_p < 1:
        last_kept = _last_of_top_p(probabilities, sampling.top_p)
        probabilities = torch.where(probabilities >= last_kept, probabilities, 0.0)
    cdf = probabilities.cumsum(0)
    # Right of u: a token of probability 0 covers no interval and is never drawn.
    token_id = int(torch.searchsorted(cdf, u * float(cdf[-1]), right=True))
    if token_id == cdf.numel():  # u * total rounded up to total
        token_id = int(probabilities.nonzero()[-1])
    return token_id


def _last_of_top_p(probabilities: Tensor, top_p: float) -> Tensor:
    """The smallest probability that top_p keeps."""
    goal = top_p * float(probabilities.sum())
    for num_candidates in (min(_TOP_P_CANDIDATES, probabilities.numel()), probabilities.numel()):
        largest = probabilities.topk(num_candidates).values
        reached = (largest.cumsum(0) >= goal).nonzero()
        if len(reached):
            return largest[reached[0, 0]]
    return largest[-1]  # rounding kept the sum a hair under the goal: everything stays
