"""Model processes as the front runs them: KV bytes, logits against one process, and how they end."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file

import pagewire as pw
from pagewire.net.channel import frame
from pagewire.serve.config import EXIT_BAD_CONFIG, WorkerConfig
from pagewire.serve.messages import Finished, Pair, Sampling
from pagewire.serve.model.files import load_config
from pagewire.serve.model.fingerprint import fingerprint
from pagewire.serve.worker import process
from pagewire.serve.worker.peers import Peers
from pagewire.transfer.frames import Ack
from pagewire.transfer.packing import new_hello
from serve.tiny import make_tiny_llama
from serve.workers import Workers, prompt_of

LENS = (1, 3, 4, 5, 37, 90)  # around a page of 4, and across chunks of 16
MAX_TOKENS = 8
SAMPLED = Sampling(temperature=0.8, seed=11)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    return make_tiny_llama(path, num_layers=3, eos_token_id=None)


def config_of(model: Path, **changes) -> WorkerConfig:
    fields = dict(
        model=str(model), page_size=4, pool_tokens=512, prefill_chunk=16, max_batch_size=4,
        staging_bytes=1 << 15, verify_kv=True, backend="reference", device="cpu",
    )  # fmt: skip
    return WorkerConfig(**{**fields, **changes})


def submit_all(workers: Workers) -> list[str]:
    for length in LENS:
        sampling = SAMPLED if length == 37 else Sampling()
        workers.submit(f"len{length}", prompt_of(length), MAX_TOKENS, sampling=sampling)
    return [f"len{length}" for length in LENS]


@pytest.fixture(scope="module")
def pair(model: Path, tmp_path_factory: pytest.TempPathFactory):
    pair = Workers(config_of(model, record_dir=str(tmp_path_factory.mktemp("pair"))))
    yield pair
    pair.stop()


@pytest.fixture(scope="module")
def answered(pair: Workers) -> list[str]:
    """The ids of requests the pair has answered, one for each of LENS."""
    ids = submit_all(pair)
    pair.until_ended(*ids)
    pair.until(pair.all_free)
    return ids


def test_a_pair_answers_and_every_byte_of_kv_arrives(pair: Workers, answered: list[str]) -> None:
    assert {ready.role for ready in pair.ready.values()} == {"decode", "prefill"}
    assert pair.ready["decode"].pool_tokens == 512 and pair.ready["decode"].vocab_size == 320
    for length, request_id in zip(LENS, answered, strict=True):
        assert pair.ends[request_id] == [Finished(request_id, "length", MAX_TOKENS)]
        assert len(pair.output(request_id)) == MAX_TOKENS
        (verified,) = pair.reported("kv_verify", request_id)
        assert verified.args["equal"] == 1
        (transfer,) = pair.reported("transfer_total", request_id)
        assert transfer.args["bytes"] == length * 2 * 3 * 2 * 16 * 4  # K, V; layers, heads, dim, fp32


def test_the_phases_of_a_request_follow_each_other(pair: Workers) -> None:
    """queue_p, prefill, transfer_late, join_wait, queue_d and decode partition its time, but for a frame's flight."""
    pair.submit("phases", prompt_of(50), MAX_TOKENS)
    pair.until_ended("phases")
    names = ("queue_p", "prefill", "transfer_late", "join_wait", "queue_d", "decode")
    spans = [pair.reported(name, "phases") for name in names]
    assert [len(span) for span in spans] == [1] * len(names)
    starts = [span[0].start_us for span in spans]
    ends = [span[0].start_us + span[0].duration_us for span in spans]
    assert starts[1:4] == ends[:3] and starts[5] == ends[4]
    assert starts == sorted(starts) and ends[5] == max(ends)
    chunks = pair.named("prefill_chunk", "phases")
    assert [(c.args["start"], c.args["stop"]) for c in chunks] == [(0, 16), (16, 32), (32, 48), (48, 50)]


def test_cancelled_requests_leave_no_page_behind(pair: Workers) -> None:
    for i in range(8):
        request_id = f"cancel{i}"
        pair.submit(request_id, prompt_of(60, salt=i), 60)
        if i % 2:
            pair.until(lambda r=request_id, n=i: len(pair.tokens[r]) >= n - 1)  # 0, 2, 4, 6 tokens
        pair.cancel(request_id)
    pair.until_ended(*(f"cancel{i}" for i in range(8)))
    pair.submit("after", prompt_of(60), 2)
    pair.until_ended("after")
    pair.until(pair.all_free)
    for i in range(8):
        assert {end.reason for end in pair.ends[f"cancel{i}"]} == {"cancelled"}


