"""Prometheus metrics. Everything but the token times comes from the workers' events and gauges."""

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from pagewire.serve.messages import Event, Gauges

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)

# The events that are a phase of a request, by histogram and label.
_QUEUES = ("queue_p", "queue_d")
_TRANSFERS = {"transfer_total": "total", "transfer_late": "transfer_late", "join_wait": "join_wait"}


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter, gauge = partial(Counter, registry=self.registry), partial(Gauge, registry=self.registry)
        seconds = partial(Histogram, buckets=_SECONDS, registry=self.registry)
        outcomes = "Ended choices: stop, length, cancelled, failed; refused bodies: rejected"
        self.requests = counter("pagewire_requests", outcomes, ["outcome"])
        self.prompt_tokens = counter("pagewire_prompt_tokens", "Prompt tokens of answered choices")
        self.output_tokens = counter("pagewire_output_tokens", "Tokens generated")
        self.ttft = seconds("pagewire_time_to_first_token_seconds", "From the body's arrival to the first token")
        self.inter_token = seconds("pagewire_inter_token_seconds", "Between two tokens of one choice")
        self.queue = seconds("pagewire_queue_seconds", "Waiting in P (queue_p) and in D (queue_d)", ["stage"])
        self.prefill = seconds("pagewire_prefill_seconds", "A prompt's forwards")
        parts = "total; from P's last forward to COMMIT (transfer_late); from there to D's ACK (join_wait)"
        self.transfer = seconds("pagewire_kv_transfer_seconds", f"A handoff: {parts}", ["part"])
        self.kv_bytes = counter("pagewire_kv_transfer_bytes", "KV bytes moved from P to D")
        pages = "Pages by owner; free + active + cached + leased == total"
        self.pages = gauge("pagewire_pages", pages, ["role", "state"])
        self.running = gauge("pagewire_running_requests", "Requests being computed", ["role"])
        self.waiting = gauge("pagewire_waiting_requests", "Requests waiting in a model process", ["role"])
        self.inflight = gauge("pagewire_inflight_requests", "Choices admitted and not yet ended")
        self.ready = gauge("pagewire_ready", "1 when a whole pair can answer")
        lost = "Attempts made anew because a process or a transfer was lost"
        self.recovered = gauge("pagewire_recovered_attempts", lost)
        self.restarts = gauge("pagewire_restarts", "Times a model process was started again")

    def on_event(self, event: Event) -> None:
        seconds = event.duration_us / 1e6
        if event.name in _QUEUES:
            self.queue.labels(event.name).observe(seconds)
        elif event.name in _TRANSFERS:
            self.transfer.labels(_TRANSFERS[event.name]).observe(seconds)
            self.kv_bytes.inc(int(event.args.get("bytes", 0)))
        elif event.name == "prefill":
            self.prefill.observe(seconds)

    def on_gauges(self, role: str, gauges: Gauges) -> None:
        for state, count in gauges.num_pages.items():
            self.pages.labels(role, state).set(count)
        self.running.labels(role).set(gauges.num_running)
        self.waiting.labels(role).set(gauges.num_waiting)

    def forget(self, role: str) -> None:
        """Its gauges are of a process that is gone."""
        for gauge in (self.running, self.waiting, self.pages):
            gauge.remove_by_labels({"role": role})

    def render(self) -> bytes:
        return generate_latest(self.registry)
