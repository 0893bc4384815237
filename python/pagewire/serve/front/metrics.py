"""Prometheus metrics. Everything but the token times comes from the workers' events and gauges."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from pagewire.serve.messages import Event, Gauges

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)

# The events that are a phase of a request, by histogram and label.
_QUEUES = ("queue_p", "queue_d")
_TRANSFERS = {"transfer_total": "total", "transfer_late": "transfer_late", "join_wait": "join_wait"}


class Metrics:
    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "pagewire_requests",
            "Ended choices: stop, length, cancelled, failed; refused bodies: rejected",
            ["outcome"],
            registry=registry,
        )
        self.prompt_tokens = Counter("pagewire_prompt_tokens", "Prompt tokens of answered choices", registry=registry)
        self.output_tokens = Counter("pagewire_output_tokens", "Tokens generated", registry=registry)
        self.ttft = Histogram(
            "pagewire_time_to_first_token_seconds",
            "From the body's arrival to the first token",
            buckets=_SECONDS,
            registry=registry,
        )
        self.inter_token = Histogram(
            "pagewire_inter_token_seconds", "Between two tokens of one choice", buckets=_SECONDS, registry=registry
        )
        self.queue = Histogram(
            "pagewire_queue_seconds",
            "Waiting in P (queue_p) and in D (queue_d)",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.prefill = Histogram("pagewire_prefill_seconds", "A prompt's forwards", buckets=_SECONDS, registry=registry)
        self.transfer = Histogram(
            "pagewire_kv_transfer_seconds",
            "A handoff: total; from P's last forward to COMMIT (transfer_late); from there to D's ACK (join_wait)",
            ["part"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.kv_bytes = Counter("pagewire_kv_transfer_bytes", "KV bytes moved from P to D", registry=registry)
        self.pages = Gauge(
            "pagewire_pages",
            "Pages by owner; free + active + cached + leased == total",
            ["role", "state"],
            registry=registry,
        )
        self.running = Gauge("pagewire_running_requests", "Requests being computed", ["role"], registry=registry)
        self.waiting = Gauge(
            "pagewire_waiting_requests", "Requests waiting in a model process", ["role"], registry=registry
        )
        self.inflight = Gauge("pagewire_inflight_requests", "Choices admitted and not yet ended", registry=registry)
        self.ready = Gauge("pagewire_ready", "1 when a whole pair can answer", registry=registry)
        self.recovered = Gauge(
            "pagewire_recovered_attempts",
            "Attempts made anew because a process or a transfer was lost",
            registry=registry,
        )
        self.restarts = Gauge("pagewire_restarts", "Times a model process was started again", registry=registry)

    def on_event(self, event: Event) -> None:
        seconds = event.duration_us / 1e6
        if event.name in _QUEUES:
            self.queue.labels(event.name).observe(seconds)
        elif event.name in _TRANSFERS:
            self.transfer.labels(_TRANSFERS[event.name]).observe(seconds)
            self.kv_bytes.inc(int(event.args.get("bytes", 0)))
        elif event.name == "prefill":
            self.prefill.observe(seconds)

    def on_gauges(self, gauges: Gauges) -> None:
        for state, count in gauges.num_pages.items():
            self.pages.labels(gauges.role, state).set(count)
        self.running.labels(gauges.role).set(gauges.num_running)
        self.waiting.labels(gauges.role).set(gauges.num_waiting)

    def forget(self, role: str) -> None:
        """Its gauges are of a process that is gone."""
        self.running.remove_by_labels({"role": role})
        self.waiting.remove_by_labels({"role": role})
        self.pages.remove_by_labels({"role": role})

    def render(self) -> bytes:
        return generate_latest(self.registry)
