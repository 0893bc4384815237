"""Which tokens of which layer and kv head have arrived."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from itertools import product

from pagewire.transfer.frames import Block, Range

Cell = tuple[int, int, int]


class Coverage:
    """Exact coverage of blocks x [token_start, token_stop): none twice, none outside."""

    def __init__(self, blocks: tuple[Block, ...], token_start: int, token_stop: int) -> None:
        self._tokens = (token_start, token_stop)
        # per (group, layer, head): where what is there starts and stops, in order; where two ranges meet, neither
        self._bounds: dict[Cell, list[int]] = {cell: [] for block in blocks for cell in cells(block)}

    def problem(self, block: Block, tokens: Range) -> str | None:
        """Why these tokens of the block cannot be added; None: they can."""
        start, stop = tokens
        outside = next((cell for cell in cells(block) if cell not in self._bounds), None)
        if outside is not None:
            return "group {}, layer {}, head {} is not what was reserved".format(*outside)
        if not (self._tokens[0] <= start < stop <= self._tokens[1]):
            return f"tokens {tokens} outside the reserved {self._tokens}"
        for bounds in (self._bounds[cell] for cell in cells(block)):
            at = bisect_right(bounds, start)
            if at % 2 == 1 or bisect_left(bounds, stop) > at:
                return f"tokens {tokens} of group {block.group}, layers {block.layers}, heads {block.heads} came twice"
        return None

    def add(self, block: Block, tokens: Range) -> None:
        """A block without a `problem`."""
        for bounds in (self._bounds[cell] for cell in cells(block)):
            at, end = bisect_left(bounds, tokens[0]), bisect_right(bounds, tokens[1])
            bounds[at:end] = [bound for bound in tokens if bound not in bounds[at:end]]

    @property
    def complete(self) -> bool:
        return all(bounds == [*self._tokens] for bounds in self._bounds.values())


NOTHING = Coverage((), 0, 0)  # is to come


def cells(block: Block) -> Iterator[Cell]:
    """Its (group, layer, head)."""
    return product((block.group,), range(*block.layers), range(*block.heads))
