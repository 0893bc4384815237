"""OpenAI's wire format: strict decoding of request bodies, and the shapes of answers and errors.

A field is served, harmless (`user`), or refused by name: none is ignored. Everything here is pure; nothing here
names a file, a peer or a URL.
"""

import re
import reprlib
import secrets
import time
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct, field

from pagewire.serve.messages import Sampling

MAX_SEED = 2**63 - 1
Request = TypeVar("Request", bound="GenerationRequest")
TokenId = Annotated[int, Meta(ge=0)]
Stop = Annotated[str, Meta(min_length=1, max_length=256)]


class ApiError(Exception):
    """An HTTP status with OpenAI's error body."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def server_error(message: str, *, status: int = 503, code: str = "service_unavailable") -> ApiError:
    return ApiError(status, message, code=code)


def expect(ok: bool, param: str, message: str) -> None:
    if not ok:
        raise ApiError(400, f"{param}: {message}", param)


def check_model(name: str, served: str) -> None:
    if name != served:
        raise ApiError(404, f"model {name!r} does not exist; this server serves {served!r}", "model", "model_not_found")


# Fields we know and do not serve, with the values that ask for nothing. Any other value is refused.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "best_of": (1,), "echo": (False,), "frequency_penalty": (0, 0.0), "logit_bias": ({},), "logprobs": (False,),
    "presence_penalty": (0, 0.0), "service_tier": ("auto", "default"), "suffix": ("",),
}  # fmt: skip
_UNSUPPORTED_IN_CHAT: dict[str, tuple[Any, ...]] = _UNSUPPORTED | {
    "audio": (), "function_call": ("none",), "functions": ([],), "modalities": (["text"],),
    "parallel_tool_calls": (True, False), "prediction": (), "reasoning_effort": (),
    "response_format": ({"type": "text"},), "tool_choice": ("none",), "tools": ([],), "top_logprobs": (0,),
    "verbosity": (), "web_search_options": (),
}  # fmt: skip
_UNSUPPORTED_IN_MESSAGE: dict[str, tuple[Any, ...]] = {
    "annotations": ([],), "audio": (), "function_call": (), "name": (), "refusal": (), "tool_call_id": (),
    "tool_calls": ([],),
}  # fmt: skip


class Limits(Struct, frozen=True):
    """Every cap the front puts on a request before it does any work for it, but for those of the fields below."""

    max_body_bytes: int = 2 << 20
    body_timeout_s: float = 30.0  # a body must arrive within this
    request_timeout_s: float = 600.0  # a request must end within this
    max_inflight: int = 256  # outputs (prompts x n) admitted and not yet ended; more are answered 429
    max_prompts: int = 16  # prompts of one /v1/completions body
    # Text is refused before it is tokenised when even long tokens could not make it fit.
    max_chars_per_context_token: int = 16
    default_max_tokens: int = 16  # /v1/completions, as OpenAI's
    default_max_chat_tokens: int = 512  # /v1/chat/completions, or what still fits the context


class StreamOptions(Struct, forbid_unknown_fields=True):
    include_usage: bool = False
    include_obfuscation: bool = False  # pads chunks against traffic analysis when true: refused


class GenerationRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """A decoded body: what both endpoints take."""

    model: str | None = None  # absent: the one model served
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] = 1.0
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] = 0  # ours; 0 and -1: all
    seed: Annotated[int, Meta(ge=-(2**63), le=MAX_SEED)] = field(default_factory=lambda: secrets.randbits(63))
    n: Annotated[int, Meta(ge=1, le=16)] = 1
    stop: Stop | Annotated[tuple[Stop, ...], Meta(max_length=4)] = ()
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False  # ours, for benchmarks

    # They change nothing in the answer.
    user: str = ""
    metadata: dict[str, Any] = {}
    store: bool = False
    safety_identifier: str = ""
    prompt_cache_key: str = ""

    @property
    def prompts(self) -> list[Any]:
        """Of /v1/completions: strings, or lists of token ids."""
        return []

    @property
    def messages(self) -> list[dict[str, str]]:
        """Of /v1/chat/completions: role and content each."""
        return []

    @property
    def num_outputs(self) -> int:
        return max(1, len(self.prompts)) * self.n

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else self.stop

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_p, max(0, self.top_k), self.seed & MAX_SEED)


class CompletionRequest(GenerationRequest):
    prompt: str | list[str | TokenId | list[TokenId]]

    @property
    def prompts(self) -> list[Any]:
        if isinstance(self.prompt, str) or {type(item) for item in self.prompt} == {int}:
            return [self.prompt]
        return self.prompt


class TextPart(Struct, forbid_unknown_fields=True):
    type: Annotated[str, Meta(pattern="^text$")]
    text: str


class Message(Struct, forbid_unknown_fields=True):
    role: Annotated[str, Meta(pattern="^(system|developer|user|assistant)$")]
    content: str | Annotated[list[TextPart], Meta(min_length=1)]

    def plain(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(GenerationRequest):
    given: Annotated[list[Message], Meta(min_length=1)] = field(name="messages")
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None

    @property
    def messages(self) -> list[dict[str, str]]:
        return [message.plain() for message in self.given]


def _decode(data: bytes, kind: type[Request], unsupported: dict[str, tuple[Any, ...]], model: str) -> Request:
    body: Any = {}
    try:
        body = _asked(msgspec.json.decode(data, type=dict[str, Any]), kind, unsupported)
        if isinstance(messages := body.get("messages"), list):
            refused = _UNSUPPORTED_IN_MESSAGE
            body["messages"] = [_asked(m, Message, refused, f"messages[{i}].") for i, m in enumerate(messages)]
        request = msgspec.convert(body, kind)
    except msgspec.ValidationError as error:
        text, given = str(error), body
        at = re.search(r"at `\$\.(.+)`", text)  # `$.messages[0].role`
        place = re.findall(r"\w+", at[1]) if at else []
        field = re.search(r"(?:unknown|required) field `(\w+)`", text)
        for key in place:
            given = given[int(key) if isinstance(given, list) else key]
        got = "" if field or not place or "got" in text else f", got {reprlib.repr(given)}"
        raise ApiError(400, text + got, place[0] if place else field[1] if field else None) from None
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    check_model(model if request.model is None else request.model, model)
    expect(request.stream or not request.stream_options, "stream_options", "only allowed when stream is true")
    if request.stream_options and request.stream_options.include_obfuscation:
        message = "stream_options.include_obfuscation is not supported by this server"
        raise ApiError(400, message, "stream_options", "unsupported_parameter")
    return request


def _asked(value: Any, kind: type[Struct], unsupported: dict[str, tuple[Any, ...]], where: str = "") -> Any:
    """The object `value` without what asks for nothing: null for a field of `kind`, as OpenAI's clients send it, and
    the harmless values of `unsupported`.
    """
    if not isinstance(value, dict):
        return value  # convert says what it should be
    asked = {}
    for name, given in value.items():
        if name not in unsupported:
            if given is not None or name not in kind.__struct_encode_fields__:
                asked[name] = given
        # type() too: False == 0, but logprobs=0 asks for something and logprobs=false does not
        elif not any(type(given) is type(harmless) and given == harmless for harmless in (None, *unsupported[name])):
            raise ApiError(400, f"{where}{name} is not supported by this server", where + name, "unsupported_parameter")
    return asked


def parse_completion(data: bytes, limits: Limits, model: str) -> GenerationRequest:
    request = _decode(data, CompletionRequest, _UNSUPPORTED, model)
    prompts, most = request.prompts, limits.max_prompts
    forms = "a string, an array of strings, an array of token ids or an array of arrays of token ids"
    expect(len({type(prompt) for prompt in prompts}) <= 1, "prompt", f"expected {forms}, got a mixture")
    expect(1 <= len(prompts) <= most, "prompt", f"expected 1 to {most} prompts, got {len(prompts)}")
    return request


def parse_chat(data: bytes, limits: Limits, model: str) -> GenerationRequest:
    request = _decode(data, ChatRequest, _UNSUPPORTED_IN_CHAT, model)
    most, most_too = request.max_tokens, request.max_completion_tokens
    same = None in (most, most_too) or most == most_too
    expect(same, "max_tokens", f"expected what max_completion_tokens says ({most_too}), or one of the two, got {most}")
    return msgspec.structs.replace(request, max_tokens=most_too or most)


class Answer:
    """Builds the objects of one answer: whole, or as chunks."""

    def __init__(self, chat: bool, model: str, include_usage: bool) -> None:
        self.chat = chat
        self.id = ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12)
        self.include_usage = include_usage
        self._begun: set[int] = set()  # choices that a chunk told of
        self.head = {"id": self.id, "created": int(time.time()), "model": model}

    def whole(self, texts: list[str], reasons: list[str], usage: dict[str, int]) -> dict[str, Any]:
        ends = enumerate(zip(texts, reasons, strict=True))
        choices = [self._choice(i, text, reason, "message") for i, (text, reason) in ends]
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": choices, "usage": usage}

    def chunk(self, index: int, text: str, reason: str | None) -> bytes:
        return self._chunk([self._choice(index, text, reason, "delta")], None)

    def usage_chunk(self, usage: dict[str, int]) -> bytes:
        return self._chunk([], usage)

    def _choice(self, index: int, text: str, reason: str | None, kind: str) -> dict[str, Any]:
        told: dict[str, Any] = {"text": text}
        if self.chat:
            begins = {} if index in self._begun else {"role": "assistant", "content": text}
            told = {kind: begins or ({"content": text} if text else {})}
            self._begun.add(index)
        return {"index": index, "finish_reason": reason, "logprobs": None, **told}

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, int] | None) -> bytes:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        told = {"usage": usage} if self.include_usage else {}
        return event({**self.head, "object": kind, "choices": choices, **told})


def event(body: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


DONE = b"data: [DONE]\n\n"
