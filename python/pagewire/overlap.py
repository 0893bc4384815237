"""Which memory a strided tensor covers: whether two of them, or one with itself, name the same byte. Exact.

Two views overlap if `sum(c_i * x_i) = t` has a solution with `0 <= x_i <= u_i`: one term for each dim of each view,
and one for the bytes of an element. Solved from the largest coefficient down, with what the rest can reach as the
bound; strides of real tensors are nested, so that hardly any choice is left (numpy's `shares_memory` works alike).
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from torch import Tensor

Span = tuple[int, int]  # byte addresses [start, stop)

_MOST_STEPS = 100_000  # beyond, two views are taken to overlap


def span(x: Tensor) -> Span:
    """From the first byte of `x` to behind its last; nothing for a tensor without elements or without memory."""
    if x.is_meta:
        return 0, 0
    start = x.data_ptr()
    if x.is_contiguous():
        return start, start + x.nbytes
    return start, start + x.element_size() * _reach(x.shape, x.stride())


@functools.lru_cache(maxsize=4096)
def _reach(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements from the first to behind the last."""
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))


class Room:
    """Of calls that differ in addresses only, once one was looked at closely: what is surely apart again."""

    def __init__(self) -> None:
        self._num_written = 0
        self._sizes: list[tuple[int, int]] = []  # (index among the tensors, bytes of the span), none of no bytes

    def learn(self, written: Sequence[Any], read: Sequence[Any]) -> None:
        """The first call has passed; what is no tensor counts for nothing."""
        spans = [span(x) if isinstance(x, Tensor) else (0, 0) for x in (*written, *read)]
        self._sizes = [(i, stop - start) for i, (start, stop) in enumerate(spans) if start < stop]
        self._num_written = sum(i < len(written) for i, _ in self._sizes)

    def surely(self, *tensors: Any) -> bool:
        """Whether the span of no written tensor meets another's; the tensors as they were learnt."""
        written: list[Span] = []
        for n, (index, size) in enumerate(self._sizes):
            start = tensors[index].data_ptr()
            stop = start + size
            for its_start, its_stop in written:
                if its_start < stop and start < its_stop:
                    return False
            if n < self._num_written:
                written.append((start, stop))
        return bool(written)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether both are the very same view."""
    return a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and a.shape == b.shape and _live(a) == _live(b)


def is_prefix(part: Tensor, whole: Tensor) -> bool:
    """Whether `part` is the first columns of the rows of `whole`, the way MLA keeps V within K."""
    return (
        part.data_ptr() == whole.data_ptr()
        and part.dtype == whole.dtype
        and part.shape[:-1] == whole.shape[:-1]
        and part.shape[-1] <= whole.shape[-1]
        and _live(part)[:-1] == _live(whole)[:-1]
        and whole.numel() > 0
        and not whole.is_meta
    )


def _live(x: Tensor) -> tuple[int, ...]:
    """Strides, 0 where the extent is 1: such a stride is never used."""
    return tuple(s if n > 1 else 0 for n, s in zip(x.shape, x.stride(), strict=True))


def meet(a: Span, b: Span) -> bool:
    return a[0] < b[1] and b[0] < a[1] and a[0] < a[1] and b[0] < b[1]


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether some byte belongs to both."""
    if not meet(span(a), span(b)):
        return False
    return _overlap(_terms(a), _terms(b), b.data_ptr() - a.data_ptr())


def overlaps_itself(x: Tensor) -> bool:
    """Whether two elements of `x` are the same memory, as in an expanded tensor."""
    return not x.is_contiguous() and _is_double(x.shape, x.stride())


@functools.lru_cache(maxsize=4096)
def _is_double(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    dims = sorted((s, n) for n, s in zip(shape, strides, strict=True) if n > 1)
    if 0 in shape:
        return False
    reached = 1
    for stride, n in dims:
        if stride < reached:
            return _overlaps_itself(tuple(dims))
        reached += stride * (n - 1)
    return False  # every stride is longer than all that the smaller ones reach


def _terms(x: Tensor) -> tuple[tuple[int, int], ...]:
    """(bytes, largest index) of each dim, and of the bytes of an element."""
    size = x.element_size()
    dims = ((s * size, n - 1) for n, s in zip(x.shape, x.stride(), strict=True) if n > 1)
    return (*dims, (1, size - 1))


@functools.lru_cache(maxsize=4096)
def _overlap(a: tuple[tuple[int, int], ...], b: tuple[tuple[int, int], ...], distance: int) -> bool:
    """a + indices = b + distance + indices; those of b counted from their end, to have one sign only."""
    bounds: dict[int, int] = {}
    for c, u in (*a, *b):
        bounds[c] = bounds.get(c, 0) + u
    target = distance + sum(c * u for c, u in b)
    return any(True for _ in _solutions(sorted(bounds.items(), reverse=True), target))


def _overlaps_itself(dims: tuple[tuple[int, int], ...]) -> bool:
    """Two index vectors that differ and reach the same place: another solution than equal ones."""
    terms = [(s, 2 * (n - 1)) for s, n in reversed(dims)]
    if any(s == 0 for s, _ in terms):
        return True
    found = _solutions(terms, sum(s * u // 2 for s, u in terms))
    return len(list(islice(found, 2))) == 2


def _solutions(terms: Sequence[tuple[int, int]], target: int) -> Iterator[tuple[int, ...] | None]:
    """Of sum(c * x) = target, 0 <= x <= u; terms (c, u) with c descending. None: given up, there may be one."""
    rest = [0]
    for c, u in reversed(terms):
        rest.append(rest[-1] + c * u)
    rest.reverse()  # rest[i]: what terms i.. can reach
    steps = 0

    def search(i: int, left: int) -> Iterator[tuple[int, ...] | None]:
        nonlocal steps
        if i == len(terms):
            if left == 0:
                yield ()
            return
        c, u = terms[i]
        if c == 0:
            yield from search(i + 1, left)
            return
        for x in range(max(0, -(-(left - rest[i + 1]) // c)), min(u, left // c) + 1):
            steps += 1
            if steps > _MOST_STEPS:
                yield None
                return
            for tail in search(i + 1, left - c * x):
                yield None if tail is None else (x, *tail)

    return search(0, target)


def merged(spans: Iterable[Span]) -> tuple[Span, ...]:
    """The spans, sorted, those that meet made one."""
    result: list[Span] = []
    for start, stop in sorted(s for s in spans if s[0] < s[1]):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(stop, result[-1][1]))
        else:
            result.append((start, stop))
    return tuple(result)


def touches(spans: Sequence[Span], other: Span) -> bool:
    """Whether `other` meets one of the `merged` spans."""
    at = bisect_right(spans, (other[1],))
    return at > 0 and spans[at - 1][1] > other[0] and other[0] < other[1]
