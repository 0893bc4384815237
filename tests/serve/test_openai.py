"""Request bodies and answer shapes, without a server."""

import json

import msgspec
import pytest

from pagewire.serve.front.openai import Answer, ApiError, Limits, parse_chat, parse_completion
from pagewire.serve.messages import Sampling

LIMITS = Limits(max_prompts=3)
MESSAGES = [{"role": "user", "content": "hi"}]


def completion(**body):
    return parse_completion(json.dumps({"prompt": "x"} | body).encode(), LIMITS, "m")


def chat(**body):
    return parse_chat(json.dumps({"messages": MESSAGES} | body).encode(), LIMITS, "m")


def refused(parse, body) -> tuple[int, str | None, str]:
    with pytest.raises(ApiError) as caught:
        parse(body if isinstance(body, bytes) else json.dumps(body).encode(), LIMITS, "m")
    error = caught.value.body["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    return caught.value.status, error["param"], error["message"]


def test_defaults():
    request = completion()
    assert (request.prompts, request.max_tokens, request.n, request.stop, request.stream) == (["x"], None, 1, (), False)
    assert request.sampling == Sampling(temperature=1.0, top_p=1.0, top_k=0, seed=request.sampling.seed)
    assert completion().sampling.seed != completion().sampling.seed


@pytest.mark.parametrize(
    ("given", "prompts"), [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])]
)
def test_prompt_forms(given, prompts):
    request = completion(prompt=given, n=2)
    assert request.prompts == prompts
    assert request.num_outputs == 2 * len(prompts)


def test_null_is_absent():
    fields = (
        "model",
        "max_tokens",
        "temperature",
        "top_p",
        "seed",
        "n",
        "stop",
        "stream",
        "stream_options",
        "logprobs",
        "presence_penalty",
        "user",
    )
    request = completion(**dict.fromkeys(fields))
    assert request.n == 1 and not request.stream


def test_fields_that_ask_for_nothing_are_taken():
    completion(
        user="me",
        metadata={"a": "b"},
        store=True,
        logprobs=False,
        presence_penalty=0,
        best_of=1,
        echo=False,
        logit_bias={},
        suffix="",
    )
    chat(tools=[], tool_choice="none", response_format={"type": "text"}, top_logprobs=0, parallel_tool_calls=True)


UNSUPPORTED = {
    "logprobs": (5, 0), "presence_penalty": (0.5,), "frequency_penalty": (1,), "best_of": (2,), "suffix": ("end",),
    "echo": (True,), "logit_bias": ({"50256": -100},),
}  # fmt: skip
UNSUPPORTED_IN_CHAT = {
    "tools": ([{"type": "function"}],), "tool_choice": ("auto",), "response_format": ({"type": "json_object"},),
    "functions": ([{"name": "f"}],), "top_logprobs": (3,), "modalities": (["audio"],), "logprobs": (True,),
}  # fmt: skip


@pytest.mark.parametrize(("field", "values"), UNSUPPORTED.items())
def test_unsupported_fields_are_refused_by_name(field, values):
    for value in values:
        status, param, message = refused(parse_completion, {"prompt": "x", field: value})
        assert (status, param) == (400, field) and f"{field} is not supported" in message


@pytest.mark.parametrize(("field", "values"), UNSUPPORTED_IN_CHAT.items())
def test_unsupported_chat_fields_are_refused_by_name(field, values):
    for value in values:
        status, param, message = refused(parse_chat, {"messages": MESSAGES, field: value})
        assert (status, param) == (400, field) and f"{field} is not supported" in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", 7), ("prompt", [1, "a"]), ("prompt", []), ("prompt", [-1]), ("prompt", [True]),
        ("prompt", ["a"] * 4), ("prompt", [[1], 2]), ("max_tokens", 0), ("max_tokens", "5"), ("max_tokens", 1.5),
        ("temperature", -0.1), ("temperature", 2.5), ("temperature", "hot"), ("top_p", 0), ("top_p", 1.1),
        ("top_k", -2), ("seed", 1.5), ("seed", 2**70), ("n", 0), ("n", 17), ("n", True), ("stop", 1), ("stop", ""),
        ("stop", ["a"] * 5), ("stop", ["x" * 257]), ("stream", "yes"), ("stream_options", {"include_usage": True}),
        ("stream_options", {"nonsense": 1}), ("ignore_eos", 1), ("nonsense", 1), ("model", 3), ("tools", []),
    ],
)  # fmt: skip
def test_bad_values_name_their_field(field, value):
    status, param, message = refused(parse_completion, {"prompt": "x"} | {field: value})
    assert status == 400 and message
    assert param == field


