"""Drawing tokens. (seed, position) decides every draw: the batch around a request never does."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pagewire.serve.messages import Sampling

_FEW = 4096  # a CPU finds as many in a fifth of the time that it takes to sort 49,152
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
        expected = f"expected one sampling and one position per row of logits ({logits.shape[0]})"
        raise ValueError(f"{expected}, got {len(samplings)} and {len(positions)}")
    token_ids = logits.argmax(dim=-1)
    if any(sampling.temperature > 0 for sampling in samplings):
        token_ids = _draw(token_ids, logits, samplings, positions)
    found: list[int] = token_ids.where(logits.amax(dim=-1).isfinite(), -1).tolist()  # amax is NaN if any is
    return [token_id if token_id >= 0 else None for token_id in found]


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) of (seed, position). A seed is any integer, taken modulo 2^64."""
    generator = np.random.Philox(key=seed % (1 << 64), counter=position)
    return float(np.random.Generator(generator).random())


def _draw(greedy: Tensor, logits: Tensor, samplings: Sequence[Sampling], positions: Sequence[int]) -> Tensor:
    """[num_rows], where the logits are and without waiting; a row of temperature 0 keeps `greedy`.

    In integers, as a GPU's sums of floats depend on their order: a weight below 2^-40 of the largest counts as 0.
    """
    vocab_size = logits.shape[-1]
    of_rows = [
        (s.temperature, s.top_k if s.top_k > 0 else vocab_size, s.top_p, uniform(s.seed, p)) if s.temperature > 0
        else (0.0, vocab_size, 1.0, 0.0)
        for s, p in zip(samplings, positions, strict=True)
    ]  # fmt: skip
    host = torch.tensor(of_rows, dtype=torch.float64, device="cpu", pin_memory=logits.device.type == "cuda")
    temperature, top_k, top_p, u = host.to(logits.device, non_blocking=True).split(1, dim=1)  # each [num_rows, 1]
    values = logits.double()
    weights = (((values - values.amax(-1, keepdim=True)) / temperature).exp() * _ONE).long()
    if restricted := [k for _, k, p, _ in of_rows if k < vocab_size or p < 1]:
        num_sorted, few = max(restricted), vocab_size if weights.is_cuda else _FEW
        smallest, found = _smallest_kept(weights, top_k, top_p, min(num_sorted, few))
        if num_sorted > few and not found.all():
            smallest, _ = _smallest_kept(weights, top_k, top_p, num_sorted)
        weights = weights.where(weights >= smallest, 0)
    exact = weights.cumsum(-1)
    target = (u * exact[:, -1:].double()).long().minimum(exact[:, -1:] - 1)  # the product may round up to the total
    # Right of u: a token of weight 0 covers no interval and is never drawn.
    return torch.searchsorted(exact, target, right=True).squeeze(-1).where(temperature.squeeze(-1) > 0, greedy)


def _smallest_kept(weights: Tensor, top_k: Tensor, top_p: Tensor, num_sorted: int) -> tuple[Tensor, Tensor]:
    """The smallest weight that a row keeps, and whether the `num_sorted` largest were enough to tell: both
    [num_rows, 1].
    """
    vocab_size = weights.shape[-1]
    descending = weights.topk(min(num_sorted, vocab_size)).values
    num_sorted = descending.shape[-1]
    smallest = descending.gather(-1, top_k.long().clamp(max=num_sorted) - 1).where(top_k <= num_sorted, 0)
    cdf = descending.where(descending >= smallest, 0).cumsum(-1).double()
    wanted = top_p * weights.where(weights >= smallest, 0).sum(-1, keepdim=True).double()
    within = cdf[:, -1:] >= wanted  # otherwise its equals follow, or all are kept
    last_kept = torch.searchsorted(cdf, wanted).clamp(max=num_sorted - 1)
    smallest = smallest.maximum(descending.gather(-1, last_kept).where(within, 0))
    return smallest, (top_k <= num_sorted) | (top_k >= vocab_size) & (within | (top_p >= 1))
