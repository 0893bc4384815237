"""Thousands of requests of every kind, P and D killed among them: every answer right, memory and descriptors flat.

PAGEWIRE_SOAK_REQUESTS sets how many; `make test-faults` takes 10,000.
"""

import os
import queue
import random
import threading
import time
from pathlib import Path

import pytest

from serve.http_server import Server, serve, wait_for
from serve.test_recovery import OPTIONS, Stream, conserved, kill, staging_arenas, wait_replaced
from serve.tiny import make_tiny_llama

NUM_CLIENTS = 8
NUM_BODIES = 24
NUM_KILLS = 10  # of P and of D each, spread over the run
MAX_REQUEST_S = 60.0
MAX_GROWTH_MB = 12.0  # from 20 % of the requests to their end; the front's last requests and trace are in it
REQUESTS = int(os.environ.get("PAGEWIRE_SOAK_REQUESTS", "60"))
LONG = REQUESTS >= 500  # below that, one kill of each, and no runs that show what one life of theirs grows by


def body_of(number: int) -> dict:
    """Mixed lengths, greedy and drawn; the longest fills a quarter of the pool."""
    draw = random.Random(number)
    length, max_tokens = draw.choice([(3, 12), (20, 40), (70, 20), (200, 30), (400, 8), (40, 100)])
    prompt = [30 + (11 * number + 7 * j) % 250 for j in range(length)]
    return dict(prompt=prompt, max_tokens=max_tokens, temperature=0.8 * (number % 2), seed=number)


class Client(threading.Thread):
    """Takes one number after the other; what it finds wrong is in `wrong`."""

    def __init__(self, server: Server, numbers: "queue.SimpleQueue[int]", expected: list[str]) -> None:
        super().__init__(daemon=True)
        self.server, self.numbers, self.expected = server, numbers, expected
        self.wrong: list[str] = []
        self.slowest_s = 0.0
        self.num_left = 0

    def run(self) -> None:
        while True:
            try:
                number = self.numbers.get_nowait()
            except queue.Empty:
                return
            start = time.monotonic()
            try:
                self.one(number)
            except Exception as error:  # its thread must not end in silence
                self.wrong.append(f"{number}: {error!r}")
            self.slowest_s = max(self.slowest_s, time.monotonic() - start)

    def one(self, number: int) -> None:
        body, expected = body_of(number % NUM_BODIES), self.expected[number % NUM_BODIES]
        way = random.Random(number).randrange(8)
        if way == 0:  # leaves before the first token
            with self.server.open_stream("/v1/completions", **body):
                self.num_left += 1
        elif way == 1:  # leaves in the middle
            with self.server.open_stream("/v1/completions", **body) as response:
                for _ in range(6):
                    response.readline()
                self.num_left += 1
        elif way < 5:
            status, answer = self.server.post("/v1/completions", **body)
            text = answer["choices"][0]["text"] if status == 200 else answer
            if text != expected:
                self.wrong.append(f"{number}: {status} {text!r} instead of {expected!r}")
        else:
            stream = Stream(self.server, **body)
            text, reason, error, _ = stream.outcome()
            if (text, reason, error) != (expected, "length", ""):
                self.wrong.append(f"{number}: {text!r} {reason} {error} instead of {expected!r}")


def rss_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0]) / 1024


def num_fds(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def settled(server: Server) -> dict[str, tuple[float, int]]:
    """Memory and descriptors of each process, once nothing is in flight."""
    server.wait_healthy()
    wait_for(lambda: conserved(server), 20)
    pids = {"front": server.process.pid, **server.pids()}
    fewest = {role: num_fds(pid) for role, pid in pids.items()}
    for _ in range(10):  # connections that clients have closed
        time.sleep(0.1)
        fewest = {role: min(fds, num_fds(pids[role])) for role, fds in fewest.items()}
    return {role: (rss_mb(pid), fewest[role]) for role, pid in pids.items()}


def run(server: Server, numbers: range, expected: list[str]) -> list[Client]:
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in numbers:
        waiting.put(number)
    clients = [Client(server, waiting, expected) for _ in range(NUM_CLIENTS)]
    for client in clients:
        client.start()
    return clients


@pytest.mark.timeout(300 + REQUESTS)
def test_soak(tmp_path: Path) -> None:
    """Ten parts, P and D killed in each."""
    model = str(make_tiny_llama(tmp_path / "tiny", eos_token_id=None))
    every_pid, marks, clients = set(), {}, []
    with serve("--model", model, *OPTIONS) as server:
        expected = [
            server.post("/v1/completions", **body_of(number))[1]["choices"][0]["text"] for number in range(NUM_BODIES)
        ]
        every_pid |= set(server.pids().values())
        start, num_kills = time.monotonic(), 0
        parts = [range(REQUESTS * i // NUM_KILLS, REQUESTS * (i + 1) // NUM_KILLS) for i in range(NUM_KILLS)]
        for i, part in enumerate(parts):
            running = run(server, part, expected)
            clients += running
            if LONG or i == 4:
                for role in ("prefill", "decode") if i % 2 else ("decode", "prefill"):
                    wait_for(lambda: server.metric("pagewire_inflight_requests") > 2 or not alive(running), 60)  # noqa: B023
                    wait_replaced(server, kill(server, role), timeout=30)
                    num_kills += 1
            for client in running:
                client.join(MAX_REQUEST_S * max(1, len(part)))
                assert not client.is_alive(), "a request hangs"
            marks[i] = settled(server)
            every_pid |= set(server.pids().values())
            assert staging_arenas(server.pids().values()) <= 2 and staging_arenas([server.process.pid]) == 0
        took_s = time.monotonic() - start
        wrong = [sentence for client in clients for sentence in client.wrong]
        assert not wrong, f"{len(wrong)} of {REQUESTS}: {wrong[:5]}"
        # P and D of now, over parts without a kill
        run_alone = range(REQUESTS, REQUESTS + REQUESTS // 20)
        lives = [marks[NUM_KILLS - 1]]
        for _ in range(2 * LONG):
            for client in run(server, run_alone, expected):
                client.join(MAX_REQUEST_S * len(run_alone))
                assert not client.is_alive() and not client.wrong, client.wrong[:5]
            lives.append(settled(server))
        slowest_s = max(client.slowest_s for client in clients)
        print(
            f"{REQUESTS} requests, {sum(client.num_left for client in clients)} of them left, {num_kills} kills, "
            f"{server.metric('pagewire_recovered_attempts'):.0f} attempts recovered, in {took_s:.1f} s, "
            f"the slowest {slowest_s:.2f} s"
        )
        print(f"MB and descriptors: at 20 % {marks[1]}, at the end {marks[NUM_KILLS - 1]}, of one life {lives}")
        assert slowest_s < MAX_REQUEST_S
        assert server.process.poll() is None
        growths = {"front": (marks[1], marks[NUM_KILLS - 1])}
        if LONG:
            growths |= dict.fromkeys(("prefill", "decode"), (lives[-2], lives[-1]))
        for role, (then, now) in growths.items():
            assert now[role][0] - then[role][0] < MAX_GROWTH_MB, (role, then, now)
        assert {r: fds for r, (_, fds) in marks[1].items()} == {r: fds for r, (_, fds) in marks[NUM_KILLS - 1].items()}
        every_pid.add(server.process.pid)
    wait_for(lambda: not any(is_ours(pid) for pid in every_pid), 5)


def alive(clients: list[Client]) -> bool:
    return any(client.is_alive() for client in clients)


def is_ours(pid: int) -> bool:
    try:
        return b"pagewire" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
