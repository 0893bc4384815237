"""What the HTTP handlers share: the model's name, its tokenizer, the model processes, and what they report."""

import time
from collections.abc import Callable
from typing import Protocol

from pagewire.serve.front.limits import Limits
from pagewire.serve.front.metrics import Metrics
from pagewire.serve.front.output import Detokenizer
from pagewire.serve.front.supervisor import Supervisor
from pagewire.serve.front.trace import EventLog
from pagewire.serve.messages import Events


class Tokenizer(Protocol):
    eos_token_ids: tuple[int, ...]

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...
    def render_chat(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str: ...


class Front:
    """`supervisor` is set once it exists: it reports events to this object."""

    supervisor: Supervisor

    def __init__(
        self, model: str, tokenizer: Tokenizer, detokenizer: Callable[[], Detokenizer], limits: Limits
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.detokenizer = detokenizer
        self.limits = limits
        self.metrics = Metrics()
        self.events = EventLog()
        self.num_inflight = 0
        self.created = int(time.time())

    def on_events(self, events: Events) -> None:
        for event in events.events:
            self.metrics.on_event(event)
            self.events.add(event)
