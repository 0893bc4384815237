"""Sampling: what may be drawn, how often, and that (seed, position) alone decides."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pagewire.serve.messages import Sampling
from pagewire.serve.model import sampling
from pagewire.serve.model.sampling import sample, uniform


def drawn_by_numpy(logits: np.ndarray, sampling: Sampling, u: float) -> int:
    """One row in fp64: what `_draw` does in integers for all of them."""
    weights = np.exp((logits - logits.max()) / sampling.temperature)  # probabilities times a constant
    if 0 < sampling.top_k < weights.size:
        weights = at_least(np.partition(weights, -sampling.top_k)[-sampling.top_k], weights)
    if sampling.top_p < 1:
        descending = np.sort(weights)[::-1]
        cdf = descending.cumsum()
        last_kept = min(int(np.searchsorted(cdf, sampling.top_p * cdf[-1])), weights.size - 1)
        weights = at_least(descending[last_kept], weights)
    cdf = weights.cumsum()
    # Right of u: a token of weight 0 covers no interval and is never drawn.
    token_id = int(np.searchsorted(cdf, u * cdf[-1], side="right"))
    # u * total may round up to the total: then it is the last token with a weight.
    return token_id if token_id < weights.size else int(weights.nonzero()[0][-1])


def at_least(smallest: float, weights: np.ndarray) -> np.ndarray:
    return np.where(weights >= smallest, weights, 0.0)


LOGITS = torch.tensor([[0.0, 3.0, 1.0, 2.0, -1.0, 3.0]])


def draws(logits: torch.Tensor, sampling: Sampling, count: int) -> torch.Tensor:
    """How often each token was drawn at positions 0 … count - 1: [vocab_size]."""
    ids = sample(logits.expand(count, -1), [sampling] * count, range(count))
    return torch.bincount(torch.tensor(ids), minlength=logits.shape[-1])


def test_temperature_zero_takes_the_first_largest() -> None:
    assert sample(LOGITS, [Sampling(temperature=0.0, seed=5, top_p=0.1)], [7]) == [1]


def test_no_rows() -> None:
    assert sample(torch.empty(0, 6), [], []) == []


@pytest.mark.parametrize(
    "sampling, kept",
    [
        (Sampling(temperature=1.0), [0, 1, 2, 3, 4, 5]),
        (Sampling(temperature=1.0, top_k=3), [1, 3, 5]),
        (Sampling(temperature=1.0, top_k=1), [1, 5]),  # equals of the last one kept stay
        (Sampling(temperature=1.0, top_k=99), [0, 1, 2, 3, 4, 5]),
        (Sampling(temperature=1.0, top_p=0.9), [1, 3, 5]),  # 0.407 + 0.407 + 0.150
        (Sampling(temperature=1.0, top_p=0.5), [1, 5]),
        (Sampling(temperature=1.0, top_p=0.0), [1, 5]),
        # Of the three kept by top_k, renormalised, the first two have 0.844.
        (Sampling(temperature=1.0, top_k=3, top_p=0.84), [1, 5]),
        (Sampling(temperature=1.0, top_k=3, top_p=0.85), [1, 3, 5]),
        (Sampling(temperature=0.5, top_p=0.9), [1, 5]),  # 0.467 + 0.467 at half the temperature
        (Sampling(temperature=1e-6), [1, 5]),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(sampling: Sampling, kept: list[int]) -> None:
    count = 4000
    found = draws(LOGITS, sampling, count)
    exact = torch.full((6,), float("-inf"), dtype=torch.float64)
    exact[kept] = LOGITS[0, kept].double() / sampling.temperature
    expected = torch.softmax(exact, dim=0) * count
    assert found[expected == 0].sum() == 0
    within = expected > 0
    chi_square = float(((found - expected)[within].square() / expected[within]).sum())
    assert chi_square < 21  # 5 degrees of freedom: exceeded once in a thousand seeds


def test_seeds_differ() -> None:
    flat = torch.zeros(1, 1000)
    by_seed = {tuple(sample(flat.expand(8, -1), [Sampling(1.0, seed=s)] * 8, range(8))) for s in range(50)}
    assert len(by_seed) == 50


@given(
    seed=st.integers(-(2**63), 2**64 - 1),
    position=st.integers(0, 2**20),
    others=st.integers(0, 3),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 7, 64]),
    top_p=st.sampled_from([0.2, 0.9, 1.0]),
)
def test_the_batch_does_not_matter(
    seed: int, position: int, others: int, temperature: float, top_k: int, top_p: float
) -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(seed % 2**32))
    mine = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    alone = sample(logits[others : others + 1], [mine], [position])
    samplings = [Sampling(temperature=0.7, seed=i) for i in range(4)]
    samplings[others] = mine
    positions = [3, 1, 4, 1]
    positions[others] = position
    assert sample(logits, samplings, positions)[others] == alone[0]


def test_top_p_in_a_vocabulary_with_a_long_tail() -> None:
    """Thousands of tokens are kept, and the last of them are drawn too."""
    logits = torch.linspace(0, -1, 5000)[None]
    probabilities = torch.softmax(logits[0].double(), dim=0)
    num_kept = int((probabilities.cumsum(0) < 0.9).sum()) + 1
    assert num_kept > 4000
    found = draws(logits, Sampling(temperature=1.0, top_p=0.9), 2000)
    assert found[num_kept:].sum() == 0
    assert found[4000:num_kept].sum() > 40


SHAPES = {
    "random": lambda g: 3 * torch.randn(8, 1000, generator=g),
    "ties": lambda g: torch.randint(0, 4, (8, 1000), generator=g).float(),
    "peaked": lambda g: 200 * torch.randn(8, 1000, generator=g),
    "masked": lambda g: torch.randn(8, 1000, generator=g).masked_fill(
        torch.rand(8, 1000, generator=g) < 0.7, -torch.inf
    ),
    "flat": lambda g: torch.zeros(8, 1000),
}


@pytest.mark.parametrize("few", [1, 100, 4096])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", SHAPES)
def test_draws_are_numpys(shape: str, seed: int, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Integer weights against fp64 ones, one sampling a row; however many of the largest are looked at first."""
    monkeypatch.setattr(sampling, "_FEW", few)
    logits = SHAPES[shape](torch.Generator().manual_seed(seed))
    samplings = [
        Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        for temperature, top_k, top_p in [
            (1.0, 0, 1.0), (0.7, 40, 1.0), (1.5, 0, 0.9), (0.0, 0, 1.0), (1.0, 1, 1.0), (1.0, 2000, 0.0),
            (0.01, 7, 0.5), (2.0, 300, 0.95),
        ]
    ]  # fmt: skip
    for position in range(20):
        positions = list(range(position, position + 8))
        expected = [
            drawn_by_numpy(row.double().numpy(), one, uniform(seed, at)) if one.temperature else int(row.argmax())
            for row, one, at in zip(logits, samplings, positions, strict=True)
        ]
        assert sample(logits, samplings, positions) == expected