def test_the_largest_n_and_stops_are_taken():
    request = completion(n=16, stop=["x" * 256] * 4)
    assert request.num_outputs == 16 and request.stops == ("x" * 256,) * 4
    assert completion(stop="x" * 256).stops == ("x" * 256,)
    assert refused(parse_completion, {"prompt": "x", "stop": "x" * 257})[:2] == (400, "stop")


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff", b'{"prompt":"x"}{}', b'{"prompt":"\\ud800"}', b'{"prompt":"x","temperature":NaN}',
     b'{"prompt":"x","logit_bias":' + b"[" * 100_000],
    ids=["empty", "truncated", "not-utf8", "two-values", "lone-surrogate", "NaN", "deep"],
)  # fmt: skip
def test_malformed_json(body):
    status, param, message = refused(parse_completion, body)
    assert (status, param) == (400, None) and "not valid JSON" in message


def test_unknown_model_is_404():
    assert refused(parse_completion, {"prompt": "x", "model": "gpt-4"})[:2] == (404, "model")
    assert completion(model="m").prompts == ["x"]


def test_missing_prompt_and_messages():
    assert refused(parse_completion, {})[:2] == (400, "prompt")
    assert refused(parse_chat, {})[:2] == (400, "messages")
    assert refused(parse_chat, {"messages": []})[:2] == (400, "messages")
    assert refused(parse_chat, [])[0] == 400


def test_chat_messages():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = chat(
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": parts},
            {"role": "assistant", "content": "ok", "refusal": None, "tool_calls": []},
        ]
    )
    assert request.messages == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "ok"},
    ]
    assert request.num_outputs == 1


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]},
        {"role": "user", "content": [{"type": "text", "text": "a", "extra": 1}]},
        {"role": "user", "content": [{"type": "text", "text": 1}]},
        {"role": "user", "content": []},
        {"role": "user", "content": 7},
        {"role": "user"},
        {"role": "tool", "content": "x"},
        {"role": "user", "content": "x", "nonsense": 1},
        {"content": "x"},
    ],
)
def test_bad_messages(message):
    status, param, text = refused(parse_chat, {"messages": [message]})
    assert (status, param) == (400, "messages") and text


def test_a_broken_bound_says_where_and_what_came():
    role = refused(parse_chat, {"messages": [*MESSAGES, {"role": "tool", "content": "x"}]})[2]
    assert "user" in role and "`$.messages[1].role`, got 'tool'" in role
    assert "2.0 - at `$.temperature`, got 3" in refused(parse_completion, {"prompt": "x", "temperature": 3})[2]


def test_message_fields_we_do_not_serve():
    for field, value in {"name": "bob", "tool_calls": [{}], "tool_call_id": "1"}.items():
        status, param, _ = refused(parse_chat, {"messages": [{"role": "user", "content": "x", field: value}]})
        assert (status, param) == (400, f"messages[0].{field}")


def test_the_two_max_tokens_agree_or_are_refused():
    assert chat(max_completion_tokens=3).max_tokens == 3
    assert chat(max_tokens=3, max_completion_tokens=3).max_tokens == 3
    assert refused(parse_chat, {"messages": MESSAGES, "max_tokens": 1, "max_completion_tokens": 2})[0] == 400


def test_seeds_are_taken_as_63_bits():
    assert completion(seed=5).sampling.seed == 5
    assert 0 <= completion(seed=-1).sampling.seed < 2**63


def test_chunks_are_events_of_openai_shape():
    answer = Answer(chat=True, model="m", include_usage=True)
    first = msgspec.json.decode(answer.chunk(0, "a", None).removeprefix(b"data: "))
    assert first["object"] == "chat.completion.chunk" and first["usage"] is None and first["model"] == "m"
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": "a"}
    last = msgspec.json.decode(answer.chunk(0, "", "stop")[6:])
    assert last["choices"][0] == {"index": 0, "delta": {}, "finish_reason": "stop", "logprobs": None}
    usage = msgspec.json.decode(answer.usage_chunk({"total_tokens": 3})[6:])
    assert usage["choices"] == [] and usage["usage"]["total_tokens"] == 3 and usage["id"] == first["id"]
    plain = Answer(chat=False, model="m", include_usage=False)
    chunk = msgspec.json.decode(plain.chunk(1, "b", None)[6:])
    assert chunk["choices"][0]["text"] == "b" and "usage" not in chunk


def test_an_errors_type_follows_from_its_status():
    types = [ApiError(status, "why").body["error"]["type"] for status in (400, 404, 429, 500, 503)]
    refused = "invalid_request_error"
    assert types == [refused, refused, "rate_limit_error", "server_error", "server_error"]
