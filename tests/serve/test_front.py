"""The front alone: real HTTP and real processes, but workers without a model (fake_worker.py)."""

import http.client
import json
import signal
import socket
import subprocess
import sys
import time

import pytest

from serve.http_server import command, environment, error_of, serve, wait_for
from serve.tiny import make_tiny_llama

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny-llama"))


@pytest.fixture(scope="module")
def server(model):
    with serve("--model", model, fake=True) as server:
        yield server


@pytest.fixture(scope="module")
def slow(model):
    """Never ends a request within a test; two places in all."""
    with serve("--model", model, "--max-queue", "2", fake=True, FAKE_TOKEN_MS="30") as server:
        yield server


def run(*args: str, fake: bool = True, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(*args, fake=fake), env=environment(**env), capture_output=True, text=True, timeout=60)


def one_sentence(result: subprocess.CompletedProcess) -> str:
    """What a start that cannot work leaves: a non-zero code and one line on stderr."""
    assert result.returncode not in (0, None)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("pagewire serve: "), result.stderr
    return lines[0]


def test_front_has_no_torch():
    code = "import pagewire.serve.cli, pagewire.__main__, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), timeout=60).returncode == 0


def test_tokens_of_two_processes_come_in_order(model):
    with serve("--model", model, fake=True, FAKE_FIRST_TOKEN_MS="50") as server:  # D overtakes P
        status, body = server.post("/v1/completions", prompt=[70, 71, 72], max_tokens=8)
        alone = server.post("/v1/completions", prompt=[70, 71, 72], max_tokens=1)[1]
    text = body["choices"][0]["text"]
    assert status == 200 and len(text) == 8 and text[:3] * 2 + text[:2] == text
    assert alone["choices"][0]["text"] == text[0]


def test_routes(server):
    assert error_of(*server.request("GET", "/nowhere"))[0] == 404
    assert error_of(*server.request("GET", "/v1/completions"))[0] == 405
    assert server.request("GET", "/health") == (200, {"status": "ok"})
    models = server.request("GET", "/v1/models")[1]
    assert [card["id"] for card in models["data"]] == ["tiny-llama"]
    assert server.request("GET", "/v1/models/tiny-llama")[1]["max_model_len"] == 512
    assert error_of(*server.request("GET", "/v1/models/gpt-4"))[:3] == (404, "model", "model_not_found")


def test_errors(server):
    assert server.error("/v1/completions", prompt="x", model="gpt-4")[:3] == (404, "model", "model_not_found")
    assert server.error("/v1/completions", prompt="x", temperature="hot")[:2] == (400, "temperature")
    assert error_of(*server.request("POST", "/v1/completions", b"{"))[::2] == (400, "invalid_json")
    assert error_of(*server.request("POST", "/v1/completions", b"{}", Content_Type="text/plain"))[0] == 415
    assert server.error("/v1/completions", prompt="")[:2] == (400, "prompt")
    status, _, _, message = server.error("/v1/completions", prompt=[1, 320])
    assert status == 400 and "320" in message


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "numbers"),
    [([70] * 600, 1, ("512", "600")), ([70] * 500, 20, ("512", "520", "500", "20")), ("a" * 9000, 1, ("512", "9000"))],
    ids=["prompt", "prompt+max_tokens", "characters"],
)
def test_context_length(server, prompt, max_tokens, numbers):
    status, param, code, message = server.error("/v1/completions", prompt=prompt, max_tokens=max_tokens)
    assert (status, param, code) == (400, "prompt", "context_length_exceeded")
    assert all(number in message for number in numbers), message


def test_a_prompt_that_just_fits(server):
    status, body = server.post("/v1/completions", prompt=[70] * 500, max_tokens=12)
    assert status == 200 and body["usage"]["total_tokens"] == 512
    # without max_tokens, what still fits is the default
    status, body = server.post("/v1/completions", prompt=[70] * 510)
    assert status == 200 and body["usage"]["completion_tokens"] == 2


def test_pool_smaller_than_the_context(model):
    with serve("--model", model, "--pool-tokens", "64", fake=True) as server:
        status, _, code, message = server.error("/v1/completions", prompt=[70] * 60, max_tokens=5)
    assert (status, code) == (400, "context_length_exceeded") and "pool" in message and "64" in message


def test_body_too_large(server):
    assert error_of(*server.request("POST", "/v1/completions", b" " * (3 << 20)))[::2] == (413, "body_too_large")


