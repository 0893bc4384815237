"""One bounded list of events behind /debug/requests and /debug/trace."""

from collections import Counter, OrderedDict, deque
from typing import Any

import msgspec

from pagewire.serve.messages import Event

MAX_REQUESTS, MAX_EVENTS_PER_REQUEST, MAX_STEPS = 256, 512, 16384
TRACKS = ("front", "prefill", "decode", "colocated")  # of the trace, from 1; others follow as they appear


class EventLog:
    """The last requests' events, and those of the last steps, which belong to no request."""

    def __init__(self) -> None:
        self._requests: OrderedDict[str, list[Event]] = OrderedDict()
        self._steps: deque[Event] = deque(maxlen=MAX_STEPS)

    def add(self, event: Event) -> None:
        if not event.request_id:
            self._steps.append(event)
            return
        events = self._requests.setdefault(event.request_id, [])
        if len(self._requests) > MAX_REQUESTS:
            self._requests.popitem(last=False)
        if len(events) < MAX_EVENTS_PER_REQUEST:
            events.append(event)

    def requests(self) -> list[dict[str, Any]]:
        """Newest first: the events of each request in time order, and microseconds per phase."""
        found = []
        for request_id, events in reversed(self._requests.items()):
            phases: Counter[str] = Counter()
            for event in events:
                phases[event.name] += event.duration_us
            ordered = sorted(events, key=lambda event: event.start_us)
            found.append({"request_id": request_id, "phases_us": phases, "events": ordered})
        return found

    def chrome_trace(self) -> bytes:
        """Chrome's JSON trace format, which Perfetto reads: a process per worker, a lane per phase."""
        events = [event for events in self._requests.values() for event in events] + list(self._steps)
        events.sort(key=lambda event: event.start_us)
        rows: list[dict[str, Any]] = []
        ends: dict[tuple[str, str], list[int]] = {}  # (role, name) -> the end of each lane's last span
        tids: dict[tuple[str, str, int], int] = {}
        pids = {role: i for i, role in enumerate(TRACKS, 1)}  # not process ids
        for event in events:
            # spans that overlap (two requests in one phase) go to lanes of their own
            lanes = ends.setdefault((event.role, event.name), [])
            lane = next((i for i, end in enumerate(lanes) if end <= event.start_us), len(lanes))
            lanes[lane : lane + 1] = [event.start_us + event.duration_us]
            tid = tids.setdefault((event.role, event.name, lane), len(tids) + 1)
            args = {**event.args, "request_id": event.request_id} if event.request_id else event.args
            kind = {"ph": "X", "dur": event.duration_us} if event.duration_us else {"ph": "i", "s": "t"}
            pid = pids.setdefault(event.role, len(pids) + 1)
            place = {"cat": event.role, "pid": pid, "tid": tid, "ts": event.start_us}
            rows.append({"name": event.name, "args": args, **place, **kind})

        def named(what: str, role: str, tid: int, name: str) -> dict[str, Any]:
            return {"ph": "M", "name": what, "pid": pids[role], "tid": tid, "args": {"name": name}}

        rows += [named("process_name", role, 0, role) for role in {role for role, _, _ in tids}]
        for (role, name, lane), tid in tids.items():
            rows.append(named("thread_name", role, tid, f"{name} {lane + 1}" if lane else name))
        return msgspec.json.encode({"traceEvents": rows, "displayTimeUnit": "ms"})
