"""Which layers of which tokens of a request leave together, as one chunk."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Generic, TypeVar

from pagewire.transfer.frames import Range

IDLE_CHUNK_BYTES = 1 << 20  # what is worth a chunk of its own while nothing else is on its way

Owner = TypeVar("Owner")


@dataclass(eq=False)
class Group(Generic[Owner]):
    owner: Owner
    tokens: Range
    layer_start: int
    layer_stop: int

    @property
    def layers(self) -> Range:
        return self.layer_start, self.layer_stop


class Grouping(Generic[Owner]):
    """Consecutive layers of a token range are one group, of at most `max_bytes`, unless a layer alone is more:
    then its tokens are split. A group is full when the next layer would not fit or there is none.
    """

    def __init__(self, num_layers: int, max_tokens: int, max_bytes: int, num_bytes: Callable[[int, int], int]) -> None:
        """max_tokens: of one layer in max_bytes. num_bytes: of (layers, tokens)."""
        self._num_layers = num_layers
        self._max_tokens = max_tokens
        self._max_bytes = max_bytes
        self._num_bytes = num_bytes
        self._open: dict[tuple[Owner, Range], Group[Owner]] = {}
        self._full: deque[Group[Owner]] = deque()

    def add(self, owner: Owner, layer: int, start: int, stop: int) -> None:
        """Tokens [start, stop) of the layer, each layer of them in its turn."""
        for at in range(start, stop, self._max_tokens):
            tokens = at, min(at + self._max_tokens, stop)
            group = self._open.setdefault((owner, tokens), Group(owner, tokens, layer, layer))
            assert group.layer_stop == layer
            group.layer_stop = layer + 1
            if layer + 1 == self._num_layers or self._bytes(group, more=1) > self._max_bytes:
                self._full.append(self._open.pop((owner, tokens)))

    def take(self, idle: bool) -> Group[Owner] | None:
        """The next that may leave. `idle`: so may one that is not full, if it is worth it."""
        if self._full:
            return self._full.popleft()
        worth = (g for g in self._open.values() if self._bytes(g) >= IDLE_CHUNK_BYTES) if idle else iter(())
        group = next(worth, None)
        return self._open.pop((group.owner, group.tokens)) if group else None

    def drop(self, owner: Owner) -> None:
        self._open = {key: group for key, group in self._open.items() if group.owner is not owner}
        self._full = deque(group for group in self._full if group.owner is not owner)

    def holds(self, owner: Owner) -> bool:
        return any(group.owner is owner for group in chain(self._full, self._open.values()))

    def _bytes(self, group: Group[Owner], more: int = 0) -> int:
        start, stop = group.tokens
        return self._num_bytes(group.layer_stop - group.layer_start + more, stop - start)
