"""What `make demo` runs: a real model answers questions through two processes, and the handoff is checked.

Starts `pagewire serve`, asks every question at once over HTTP and streams the answers; then asks the same of one
`--colocated` process. Compares P's and D's KV as bytes and both runs' logits within a tolerance, prints a table per
run, and writes demo-out/trace.json for https://ui.perfetto.dev. Ends with 1 and one sentence if anything is wrong.
With `--kv-dtype` a third run asks the same with such KV caches, and what that changes in the answers is printed.
Everything runs on a GPU where there is one (`--device`).
"""

import argparse
import contextlib
import http.client
import json
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

STORY = (
    "The lighthouse keeper of the small island lit the lamp every evening at sunset and put it out every morning at "
    "sunrise. One winter night a storm broke the glass, and the wind blew the flame out. The keeper stood on the "
    "tower until dawn with a lantern in each hand, and every ship came home safely. In spring the sailors brought "
    "a new glass, and a bell that rings by itself when the wind is strong."
)
QUESTIONS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "What is photosynthesis?",
    "What does a compiler do? Answer in one sentence.",
    f"Summarize this story in one sentence: {STORY}",
)
MAX_TOKENS = 64
KV_DTYPES = ("fp8_e4m3", "float8_e4m3fn", "float8_e5m2", "int8")
# fp32 logits of about +-20 after 30 layers: batch and chunk sizes change how a matmul rounds
LOGIT_TOLERANCE = 1e-3
OUT = Path("demo-out")


class DemoError(Exception):
    """One sentence: what was expected and what came."""


@dataclass
class Answer:
    question: str
    pieces: queue.Queue[str | None] = field(default_factory=queue.Queue)  # text as it comes; None at the end
    request_id: str = ""
    usage: dict[str, int] = field(default_factory=dict)
    start: float = 0.0
    times: list[float] = field(default_factory=list)  # arrival of each piece of text, seconds
    text: str = ""
    error: str = ""


@dataclass
class Run:
    """One server's answers and what it recorded about them."""

    answers: list[Answer]
    requests: dict[str, dict[str, Any]]  # /debug/requests, by request id
    records: Path

    def event(self, answer: Answer, name: str) -> dict[str, Any]:
        events = self.requests[answer.request_id]["events"]
        return next((event for event in events if event["name"] == name), {})


@contextlib.contextmanager
def server(records: Path, *options: str) -> Iterator[int]:
    """The port of a server that answers. Stopped at the end."""
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-m", "pagewire", "serve", "--port", "0", "--record-dir", str(records), *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r"http://[\d.]+:(\d+) serves (\S+)", line)
            start = time.monotonic()
            while found and process.poll() is None and not healthy(int(found[1])):
                if time.monotonic() - start > 300:
                    raise DemoError("the server was not ready within 300 s")
                time.sleep(0.1)
            if not found or process.poll() is not None:
                process.wait(10)
                log.seek(0)
                words = log.read().strip().splitlines() or ["it said nothing"]
                raise DemoError(f"the server did not start: {words[-1]}")
            print(f"\n{line.strip().removeprefix('pagewire: ')} (ready after {time.monotonic() - start:.1f} s)\n")
            yield int(found[1])
            process.terminate()
            if process.wait(20) != 0:
                raise DemoError(f"the server ended with code {process.returncode}")
        finally:
            process.kill()
            process.wait()


