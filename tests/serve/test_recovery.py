"""No request dies with a process: kills, stops and floods under streams, whose clients notice a pause only."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from serve.http_server import Server, serve, wait_for
from serve.tiny import make_tiny_llama

POISON = 319  # fake_worker.py's
NUM_STREAMS = 6
OPTIONS = ("--page-size", "4", "--pool-tokens", "2048", "--prefill-chunk", "24", "--max-batch-size", "8")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """It never ends by itself: every output has max_tokens tokens."""
    return str(make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", eos_token_id=None))


@pytest.fixture(scope="module")
def fake(model) -> Iterator[Server]:
    with serve("--model", model, fake=True, FAKE_TOKEN_MS="4", FAKE_FIRST_TOKEN_MS="20") as server:
        yield server


class Stream(threading.Thread):
    """One streamed completion; what came of it."""

    def __init__(self, server: Server, **body) -> None:
        super().__init__(daemon=True)
        self.server, self.body = server, body
        self.text, self.reason, self.error, self.usage, self.num_events = "", None, "", {}, 0
        self.start()

    def run(self) -> None:
        options = {"include_usage": True}
        with self.server.open_stream("/v1/completions", **self.body, stream_options=options) as response:
            while line := response.readline():
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                self.error = event.get("error", {}).get("message", self.error)
                self.usage = event.get("usage") or self.usage
                for choice in event.get("choices", ()):
                    self.text += choice["text"]
                    self.reason = choice["finish_reason"] or self.reason
                    self.num_events += 1

    def outcome(self) -> tuple[str, str | None, str, int]:
        self.join(60)
        assert not self.is_alive(), "the stream hangs"
        return self.text, self.reason, self.error, self.usage.get("completion_tokens", 0)


def kill(server: Server, *roles: str, number: int = signal.SIGKILL) -> dict[str, int]:
    """The processes it went to."""
    pids = {role: pid for role, pid in server.pids().items() if role in roles}
    for pid in pids.values():
        os.kill(pid, number)
    return pids


def wait_replaced(server: Server, killed: dict[str, int], timeout: float = 10) -> None:
    """Until others have been started in place of these."""
    wait_for(lambda: all(server.pids().get(role, pid) != pid for role, pid in killed.items()), timeout)


def conserved(server: Server) -> bool:
    """Both pools conserve their pages, and nothing is left in them."""
    scrape, states = server.metrics(), ("free", "active", "cached", "leased")
    for role in server.pids():
        total = server.metric("pagewire_pages", scrape, role=role, state="total")
        counts = [server.metric("pagewire_pages", scrape, role=role, state=state) for state in states]
        if not total or sum(counts) != total or counts[0] != total:
            return False
    return server.metric("pagewire_inflight_requests", scrape) == 0


def staging_arenas(pids) -> int:
    """Descriptors of staging memory that these processes hold."""
    found = 0
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                found += "pagewire-staging" in os.readlink(link)
            except FileNotFoundError:
                pass
    return found


def bodies() -> list[dict]:
    """Short and long ones, greedy and drawn."""
    return [
        dict(
            prompt=[30 + (7 * i + j) % 250 for j in range(20 + 40 * i)],
            max_tokens=200,
            temperature=0.8 * (i % 2),
            seed=i,
        )
        for i in range(NUM_STREAMS)
    ]


@pytest.fixture(scope="module")
def real(model) -> Iterator[Server]:
    with serve("--model", model, *OPTIONS) as server:
        yield server


@pytest.fixture(scope="module")
def undisturbed(real) -> list[tuple]:
    outcomes = [stream.outcome() for stream in [Stream(real, **body) for body in bodies()]]
    assert all(reason == "length" and num == 200 for _, reason, _, num in outcomes)
    return outcomes


# in events of one stream: before any token, while others are still prefilled, in the middle of decoding, near the end
@pytest.mark.parametrize("moment", [0, 1, 60, 110])
@pytest.mark.parametrize("victims", [("prefill",), ("decode",), ("decode", "prefill")], ids="+".join)
def test_kill_9_under_streams(real, undisturbed, victims, moment):
    """The bar: no failed request, no wrong or repeated token, pages conserved, nobody left behind."""
    before = real.pids()
    streams = [Stream(real, **body) for body in bodies()]
    wait_for(lambda: any(stream.num_events >= moment for stream in streams), 20)
    killed = kill(real, *victims)
    assert len(killed) == len(victims)
    start = time.monotonic()
    assert [stream.outcome() for stream in streams] == undisturbed
    wait_replaced(real, killed)
    real.wait_healthy()
    print(f"{'+'.join(victims)} at event {moment}: whole again after {time.monotonic() - start:.1f} s")
    wait_for(lambda: conserved(real), 5)
    after = real.pids()
    for role, pid in before.items():
        assert (after[role] != pid) == (role in victims)
        assert role not in victims or not Path(f"/proc/{pid}").exists()
    assert staging_arenas(after.values()) <= 2  # the mapping of each side


def test_recovered_attempts_are_counted(real):
    assert real.metric("pagewire_recovered_attempts") > 0 and real.metric("pagewire_restarts") >= 12


def test_n_choices_and_usage_survive(real):
    body = dict(prompt=[60, 61, 62], max_tokens=150, temperature=0.9, seed=5, n=3)
    whole = real.post("/v1/completions", **body)[1]
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(real.post, "/v1/completions", **body)
        wait_for(lambda: real.metric("pagewire_running_requests", role="decode") == 3, 5)
        kill(real, "decode")
        again = answer.result(60)[1]
    assert again["choices"] == whole["choices"] and again["usage"] == whole["usage"]


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_stopped_process_is_killed_and_its_requests_go_on(model, undisturbed, role):
    with serve("--model", model, *OPTIONS, "--worker-timeout", "1.5") as server:
        streams = [Stream(server, **body) for body in bodies()]
        wait_for(lambda: streams[0].num_events > 5, 20)
        stopped = kill(server, role, number=signal.SIGSTOP)
        assert [stream.outcome() for stream in streams] == undisturbed
        wait_replaced(server, stopped)
        told = f"the {role} process (pid {stopped[role]}) said nothing for 1.5 s and was killed"
        assert told in "".join(server.stderr), server.stderr
        server.wait_healthy()
        wait_for(lambda: conserved(server), 5)


def whole_text(server: Server, **body) -> str:
    return server.post("/v1/completions", **body)[1]["choices"][0]["text"]


def test_d_killed_while_p_is_down_and_again_while_it_loads(model):
    with serve("--model", model, fake=True, FAKE_TOKEN_MS="4", FAKE_START_MS="400") as fake:
        body = dict(prompt=[70, 71, 72], max_tokens=200)
        expected = whole_text(fake, **body)
        streams = [Stream(fake, **body) for _ in range(NUM_STREAMS)]
        wait_for(lambda: streams[0].num_events > 20, 10)
        kill(fake, "prefill")
        time.sleep(0.1)
        killed = kill(fake, "decode")
        for _ in range(2):
            wait_replaced(fake, killed)
            killed = kill(fake, "decode")  # not ready yet
        assert [stream.outcome() for stream in streams] == [(expected, "length", "", 200)] * NUM_STREAMS
        fake.wait_healthy()


def test_health_tells_and_new_requests_wait(fake):
    kill(fake, "decode")
    wait_for(lambda: fake.request("GET", "/health")[0] == 503, 2)
    assert fake.post("/v1/completions", prompt=[70], max_tokens=3)[0] == 200
    fake.wait_healthy()


def test_fail_mode_ends_what_a_process_held(model):
    with serve("--model", model, "--on-failure", "fail", fake=True, FAKE_TOKEN_MS="20") as server:
        pid = server.pids()["decode"]
        stream = Stream(server, prompt=[70], max_tokens=400)
        wait_for(lambda: stream.num_events > 2, 5)
        kill(server, "decode")
        _, reason, error, _ = stream.outcome()
        assert reason is None
        assert error == f"the decode process (pid {pid}) was killed by SIGKILL while it served this request"
        server.wait_healthy()
        assert server.post("/v1/completions", prompt=[70], max_tokens=2)[0] == 200


def test_a_request_that_kills_d_is_given_up_and_others_are_not(fake):
    """Those that wait beside it, too, though they lose attempts with it."""
    body = dict(prompt=[70, 71, 72], max_tokens=100)
    expected = whole_text(fake, **body)
    restarts = fake.metric("pagewire_restarts")
    streams = [Stream(fake, **body) for _ in range(3)]
    wait_for(lambda: streams[0].num_events > 5, 5)
    with ThreadPoolExecutor(4) as pool:
        poison = pool.submit(fake.error, "/v1/completions", prompt=[70, POISON], max_tokens=9)
        others = [pool.submit(whole_text, fake, **body) for _ in range(3)]
        status, _, _, message = poison.result(60)
        assert [other.result(60) for other in others] == [expected] * 3
    assert status == 503 and "given up after 3 attempts in which no token was decoded" in message
    assert [stream.outcome() for stream in streams] == [(expected, "length", "", 100)] * 3
    assert fake.metric("pagewire_restarts") == restarts + 3
    fake.wait_healthy()


def test_a_process_that_cannot_start_again_is_told_and_tried_again(model, tmp_path):
    flag = tmp_path / "bad"
    with serve("--model", model, fake=True, FAKE_TOKEN_MS="20", FAKE_BAD_CONFIG=str(flag)) as server:
        stream = Stream(server, prompt=[70], max_tokens=400)
        wait_for(lambda: stream.num_events > 2, 5)
        flag.touch()
        kill(server, "decode")
        assert stream.outcome()[2] == "model.safetensors: expected 100 bytes, got 50"
        status, _, _, message = server.error("/v1/completions", prompt=[70])
        assert status == 503 and "expected 100 bytes" in message
        assert "expected 100 bytes" in server.request("GET", "/health")[1]["reason"]
        flag.unlink()
        server.wait_healthy()
        assert server.post("/v1/completions", prompt=[70], max_tokens=2)[0] == 200


def test_a_process_that_dies_again_and_again_does_not_end_the_server(model, tmp_path):
    flag = tmp_path / "dies"
    with serve("--model", model, fake=True, FAKE_TOKEN_MS="10", FAKE_DIES=str(flag)) as server:
        stream = Stream(server, prompt=[70], max_tokens=200)
        wait_for(lambda: stream.num_events > 2, 5)
        flag.touch()
        kill(server, "decode", "prefill")
        wait_for(lambda: server.metric("pagewire_restarts") > 8, 20)
        flag.unlink()
        server.wait_healthy()
        assert any("exited with code 7; restarting" in line for line in server.stderr)
        text, reason, error, _ = stream.outcome()  # its losses without a token may have been too many
        assert (len(text), reason) == (200, "length") or "given up after 3 attempts" in error
        assert server.post("/v1/completions", prompt=[70], max_tokens=2)[0] == 200


def test_a_first_start_that_is_killed_ends_the_server_with_the_reason(model):
    with serve("--model", model, fake=True, healthy=False, FAKE_START_MS="5000") as server:
        wait_for(lambda: len(server.pids()) == 2, 5)
        pid = server.pids()["prefill"]
        kill(server, "prefill")
        assert server.process.wait(10) == 1
        wait_for(lambda: server.stderr, 2)
        assert server.stderr == [f"pagewire serve: the prefill process (pid {pid}) was killed by SIGKILL\n"]


@pytest.mark.parametrize("mode", ["recover", "fail"])
def test_a_handoff_that_fails_is_made_good_by_d(model, mode):
    with serve("--model", model, "--on-failure", mode, fake=True, FAKE_NO_HANDOFF="1") as server:
        status, body = server.post("/v1/completions", prompt=[70, 71], max_tokens=20)
        if mode == "fail":
            assert status == 500 and "CRC32C" in body["error"]["message"]
            return
        assert status == 200 and body["usage"]["completion_tokens"] == 20
        assert server.metric("pagewire_recovered_attempts") == 1 and server.metric("pagewire_restarts") == 0


def test_requests_that_come_and_go_before_a_stopped_d_cost_the_front_nothing(model):
    def rss_mb() -> float:
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    with serve("--model", model, fake=True) as server:
        kill(server, "decode", number=signal.SIGSTOP)
        body = json.dumps({"prompt": [[70] * 490] * 16, "max_tokens": 8}).encode()

        def come_and_go() -> None:
            connection = server.connect()
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            time.sleep(0.004)
            connection.close()

        for _ in range(300):  # until its heap has the size that it works with
            come_and_go()
        before = rss_mb()
        for _ in range(400):
            come_and_go()
        wait_for(lambda: server.metric("pagewire_inflight_requests") == 0, 5)
        assert rss_mb() - before < 8, "each of 6400 Submits is 4 kB"
        wait_for(lambda: server.request("GET", "/health")[0] == 503, 7)
        kill(server, "decode", number=signal.SIGCONT)
        server.wait_healthy()
        assert server.post("/v1/completions", prompt=[70], max_tokens=2)[0] == 200
