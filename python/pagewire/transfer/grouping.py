"""Which layers of which tokens of a request leave together, as one chunk."""

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from pagewire.transfer.frames import Block, Range

IDLE_CHUNK_BYTES = 1 << 20  # what is worth a chunk of its own while nothing else is on its way

Owner = TypeVar("Owner")
Piece = tuple[Owner, Block, Range]


class Grouping(Generic[Owner]):
    """Consecutive layers of a token range are one piece, of at most `max_bytes`, unless a layer alone is more:
    then its tokens are split. A piece is full when the next layer would not fit or there is none.
    """

    def __init__(self, max_bytes: int, num_bytes: Callable[[Block, int], int]) -> None:
        """num_bytes: of a block and a number of tokens; one token of one layer is no more than max_bytes."""
        self._max_bytes = max_bytes
        self._num_bytes = num_bytes
        self._open: dict[tuple[Owner, int, Range], Block] = {}  # of a group's tokens, with the layers so far
        self._full: deque[Piece[Owner]] = deque()

    def add(self, owner: Owner, block: Block, layer: int, start: int, stop: int) -> None:
        """Tokens [start, stop) of one of the block's layers, each layer of them in its turn."""
        max_tokens = self._max_bytes // self._num_bytes(Block(block.group, layer, layer + 1, *block.heads), 1)
        for at in range(start, stop, max_tokens):
            tokens = at, min(at + max_tokens, stop)
            key = owner, block.group, tokens
            begun = self._open.get(key)
            assert begun is None or begun.layer_stop == layer
            first = begun.layer_start if begun else layer
            self._open[key] = Block(block.group, first, layer + 1, *block.heads)
            with_next = Block(block.group, first, layer + 2, *block.heads)
            if layer + 1 == block.layer_stop or self._num_bytes(with_next, tokens[1] - at) > self._max_bytes:
                self._full.append((owner, self._open.pop(key), tokens))

    def take(self, idle: bool) -> Piece[Owner] | None:
        """The next that may leave. `idle`: so may one that is not full, if it is worth it."""
        if self._full:
            return self._full.popleft()
        for (owner, group, tokens), block in self._open.items() if idle else ():
            if self._num_bytes(block, tokens[1] - tokens[0]) >= IDLE_CHUNK_BYTES:
                return owner, self._open.pop((owner, group, tokens)), tokens
        return None

    def drop(self, owner: Owner) -> None:
        self._open = {key: block for key, block in self._open.items() if key[0] is not owner}
        self._full = deque(piece for piece in self._full if piece[0] is not owner)

    def holds(self, owner: Owner) -> bool:
        return any(of is owner for of, _, _ in (*self._full, *self._open))