def test_logits_agree_with_one_process(model: Path, pair: Workers, answered: list[str], tmp_path: Path) -> None:
    record_dir = Path(pair_record_dir(pair))
    workers = Workers(config_of(model, record_dir=str(tmp_path)), roles=("colocated",))
    try:
        workers.until_ended(*submit_all(workers))
        workers.until(workers.all_free)
    finally:
        workers.stop()
    for request_id in answered:
        ours, theirs = (load_file(d / f"{request_id}.prefill.safetensors") for d in (record_dir, tmp_path))
        torch.testing.assert_close(ours["logits"], theirs["logits"], atol=1e-4, rtol=1e-4)
        ours, theirs = (load_file(d / f"{request_id}.decode.safetensors") for d in (record_dir, tmp_path))
        assert ours["logits"].shape == (MAX_TOKENS - 1, 320)
        assert ours["token_ids"].tolist() == pair.output(request_id)
        same = ours["token_ids"] == theirs["token_ids"]
        num_same = MAX_TOKENS if bool(same.all()) else int(same.int().argmin())
        assert num_same >= 1  # rows whose input tokens agree are comparable
        torch.testing.assert_close(ours["logits"][:num_same], theirs["logits"][:num_same], atol=1e-4, rtol=1e-4)


def pair_record_dir(pair: Workers) -> str:
    args = pair.processes["decode"].args
    return msgspec.json.decode(args[args.index("--config-json") + 1])["record_dir"]


@pytest.mark.parametrize("victim", ["prefill", "decode"])
def test_the_other_process_outlives_a_kill(model: Path, victim: str) -> None:
    """It says so, drops what it cannot end, gives every page and descriptor back, and joins the next one."""
    survivor = "decode" if victim == "prefill" else "prefill"
    pair = Workers(config_of(model, backend="cpu"))
    try:
        fds = pair.num_fds(survivor)
        pair.submit("running", prompt_of(20), 300)
        pair.until(lambda: len(pair.tokens["running"]) > 3)
        for i in range(4):
            pair.submit(f"early{i}", prompt_of(400, salt=i), 2)
        pair.kill(victim)
        pair.until(lambda: pair.unlinked != [])
        ((role, unlinked),) = pair.unlinked
        assert (role, unlinked.link) == (survivor, 1) and unlinked.reason.startswith(f"{victim[0].upper()}: ")
        if survivor == "decode":
            pair.until_ended("running")
            assert pair.ends["running"] == [Finished("running", "length", 300)]
        pair.start(victim)
        pair.until(lambda: len(pair.ready) == 2)
        pair.pair()
        pair.submit("next", prompt_of(20), 8)
        pair.until_ended("next")
        assert pair.output("next") == pair.output("running")[:8] or survivor == "prefill"
        pair.until(pair.all_free)
        assert pair.num_fds(survivor) == fds
    finally:
        pair.stop()


def test_a_flood_of_frames_does_not_keep_d_from_its_work(model: Path) -> None:
    """100,000 frames that change nothing, from a peer of ours, beside a request that D decodes."""
    config = config_of(model, backend="cpu", verify_kv=False)
    d = Workers(config, roles=("decode",))
    cache = pw.PagedKVCache.allocate(
        num_layers=3, num_pages=2, page_size=4, num_kv_heads=2, head_dim=16, dtype=torch.float32, device="cpu"
    )
    p = Peers(new_hello("prefill", cache, bytes.fromhex(fingerprint(model, load_config(model)))), cache, config)
    try:
        d.channels["decode"].send(Pair(1, p.incarnation, ""))
        p.pair(Pair(1, d.ready["decode"].incarnation, d.ready["decode"].address))
        d.until(lambda: p.join() or 1 in p.links, 10)
        d.until(lambda: d.linked == {"decode": 1})
        d.submit("victim", prompt_of(20), 400, local=True)
        d.until(lambda: len(d.tokens["victim"]) > 20)
        before = d.rss_mb("decode")
        flood = b"".join(frame(p.links[1].transport._codec.encode(Ack("x", 1))) for _ in range(100_000))
        with p.links[1].transport._sock.dup() as sock:
            sock.setblocking(True)

            def send() -> None:
                with contextlib.suppress(OSError):
                    sock.sendall(flood)

            thread = threading.Thread(target=send, daemon=True)
            thread.start()
            longest, last = 0.0, time.monotonic()
            while not d.ends["victim"]:
                seen = len(d.tokens["victim"])
                d.until(lambda n=seen: len(d.tokens["victim"]) > n or d.ends["victim"], 10)
                now = time.monotonic()
                longest, last = max(longest, now - last), now
            assert thread.is_alive(), "the flood was over before the request"
            sock.shutdown(socket.SHUT_RDWR)
            thread.join(5)
        assert d.ends["victim"] == [Finished("victim", "length", 400)]
        assert longest < 0.5 and d.rss_mb("decode") - before < 32
        refused = d.reported("refused", "")
        assert "which only D sends" in refused[0].args["reason"]
    finally:
        d.stop()


