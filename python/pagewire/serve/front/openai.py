"""OpenAI's wire format: strict decoding of request bodies, and the shapes of answers and errors.

A field is served, harmless (`user`), or refused by name: none is ignored. Everything here is pure; nothing here
names a file, a peer or a URL.
"""

import re
import secrets
import time
from typing import Annotated, Any, TypeVar

import msgspec

from pagewire.serve.front.limits import Limits
from pagewire.serve.messages import Sampling

MAX_SEED = 2**63 - 1


class ApiError(Exception):
    """An HTTP status with OpenAI's error body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": type, "param": param, "code": code}}


def server_error(message: str, *, status: int = 503, code: str = "service_unavailable") -> ApiError:
    return ApiError(status, message, type="server_error", code=code)


# Fields we know and do not serve, with the values that ask for nothing. Any other value is refused.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (), "best_of": (1,), "echo": (False,), "frequency_penalty": (0, 0.0), "function_call": ("none",),
    "functions": ([],), "logit_bias": ({},), "logprobs": (False,), "modalities": (["text"],),
    "parallel_tool_calls": (True, False), "prediction": (), "presence_penalty": (0, 0.0), "reasoning_effort": (),
    "response_format": ({"type": "text"},), "service_tier": ("auto", "default"), "suffix": ("",),
    "tool_choice": ("none",), "tools": ([],), "top_logprobs": (0,), "verbosity": (), "web_search_options": (),
}  # fmt: skip
_UNSUPPORTED_IN_MESSAGE: dict[str, tuple[Any, ...]] = {
    "annotations": ([],), "audio": (), "function_call": (), "name": (), "refusal": (), "tool_call_id": (),
    "tool_calls": ([],),
}  # fmt: skip


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    include_usage: bool = False
    include_obfuscation: bool = False  # pads chunks against traffic analysis when true: refused


class _Sampled(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """What both endpoints take. null means absent, as in OpenAI's clients."""

    model: str | None = None  # absent: the one model served
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=-1, le=2**31 - 1)] | None = None  # ours; 0 and -1: all
    seed: Annotated[int, msgspec.Meta(ge=-(2**63), le=MAX_SEED)] | None = None
    n: Annotated[int, msgspec.Meta(ge=1)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None  # ours, for benchmarks

    # They change nothing in the answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    best_of: Any = None
    echo: Any = None
    frequency_penalty: Any = None
    logit_bias: Any = None
    logprobs: Any = None
    presence_penalty: Any = None
    service_tier: Any = None
    suffix: Any = None


class CompletionBody(_Sampled, forbid_unknown_fields=True, kw_only=True, frozen=True):
    prompt: str | list[str | Annotated[int, msgspec.Meta(ge=0)] | list[Annotated[int, msgspec.Meta(ge=0)]]]


class Message(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    role: str
    content: str | list[dict[str, Any]] | None = None
    annotations: Any = None
    audio: Any = None
    function_call: Any = None
    name: Any = None
    refusal: Any = None
    tool_call_id: Any = None
    tool_calls: Any = None


class ChatBody(_Sampled, forbid_unknown_fields=True, kw_only=True, frozen=True):
    messages: list[Message]
    max_completion_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None

    audio: Any = None
    function_call: Any = None
    functions: Any = None
    modalities: Any = None
    parallel_tool_calls: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    response_format: Any = None
    tool_choice: Any = None
    tools: Any = None
    top_logprobs: Any = None
    verbosity: Any = None
    web_search_options: Any = None


class GenerationRequest(msgspec.Struct, frozen=True):
    """A decoded, validated body; prompts are not tokenised yet."""

    prompts: list[str] | list[list[int]]  # of /v1/completions
    messages: list[dict[str, str]]  # of /v1/chat/completions, else empty
    max_tokens: int | None
    n: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    ignore_eos: bool
    sampling: Sampling

    @property
    def num_outputs(self) -> int:
        return max(1, len(self.prompts)) * self.n


Body = TypeVar("Body", CompletionBody, ChatBody)


def _decode(body: bytes, kind: type[Body]) -> Body:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        text = str(error)
        where = re.search(r"at `\$\.(\w+)", text) or re.search(r"(?:unknown|required) field `(\w+)`", text)
        raise ApiError(400, text, param=where[1] if where else None) from None
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None


def _refuse_unsupported(struct: msgspec.Struct, table: dict[str, tuple[Any, ...]], where: str = "") -> None:
    for name in struct.__struct_fields__:
        value = getattr(struct, name)
        if name not in table or value is None:
            continue
        # type() too: False == 0, but logprobs=0 asks for something and logprobs=false does not
        if not any(type(value) is type(harmless) and value == harmless for harmless in table[name]):
            raise ApiError(
                400, f"{where}{name} is not supported by this server", param=where + name, code="unsupported_parameter"
            )


def _sampled(body: _Sampled, limits: Limits, model: str) -> dict[str, Any]:
    """The fields of GenerationRequest that both endpoints share."""
    if body.model is not None and body.model != model:
        raise ApiError(
            404,
            f"model {body.model!r} does not exist; this server serves {model!r}",
            param="model",
            code="model_not_found",
        )
    _refuse_unsupported(body, _UNSUPPORTED)
    n = body.n or 1
    if n > limits.max_n:
        raise ApiError(400, f"n: expected at most {limits.max_n}, got {n}", param="n")
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stop) > limits.max_stop:
        raise ApiError(400, f"stop: expected at most {limits.max_stop} strings, got {len(stop)}", param="stop")
    for text in stop:
        if not 1 <= len(text) <= limits.max_stop_chars:
            raise ApiError(
                400,
                f"stop: expected strings of 1 to {limits.max_stop_chars} characters, got one of {len(text)}",
                param="stop",
            )
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options is only allowed when stream is true", param="stream_options")
    if body.stream_options is not None and body.stream_options.include_obfuscation:
        raise ApiError(
            400,
            "stream_options.include_obfuscation is not supported by this server",
            param="stream_options",
            code="unsupported_parameter",
        )
    return {
        "n": n,
        "stop": tuple(stop),
        "stream": bool(body.stream),
        "include_usage": body.stream_options is not None and body.stream_options.include_usage,
        "ignore_eos": bool(body.ignore_eos),
        "sampling": Sampling(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=max(0, body.top_k or 0),
            seed=secrets.randbits(63) if body.seed is None else body.seed & MAX_SEED,
        ),
    }


def parse_completion(data: bytes, limits: Limits, model: str) -> GenerationRequest:
    body = _decode(data, CompletionBody)
    shared = _sampled(body, limits, model)
    prompt = body.prompt
    if isinstance(prompt, str):
        prompts: Any = [prompt]
    elif prompt and all(isinstance(item, int) for item in prompt):
        prompts = [prompt]
    elif all(isinstance(item, str) for item in prompt) or all(isinstance(item, list) for item in prompt):
        prompts = prompt
    else:
        raise ApiError(
            400,
            "prompt: expected a string, an array of strings, an array of token ids or an array "
            "of arrays of token ids, got a mixture",
            param="prompt",
        )
    if not 1 <= len(prompts) <= limits.max_prompts:
        raise ApiError(400, f"prompt: expected 1 to {limits.max_prompts} prompts, got {len(prompts)}", param="prompt")
    return GenerationRequest(prompts=prompts, messages=[], max_tokens=body.max_tokens, **shared)


def _message(message: Message, where: str) -> dict[str, str]:
    _refuse_unsupported(message, _UNSUPPORTED_IN_MESSAGE, where + ".")
    role = "system" if message.role == "developer" else message.role
    if role not in ("system", "user", "assistant"):
        raise ApiError(
            400, f"{where}.role: expected system, developer, user or assistant, got {role!r}", param="messages"
        )
    if isinstance(message.content, str):
        return {"role": role, "content": message.content}
    texts = []
    for part in message.content or []:
        if part.get("type") != "text":
            raise ApiError(
                400,
                f"{where}.content: this model takes text only, got a part of type {part.get('type')!r}",
                param="messages",
                code="unsupported_content",
            )
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise ApiError(
                400,
                f"{where}.content: expected parts {{type, text}} with a string, got the keys {sorted(part)}",
                param="messages",
            )
        texts.append(part["text"])
    if not texts:
        raise ApiError(400, f"{where}.content: expected a string or text parts, got none", param="messages")
    return {"role": role, "content": "".join(texts)}


def parse_chat(data: bytes, limits: Limits, model: str) -> GenerationRequest:
    body = _decode(data, ChatBody)
    shared = _sampled(body, limits, model)
    if not body.messages:
        raise ApiError(400, "messages: expected at least one message, got none", param="messages")
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise ApiError(
            400,
            f"max_tokens ({body.max_tokens}) and max_completion_tokens ({body.max_completion_tokens}) differ: give one",
            param="max_tokens",
        )
    messages = [_message(message, f"messages[{i}]") for i, message in enumerate(body.messages)]
    return GenerationRequest(
        prompts=[], messages=messages, max_tokens=body.max_completion_tokens or body.max_tokens, **shared
    )


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Answer:
    """Builds the objects of one answer: whole, or as chunks."""

    def __init__(self, chat: bool, model: str, include_usage: bool) -> None:
        self.chat = chat
        self.id = ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12)
        self.include_usage = include_usage
        self.head = {"id": self.id, "created": int(time.time()), "model": model}

    def whole(self, texts: list[str], reasons: list[str], usage: Usage) -> dict[str, Any]:
        choices = [
            {"index": i, "finish_reason": reason, "logprobs": None}
            | ({"message": {"role": "assistant", "content": text}} if self.chat else {"text": text})
            for i, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ]
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": choices, "usage": usage}

    def chunk(self, index: int, text: str, reason: str | None = None, first: bool = False) -> bytes:
        choice: dict[str, Any] = {"index": index, "finish_reason": reason, "logprobs": None}
        if self.chat:
            choice["delta"] = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
        else:
            choice["text"] = text
        return self._chunk([choice], None)

    def usage_chunk(self, usage: Usage) -> bytes:
        return self._chunk([], usage)

    def _chunk(self, choices: list[dict[str, Any]], usage: Usage | None) -> bytes:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        body: dict[str, Any] = {**self.head, "object": kind, "choices": choices}
        if self.include_usage:
            body["usage"] = usage
        return event(body)


def event(body: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


DONE = b"data: [DONE]\n\n"
