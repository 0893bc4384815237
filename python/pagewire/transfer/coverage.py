"""Which tokens of which layer and kv head have arrived."""

from bisect import bisect_left

from pagewire.transfer.frames import Range


class Coverage:
    """Exact coverage of layers x heads x [token_start, token_stop): none twice, none outside."""

    def __init__(self, num_layers: int, num_heads: int, token_start: int, token_stop: int) -> None:
        self._num_heads = num_heads
        self._num_layers = num_layers
        self._range = (token_start, token_stop)
        # per (layer, head): disjoint ranges in order, neighbours joined
        self._ranges: list[list[Range]] = [[] for _ in range(num_layers * num_heads)]

    def problem(self, layers: Range, heads: Range, tokens: Range) -> str | None:
        """Why the block cannot be added; None: it can."""
        start, stop = tokens
        if not (0 <= layers[0] < layers[1] <= self._num_layers):
            return f"layers {layers} outside [0, {self._num_layers})"
        if not (0 <= heads[0] < heads[1] <= self._num_heads):
            return f"heads {heads} outside [0, {self._num_heads})"
        if not (self._range[0] <= start < stop <= self._range[1]):
            return f"tokens {tokens} outside the reserved {self._range}"
        if any(_overlaps(ranges, start, stop) for ranges in self._of(layers, heads)):
            return f"tokens {tokens} of layers {layers}, heads {heads} came twice"
        return None

    def add(self, layers: Range, heads: Range, tokens: Range) -> None:
        """A block without a `problem`."""
        for ranges in self._of(layers, heads):
            _insert(ranges, *tokens)

    @property
    def complete(self) -> bool:
        return all(ranges == [self._range] for ranges in self._ranges)

    def _of(self, layers: Range, heads: Range) -> list[list[Range]]:
        return [self._ranges[layer * self._num_heads + head] for layer in range(*layers) for head in range(*heads)]


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
