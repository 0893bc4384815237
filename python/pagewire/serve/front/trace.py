"""One bounded list of events behind /debug/requests and /debug/trace."""

from collections import OrderedDict, deque
from typing import Any

import msgspec

from pagewire.serve.messages import Event

MAX_EVENTS_PER_REQUEST = 512
PIDS = {"front": 1, "prefill": 2, "decode": 3, "colocated": 4}  # tracks of the trace, not process ids


class EventLog:
    """The last `max_requests` requests' events, and as many again that belong to no request (decode steps)."""

    def __init__(self, max_requests: int = 256, max_steps: int = 16384) -> None:
        self._max_requests = max_requests
        self._requests: OrderedDict[str, list[Event]] = OrderedDict()
        self._steps: deque[Event] = deque(maxlen=max_steps)

    def add(self, event: Event) -> None:
        if not event.request_id:
            self._steps.append(event)
            return
        if event.request_id not in self._requests:
            self._requests[event.request_id] = []
            if len(self._requests) > self._max_requests:
                self._requests.popitem(last=False)
        events = self._requests[event.request_id]
        if len(events) < MAX_EVENTS_PER_REQUEST:
            events.append(event)

    def requests(self) -> list[dict[str, Any]]:
        """Newest first: the events of each request in time order, and microseconds per phase."""
        found = []
        for request_id, events in reversed(self._requests.items()):
            phases: dict[str, int] = {}
            for event in events:
                phases[event.name] = phases.get(event.name, 0) + event.duration_us
            ordered = sorted(events, key=lambda event: event.start_us)
            found.append({"request_id": request_id, "phases_us": phases, "events": ordered})
        return found

    def chrome_trace(self) -> bytes:
        """Chrome's JSON trace format, which Perfetto reads: a process per role, a lane per phase."""
        events = [event for events in self._requests.values() for event in events] + list(self._steps)
        events.sort(key=lambda event: event.start_us)
        rows: list[dict[str, Any]] = []
        lanes: dict[tuple[str, str], list[int]] = {}  # (role, name) -> the end of each lane's last span
        tids: dict[tuple[str, str, int], int] = {}
        for event in events:
            ends = lanes.setdefault((event.role, event.name), [])
            # spans that overlap (two requests in one phase) go to lanes of their own
            lane = next((i for i, end in enumerate(ends) if end <= event.start_us), len(ends))
            ends[lane : lane + 1] = [event.start_us + event.duration_us]
            tid = tids.setdefault((event.role, event.name, lane), len(tids) + 1)
            args = {**event.args, "request_id": event.request_id} if event.request_id else event.args
            rows.append(
                {
                    "name": event.name,
                    "cat": event.role,
                    "pid": PIDS.get(event.role, 0),
                    "tid": tid,
                    "ts": event.start_us,
                    "args": args,
                }
                | ({"ph": "X", "dur": event.duration_us} if event.duration_us else {"ph": "i", "s": "t"})
            )
        for role in {role for role, _, _ in tids}:
            rows.append({"ph": "M", "name": "process_name", "pid": PIDS.get(role, 0), "tid": 0, "args": {"name": role}})
        for (role, name, lane), tid in tids.items():
            rows.append(
                {
                    "ph": "M",
                    "name": "thread_name",
                    "pid": PIDS.get(role, 0),
                    "tid": tid,
                    "args": {"name": f"{name} {lane + 1}" if lane else name},
                }
            )
        return msgspec.json.encode({"traceEvents": rows, "displayTimeUnit": "ms"})
