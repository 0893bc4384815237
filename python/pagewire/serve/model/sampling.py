"""Drawing tokens. (seed, position) decides every draw: the batch around a request never does."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from pagewire.serve.messages import Sampling


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
    drawn = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    for row, values in zip(drawn, logits[drawn].double().cpu().numpy(), strict=True):
        sampling = samplings[row]
        token_ids[row] = _draw(values, sampling, uniform(sampling.seed, positions[row]))
    return token_ids


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) of (seed, position). A seed is any integer, taken modulo 2^64."""
    generator = np.random.Philox(key=seed % (1 << 64), counter=position)
    return float(np.random.Generator(generator).random())


def _draw(logits: np.ndarray, sampling: Sampling, u: float) -> int:
    # In NumPy: its sort of a 49,152-token vocabulary takes 1 ms, PyTorch's 16.
    weights = np.exp((logits - logits.max()) / sampling.temperature)  # probabilities times a constant
    if 0 < sampling.top_k < weights.size:
        weights = _at_least(np.partition(weights, -sampling.top_k)[-sampling.top_k], weights)
    if sampling.top_p < 1:
        descending = np.sort(weights)[::-1]
        cdf = descending.cumsum()
        last_kept = min(int(np.searchsorted(cdf, sampling.top_p * cdf[-1])), weights.size - 1)
        weights = _at_least(descending[last_kept], weights)
    cdf = weights.cumsum()
    # Right of u: a token of weight 0 covers no interval and is never drawn.
    token_id = int(np.searchsorted(cdf, u * cdf[-1], side="right"))
    # u * total may round up to the total: then it is the last token with a weight.
    return token_id if token_id < weights.size else int(weights.nonzero()[0][-1])


def _at_least(smallest: float, weights: np.ndarray) -> np.ndarray:
    return np.where(weights >= smallest, weights, 0.0)
