"""Coverage against a plain set of (layer, head, token)."""

from hypothesis import given
from hypothesis import strategies as st

from pagewire.transfer.coverage import Coverage

LAYERS, HEADS, START, STOP = 2, 3, 4, 12


def spans(lo: int, hi: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(lo, hi), st.integers(lo, hi))


@given(st.lists(st.tuples(spans(-1, LAYERS + 1), spans(-1, HEADS + 1), spans(START - 1, STOP + 1))))
def test_coverage_is_a_set_without_repetition(blocks: list) -> None:
    coverage = Coverage(LAYERS, HEADS, START, STOP)
    every = {(y, h, t) for y in range(LAYERS) for h in range(HEADS) for t in range(START, STOP)}
    covered: set = set()
    for layers, heads, tokens in blocks:
        block = {(y, h, t) for y in range(*layers) for h in range(*heads) for t in range(*tokens)}
        fits = bool(block) and block <= every and not block & covered
        assert (coverage.problem(layers, heads, tokens) is None) == fits
        if fits:
            coverage.add(layers, heads, tokens)
            covered |= block
        assert coverage.complete == (covered == every)


@given(st.permutations(range(START, STOP)))
def test_one_token_at_a_time_in_any_order(tokens: list[int]) -> None:
    coverage = Coverage(LAYERS, HEADS, START, STOP)
    for token in tokens:
        assert not coverage.complete
        coverage.add((0, LAYERS), (0, HEADS), (token, token + 1))
    assert coverage.complete
