"""Model processes as the front runs them: KV bytes, logits against one process, and how they end."""

import contextlib
import dataclasses
import socket
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file

import pagewire as pw
from pagewire.serve.channel import Channel
from pagewire.serve.config import EXIT_BAD_CONFIG, EXIT_PEER_LOST, WorkerConfig
from pagewire.serve.messages import Failed, Finished, Sampling
from pagewire.serve.worker import process
from pagewire.transfer.packing import Packing
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
        staging_bytes=1 << 15, verify_kv=True, backend="reference",
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
    """queue_p, prefill, exposed, queue_d and decode partition its time, but for a frame's flight."""
    pair.submit("phases", prompt_of(50), MAX_TOKENS)
    pair.until_ended("phases")
    names = ("queue_p", "prefill", "exposed", "queue_d", "decode")
    spans = [pair.reported(name, "phases") for name in names]
    assert [len(span) for span in spans] == [1] * len(names)
    starts = [span[0].start_us for span in spans]
    ends = [span[0].start_us + span[0].duration_us for span in spans]
    assert starts[1] == ends[0] and starts[2] >= ends[1] and starts[4] == ends[3]
    assert starts == sorted(starts) and ends[4] == max(ends)
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


def test_killing_p_ends_d_with_a_word_on_every_request(model: Path) -> None:
    pair = Workers(config_of(model))
    pair.submit("running", prompt_of(20), 400)
    pair.until(lambda: len(pair.tokens["running"]) > 3)
    ids = [f"early{i}" for i in range(4)]
    for i, request_id in enumerate(ids):
        pair.submit(request_id, prompt_of(300, salt=i), 2)
    pair.kill("prefill")
    assert pair.exit_code("decode") == EXIT_PEER_LOST
    pair.until(lambda: "decode" in pair.closed)
    for request_id in ("running", *ids):
        assert pair.ends[request_id] == [Failed(request_id, "the decode process lost its peer")]
    assert "P: the other end closed, exiting" in pair.stderr("decode")
    pair.stop()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"fingerprint": b"g" * 32}, "fingerprint: expected 6666666666666666, got 6767676767676767"),
        ({"num_layers": 4}, "num_layers: expected 3, got 4"),
        ({"num_kv_heads": 8}, "num_kv_heads: expected 2, got 8"),
        ({"dtype": "bfloat16"}, "dtype: expected float32, got bfloat16"),
        ({"role": "decode"}, "HELLO: expected one from prefill"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_peer_of_another_model_is_refused(model: Path, change: dict, sentence: str) -> None:
    """Before Ready, and by the field in which they differ."""
    cache = pw.PagedKVCache.allocate(
        num_layers=3, num_pages=2, page_size=4, num_kv_heads=2, head_dim=16, dtype=torch.float32, device="cpu"
    )
    packing = Packing(cache, b"f" * 32)
    ours, theirs = (
        Channel(sock, process.frame_codec(), name="peer")
        for sock in socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    )
    theirs.send(dataclasses.replace(process._hello("prefill", packing.wire, 0, 0), **change))
    with pytest.raises(ValueError, match=sentence):
        process._create_arena(config_of(model), ours, packing)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"pool_tokens": 3}, "pool_tokens: expected at least one page of 4 tokens, got 3"),
        ({"page_size": 0}, "page_size: expected at least 1, got 0"),
        ({"dtype": "int4"}, "dtype: expected one of float32, bfloat16, float16, got 'int4'"),
        ({"model": "/nowhere"}, "/nowhere: expected a Hugging Face directory or a .gguf file"),
        ({"backend": "warp"}, "warp"),
        ({"staging_bytes": 300}, "staging_bytes: expected at least"),
        ({"kv_wire_dtype": "int8"}, "kv_wire_dtype: expected null or one of"),
        ({"polite": True}, "unknown field `polite`"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_that_cannot_work_is_refused(
    model: Path, changes: dict, sentence: str, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAGEWIRE_BACKEND", "reference")
    monkeypatch.setattr(process.signal, "signal", lambda *args: None)
    fields = {**msgspec.to_builtins(config_of(model)), **changes}
    (front, control), (peer, _other) = socket.socketpair(), socket.socketpair()
    argv = ["--role", "decode", "--config-json", msgspec.json.encode(fields).decode()]
    argv += ["--control-fd", str(control.detach()), "--peer-fd", str(peer.detach())]
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
    assert "the front closed, exiting" in pair.stderr("decode")
