"""The whole server: two real model processes behind real HTTP, with a tiny random Llama.

What two servers must agree on is KV bytes and logits; tokens are only compared within one server.
"""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from serve.http_server import Server, command, environment, error_of, serve, wait_for
from serve.tiny import make_tiny_llama

# small pages and chunks, so that a prompt crosses many of both; the pool holds 4 long requests
OPTIONS = ("--page-size", "4", "--pool-tokens", "1024", "--prefill-chunk", "24", "--max-batch-size", "4")
CHAT = {"messages": [{"role": "user", "content": "hello world"}]}
LONG = {"prompt": [50 + i % 200 for i in range(60)], "max_tokens": 190, "temperature": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """It never ends by itself: every output has max_tokens tokens."""
    return make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", eos_token_id=None)


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("records")


@pytest.fixture(scope="module")
def server(model, records):
    with serve("--model", str(model), *OPTIONS, "--verify-kv", "--record-dir", str(records)) as server:
        yield server


def free_pages(server: Server) -> bool:
    """Both pools conserve their pages, and nothing is left in them."""
    scrape, clean = server.metrics(), True
    for role in server.pids():
        free, active, cached, leased, total = (
            server.metric("pagewire_pages", scrape, role=role, state=state)
            for state in ("free", "active", "cached", "leased", "total")
        )
        assert free + active + cached + leased == total > 0
        clean &= free + cached == total
    return clean


def text_of(body) -> str:
    (choice,) = body["choices"]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def streamed(events) -> str:
    """The text of a one-choice stream that ended well."""
    assert events[-1] == "[DONE]"
    choices = [event["choices"][0] for event in events[:-1] if event["choices"]]
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"] in ("stop", "length")
    return "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in choices)


def test_front_process_maps_no_torch(server):
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "libtorch" not in maps
    assert "libtorch" in Path(f"/proc/{server.pids()['decode']}/maps").read_text()


def test_completion_whole_and_streamed(server):
    body = {"prompt": "hello world and the hello", "max_tokens": 30, "temperature": 0}
    status, whole = server.post("/v1/completions", **body)
    assert status == 200 and whole["object"] == "text_completion" and whole["model"] == "tiny"
    assert whole["choices"][0]["finish_reason"] == "length"
    prompt_tokens = whole["usage"]["prompt_tokens"]
    assert whole["usage"] == {
        "prompt_tokens": prompt_tokens, "completion_tokens": 30, "total_tokens": prompt_tokens + 30,
    }  # fmt: skip
    events = server.stream("/v1/completions", **body, stream_options={"include_usage": True})
    assert streamed(events) == text_of(whole)
    assert events[-2]["usage"] == whole["usage"] and events[-2]["choices"] == []
    assert len(events) > 10, "a stream comes in pieces"


def test_chat_whole_and_streamed(server):
    status, whole = server.post("/v1/chat/completions", **CHAT, max_tokens=20, temperature=0)
    assert status == 200 and whole["object"] == "chat.completion"
    assert whole["choices"][0]["message"]["role"] == "assistant"
    assert whole["usage"]["completion_tokens"] == 20
    events = server.stream("/v1/chat/completions", **CHAT, max_tokens=20, temperature=0)
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert streamed(events) == text_of(whole)


def test_one_token_is_p_s_alone(server):
    first = server.post("/v1/completions", prompt="hello", max_tokens=1, temperature=0)[1]
    more = server.post("/v1/completions", prompt="hello", max_tokens=9, temperature=0)[1]
    assert first["usage"]["completion_tokens"] == 1 and first["choices"][0]["finish_reason"] == "length"
    assert text_of(more).startswith(text_of(first).rstrip("\ufffd"))


def test_eos_ends_an_output(server, records, tmp_path):
    """A greedy token of the endless model becomes the same model's end."""
    body = {"prompt": [60, 61, 62, 63], "max_tokens": 8, "temperature": 0}
    answer_id = server.post("/v1/completions", **body)[1]["id"]
    file = records / f"{answer_id}-0.decode.safetensors"
    wait_for(file.exists, 5)
    tokens = load_file(file)["token_ids"].tolist()
    end = next(i for i in range(2, 8) if tokens[i] not in tokens[:i])
    model = make_tiny_llama(tmp_path / "ending", eos_token_id=tokens[end])
    with serve("--model", str(model), *OPTIONS) as ending:
        stopped = ending.post("/v1/completions", **body)[1]
        ignored = ending.post("/v1/completions", **body, ignore_eos=True)[1]
    assert stopped["choices"][0]["finish_reason"] == "stop"
    assert stopped["usage"]["completion_tokens"] == end
    assert ignored["usage"]["completion_tokens"] == 8


def test_stop_strings(server):
    body = {"prompt": "the world", "max_tokens": 40, "temperature": 0}
    whole = text_of(server.post("/v1/completions", **body)[1])
    stop = whole[5:8]
    before = whole[: whole.index(stop)]
    status, stopped = server.post("/v1/completions", **body, stop=["never there", stop])
    assert status == 200 and text_of(stopped) == before
    assert stopped["choices"][0]["finish_reason"] == "stop" and stopped["usage"]["completion_tokens"] < 40
    assert streamed(server.stream("/v1/completions", **body, stop=stop)) == before
    wait_for(lambda: free_pages(server), 5)


def test_seeds_and_n(server):
    body = {"prompt": "hello", "max_tokens": 16, "temperature": 1.0, "n": 3}
    first = server.post("/v1/completions", **body, seed=7)[1]["choices"]
    again = server.post("/v1/completions", **body, seed=7)[1]["choices"]
    other = server.post("/v1/completions", **body, seed=1007)[1]["choices"]
    texts = [choice["text"] for choice in first]
    assert len(set(texts)) == 3 and [choice["index"] for choice in first] == [0, 1, 2]
    # sampling depends on seed and position alone; rounding may differ between batches of other sizes
    assert sum(a["text"] == b["text"] for a, b in zip(first, again, strict=True)) >= 2
    assert not {choice["text"] for choice in other} & set(texts)


def test_errors_disturb_nothing(server):
    with server.open_stream("/v1/completions", **LONG) as response:
        response.readline()
        assert server.error("/v1/completions", prompt=[70] * 600)[::2] == (400, "context_length_exceeded")
        assert server.error("/v1/completions", prompt="x", model="gpt-4")[0] == 404
        assert server.error("/v1/completions", prompt="x", logprobs=3)[1] == "logprobs"
        assert error_of(*server.request("POST", "/v1/chat/completions", b"{"))[0] == 400
        lines = [line for line in response.read().split(b"\n\n") if line]
    assert lines[-1] == b"data: [DONE]"


def test_many_at_once(server):
    """More than fit the batch and the pool: everyone gets all tokens, and the pages come back."""
    lengths = [(3 + 11 * i % 70, 1 + 17 * i % 60) for i in range(16)]

    def ask(i: int) -> tuple[int, int]:
        prompt_len, max_tokens = lengths[i]
        body = {"prompt": [40 + (i + j) % 250 for j in range(prompt_len)], "max_tokens": max_tokens}
        if i % 2:
            usage = server.stream("/v1/completions", **body, stream_options={"include_usage": True})[-2]["usage"]
        else:
            usage = server.post("/v1/completions", **body)[1]["usage"]
        return usage["prompt_tokens"], usage["completion_tokens"]

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(16))) == lengths
    wait_for(lambda: free_pages(server), 5)
    assert server.metric("pagewire_inflight_requests") == 0