def get(port: int, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def healthy(port: int) -> bool:
    try:
        return get(port, "/health")[0] == 200
    except OSError:
        return False


def ask(port: int, answer: Answer) -> None:
    """Streams one chat completion into `answer`."""
    body = {
        "messages": [{"role": "user", "content": answer.question}],
        "max_tokens": MAX_TOKENS, "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        answer.start = time.monotonic()
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise DemoError(f"the server answered {response.status}: {response.read().decode()}")
        while line := response.readline():
            if not line.startswith(b"data: ") or line == b"data: [DONE]\n":
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise DemoError(event["error"]["message"])
            answer.request_id = event["id"] + "-0"
            answer.usage = event["usage"] or answer.usage
            if event["choices"] and (text := event["choices"][0]["delta"].get("content")):
                answer.times.append(time.monotonic())
                answer.text += text
                answer.pieces.put(text)
        if not answer.usage or not answer.text.strip():
            raise DemoError(f"expected an answer and its usage, got {answer.text!r}")
    except (DemoError, OSError, http.client.HTTPException, ValueError) as error:
        answer.error = f"{answer.question[:40]!r}: {error}"
    finally:
        answer.pieces.put(None)


def run(port: int, records: Path, show: bool) -> Run:
    """Asks every question at once; prints each answer as it comes, one after the other."""
    answers = [Answer(question) for question in QUESTIONS]
    threads = [threading.Thread(target=ask, args=(port, answer), daemon=True) for answer in answers]
    for thread in threads:
        thread.start()
    for answer in answers:
        if show:
            print(f"Q: {answer.question}\nA: ", end="", flush=True)
        while (piece := answer.pieces.get()) is not None:
            if show:
                print(piece, end="", flush=True)
        if answer.error:
            raise DemoError(answer.error)
        if show:
            print("\n")
    deadline = time.monotonic() + 10
    while True:  # the model processes report a moment after the last token
        found = json.loads(get(port, "/debug/requests")[1])["requests"]
        requests = {request["request_id"]: request for request in found}
        ended = [r for r in requests.values() if any(event["name"] == "decode" for event in r["events"])]
        if len(ended) == len(answers):
            return Run(answers, requests, records)
        if time.monotonic() > deadline:
            raise DemoError(f"expected {len(answers)} requests with a decode event, got {len(ended)}")
        time.sleep(0.05)


def percentile_ms(seconds: list[float], percent: float) -> str:
    return f"{np.percentile(seconds, percent) * 1e3:.1f}" if seconds else "-"


def table(title: str, this: Run) -> None:
    head = (
        "request",
        "prompt",
        "output",
        "TTFT ms",
        "ITL p50",
        "ITL p99",
        "KV bytes",
        "transfer ms",
        "late ms",
        "join ms",
    )
    rows = []
    for answer in this.answers:
        gaps = [after - before for before, after in zip(answer.times, answer.times[1:], strict=False)]
        total, late, join = (this.event(answer, name) for name in ("transfer_total", "transfer_late", "join_wait"))
        name = answer.question if len(answer.question) <= 30 else answer.question[:27] + "..."
        rows.append((
            name, str(answer.usage["prompt_tokens"]), str(answer.usage["completion_tokens"]),
            f"{(answer.times[0] - answer.start) * 1e3:.0f}", percentile_ms(gaps, 50), percentile_ms(gaps, 99),
            f"{total['args']['bytes']:,}" if total else "-",
            *(f"{span['duration_us'] / 1e3:.1f}" if span else "-" for span in (total, late, join)),
        ))  # fmt: skip
    print(title)
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *cells]))
    print()


def check_kv(two: Run) -> str:
    """P's and D's digests over the whole prompt's KV, each packed again from its own pages."""
    num_bytes = 0
    for answer in two.answers:
        verify, total = two.event(answer, "kv_verify"), two.event(answer, "transfer_total")
        if not verify or not total:
            raise DemoError(f"{answer.question[:40]!r}: expected a kv_verify and a transfer_total event, got none")
        p, d = verify["args"]["p_sha256"], verify["args"]["d_sha256"]
        if p != d:
            raise DemoError(f"{answer.question[:40]!r}: D's KV has SHA-256 {d}, P's {p}")
        num_bytes += total["args"]["bytes"]
    return f"KV: D's pages, packed again, equal P's bytes for all {len(two.answers)} requests ({num_bytes:,} bytes)"


def logits_of(this: Run, answer: Answer) -> np.ndarray:
    """[num_steps, vocab_size] fp32; row i is what output token i was drawn from."""
    files = [this.records / f"{answer.request_id}.{phase}.safetensors" for phase in ("prefill", "decode")]
    if missing := [file.name for file in files if not file.exists()]:
        raise DemoError(f"expected recorded logits, got no {missing[0]}")
    return np.concatenate([load_file(file)["logits"] for file in files])