def test_a_worker_dies_with_its_front(model: Path) -> None:
    """While it loads, and while it is stopped: without a word from anybody."""
    code = (
        "import sys, os, time; sys.path[:0] = sys.argv[1].split(':'); from serve.workers import *;"
        "w = Workers.__new__(Workers); FrontEnd.__init__(w); w.processes = {};"
        "w.config = msgspec.json.decode(sys.argv[2], type=WorkerConfig); w.start('colocated');"
        "sys.argv[3] == 'loading' or w.until(lambda: w.ready);"
        "pid = w.processes['colocated'].pid; sys.argv[3] == 'stopped' and os.kill(pid, signal.SIGSTOP);"
        "print(pid, flush=True); time.sleep(60)"
    )
    config = msgspec.json.encode(config_of(model)).decode()
    for state in ("loading", "stopped"):
        argv = [sys.executable, "-c", code, os.pathsep.join(sys.path), config, state]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as front:
            pid = int(front.stdout.readline())
            time.sleep(0.3 if state == "loading" else 0)  # python starts, prctl is among the first things it does
            front.kill()
        deadline = time.monotonic() + 5
        while is_alive(pid):
            assert time.monotonic() < deadline, f"{state}: process {pid} is left"
            time.sleep(0.01)


def test_a_worker_whose_front_ended_before_the_kernel_was_told_ends(model: Path) -> None:
    """Whoever made the control socket is the front: here it is not the parent."""
    code = (
        "import sys, socket, os; sys.path[:0] = sys.argv[1].split(':'); from pagewire.serve.worker import process;"
        "ours, theirs = socket.socketpair();"
        "sys.exit(process.main(['--role', 'colocated', '--config-json', '{}', '--control-fd', str(theirs.detach())]))"
    )
    argv = [sys.executable, "-c", code, os.pathsep.join(sys.path)]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=20)
    assert result.returncode == 0 and "is not the parent" in result.stderr


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"pool_tokens": 3}, "pool_tokens: expected at least one page of 4 tokens, got 3"),
        ({"page_size": 0}, "page_size: expected at least 1, got 0"),
        ({"dtype": "int4"}, "dtype: expected one of float32, bfloat16, float16, got 'int4'"),
        ({"model": "/nowhere"}, "/nowhere: expected a Hugging Face directory or a .gguf file"),
        ({"backend": "warp"}, "warp"),
        ({"staging_bytes": 300}, "staging_bytes: expected at least"),
        ({"kv_transport": "nvlink"}, "kv_transport: expected one of shm, cuda-ipc, got 'nvlink'"),
        ({"kv_wire_dtype": "int4"}, "kv_wire_dtype: expected null or one of float32, bfloat16, float16, float8_e4m3fn"),
        (
            {"kv_dtype": "bfloat16"},
            "kv_dtype: expected null or one of float32, float8_e4m3fn, float8_e5m2, int8, got 'b",
        ),
        ({"polite": True}, "unknown field `polite`"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_that_cannot_work_is_refused(
    model: Path, changes: dict, sentence: str, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAGEWIRE_BACKEND", "reference")
    monkeypatch.setattr(process.signal, "signal", lambda *args: None)
    monkeypatch.setattr(process, "die_with_front", lambda control: None)
    fields = {**msgspec.to_builtins(config_of(model)), **changes}
    front, control = socket.socketpair()
    argv = ["--role", "decode", "--config-json", msgspec.json.encode(fields).decode()]
    argv += ["--control-fd", str(control.detach())]
    assert process.main(argv) == EXIT_BAD_CONFIG
    stderr = capsys.readouterr().err
    assert sentence in stderr and stderr.startswith("decode: ") and stderr.count("\n") == 1
    front.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        assert front.recv(1) == b""  # never Ready


def test_a_pair_ends_with_its_front(pair: Workers) -> None:
    """The last test of the module's pair. Requests in flight do not keep it."""
    pair.submit("orphan", prompt_of(200), 200)
    for role, channel in pair.channels.items():
        channel.close()
        pair.closed.add(role)
    assert (pair.exit_code("decode"), pair.exit_code("prefill")) == (0, 0)
    assert "decode: the front: " in pair.stderr("decode")
