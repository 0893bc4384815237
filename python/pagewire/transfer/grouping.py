"""Which layers of which tokens of a request leave together, as one chunk."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Generic, TypeVar

from pagewire.transfer.frames import Block, Range

IDLE_CHUNK_BYTES = 1 << 20  # what is worth a chunk of its own while nothing else is on its way

Owner = TypeVar("Owner")


@dataclass(eq=False)
class Piece(Generic[Owner]):
    owner: Owner
    tokens: Range
    of: Block  # of which it has some of the layers
    layer_start: int
    layer_stop: int

    @property
    def block(self) -> Block:
        return Block(self.of.group, self.layer_start, self.layer_stop, *self.of.heads)


class Grouping(Generic[Owner]):
    """Consecutive layers of a token range are one piece, of at most `max_bytes`, unless a layer alone is more:
    then its tokens are split. A piece is full when the next layer would not fit or there is none.
    """

    def __init__(self, max_bytes: int, num_bytes: Callable[[int, int, int, int], int]) -> None:
        """num_bytes: of (group, layers, heads, tokens); one token of one layer is no more than max_bytes."""
        self._max_bytes = max_bytes
        self._num_bytes = num_bytes
        self._open: dict[tuple[Owner, int, Range], Piece[Owner]] = {}
        self._full: deque[Piece[Owner]] = deque()

    def add(self, owner: Owner, block: Block, layer: int, start: int, stop: int) -> None:
        """Tokens [start, stop) of one of the block's layers, each layer of them in its turn."""
        max_tokens = self._max_bytes // self._num_bytes(block.group, 1, block.head_stop - block.head_start, 1)
        for at in range(start, stop, max_tokens):
            tokens = at, min(at + max_tokens, stop)
            key = owner, block.group, tokens
            piece = self._open.get(key)
            if piece is None:
                piece = self._open[key] = Piece(owner, tokens, block, layer, layer)
            assert piece.layer_stop == layer
            piece.layer_stop = layer + 1
            if layer + 1 == block.layer_stop or self._bytes(piece, more=1) > self._max_bytes:
                self._full.append(self._open.pop(key))

    def take(self, idle: bool) -> Piece[Owner] | None:
        """The next that may leave. `idle`: so may one that is not full, if it is worth it."""
        if self._full:
            return self._full.popleft()
        worth = (p for p in self._open.values() if self._bytes(p) >= IDLE_CHUNK_BYTES) if idle else iter(())
        piece = next(worth, None)
        return self._open.pop((piece.owner, piece.of.group, piece.tokens)) if piece else None

    def drop(self, owner: Owner) -> None:
        self._open = {key: piece for key, piece in self._open.items() if piece.owner is not owner}
        self._full = deque(piece for piece in self._full if piece.owner is not owner)

    def holds(self, owner: Owner) -> bool:
        return any(piece.owner is owner for piece in chain(self._full, self._open.values()))

    def _bytes(self, piece: Piece[Owner], more: int = 0) -> int:
        (start, stop), of = piece.tokens, piece.of
        num_layers = piece.layer_stop - piece.layer_start + more
        return self._num_bytes(of.group, num_layers, of.head_stop - of.head_start, stop - start)