def check_logits(two: Run, one: Run) -> str:
    """Row by row, up to the first token that rounding may have decided."""
    num_rows, worst, ties = 0, 0.0, 0
    for a, b in zip(two.answers, one.answers, strict=True):
        ours, theirs = logits_of(two, a), logits_of(one, b)
        for step, (x, y) in enumerate(zip(ours, theirs, strict=False)):
            difference = float(np.abs(x - y).max())
            num_rows, worst = num_rows + 1, max(worst, difference)
            if not difference <= LOGIT_TOLERANCE:
                raise DemoError(f"{a.question[:40]!r}, token {step}: the logits of the two runs differ by "
                                f"{difference:.2g}, expected at most {LOGIT_TOLERANCE:g}")  # fmt: skip
            second, first = np.partition(x, -2)[-2:]
            if first - second <= 2 * LOGIT_TOLERANCE:
                ties += 1
                break  # from here on the two runs may go on with different tokens
        else:
            if len(ours) != len(theirs):
                raise DemoError(f"{a.question[:40]!r}: the two runs took {len(ours)} and {len(theirs)} steps")
    cut = f", {ties} requests up to a near-tie" if ties else ""
    return (f"Logits: two processes and one agree in {num_rows} steps{cut}: "
            f"largest difference {worst:.2g}, tolerance {LOGIT_TOLERANCE:g}")  # fmt: skip


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def kv_cost(exact: Run, narrow: Run, kv_dtype: str) -> str:
    """Step by step, as long as both have the same context: up to the first token in which the answers differ."""
    agreed, whole, differences, divergences = 0, 0, [], []
    for a, b in zip(exact.answers, narrow.answers, strict=True):
        x, y = logits_of(exact, a), logits_of(narrow, b)
        steps = min(len(x), len(y))
        same = x[:steps].argmax(-1) == y[:steps].argmax(-1)
        shared = steps if same.all() else int(same.argmin()) + 1
        agreed, whole = agreed + int(same[:shared].sum()), whole + bool(same.all())
        p, q = log_softmax(x[:shared]), log_softmax(y[:shared])
        differences.append(np.abs(x[:shared] - y[:shared]))
        divergences.append((np.exp(p) * (p - q)).sum(-1))
    difference, divergence = np.concatenate(differences), np.concatenate(divergences)
    num_steps = len(divergence)
    return (
        f"What {kv_dtype} caches cost against float ones, over the {num_steps} steps with the same context:\n"
        f"  greedy tokens: {agreed} of {num_steps} steps agree; {whole} of {len(exact.answers)} answers never part\n"
        f"  |logit difference|: max {difference.max():.3g}, mean {difference.mean():.3g}\n"
        f"  KL divergence of the next token, nats: mean {divergence.mean():.3g}, max {divergence.max():.3g}"
    )


def write_trace(trace: bytes) -> None:
    rows = json.loads(trace)["traceEvents"]
    told = {row["args"]["name"] for row in rows if row["name"] == "process_name"}
    if not {"prefill", "decode"} <= told:
        raise DemoError(f"expected P's and D's events in the trace, got those of {sorted(told)}")
    (OUT / "trace.json").write_bytes(trace)


def main() -> None:
    parser = argparse.ArgumentParser(description="Answers questions through two processes and checks the handoff.")
    parser.add_argument("--kv-dtype", choices=KV_DTYPES, help="also run with such KV caches")
    parser.add_argument(
        "--device", default="auto", help="of every run: auto (a GPU if there is one), cpu, cuda, cuda:1"
    )
    args = parser.parse_args()
    kv_dtype, device = args.kv_dtype, ("--device", args.device)
    OUT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder, "two"), Path(folder, "one"), Path(folder, "narrow")
        with server(records[0], *device, "--verify-kv") as port:
            two = run(port, records[0], show=True)
            write_trace(get(port, "/debug/trace")[1])
        with server(records[1], *device, "--colocated") as port:
            print("asking the same of one process ...\n")
            one = run(port, records[1], show=False)
        if kv_dtype:
            with server(records[2], *device, "--verify-kv", "--kv-dtype", kv_dtype) as port:
                print(f"asking the same of two processes with {kv_dtype} caches ...\n")
                narrow = run(port, records[2], show=False)
        table("two processes, P and D", two)
        table("one process (--colocated)", one)
        if kv_dtype:
            table(f"two processes, {kv_dtype} caches", narrow)
        print(
            "TTFT: to the first text; ITL: between two texts, ms. Transfer: from P's first push to D's ack, beside "
            "the prefill;\nlate: from P's last forward until all was pushed; join: from there to the ack.\n"
        )
        print(check_kv(two))
        print(check_logits(two, one))
        if kv_dtype:
            print(f"{kv_dtype}: {check_kv(narrow)}")
            print(kv_cost(two, narrow, kv_dtype))
    print(f"Trace: {OUT / 'trace.json'} holds both processes' timeline; open it at https://ui.perfetto.dev")


if __name__ == "__main__":
    try:
        main()
    except (DemoError, OSError, http.client.HTTPException) as error:
        print(f"\ndemo failed: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
