"""Drawing tokens. (seed, position) decides every draw: the batch around a request never does."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pagewire.serve.messages import Sampling

_ONE = 2**40  # the largest weight as an integer: a vocabulary of them sums to less than 2^63


def sample(logits: Tensor, samplings: Sequence[Sampling], positions: Sequence[int]) -> list[int | None]:
    """One token id per row; None where the row's largest logit is NaN or infinite. A GPU is waited for once.

    Temperature divides the logits, top_k keeps the k largest, top_p then keeps the smallest set of
    the most probable whose probability reaches top_p (always at least one; ties with the last one
    kept stay in). What is left is drawn by inverse CDF in vocabulary order.

    Args:
        logits: [num_rows, vocab_size].
        samplings: one per row; temperature 0 takes the largest logit (the first of equals).
        positions: one per row: the index in its request of the token being drawn.
    Raises:
        ValueError: the counts differ.
    """
    if not len(samplings) == len(positions) == logits.shape[0]:
        raise ValueError(
            f"expected one sampling and one position per row of logits ({logits.shape[0]}), "
            f"got {len(samplings)} and {len(positions)}"
        )
    largest = logits.amax(dim=-1)  # NaN if any is
    drawn = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    token_ids = logits.argmax(dim=-1)
    if drawn and logits.device.type != "cpu":
        token_ids = draw_all(token_ids, logits, samplings, positions)
    found: list[int] = token_ids.where(largest.isfinite(), -1).tolist()
    for row in drawn if logits.device.type == "cpu" else ():
        if found[row] >= 0:
            u = uniform(samplings[row].seed, positions[row])
            found[row] = _draw(logits[row].double().numpy(), samplings[row], u)
    return [token_id if token_id >= 0 else None for token_id in found]


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) of (seed, position). A seed is any integer, taken modulo 2^64."""
    generator = np.random.Philox(key=seed % (1 << 64), counter=position)
    return float(np.random.Generator(generator).random())


def draw_all(greedy: Tensor, logits: Tensor, samplings: Sequence[Sampling], positions: Sequence[int]) -> Tensor:
    """`_draw` for every row at once and where the logits are, without waiting; a row of temperature 0 keeps `greedy`.

    In integers, as a GPU's sums of floats depend on their order: a weight below 2^-40 of the largest counts as 0.
    """
    vocab_size = logits.shape[-1]
    of_rows = [
        (s.temperature, s.top_k if s.top_k > 0 else vocab_size, s.top_p, uniform(s.seed, p)) if s.temperature > 0
        else (0.0, 1, 1.0, 0.0)
        for s, p in zip(samplings, positions, strict=True)
    ]  # fmt: skip
    host = torch.tensor(of_rows, dtype=torch.float64, device="cpu", pin_memory=logits.device.type == "cuda")
    temperature, top_k, top_p, u = host.to(logits.device, non_blocking=True).split(1, dim=1)  # each [num_rows, 1]
    values = logits.double()
    weights = (((values - values.amax(-1, keepdim=True)) / temperature).exp() * _ONE).long()
    descending = weights.sort(descending=True).values
    smallest = descending.gather(-1, top_k.long().clamp(max=vocab_size) - 1)
    cdf = descending.where(descending >= smallest, 0).cumsum(-1).double()
    last_kept = torch.searchsorted(cdf, top_p * cdf[:, -1:]).clamp(max=vocab_size - 1)
    smallest = smallest.maximum(descending.gather(-1, last_kept))
    exact = weights.where(weights >= smallest, 0).cumsum(-1)
    target = (u * exact[:, -1:].double()).long().minimum(exact[:, -1:] - 1)  # the product may round up to the total
    token_ids = torch.searchsorted(exact, target, right=True)
    return token_ids.squeeze(-1).where(temperature.squeeze(-1) > 0, greedy)


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