def test_stop_string_across_tokens(server):
    whole = server.post("/v1/completions", prompt=[70, 71, 72, 73], max_tokens=8)[1]["choices"][0]["text"]
    before = server.metric("pagewire_requests_total", outcome="stop")
    body = server.post("/v1/completions", prompt=[70, 71, 72, 73], max_tokens=8, stop=whole[2:4])[1]
    assert body["choices"][0] == {"index": 0, "text": whole[:2], "finish_reason": "stop", "logprobs": None}
    assert body["usage"]["completion_tokens"] == 4
    assert server.metric("pagewire_requests_total", outcome="stop") == before + 1


def test_many_prompts_and_choices(server):
    body = server.post("/v1/completions", prompt=[[70], [71, 72]], n=2, max_tokens=3)[1]
    texts = [choice["text"] for choice in body["choices"]]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert texts[0] == texts[1] != texts[2] == texts[3]
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 12, "total_tokens": 15}
    events = server.stream("/v1/completions", prompt=[[70], [71, 72]], n=2, max_tokens=3)
    streamed = [""] * 4
    for event in events[:-1]:
        streamed[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert events[-1] == "[DONE]" and streamed == texts


def test_a_failed_request_is_an_error_and_others_go_on(model):
    with serve("--model", model, fake=True, FAKE_FAIL_AT="3") as server:
        status, _, code, message = server.error("/v1/completions", prompt=[70], max_tokens=5)
        assert (status, code) == (500, "request_failed") and "ran out of luck" in message
        events = server.stream("/v1/completions", prompt=[70], max_tokens=5)
        assert "ran out of luck" in events[-1]["error"]["message"] and "choices" in events[0]
        assert server.post("/v1/completions", prompt=[70], max_tokens=2)[0] == 200


def test_queue_full_is_429_and_a_disconnect_gives_the_places_back(slow):
    long = {"prompt": [70], "max_tokens": 500}
    with slow.open_stream("/v1/completions", **long) as response:
        response.readline()
        assert slow.error("/v1/completions", n=2, **long)[::2] == (429, "queue_full")
        with slow.open_stream("/v1/completions", **long) as second:
            second.readline()
            assert slow.error("/v1/completions", **long)[::2] == (429, "queue_full")
            assert slow.metric("pagewire_inflight_requests") == 2
    # both clients hung up
    wait_for(lambda: slow.metric("pagewire_inflight_requests") == 0, 5)
    wait_for(lambda: slow.metric("pagewire_running_requests", role="decode") == 0, 5)
    assert slow.metric("pagewire_requests_total", outcome="cancelled") >= 2


def test_disconnect_without_streaming(slow):
    before = slow.metric("pagewire_requests_total", outcome="cancelled")
    connection = slow.connect()
    connection.request(
        "POST", "/v1/completions", json.dumps({"prompt": [70], "max_tokens": 500}), {"Content-Type": "application/json"}
    )
    wait_for(lambda: slow.metric("pagewire_running_requests", role="decode") == 1, 5)
    connection.close()
    wait_for(lambda: slow.metric("pagewire_requests_total", outcome="cancelled") == before + 1, 5)
    wait_for(lambda: slow.metric("pagewire_running_requests", role="decode") == 0, 5)


def test_health_is_503_until_the_pair_is_up(model):
    with serve("--model", model, fake=True, healthy=False, FAKE_START_MS="700") as server:
        status, body = server.request("GET", "/health")
        assert status == 503 and "starting" in body["reason"]
        assert server.error("/v1/completions", prompt=[70])[0] == 503
        server.wait_healthy()
        assert server.post("/v1/completions", prompt=[70], max_tokens=2)[0] == 200


def test_colocated_is_one_process(model):
    with serve("--model", model, "--colocated", fake=True) as server:
        assert list(server.pids()) == ["colocated"]
        assert server.post("/v1/chat/completions", max_tokens=2, **CHAT)[0] == 200


def test_api_key(model):
    with serve("--model", model, fake=True, api_key="secret") as server:
        assert server.post("/v1/completions", prompt=[70], max_tokens=1)[0] == 200
        for header in ("Bearer wrong", "secret", ""):
            for path in ("/v1/models", "/metrics", "/debug/requests", "/nowhere"):
                answer = server.request("GET", path, Authorization=header)
                assert error_of(*answer)[::2] == (401, "invalid_api_key")
        assert server.request("GET", "/health", Authorization="")[0] == 200


def test_request_timeout(model):
    with serve("--model", model, "--request-timeout", "0.2", fake=True, FAKE_TOKEN_MS="50") as server:
        assert server.error("/v1/completions", prompt=[70], max_tokens=400)[::2] == (504, "timeout")
        wait_for(lambda: server.metric("pagewire_running_requests", role="decode") == 0, 5)


def test_trace_has_both_processes_in_microseconds(server):
    server.post("/v1/completions", prompt=[70], max_tokens=2)
    rows = server.request("GET", "/debug/trace")[1]["traceEvents"]
    names = {row["args"]["name"] for row in rows if row["name"] == "process_name"}
    assert names == {"front", "prefill"}  # the fake D says nothing
    spans = [row for row in rows if row["ph"] == "X"]
    assert all(row["ts"] > 0 and row["dur"] > 0 for row in spans) and len({row["pid"] for row in spans}) == 2
    for pid, tid in {(row["pid"], row["tid"]) for row in spans}:
        lane = sorted((r["ts"], r["ts"] + r["dur"]) for r in spans if (r["pid"], r["tid"]) == (pid, tid))
        assert all(before[1] <= after[0] for before, after in zip(lane, lane[1:], strict=False))


def test_port_in_use(model):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port}" in one_sentence(run("--model", model, "--port", str(port)))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--model", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--host", "0.0.0.0"], "PAGEWIRE_API_KEY"),
        (["--host", "no.such.host.invalid"], "no.such.host.invalid"),
        (["--port", "70000"], "65535"),
        (["--page-size", "0"], "page_size"),
    ],
)
def test_starts_that_cannot_work(model, args, words):
    given = args if "--model" in args else [*args, "--model", model]
    assert words in one_sentence(run("--port", "0", *given))


