"""The two kinds of work: a step over prompts and a step over running requests, and how requests leave.

A failing forward fails the requests of its batch and nothing else.
"""

from typing import TYPE_CHECKING

from torch import AcceleratorError

from pagewire.net.channel import ChannelClosed
from pagewire.serve.messages import Failed, Finished
from pagewire.serve.worker.engine import RequestState, next_chunks
from pagewire.serve.worker.timeline import now_us

if TYPE_CHECKING:
    from pagewire.serve.worker.worker import Worker

FATAL = (ChannelClosed, AcceleratorError)  # a GPU that has failed fails all that follows: another process may do better
MAX_DESCRIPTION = 1000  # characters of an exception that a client is told

Ending = Finished | Failed  # the last word on a request
Prefilled = list[tuple[RequestState, Ending | None]]  # None: it goes on to decode
Ended = list[tuple[RequestState, Ending]]


def describe(error: Exception) -> str:
    """For the client of a request that an exception ended."""
    text = f"{type(error).__name__}: {error}"[:MAX_DESCRIPTION]
    return text.encode("utf-8", "replace").decode()  # a file name in it need not be text


class Prefilling:
    """Requests whose prompts are being computed, first come first."""

    def __init__(self, worker: "Worker") -> None:
        self._worker = worker
        self.requests: list[RequestState] = []

    def step(self) -> Prefilled:
        """One forward over at most prefill_chunk prompt tokens; a complete prompt's first token."""
        worker = self._worker
        chunks = next_chunks(self.requests, worker.config.prefill_chunk)
        start_us = now_us()
        for chunk in chunks:
            request = chunk.request
            if not request.started_us:
                request.started_us = start_us
                worker.timeline.add("queue_p", request.submitted_us, start_us, request.id)
        try:
            first_tokens = worker.engine.prefill(chunks, lambda layer: worker.on_layer(layer, chunks))
        except FATAL:
            raise
        except Exception as error:
            message = describe(error)
            return self._leave([(chunk.request, Failed(chunk.request.id, message)) for chunk in chunks])
        end_us = now_us()
        for chunk in chunks:
            args = {"start": chunk.start, "stop": chunk.stop}
            worker.timeline.add("prefill_chunk", start_us, end_us, chunk.request.id, **args)
        left: Prefilled = []
        for request, token_id in first_tokens.items():
            if request not in self.requests:
                continue  # dropped while it was computed
            args = {"tokens": request.prompt_len}
            worker.timeline.add("prefill", request.started_us, end_us, request.id, **args)
            request.computed_us = end_us
            left.append((request, worker.emit(request, token_id)))
        return self._leave(left)

    def _leave(self, left: Prefilled) -> Prefilled:
        for request, _ in left:
            if request in self.requests:
                self.requests.remove(request)
        return left


class Decoding:
    """Requests that get one token a step, first come first."""

    def __init__(self, worker: "Worker") -> None:
        self._worker = worker
        self.requests: list[RequestState] = []

    def step(self) -> Ended:
        """One forward over at most max_batch_size requests; those that ended with it."""
        worker = self._worker
        batch = self.requests[: worker.config.max_batch_size]
        start_us = now_us()
        for request in batch:
            if not request.decoded_us:
                request.decoded_us = start_us
                worker.timeline.add("queue_d", request.computed_us, start_us, request.id)
        try:
            token_ids = worker.engine.decode(batch, lambda layer: worker.on_layer(layer, []))
        except FATAL:
            raise
        except Exception as error:
            message = describe(error)
            return self._leave([(request, Failed(request.id, message)) for request in batch])
        worker.timeline.add("decode_step", start_us, batch_size=len(batch))
        endings = [(request, worker.emit(request, token)) for request, token in zip(batch, token_ids, strict=True)]
        return self._leave([(request, ending) for request, ending in endings if ending])

    def _leave(self, left: Ended) -> Ended:
        for request, ending in left:
            self.requests.remove(request)
            args = {"tokens": len(request.output)}
            self._worker.timeline.add("decode", request.decoded_us, None, request.id, **args)
            if isinstance(ending, Finished):
                self._worker.engine.record_decode(request)
        return left
