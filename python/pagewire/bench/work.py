"""What a case becomes on a device: tensors, our own call, and the check that comes before any timing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from pagewire.bench.cases import Case


@dataclass(frozen=True)
class Contender:
    """One way to do the work. `call(copy)` is timed; `before(copy)` is not; what `call` returns is what is checked."""

    name: str
    call: Callable[[int], Any]
    before: Callable[[int], None] | None = None
    syncs: bool = False  # the call itself waits for the device
    version: str = ""

    def once(self, copy: int) -> Any:
        """A call with what comes before it, untimed."""
        if self.before is not None:
            self.before(copy)
        return self.call(copy)


class Verdict(NamedTuple):
    ok: bool
    error: float  # relative to the reference, Frobenius norm; moves: the share of wrong values
    reason: str = ""


class DoesNotFit(Exception):
    """The case needs more memory than there is; the message has both figures."""


class Work(ABC):
    case: Case
    copies: int  # sets of buffers a call can be pointed at

    @abstractmethod
    def ours(self, backend: str) -> Contender:
        """The public call, on the named backend."""

    @abstractmethod
    def check(self, contender: Contender) -> Verdict:
        """Run it once on copy 0 and compare with the reference; ours by the tests' rule, peers by their precision."""