@pytest.mark.parametrize(
    "samplings",
    [[Sampling(1.0), Sampling(1.0, top_p=0.05)], [Sampling(1.0, top_k=3000, top_p=0.2)]],
    ids=["all are kept", "more than those that are looked at first"],
)
def test_the_largest_are_not_all(samplings: list[Sampling], monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.linspace(0, -0.01, 5000).repeat(len(samplings), 1)
    logits[:, 0] = 5.5  # as likely as the next 250
    found = []
    for few in (1000, 5000):
        monkeypatch.setattr(sampling, "_FEW", few)
        found.append([sample(logits, samplings, [position] * len(samplings)) for position in range(100)])
    assert found[0] == found[1]


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_the_ends_of_the_interval_draw_no_token_without_weight(u: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "uniform", lambda seed, position: u)
    logits = torch.full((1, 50_000), -torch.inf)
    logits[0, 10_000:40_000] = torch.linspace(0, -1, 30_000)
    expected = 10_000 if u == 0 else 39_999
    given = logits, [Sampling(temperature=1.0)], [0]
    assert sample(*given) == [expected]


def test_uniform_is_uniform_and_counter_based() -> None:
    values = torch.tensor([uniform(3, position) for position in range(4000)])
    assert bool(((values >= 0) & (values < 1)).all())
    assert len(set(values.tolist())) == 4000
    histogram = torch.histc(values, bins=10, min=0, max=1)
    assert float(((histogram - 400).square() / 400).sum()) < 28  # 9 degrees of freedom
    neighbours = torch.corrcoef(torch.stack([values[:-1], values[1:]]))[0, 1]
    assert abs(float(neighbours)) < 0.06
    # Frozen: a change here changes every seeded answer.
    assert [uniform(3, 0), uniform(3, 1)] == [0.9342820204007575, 0.7580892609837582]
    assert uniform(-1, 5) == uniform(2**64 - 1, 5) == 0.46292535650502586


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0)], ids=["greedy", "drawn"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_row_gets_no_token_and_the_others_theirs(bad: float, sampling: Sampling) -> None:
    logits = LOGITS.repeat(3, 1)
    logits[1, 2] = bad
    first, broken, third = sample(logits, [sampling] * 3, [0, 1, 2])
    assert broken is None
    assert [first, third] == [*sample(LOGITS, [sampling], [0]), *sample(LOGITS, [sampling], [2])]


def test_counts_must_agree() -> None:
    with pytest.raises(ValueError, match=r"row of logits \(1\), got 2 and 1"):
        sample(LOGITS, [Sampling(), Sampling()], [0])
