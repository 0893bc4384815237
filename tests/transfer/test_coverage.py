"""Coverage against a plain set of (group, layer, head, token)."""

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from pagewire.transfer.coverage import Coverage
from pagewire.transfer.frames import Block

START, STOP = 4, 12
RESERVED = (Block(0, 1, 3, 2, 5), Block(2, 0, 1, 0, 1))


def spans(lo: int, hi: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(lo, hi - 1), st.integers(1, hi)).map(lambda of: (of[0], min(of[0] + of[1], hi)))


def cells(block: Block, tokens: tuple[int, int]) -> set:
    return {(block.group, y, h, t) for y in range(*block.layers) for h in range(*block.heads) for t in range(*tokens)}


@given(st.lists(st.tuples(st.integers(0, 2), spans(0, 4), spans(0, 6), spans(START - 1, STOP + 1))))
def test_coverage_is_a_set_without_repetition(chunks: list) -> None:
    coverage = Coverage(RESERVED, START, STOP)
    every = set().union(*(cells(block, (START, STOP)) for block in RESERVED))
    covered: set = set()
    for group, layers, heads, tokens in chunks:
        block = Block(group, *layers, *heads)
        of = cells(block, tokens)
        fits = of <= every and not of & covered
        assert (coverage.problem(block, tokens) is None) == fits
        if fits:
            coverage.add(block, tokens)
            covered |= of
        assert coverage.complete == (covered == every)


@given(st.permutations(range(START, STOP)))
def test_one_token_at_a_time_in_any_order(tokens: list[int]) -> None:
    coverage = Coverage(RESERVED, START, STOP)
    for token in tokens:
        assert not coverage.complete
        for block in RESERVED:
            coverage.add(block, (token, token + 1))
    assert coverage.complete


def test_every_two_ranges() -> None:
    block = Block(0, 0, 1, 0, 1)
    ranges = [(start, stop) for start in range(START, STOP) for stop in range(start + 1, STOP + 1)]
    for first, second in product(ranges, repeat=2):
        coverage = Coverage((block,), START, STOP)
        coverage.add(block, first)
        apart = first[1] <= second[0] or second[1] <= first[0]
        assert (coverage.problem(block, second) is None) == apart, (first, second)
