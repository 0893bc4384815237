"""The HTTP side: routes, admission, and one `Generation` per request that is answered whole or streamed."""

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from pagewire.serve import openai
from pagewire.serve.generation import Delta, Detokenizer, Output
from pagewire.serve.limits import Limits
from pagewire.serve.messages import Event, Events, Gauges, Ready, Submit
from pagewire.serve.metrics import Metrics
from pagewire.serve.openai import Answer, ApiError, GenerationRequest, Usage
from pagewire.serve.supervisor import Supervisor
from pagewire.serve.trace import EventLog

T = TypeVar("T")


class Tokenizer(Protocol):
    eos_token_ids: Any

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...
    def render_chat(
        self, messages: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str: ...


class Front:
    """What the handlers share. `supervisor` is set once it exists: it reports events to this object."""

    supervisor: Supervisor

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer,
        detokenizer: Callable[[], Detokenizer],
        limits: Limits,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.detokenizer = detokenizer
        self.limits = limits
        self.metrics = Metrics()
        self.timeline = EventLog()
        self.num_inflight = 0
        self.created = int(time.time())

    def on_events(self, events: Events) -> None:
        for event in events.events:
            self.metrics.on_event(event)
            self.timeline.add(event)

    def on_gauges(self, gauges: Gauges) -> None:
        self.metrics.on_gauges(gauges)


class Generation:
    """Every choice of one request. Holds its places in the queue from `admit` to `close`."""

    def __init__(self, front: Front, request: GenerationRequest, arrived: float) -> None:
        self.front = front
        self.request = request
        self.arrived = arrived  # CLOCK_MONOTONIC seconds
        self.answer = Answer(bool(request.messages), front.model, request.include_usage)
        self.outputs: list[Output] = []
        self._sink: asyncio.Queue[Delta | ApiError] = asyncio.Queue()
        self._places = 0
        self._timer: asyncio.TimerHandle | None = None

    def admit(self) -> None:
        wanted, most = self.request.num_outputs, self.front.limits.max_inflight
        if self.front.num_inflight + wanted > most:
            raise ApiError(
                429,
                f"the queue is full: {self.front.num_inflight} of {most} places are taken and "
                f"this request needs {wanted}; try again later",
                type="rate_limit_error",
                code="queue_full",
            )
        self._places = wanted
        self.front.num_inflight += wanted

    async def submit(self) -> None:
        """Tokenises, checks the lengths, and hands every choice to the pair."""
        pair = self.front.supervisor.pair
        if pair is None:
            raise openai.server_error(self.front.supervisor.reason)
        prompts = await self._tokenise(pair)
        max_tokens = [self._max_tokens(prompt, pair) for prompt in prompts]
        stop_ids = [] if self.request.ignore_eos else sorted(self.front.tokenizer.eos_token_ids)
        self._timer = asyncio.get_running_loop().call_later(
            self.front.limits.request_timeout_s, self._expire
        )
        sampling = self.request.sampling
        for i, prompt in enumerate(prompts):
            for j in range(self.request.n):
                choice = len(self.outputs)
                seeded = msgspec.structs.replace(
                    sampling, seed=(sampling.seed + j) & openai.MAX_SEED
                )
                submit = Submit(
                    f"{self.answer.id}-{choice}", prompt, max_tokens[i], stop_ids, seeded
                )
                output = Output(
                    submit,
                    choice,
                    self.request.stop,
                    self.front.detokenizer(),
                    self._sink,
                    self.front.supervisor.cancel,
                )
                self.outputs.append(output)
                self.front.supervisor.submit(output)

    async def _tokenise(self, pair: Ready) -> list[list[int]]:
        tokenizer, request = self.front.tokenizer, self.request
        most_chars = pair.max_context * self.front.limits.max_chars_per_context_token
        chars = sum(len(m["content"]) for m in request.messages) or max(
            (len(p) for p in request.prompts if isinstance(p, str)), default=0
        )
        if chars > most_chars:
            raise _too_long(
                f"this model's context is {pair.max_context} tokens, at most {most_chars} characters "
                f"of text; the prompt has {chars}"
            )
        if request.messages:

            def render() -> list[list[int]]:
                text = tokenizer.render_chat(request.messages, add_generation_prompt=True)
                return [tokenizer.encode(text, add_special_tokens=False)]

            try:
                return await asyncio.to_thread(render)
            except ValueError as error:  # the template refuses these messages
                raise ApiError(400, str(error), param="messages") from None
        if isinstance(request.prompts[0], str):
            texts = request.prompts
            return await asyncio.to_thread(
                lambda: [tokenizer.encode(str(text), add_special_tokens=True) for text in texts]
            )
        for prompt in request.prompts:
            if bad := [token for token in prompt if int(token) >= pair.vocab_size]:
                raise ApiError(
                    400,
                    f"prompt: expected token ids below {pair.vocab_size}, the vocabulary's size, "
                    f"got {bad[0]}",
                    param="prompt",
                )
        return request.prompts  # type: ignore[return-value]

    def _max_tokens(self, prompt: list[int], pair: Ready) -> int:
        """Output tokens to reserve for. Raises ApiError when prompt and output can never fit."""
        if not prompt:
            raise ApiError(
                400,
                "prompt: expected at least one token, got an empty prompt",
                param="messages" if self.answer.chat else "prompt",
            )
        what, most = "context", pair.max_context
        if pair.pool_tokens < most:
            what, most = "KV pool", pair.pool_tokens
        room = most - len(prompt)
        if room < 1:
            raise _too_long(
                f"this model's {what} holds {most} tokens; the prompt has {len(prompt)} and at least "
                "one more must fit"
            )
        limits = self.front.limits
        default = limits.default_max_chat_tokens if self.answer.chat else limits.default_max_tokens
        wanted = self.request.max_tokens or min(default, room)
        if wanted > room:
            raise _too_long(
                f"this model's {what} holds {most} tokens; the request needs {len(prompt) + wanted} "
                f"({len(prompt)} in the prompt, {wanted} to generate)"
            )
        return wanted

    async def deltas(self) -> AsyncIterator[Delta]:
        """Until the last choice ended. Raises ApiError if one failed."""
        left = len(self.outputs)
        while left:
            item = await self._sink.get()
            if isinstance(item, ApiError):
                raise item
            left -= item.reason is not None
            yield item

    def usage(self) -> Usage:
        prompt = sum(len(output.submit.token_ids) for output in self.outputs[:: self.request.n])
        completion = sum(output.num_tokens for output in self.outputs)
        return Usage(prompt, completion, prompt + completion)

    def _expire(self) -> None:
        timeout_s = self.front.limits.request_timeout_s
        for output in self.outputs:
            output.fail(
                openai.server_error(
                    f"the request did not end within {timeout_s:g} s", status=504, code="timeout"
                )
            )
            self.front.supervisor.cancel(output.submit.request_id)

    def close(self) -> None:
        """Cancels what still runs, gives the places back, and records what happened."""
        self.front.num_inflight -= self._places
        self._places = 0
        if self._timer:
            self._timer.cancel()
        for output in self.outputs:
            output.abandon()
            self._record(output)
        self.outputs = []

    def _record(self, output: Output) -> None:
        metrics, times = self.front.metrics, output.token_times
        metrics.requests.labels(output.outcome).inc()
        metrics.prompt_tokens.inc(len(output.submit.token_ids))
        metrics.output_tokens.inc(len(times))
        for before, after in zip(times, times[1:], strict=False):
            metrics.inter_token.observe(after - before)
        start_us = int(self.arrived * 1e6)
        args: dict[str, int | float | str] = {
            "outcome": output.outcome,
            "prompt_tokens": len(output.submit.token_ids),
            "output_tokens": len(times),
        }
        if times:
            metrics.ttft.observe(times[0] - self.arrived)
            args["ttft_us"] = int(times[0] * 1e6) - start_us
        duration_us = int(time.monotonic() * 1e6) - start_us
        self.front.timeline.add(
            Event("request", "front", start_us, duration_us, output.submit.request_id, args)
        )


def _too_long(message: str) -> ApiError:
    return ApiError(400, message, param="messages", code="context_length_exceeded")


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """`work`'s result, or ClientDisconnect as soon as the client hangs up. The body was read before."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait([task, watch], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect()
        return task.result()
    finally:
        for future in (task, watch):
            future.cancel()


async def _read_body(request: Request, limits: Limits) -> bytes:
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":  # also keeps a web page's simple cross-site POST out
        raise ApiError(415, f"content-type: expected application/json, got {kind or 'none'!r}")
    body = bytearray()

    async def read() -> None:
        async for chunk in request.stream():
            body.extend(chunk)
            if len(body) > limits.max_body_bytes:
                raise ApiError(
                    413,
                    f"the body is larger than {limits.max_body_bytes} bytes",
                    code="body_too_large",
                )

    try:
        await asyncio.wait_for(read(), limits.body_timeout_s)
    except asyncio.TimeoutError:  # noqa: UP041 (on 3.10 it is not the builtin)
        raise ApiError(408, f"the body did not arrive within {limits.body_timeout_s:g} s") from None
    return bytes(body)


class _Stream(StreamingResponse):
    """Server-sent events; closes the generation however the response ends."""

    def __init__(self, generation: Generation, body: AsyncIterator[bytes]) -> None:
        super().__init__(
            body, media_type="text/event-stream", headers={"cache-control": "no-cache"}
        )
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.close()


async def _events(
    generation: Generation, first: Delta, rest: AsyncIterator[Delta]
) -> AsyncIterator[bytes]:
    answer, begun = generation.answer, set()

    def chunk(delta: Delta) -> bytes:
        is_first = delta.choice not in begun
        begun.add(delta.choice)
        return answer.chunk(delta.choice, delta.text, delta.reason, is_first)

    try:
        yield chunk(first)
        async for delta in rest:
            yield chunk(delta)
        if answer.include_usage:
            yield answer.usage_chunk(generation.usage())
        yield openai.DONE
    except ApiError as error:  # the status is long sent: the error is the last event
        yield openai.event(error.body)


async def _generate(request: Request, chat: bool) -> Response:
    front: Front = request.app.state.front
    arrived = time.monotonic()
    body = await _read_body(request, front.limits)
    parse = openai.parse_chat if chat else openai.parse_completion
    generation = Generation(front, parse(body, front.limits, front.model), arrived)
    generation.admit()
    streaming = False
    try:
        await _unless_gone(request, generation.submit())
        deltas = generation.deltas()
        if generation.request.stream:
            first = await _unless_gone(
                request, anext(deltas)
            )  # a failure before it is a proper status
            streaming = True
            return _Stream(generation, _events(generation, first, deltas))

        async def collect() -> tuple[list[str], list[str]]:
            texts, reasons = [""] * len(generation.outputs), [""] * len(generation.outputs)
            async for delta in deltas:
                texts[delta.choice] += delta.text
                reasons[delta.choice] = delta.reason or ""
            return texts, reasons

        texts, reasons = await _unless_gone(request, collect())
        return _json(generation.answer.whole(texts, reasons, generation.usage()))
    finally:
        if not streaming:
            generation.close()


def _json(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")


async def completions(request: Request) -> Response:
    return await _generate(request, chat=False)


async def chat_completions(request: Request) -> Response:
    return await _generate(request, chat=True)


def _model_card(front: Front) -> dict[str, Any]:
    card: dict[str, Any] = {
        "id": front.model,
        "object": "model",
        "created": front.created,
        "owned_by": "pagewire",
    }
    if pair := front.supervisor.pair:
        card["max_model_len"] = min(pair.max_context, pair.pool_tokens)
    return card


async def models(request: Request) -> Response:
    return _json({"object": "list", "data": [_model_card(request.app.state.front)]})


async def model(request: Request) -> Response:
    front, name = request.app.state.front, request.path_params["name"]
    if name != front.model:
        raise ApiError(
            404,
            f"model {name!r} does not exist; this server serves {front.model!r}",
            param="model",
            code="model_not_found",
        )
    return _json(_model_card(front))


async def health(request: Request) -> Response:
    supervisor: Supervisor = request.app.state.front.supervisor
    if supervisor.pair is None:
        return _json(
            {"status": "unavailable", "reason": supervisor.reason}, 503, {"retry-after": "1"}
        )
    return _json({"status": "ok"})


async def metrics(request: Request) -> Response:
    front: Front = request.app.state.front
    front.metrics.ready.set(front.supervisor.pair is not None)
    front.metrics.restarts.set(front.supervisor.num_restarts)
    front.metrics.inflight.set(front.num_inflight)
    return Response(front.metrics.render(), media_type="text/plain; version=0.0.4")


async def debug_requests(request: Request) -> Response:
    front: Front = request.app.state.front
    workers = [
        {"role": w.role, "pid": w.process.pid, "ready": w.ready is not None}
        for w in front.supervisor.workers
    ]
    return _json({"workers": workers, "requests": front.timeline.requests()})


async def debug_trace(request: Request) -> Response:
    return Response(request.app.state.front.timeline.chrome_trace(), media_type="application/json")


def _failed(request: Request, error: Exception) -> Response:
    front: Front = request.app.state.front
    if isinstance(error, HTTPException):  # Starlette's own 404 and 405
        error = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    if not isinstance(error, ApiError):
        error = openai.server_error(
            "the server failed; its log says why", status=500, code="internal_error"
        )
    if error.status < 500:
        front.metrics.requests.labels("rejected").inc()
    retry = {"retry-after": "1"} if error.status in (429, 503) else None
    return _json(error.body, error.status, retry)


class _Auth:
    """401 without the key, everywhere but /health."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self.app = app
        self.expected = f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self.expected):
                error = ApiError(
                    401,
                    "expected the header 'Authorization: Bearer <API key>' with this server's key",
                    code="invalid_api_key",
                )
                await _json(error.body, 401, {"www-authenticate": "Bearer"})(scope, receive, send)
                return
        await self.app(scope, receive, send)


def make_app(front: Front, api_key: str | None = None) -> ASGIApp:
    app = Starlette(
        routes=[
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/health", health),
            Route("/metrics", metrics),
            Route("/debug/requests", debug_requests),
            Route("/debug/trace", debug_trace),
        ],
        exception_handlers={
            ApiError: _failed,
            HTTPException: _failed,
            Exception: _failed,
            ClientDisconnect: lambda request, error: Response(status_code=499),
        },
    )
    app.state.front = front
    return _Auth(app, api_key) if api_key else app
