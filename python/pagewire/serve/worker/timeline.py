"""The spans of one process, as `messages.Event`s waiting to be sent."""

import time
from collections import deque

from pagewire.serve.messages import Arg, Event

MAX_EVENTS = 4096  # that wait to be sent; the oldest go first
MAX_TEXT = 512  # characters of an argument


def now_us() -> int:
    """CLOCK_MONOTONIC: comparable between the processes of one host."""
    return time.monotonic_ns() // 1000


class Timeline:
    def __init__(self) -> None:
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._num_dropped = 0

    def __len__(self) -> int:
        return len(self._events)

    def add(self, name: str, start_us: int, end_us: int | None = None, request_id: str = "", **args: Arg) -> None:
        """A span from `start_us` to `end_us`, by default to now."""
        duration_us = (now_us() if end_us is None else end_us) - start_us
        short = {key: value[:MAX_TEXT] if isinstance(value, str) else value for key, value in args.items()}
        self._num_dropped += len(self._events) == MAX_EVENTS
        self._events.append(Event(name, start_us, duration_us, request_id, short))

    def take(self, max_events: int) -> list[Event]:
        """The oldest, and how many even older ones there was no room for."""
        taken = [self._events.popleft() for _ in range(min(max_events, len(self._events)))]
        if self._num_dropped:
            taken.append(Event("events_dropped", now_us(), args={"count": self._num_dropped}))
            self._num_dropped = 0
        return taken
