"""Starts `pagewire serve` as a process and talks HTTP to it with the standard library."""

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# what `python -m pagewire` does, but that the tests' many kills do not have it wait longer and longer
QUICK = (
    "import sys; from pagewire.serve.front import links, process; from pagewire.__main__ import main;"
    "links.BACKOFF_S = 0.01; links.MAX_BACKOFF_S = 0.2; {patch}sys.exit(main())"
)
FAKE = f"process.WORKER_COMMAND = (sys.executable, {str(Path(__file__).with_name('fake_worker.py'))!r});"


def environment(**extra: str) -> dict[str, str]:
    """The server chooses its backend by itself, whatever the tests around it set."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("PAGEWIRE_", "TRITON_"))}
    return ours | {"PYTHONPATH": f"{ROOT / 'python'}:{os.environ.get('PYTHONPATH', '')}"} | extra


def command(*args: str, fake: bool = False) -> list[str]:
    """On the CPU unless `args` say something else: what is tested here are processes; test_cuda.py is for a GPU."""
    return [sys.executable, "-c", QUICK.format(patch=FAKE if fake else ""), "serve", "--device", "cpu", *args]


class Server:
    def __init__(self, process: subprocess.Popen, port: int, api_key: str | None) -> None:
        self.process = process
        self.port = port
        self.headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.stderr: list[str] = []

    def connect(self, timeout: float = 60) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """(status, decoded JSON or text)."""
        connection = self.connect()
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        names = {"Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
        try:
            connection.request(method, path, data, self.headers | names)
            response = connection.getresponse()
            text = response.read().decode()
            is_json = (response.getheader("content-type") or "").startswith("application/json")
            return response.status, json.loads(text) if is_json else text
        finally:
            connection.close()

    def post(self, path: str, **body: Any) -> tuple[int, Any]:
        return self.request("POST", path, body)

    def error(self, path: str, **body: Any) -> tuple[int, str | None, str | None, str]:
        """(status, param, code, message) of a request that must fail with OpenAI's error shape."""
        return error_of(*self.post(path, **body))

    @contextlib.contextmanager
    def open_stream(self, path: str, **body: Any) -> Iterator[http.client.HTTPResponse]:
        connection = self.connect()
        try:
            data = json.dumps(body | {"stream": True}).encode()
            connection.request("POST", path, data, self.headers | {"Content-Type": "application/json"})
            yield connection.getresponse()
        finally:
            connection.close()

    def stream(self, path: str, **body: Any) -> list[Any]:
        """Every event's object; "[DONE]" as a string."""
        with self.open_stream(path, **body) as response:
            assert response.status == 200, response.read()
            assert (response.getheader("content-type") or "").startswith("text/event-stream")
            return list(events(response))

    def metrics(self) -> str:
        status, text = self.request("GET", "/metrics")
        assert status == 200
        return text

    def metric(self, name: str, scrape: str | None = None, **labels: str) -> float:
        """The sum of a metric's samples that carry these labels, now or in one `metrics()`."""
        text = self.metrics() if scrape is None else scrape
        total = 0.0
        for line in text.splitlines():
            found = re.fullmatch(rf"{name}(?:{{(.*)}})? (\S+)", line)
            if found and all(f'{k}="{v}"' in (found[1] or "") for k, v in labels.items()):
                total += float(found[2])
        return total

    def pids(self) -> dict[str, int]:
        return {w["role"]: w["pid"] for w in self.request("GET", "/debug/requests")[1]["workers"]}

    def wait_healthy(self, timeout: float = 60) -> None:
        def healthy() -> bool:
            try:
                return self.request("GET", "/health")[0] == 200
            except OSError:
                return False  # it just ended: wait_for says why

        wait_for(healthy, timeout, self)


def error_of(status: int, body: Any) -> tuple[int, str | None, str | None, str]:
    assert status >= 400 and set(body) == {"error"}, (status, body)
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return status, error["param"], error["code"], error["message"]


def events(response: http.client.HTTPResponse) -> Iterator[Any]:
    while line := response.readline():
        if line.strip():
            assert line.startswith(b"data: "), line
            yield "[DONE]" if line == b"data: [DONE]\n" else json.loads(line[6:])


def wait_for(condition: Any, timeout: float, server: Server | None = None) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if server is not None and server.process.poll() is not None:
            time.sleep(0.2)  # for its last words
            raise AssertionError(f"the server ended: {''.join(server.stderr)}")
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout} s: {''.join(server.stderr) if server else condition}")
        time.sleep(0.02)


@contextlib.contextmanager
def serve(
    *args: str, fake: bool = False, api_key: str | None = None, healthy: bool = True, **env: str
) -> Iterator[Server]:
    """A server on a free port, up and healthy; SIGTERM at the end, which must end it within 10 s with exit code 0."""
    if api_key:
        env["PAGEWIRE_API_KEY"] = api_key
    process = subprocess.Popen(
        command("--port", "0", *args, fake=fake), env=environment(**env),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout and process.stderr
    stderr: list[str] = []
    reader = threading.Thread(target=lambda: stderr.extend(process.stderr or ()), daemon=True)
    reader.start()
    try:
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+) ", line)
        if not found:
            process.wait(20)
            reader.join(5)
            raise AssertionError(f"the server did not start: {line}{''.join(stderr)}")
        server = Server(process, int(found[1]), api_key)
        server.stderr = stderr
        if healthy:
            server.wait_healthy()
        yield server
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0, "".join(stderr)
    finally:
        process.kill()
        process.wait()
        reader.join(5)
        process.stdout.close()
        process.stderr.close()
