"""Physical pages and who owns them: every page is free, active, cached or leased, and reference counts are separate."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from typing import Any, Literal

from pagewire.scalars import integer

State = Literal["free", "active", "cached", "leased"]
# ids: a list, tuple, set, range, numpy array or tensor of integers (a tensor on a GPU is waited for)
Pages = Any
STATES: tuple[State, ...] = ("free", "active", "cached", "leased")


class OutOfPages(RuntimeError):
    """Fewer pages are free than were asked for; nothing was taken."""


class PageAllocator:
    """Hands out page ids `0 .. num_pages - 1`. `free + active + cached + leased == num_pages` at all times.

    - free: on offer. active: owned by `ref_count(page) >= 1` requests.
    - cached: owned by nobody, contents kept for reuse until evicted.
    - leased: owned by nobody but a transfer may still touch it; not on offer until the lease ends.

    Every call is all or nothing: it raises before it changes anything. A page id is any integer, of Python, numpy or a
    tensor; no call takes a page twice.

    >>> pages = PageAllocator(4)
    >>> pages.alloc(3)
    [0, 1, 2]
    >>> pages.share([0]); pages.free([0, 1, 2]); pages.counts()
    {'free': 3, 'active': 1, 'cached': 0, 'leased': 0}
    """

    def __init__(self, num_pages: int) -> None:
        num_pages = integer("num_pages", num_pages, least=0)
        self.num_pages = num_pages
        self._free: deque[int] = deque(range(num_pages))
        self._state: list[State] = ["free"] * num_pages
        self._refs = [0] * num_pages
        self._counts: Counter[str] = Counter(free=num_pages)

    @property
    def num_free(self) -> int:
        return self._counts["free"]

    def counts(self) -> dict[State, int]:
        """Pages per state; the values add up to `num_pages`."""
        return {state: self._counts[state] for state in STATES}

    def ref_count(self, page: int) -> int:
        (page,) = self._check([page], None, "ref_count")
        return self._refs[page]

    def state(self, page: int) -> State:
        (page,) = self._check([page], None, "state")
        return self._state[page]

    def alloc(self, num_pages: int) -> list[int]:
        """Take `num_pages` free pages, each with one reference. Raises OutOfPages when fewer are free."""
        num_pages = integer("alloc: num_pages", num_pages, least=0)
        if num_pages > self.num_free:
            raise OutOfPages(f"alloc: {num_pages} pages asked for, {self.num_free} of {self.num_pages} free")
        pages = [self._free.popleft() for _ in range(num_pages)]
        for page in pages:
            self._refs[page] = 1
            self._move(page, "active")
        return pages

    def share(self, pages: Pages) -> None:
        """Add one reference to each active page."""
        for page in self._check(pages, "active", "share"):
            self._refs[page] += 1

    def free(self, pages: Pages, *, to: State = "free") -> None:
        """Drop one reference of each active page; at zero it becomes `to`: free, cached or leased."""
        if to == "active" or to not in STATES:
            raise ValueError(f"free: expected to='free', 'cached' or 'leased', got {to!r}")
        for page in self._check(pages, "active", "free"):
            self._refs[page] -= 1
            if self._refs[page] == 0:
                self._move(page, to)

    def revive(self, pages: Pages) -> None:
        """Cached pages become active again, each with one reference."""
        for page in self._check(pages, "cached", "revive"):
            self._refs[page] = 1
            self._move(page, "active")

    def evict(self, pages: Pages) -> None:
        """Cached pages become free; their contents are given up."""
        for page in self._check(pages, "cached", "evict"):
            self._move(page, "free")

    def end_lease(self, pages: Pages) -> None:
        """Leased pages become free: the transfer is known to be drained."""
        for page in self._check(pages, "leased", "end_lease"):
            self._move(page, "free")

    def _move(self, page: int, to: State) -> None:
        self._counts[self._state[page]] -= 1
        self._counts[to] += 1
        self._state[page] = to
        if to == "free":
            self._free.append(page)

    def _check(self, pages: Pages, state: State | None, verb: str) -> list[int]:
        """The page ids as ints, each named once and in `state`."""
        # of a tensor or array in one step: its elements are tensors, which compare by value and hash by identity
        given: Any = pages.tolist() if hasattr(pages, "tolist") else pages
        if not isinstance(given, Iterable) or isinstance(given, (str, bytes)):
            raise TypeError(f"{verb}: expected page ids, got {pages!r}")
        found = [integer(f"{verb}: a page id", page) for page in given]
        for page in found:
            if not 0 <= page < self.num_pages:
                raise ValueError(f"{verb}: expected page ids in [0, {self.num_pages}), got {page}")
            if state is not None and self._state[page] != state:
                raise ValueError(f"{verb}: page {page} is {self._state[page]}, expected {state}")
        if len(set(found)) != len(found):
            twice = Counter(found).most_common(1)[0][0]
            raise ValueError(f"{verb}: page {twice} is named twice in {found}")
        return found
