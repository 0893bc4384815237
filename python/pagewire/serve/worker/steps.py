"""The two kinds of work: a step over prompts and a step over running requests, and how requests leave.

A request leaves a step with a reason: "" it goes on to the next phase, "stop" or "length" it is complete,
anything else says why it failed. A failing forward fails the requests of its batch and nothing else.
"""

from collections.abc import Callable

from pagewire.serve.channel import ChannelClosed
from pagewire.serve.worker.engine import PromptChunk, RequestState, next_chunks
from pagewire.serve.worker.timeline import now_us
from pagewire.serve.worker.worker import Worker

COMPLETE = ("stop", "length")
NAN = "the model gave NaN"
Left = list[tuple[RequestState, str]]


def describe(error: Exception) -> str:
    """For the client of a request that an exception ended."""
    text = f"{type(error).__name__}: {error}"
    return text.encode("utf-8", "replace").decode()  # a file name in it need not be text


class Prefilling:
    """Requests whose prompts are being computed, first come first: P's and the colocated process's."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.requests: list[RequestState] = []

    def step(self, on_layer: Callable[[int, list[PromptChunk]], None] | None = None) -> Left:
        """One forward over at most prefill_chunk prompt tokens; a complete prompt's first token."""
        worker = self._worker
        chunks = next_chunks(self.requests, worker.config.prefill_chunk)
        start_us = now_us()
        for chunk in chunks:
            request = chunk.request
            if not request.started_us:
                request.started_us = start_us
                worker.timeline.add("queue_p", request.submitted_us, start_us, request.id)
        callback = (lambda layer: on_layer(layer, chunks)) if on_layer else None
        try:
            first_tokens = worker.engine.prefill(chunks, callback)
        except ChannelClosed:
            raise
        except Exception as error:
            return self._leave([(chunk.request, describe(error)) for chunk in chunks])
        end_us = now_us()
        for chunk in chunks:
            args = {"start": chunk.start, "stop": chunk.stop}
            worker.timeline.add("prefill_chunk", start_us, end_us, chunk.request.id, **args)
        left = []
        for request, token_id in first_tokens.items():
            if request not in self.requests:
                continue  # dropped while it was computed
            args = {"tokens": request.prompt_len}
            worker.timeline.add("prefill", request.started_us, end_us, request.id, **args)
            request.computed_us = end_us
            left.append((request, NAN if token_id is None else worker.emit(request, token_id)))
        return self._leave(left)

    def _leave(self, left: Left) -> Left:
        for request, _ in left:
            if request in self.requests:
                self.requests.remove(request)
        return left


class Decoding:
    """Requests that get one token a step, first come first: D's and the colocated process's."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.requests: list[RequestState] = []

    def step(self) -> Left:
        """One forward over at most max_batch_size requests."""
        worker = self._worker
        batch = self.requests[: worker.config.max_batch_size]
        start_us = now_us()
        for request in batch:
            if not request.decoded_us:
                request.decoded_us = start_us
                worker.timeline.add("queue_d", request.computed_us, start_us, request.id)
        try:
            token_ids = worker.engine.decode(batch)
        except Exception as error:
            return self._leave([(request, describe(error)) for request in batch])
        worker.timeline.add("decode_step", start_us, batch_size=len(batch))
        left = []
        for request, token_id in zip(batch, token_ids, strict=True):
            reason = NAN if token_id is None else worker.emit(request, token_id)
            if reason:
                left.append((request, reason))
        return self._leave(left)

    def _leave(self, left: Left) -> Left:
        for request, reason in left:
            self.requests.remove(request)
            args = {"tokens": len(request.output)}
            self._worker.timeline.add("decode", request.decoded_us, None, request.id, **args)
            if reason in COMPLETE:
                self._worker.engine.record_decode(request)
        return left
