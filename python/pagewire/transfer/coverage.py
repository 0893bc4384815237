"""Which tokens of which layer and kv head have arrived."""

from bisect import bisect_left
from collections.abc import Iterator
from itertools import product

from pagewire.transfer.frames import Block, Range

Cell = tuple[int, int, int]


class Coverage:
    """Exact coverage of blocks x [token_start, token_stop): none twice, none outside."""

    def __init__(self, blocks: tuple[Block, ...], token_start: int, token_stop: int) -> None:
        self._tokens = (token_start, token_stop)
        # per (group, layer, head): disjoint ranges in order, neighbours joined
        self._ranges: dict[Cell, list[Range]] = {cell: [] for block in blocks for cell in cells(block)}

    def problem(self, block: Block, tokens: Range) -> str | None:
        """Why these tokens of the block cannot be added; None: they can."""
        start, stop = tokens
        outside = next((cell for cell in cells(block) if cell not in self._ranges), None)
        if outside is not None:
            return "group {}, layer {}, head {} is not what was reserved".format(*outside)
        if not (self._tokens[0] <= start < stop <= self._tokens[1]):
            return f"tokens {tokens} outside the reserved {self._tokens}"
        if any(_overlaps(self._ranges[cell], start, stop) for cell in cells(block)):
            return f"tokens {tokens} of group {block.group}, layers {block.layers}, heads {block.heads} came twice"
        return None

    def add(self, block: Block, tokens: Range) -> None:
        """A block without a `problem`."""
        for cell in cells(block):
            _insert(self._ranges[cell], *tokens)

    @property
    def complete(self) -> bool:
        return all(ranges == [self._tokens] for ranges in self._ranges.values())


NOTHING = Coverage((), 0, 0)  # is to come


def cells(block: Block) -> Iterator[Cell]:
    """Its (group, layer, head)."""
    return product((block.group,), range(*block.layers), range(*block.heads))


def _overlaps(ranges: list[Range], start: int, stop: int) -> bool:
    at = bisect_left(ranges, (start, start))
    return (at > 0 and ranges[at - 1][1] > start) or (at < len(ranges) and ranges[at][0] < stop)


def _insert(ranges: list[Range], start: int, stop: int) -> None:
    at = bisect_left(ranges, (start, start))
    if at < len(ranges) and ranges[at][0] == stop:
        stop = ranges.pop(at)[1]
    if at > 0 and ranges[at - 1][1] == start:
        at -= 1
        start = ranges.pop(at)[0]
    ranges.insert(at, (start, stop))