def test_what_a_worker_says_before_it_is_ready_ends_the_start(model):
    result = run("--model", model, "--port", "0", FAKE_BAD_CONFIG="/")
    assert one_sentence(result) == "pagewire serve: model.safetensors: expected 100 bytes, got 50"


def test_two_processes_that_do_not_fit_each_other_end_the_start(model):
    result = run("--model", model, "--port", "0", FAKE_MISFIT="dtype: expected float32, got bfloat16")
    assert result.returncode == 1
    *tries, last = result.stderr.strip().splitlines()
    assert last == "pagewire serve: dtype: expected float32, got bfloat16" and len(tries) == 2


def test_missing_extra(model):
    code = "import sys; sys.modules['uvicorn'] = None; from pagewire.__main__ import main; sys.exit(main(['serve']))"
    result = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60)
    assert "pagewire[serve]" in one_sentence(result)


def test_kill_9_of_the_front_takes_the_workers_along(model):
    with serve("--model", model, fake=True) as server:
        pids = server.pids().values()
        server.process.kill()
        server.process.wait()
        wait_for(lambda: not any(alive(pid) for pid in pids), 5)


@pytest.mark.parametrize("numbers", [[signal.SIGINT], [signal.SIGTERM, signal.SIGTERM]], ids=["INT", "TERM TERM"])
def test_a_signal_answers_clients_and_ends_everything(model, numbers):
    with serve("--model", model, fake=True, FAKE_TOKEN_MS="30") as server:
        pids = server.pids().values()
        with server.open_stream("/v1/completions", prompt=[70], max_tokens=500) as response:
            response.readline()
            start = time.monotonic()
            for number in numbers:
                server.process.send_signal(number)
                time.sleep(0.1)
            try:
                assert "shutting down" in response.read().decode()
            except http.client.IncompleteRead as error:
                pytest.fail(f"the stream was cut: {error}")
        assert server.process.wait(5) == 0 and time.monotonic() - start < 4
        assert not any(alive(pid) for pid in pids) and server.stderr == []


def test_sigterm_lets_what_runs_end(model):
    with serve("--model", model, fake=True, FAKE_TOKEN_MS="30") as server:
        with server.open_stream("/v1/completions", prompt=[70, 71], max_tokens=60) as response:
            response.readline()
            server.process.send_signal(signal.SIGTERM)
            wait_for(lambda: server.request("GET", "/health")[0] == 503, 2)
            status, _, _, message = server.error("/v1/completions", prompt=[70])
            assert status == 503 and "shutting down" in message
            assert response.read().endswith(b"data: [DONE]\n\n")
        assert server.process.wait(5) == 0 and server.stderr == []


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
