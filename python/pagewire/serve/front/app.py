"""The HTTP side: bodies in, one `Generation` each, answers out whole or as server-sent events."""

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeVar

import anyio
import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from pagewire.serve.front import openai
from pagewire.serve.front.generation import Front, Generation
from pagewire.serve.front.openai import ApiError, GenerationRequest, Limits
from pagewire.serve.front.output import Delta

T = TypeVar("T")


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
    body, size, most = bytearray(), 0, limits.max_body_bytes
    try:
        with anyio.fail_after(limits.body_timeout_s):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= most:
                    body.extend(chunk)
                elif size > 8 * most:  # up to here, reading on lets the client get to our answer
                    break
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {limits.body_timeout_s:g} s") from None
    if size > most:
        raise ApiError(413, f"the body is larger than {most} bytes", code="body_too_large")
    return bytes(body)


class _Stream(StreamingResponse):
    """Server-sent events; leaves `held`, which closes the generation, however the response ends."""

    def __init__(self, body: AsyncIterator[bytes], held: ExitStack) -> None:
        super().__init__(body, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            await super().__call__(scope, receive, send)


async def _events(generation: Generation, first: Delta, rest: AsyncIterator[Delta]) -> AsyncIterator[bytes]:
    answer = generation.answer
    try:
        yield answer.chunk(*first)
        async for delta in rest:
            yield answer.chunk(*delta)
        if answer.include_usage:
            yield answer.usage_chunk(generation.usage())
        yield openai.DONE
    except ApiError as error:  # the status is long sent: the error is the last event
        yield openai.event(error.body)


async def _generate(front: Front, parse: Callable[..., GenerationRequest], request: Request) -> Response:
    arrived = time.monotonic()
    body = await _read_body(request, front.limits)
    generation = Generation(front, parse(body, front.limits, front.model), arrived)
    generation.admit()
    with ExitStack() as held:
        held.callback(generation.close)
        await _unless_gone(request, generation.submit())
        if generation.request.stream:
            deltas = generation.deltas()
            first = await _unless_gone(request, anext(deltas))  # a failure before it is a proper status
            return _Stream(_events(generation, first, deltas), held.pop_all())
        texts, reasons = await _unless_gone(request, generation.whole())
        return _json(generation.answer.whole(texts, reasons, generation.usage()))


def _json(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")


def _model_card(front: Front) -> dict[str, Any]:
    card: dict[str, Any] = {"id": front.model, "object": "model", "created": front.created, "owned_by": "pagewire"}
    if limits := front.supervisor.limits:
        card["max_model_len"] = min(limits.max_context, limits.pool_tokens)
    return card


async def models(front: Front, request: Request) -> Response:
    return _json({"object": "list", "data": [_model_card(front)]})


async def model(front: Front, request: Request) -> Response:
    openai.check_model(request.path_params["name"], front.model)
    return _json(_model_card(front))


async def health(front: Front, request: Request) -> Response:
    if reason := front.supervisor.reason:
        return _json({"status": "unavailable", "reason": reason}, 503, {"retry-after": "1"})
    return _json({"status": "ok"})


async def metrics(front: Front, request: Request) -> Response:
    supervisor, gauges = front.supervisor, front.supervisor.metrics
    gauges.ready.set(supervisor.reason is None)
    gauges.restarts.set(supervisor.num_restarts)
    gauges.recovered.set(supervisor.routing.num_recovered)
    gauges.inflight.set(front.num_inflight)
    return Response(gauges.render(), media_type="text/plain; version=0.0.4")


async def debug_requests(front: Front, request: Request) -> Response:
    workers = front.supervisor.workers.values()
    told = [{"role": w.name, "pid": w.pid, "ready": w.ready is not None} for w in workers]
    return _json({"workers": told, "requests": front.supervisor.events.requests()})


async def debug_trace(front: Front, request: Request) -> Response:
    return Response(front.supervisor.events.chrome_trace(), media_type="application/json")


def _failed(front: Front, request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):  # Starlette's own 404 and 405
        error = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    if not isinstance(error, ApiError):
        error = openai.server_error("the server failed; its log says why", status=500, code="internal_error")
    if error.status < 500:
        front.supervisor.metrics.requests.labels("rejected").inc()
    return _json(error.body, error.status, {"retry-after": "1"} if error.status in (429, 503) else None)


class _Auth:
    """401 without the key, everywhere but /health."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self.app = app
        self.expected = f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            if not hmac.compare_digest(dict(scope["headers"]).get(b"authorization", b""), self.expected):
                message = "expected the header 'Authorization: Bearer <API key>' with this server's key"
                error = ApiError(401, message, code="invalid_api_key")
                await _json(error.body, 401, {"www-authenticate": "Bearer"})(scope, receive, send)
                return
        await self.app(scope, receive, send)


def make_app(front: Front, api_key: str | None = None) -> ASGIApp:
    parsers = {"/v1/completions": openai.parse_completion, "/v1/chat/completions": openai.parse_chat}
    told = {"/v1/models": models, "/v1/models/{name:path}": model, "/health": health, "/metrics": metrics,
            "/debug/requests": debug_requests, "/debug/trace": debug_trace}  # fmt: skip
    app = Starlette(
        routes=[Route(path, partial(_generate, front, parse), methods=["POST"]) for path, parse in parsers.items()]
        + [Route(path, partial(tell, front)) for path, tell in told.items()],
        exception_handlers=dict.fromkeys((ApiError, HTTPException, Exception), partial(_failed, front))
        | {ClientDisconnect: lambda request, error: Response(status_code=499)},
    )
    return _Auth(app, api_key) if api_key else app
