"""Groups: every layer of every token leaves once, in chunks as large as they may be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagewire.transfer import grouping
from pagewire.transfer.coverage import cells
from pagewire.transfer.frames import Block
from pagewire.transfer.grouping import Grouping

TOKEN_BYTES = 10  # of one layer


def make(max_tokens: int) -> Grouping[str]:
    return Grouping(max_tokens * TOKEN_BYTES, lambda block, tokens: len(list(cells(block))) * tokens * TOKEN_BYTES)


def layers_of(num_layers: int, group: int = 0) -> Block:
    return Block(group, 2, 2 + num_layers, 0, 1)


def drained(groups: Grouping[str], idle: bool = False) -> list[tuple]:
    taken = []
    while piece := groups.take(idle):
        owner, block, tokens = piece
        taken.append((owner, tuple(layer - 2 for layer in block.layers), tokens))
    return taken


@pytest.mark.parametrize(
    ("max_tokens", "expected"),
    [
        (100, [((0, 5), (3, 10))]),
        (15, [((0, 2), (3, 10)), ((2, 4), (3, 10)), ((4, 5), (3, 10))]),
        (7, [((layer, layer + 1), (3, 10)) for layer in range(5)]),
        # a layer is too large: 6 tokens alone, the last one with the other layers'
        (6, [*(((layer, layer + 1), (3, 9)) for layer in range(5)), ((0, 5), (9, 10))]),
    ],
)
def test_what_fits_leaves_together(max_tokens: int, expected: list) -> None:
    groups = make(max_tokens)
    for layer in range(5):
        groups.add("a", layers_of(5), 2 + layer, 3, 10)
    assert drained(groups) == [("a", *of) for of in expected]


def test_a_group_that_is_not_full_leaves_only_an_idle_link_and_if_it_is_worth_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grouping, "IDLE_CHUNK_BYTES", 2 * 7 * TOKEN_BYTES)
    groups = make(100)
    groups.add("a", layers_of(4), 2 + 0, 0, 7)
    assert drained(groups, idle=True) == []
    groups.add("a", layers_of(4), 2 + 1, 0, 7)
    assert drained(groups) == []
    assert drained(groups, idle=True) == [("a", (0, 2), (0, 7))]
    groups.add("a", layers_of(4), 2 + 2, 0, 7)
    groups.add("a", layers_of(4), 2 + 3, 0, 7)
    assert drained(groups) == [("a", (2, 4), (0, 7))]


def test_a_full_group_does_not_wait_behind_another_owners() -> None:
    groups = make(10)
    groups.add("small", layers_of(2), 2, 0, 1)
    groups.add("large", layers_of(2), 2, 0, 9)
    assert drained(groups) == [("large", (0, 1), (0, 9))]
    assert groups.holds("small") and not groups.holds("large")
    groups.drop("small")
    assert not groups.holds("small") and drained(groups, idle=True) == []


def test_groups_of_layers_do_not_mix() -> None:
    groups = make(100)
    for group in (0, 1):
        groups.add("a", layers_of(2, group), 2, 0, 7)
    groups.add("a", layers_of(2, 1), 3, 0, 7)
    assert groups.take(idle=False) == ("a", layers_of(2, 1), (0, 7)) and groups.take(idle=False) is None


@given(
    num_layers=st.integers(1, 6),
    max_tokens=st.integers(1, 12),
    spans=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    idle=st.lists(st.booleans(), min_size=24, max_size=24),
)
def test_every_cell_leaves_once_and_no_chunk_is_too_large(
    num_layers: int, max_tokens: int, spans: list[int], idle: list[bool]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouping, "IDLE_CHUNK_BYTES", 3 * TOKEN_BYTES)
        groups, taken, at = make(max_tokens), [], 0
        for span in spans:
            for layer in range(num_layers):
                groups.add("a", layers_of(num_layers), 2 + layer, at, at + span)
                if idle.pop():
                    taken += drained(groups, idle=True)
            at += span
    taken += drained(groups)
    cells = [(layer, token) for _, layers, tokens in taken for layer in range(*layers) for token in range(*tokens)]
    assert sorted(cells) == [(layer, token) for layer in range(num_layers) for token in range(at)]
    for _, (layer, next_layer), (start, stop) in taken:
        assert (next_layer - layer) * (stop - start) <= max_tokens
