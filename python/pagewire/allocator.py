"""Physical pages and who owns them: every page is free, active, cached or leased, and reference counts are separate."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from typing import Literal

State = Literal["free", "active", "cached", "leased"]
STATES: tuple[State, ...] = ("free", "active", "cached", "leased")


class OutOfPages(RuntimeError):
    """Fewer pages are free than were asked for; nothing was taken."""


class PageAllocator:
    """Hands out page ids `0 .. num_pages - 1`. `free + active + cached + leased == num_pages` at all times.

    - free: on offer. active: owned by `ref_count(page) >= 1` requests.
    - cached: owned by nobody, contents kept for reuse until evicted.
    - leased: owned by nobody but a transfer may still touch it; not on offer until the lease ends.

    Every call is all or nothing: it raises before it changes anything.

    >>> pages = PageAllocator(4)
    >>> pages.alloc(3)
    [0, 1, 2]
    >>> pages.share([0]); pages.free([0, 1, 2]); pages.counts()
    {'free': 3, 'active': 1, 'cached': 0, 'leased': 0}
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 0:
            raise ValueError(f"num_pages: expected >= 0, got {num_pages}")
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
        self._check([page], None, "ref_count")
        return self._refs[page]

    def state(self, page: int) -> State:
        self._check([page], None, "state")
        return self._state[page]

    def alloc(self, num_pages: int) -> list[int]:
        """Take `num_pages` free pages, each with one reference. Raises OutOfPages when fewer are free."""
        if num_pages < 0:
            raise ValueError(f"alloc: expected num_pages >= 0, got {num_pages}")
        if num_pages > self.num_free:
            raise OutOfPages(
                f"alloc: {num_pages} pages asked for, {self.num_free} of {self.num_pages} free"
            )
        pages = [self._free.popleft() for _ in range(num_pages)]
        for page in pages:
            self._refs[page] = 1
            self._move(page, "active")
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Add one reference to each active page."""
        pages = self._check(pages, "active", "share")
        for page in pages:
            self._refs[page] += 1

    def free(self, pages: Iterable[int], *, to: State = "free") -> None:
        """Drop one reference of each active page; at zero it becomes `to`: free, cached or leased."""
        if to == "active" or to not in STATES:
            raise ValueError(f"free: expected to='free', 'cached' or 'leased', got {to!r}")
        pages = self._check(pages, "active", "free")
        for page, times in Counter(pages).items():
            if times > self._refs[page]:
                raise ValueError(
                    f"free: page {page} has {self._refs[page]} references, {times} were to be dropped"
                )
        for page in pages:
            self._refs[page] -= 1
            if self._refs[page] == 0:
                self._move(page, to)

    def revive(self, pages: Iterable[int]) -> None:
        """Cached pages become active again, each with one reference."""
        for page in self._distinct(pages, "cached", "revive"):
            self._refs[page] = 1
            self._move(page, "active")

    def evict(self, pages: Iterable[int]) -> None:
        """Cached pages become free; their contents are given up."""
        for page in self._distinct(pages, "cached", "evict"):
            self._move(page, "free")

    def end_lease(self, pages: Iterable[int]) -> None:
        """Leased pages become free: the transfer is known to be drained."""
        for page in self._distinct(pages, "leased", "end_lease"):
            self._move(page, "free")

    def _move(self, page: int, to: State) -> None:
        self._counts[self._state[page]] -= 1
        self._counts[to] += 1
        self._state[page] = to
        if to == "free":
            self._free.append(page)

    def _distinct(self, pages: Iterable[int], state: State, verb: str) -> list[int]:
        pages = self._check(pages, state, verb)
        if len(set(pages)) != len(pages):
            raise ValueError(f"{verb}: a page is named twice in {pages}")
        return pages

    def _check(self, pages: Iterable[int], state: State | None, verb: str) -> list[int]:
        pages = list(pages)
        for page in pages:
            if not 0 <= page < self.num_pages:
                raise ValueError(f"{verb}: expected page ids in [0, {self.num_pages}), got {page}")
            if state is not None and self._state[page] != state:
                raise ValueError(f"{verb}: page {page} is {self._state[page]}, expected {state}")
        return pages