def test_disconnect_frees_the_pages_of_both(server):
    with server.open_stream("/v1/completions", **LONG) as response:
        response.readline()
        wait_for(lambda: server.metric("pagewire_pages", role="decode", state="active") > 0, 5)
    wait_for(lambda: free_pages(server), 5)
    assert server.metric("pagewire_requests_total", outcome="cancelled") >= 1
    assert server.metric("pagewire_running_requests") == 0


def test_every_handoff_had_equal_kv_and_its_phases_are_told(server):
    server.post("/v1/completions", **LONG)
    phases = {"queue_p", "prefill", "transfer_late", "join_wait", "transfer_total", "queue_d", "decode", "request"}

    def events() -> dict:
        newest = server.request("GET", "/debug/requests")[1]["requests"][0]
        return {event["name"]: event for event in newest["events"]}

    wait_for(lambda: phases | {"kv_verify"} <= set(events()), 5)
    told = events()
    verify = told["kv_verify"]["args"]
    assert verify["p_sha256"] == verify["d_sha256"]
    # 2 layers x K and V x 2 heads x 16 x fp32, of 60 tokens
    assert told["transfer_total"]["args"]["bytes"] == 60 * 2 * 2 * 2 * 16 * 4
    assert server.metric("pagewire_kv_transfer_bytes_total") >= 60 * 512
    for name in ("pagewire_time_to_first_token_seconds", "pagewire_inter_token_seconds"):
        assert server.metric(f"{name}_count") > 0
    for part in ("total", "transfer_late", "join_wait"):
        assert server.metric("pagewire_kv_transfer_seconds_count", part=part) > 0
    trace = server.request("GET", "/debug/trace")[1]["traceEvents"]
    named = {row["args"]["name"] for row in trace if row["name"] == "process_name"}
    assert named == {"front", "prefill", "decode"}


def test_logits_agree_with_one_process(server, model, records, tmp_path):
    """Chunked prefill, transfer and decode give the logits of the colocated baseline, up to rounding."""
    body = {"prompt": [50 + 7 * i % 200 for i in range(70)], "max_tokens": 24, "temperature": 0}
    ours = server.post("/v1/completions", **body)[1]["id"]
    with serve("--model", str(model), *OPTIONS, "--colocated", "--record-dir", str(tmp_path)) as baseline:
        theirs = baseline.post("/v1/completions", **body)[1]["id"]
    a, b = logits_of(records, ours), logits_of(tmp_path, theirs)
    for step, (x, y) in enumerate(zip(a, b, strict=True)):
        assert np.abs(x - y).max() < 1e-4, f"step {step}"
        second, first = np.partition(x, -2)[-2:]
        if first - second < 2e-4:
            break
    assert step >= 4, "the comparison ended too early to mean anything: choose another prompt"


def logits_of(folder: Path, answer_id: str) -> np.ndarray:
    files = [folder / f"{answer_id}-0.{phase}.safetensors" for phase in ("prefill", "decode")]
    wait_for(lambda: all(file.exists() for file in files), 5)
    return np.concatenate([load_file(file)["logits"] for file in files])


def test_a_truncated_model_is_one_sentence(tmp_path):
    model = make_tiny_llama(tmp_path / "tiny")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    result = subprocess.run(command("--model", str(model), "--port", "0"), env=environment(), capture_output=True,
                            text=True, timeout=60)  # fmt: skip
    assert result.returncode == 1
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    (line,) = lines
    assert line.startswith("pagewire serve: ") and "model.safetensors" in line
