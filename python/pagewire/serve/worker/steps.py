"""The two kinds of work: a step over prompts and a step over running requests, and how requests leave.

A failing forward fails the requests of its batch and nothing else.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import AcceleratorError

from pagewire.net.channel import ChannelClosed
from pagewire.serve.messages import Failed, Finished
from pagewire.serve.worker.engine import RequestState, Tokens, next_chunks
from pagewire.serve.worker.timeline import now_us

if TYPE_CHECKING:
    from pagewire.serve.worker.worker import Worker

FATAL = (ChannelClosed, AcceleratorError)  # a GPU that has failed fails all that follows: another process may do better
MAX_DESCRIPTION = 1000  # characters of an exception that a client is told

Ending = Finished | Failed  # the last word on a request
Left = list[tuple[RequestState, Ending | None]]  # None: it goes on to decode


def describe(error: Exception) -> str:
    """For the client of a request that an exception ended."""
    text = f"{type(error).__name__}: {error}"[:MAX_DESCRIPTION]
    return text.encode("utf-8", "replace").decode()  # a file name in it need not be text


class _Work:
    """Requests that get one kind of forward, first come first."""

    def __init__(self, worker: "Worker") -> None:
        self._worker = worker
        self.requests: list[RequestState] = []

    def _forward(self, batch: list[RequestState], queue: str, forward: Callable[[], Tokens]) -> tuple[Tokens, Left]:
        """Its tokens, or the ends of all when it failed. queue: the span until a request's first one."""
        start_us = now_us()
        for request in batch:
            if not request.started_us:
                request.started_us = start_us
                self._worker.timeline.add(queue, request.since_us, start_us, request.id)
        try:
            return forward(), []
        except FATAL:
            raise
        except Exception as error:
            return {}, [(request, Failed(request.id, describe(error))) for request in batch]


class Prefilling(_Work):
    """Their prompts are being computed."""

    def step(self) -> Left:
        """One forward over at most prefill_chunk prompt tokens; a complete prompt's first token."""
        worker, start_us = self._worker, now_us()
        chunks = next_chunks(self.requests, worker.config.prefill_chunk)
        tokens, left = self._forward(
            [chunk.request for chunk in chunks], "queue_p",
            lambda: worker.engine.prefill(chunks, lambda layer: worker.on_layer(layer, chunks)),
        )  # fmt: skip
        end_us = now_us()
        for chunk in chunks if not left else ():
            worker.timeline.add("prefill_chunk", start_us, end_us, chunk.request.id, start=chunk.start, stop=chunk.stop)
        for request, token_id in tokens.items():
            if request not in self.requests:
                continue  # dropped while it was computed
            worker.timeline.add("prefill", request.started_us, end_us, request.id, tokens=request.prompt_len)
            request.since_us, request.started_us = end_us, 0
            self.requests.remove(request)
            left.append((request, worker.emit(request, token_id)))
        return left


class Decoding(_Work):
    """They get one token a step."""

    def step(self) -> Left:
        """One forward over at most max_batch_size requests; those that ended with it."""
        worker, start_us = self._worker, now_us()
        batch = self.requests[: worker.config.max_batch_size]
        tokens, left = self._forward(
            batch, "queue_d", lambda: dict(zip(batch, worker.engine.decode(batch, worker.on_layer), strict=True))
        )
        if not left:
            worker.timeline.add("decode_step", start_us, batch_size=len(batch))
        endings = [(request, worker.emit(request, token)) for request, token in tokens.items()]
        left += [(request, ending) for request, ending in endings if ending]
        for request, ending in left:
            worker.timeline.add("decode", request.started_us, None, request.id, tokens=len(request.output))
            if isinstance(ending, Finished):
                worker.engine.record(request, "decode", request.logits, request.output)
        return left
