"""The spans of one process, as `messages.Event`s waiting to be sent."""

import time

from pagewire.serve.messages import Event, Role


def now_us() -> int:
    """CLOCK_MONOTONIC: comparable between the processes of one host."""
    return time.monotonic_ns() // 1000


class Timeline:
    def __init__(self, role: Role) -> None:
        self._role = role
        self._events: list[Event] = []

    def add(
        self, name: str, start_us: int, end_us: int | None = None, request_id: str = "", **args: int | float | str
    ) -> None:
        """A span from `start_us` to `end_us`, by default to now."""
        duration_us = (now_us() if end_us is None else end_us) - start_us
        self._events.append(Event(name, self._role, start_us, duration_us, request_id, args))

    def take(self) -> list[Event]:
        events, self._events = self._events, []
        return events
