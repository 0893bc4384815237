"""The server on a GPU: what test_device.py cannot tell without one. About two minutes with kernels to compile."""

import time
import warnings

import pytest
import torch

import pagewire as pw
from pagewire.serve.model.sampling import sample
from pagewire.serve.worker.engine import PromptChunk
from pagewire.transfer.packing import Packing
from pagewire.transfer.shm import Arena
from serve.http_server import serve, wait_for
from serve.steps import DRAWN, GREEDY, both, copy_of, engine_of, new_request, start
from serve.tiny import make_tiny_llama
from serve.workers import Stepped, prompt_of
from transfer.test_packing import D_PAGES, P_PAGES, block_of, chunk_of, filled, make, packing_of, rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = "cuda"


def logits_of(folder, device: str) -> list[torch.Tensor]:
    """Of a prefill in two chunks and of three steps, all greedy after the CPU's own tokens."""
    engine = engine_of(folder, device=device)
    requests = [new_request(engine, f"r{i}", 7 + 5 * i, i) for i in range(3)]
    found: list[torch.Tensor] = []
    engine._sample = lambda requests, logits: found.append(logits.cpu()) or [7] * len(requests)
    engine.prefill([PromptChunk(request, 0, 4) for request in requests])
    engine.prefill([PromptChunk(request, 4, request.prompt_len) for request in requests])
    for step in range(3):
        for request in requests:
            request.output.append(30 + step)
        engine.decode(requests)
    return found


def test_logits_are_the_cpus(tmp_path):
    ours, theirs = logits_of(tmp_path, GPU), logits_of(tmp_path, "cpu")
    assert [len(x) for x in ours] == [0, 3, 3, 3, 3]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "dtypes, rounding",
    [
        (dict(dtype="float32"), 1e-3),
        (dict(dtype="bfloat16"), 0.3),
        (dict(dtype="bfloat16", kv_dtype="float8_e4m3fn"), 2.0),
        (dict(dtype="float16", kv_dtype="int8"), 0.5),
    ],
    ids=str,
)
def test_a_replayed_step_is_the_plain_one(tmp_path, dtypes, rounding):
    engine = engine_of(tmp_path, device=GPU, **dtypes)
    assert sorted(engine._steps) == [1, 2, 4, 6]
    assert all(step._graph is not None for step in engine._steps.values())
    requests = [new_request(engine, f"r{i}", 3 + 5 * i % 17, i) for i in range(6)]
    start(engine, *requests)
    a, b, c, d, e, f = requests
    for batch in ([a, b, c], [c, a, b], [b], [d, b, c], [a, b, c, d, e, f], [f, e, d, c, b], [b, a]):
        both(engine, copy_of(engine.cache), batch, rounding)  # the cache each step begins with


def test_a_step_waits_once(tmp_path):
    engine = engine_of(tmp_path, device=GPU)
    requests = [new_request(engine, f"r{i}", 6, i, sampling) for i, sampling in enumerate((GREEDY, DRAWN, DRAWN))]
    start(engine, *requests)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            engine.decode(requests)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(warning.message) for warning in caught if "synchroniz" in str(warning.message)]
    assert len(waits) == 1, waits


def test_draws_are_the_cpus():
    logits = 3 * torch.randn(8, 50_000, generator=torch.Generator().manual_seed(3))
    samplings = [DRAWN, GREEDY] * 4
    for position in range(0, 160, 8):
        positions = list(range(position, position + 8))
        assert sample(logits.to(GPU), samplings, positions) == sample(logits, samplings, positions)


@pytest.mark.parametrize("wire", [None, "bfloat16", "int8"])
def test_kv_through_the_pinned_arena_is_the_cpus(wire):
    """Packed on a GPU and on a CPU the bytes are the same; unpacked on either, so are the rows."""
    on_cpu, block, tokens = filled(make("prefill", wire)), block_of((1, 4)), (2, 13)
    p = _on_gpu(on_cpu, "prefill", wire)
    arena = Arena.create(2, 16384)
    assert arena.pin() is None
    assert arena.staging_slot(1).is_pinned()
    ours, theirs = arena.staging_slot(0), arena.staging_slot(1)
    packed = p.pack(P_PAGES, block, tokens, ours)
    assert packed == on_cpu.pack(P_PAGES, block, tokens, theirs)
    assert torch.equal(ours[: packed[0]], theirs[: packed[0]])
    chunk = chunk_of(p, (1, 4), tokens, packed)
    empty = make("decode", wire)
    for layer in (*empty._caches[0].k, *empty._caches[0].v):
        layer.zero_()
    d = _on_gpu(empty, "decode", wire)
    assert d.unpack(chunk, D_PAGES, ours) is None and empty.unpack(chunk, D_PAGES, ours) is None
    slots = d._slots(tuple(D_PAGES), *tokens)
    on_gpu = [layer.flatten(0, 1)[slots] for layer in (*d._caches[0].k, *d._caches[0].v)]
    assert torch.equal(torch.stack(on_gpu).cpu(), rows(empty, D_PAGES, tokens))
    assert p.digests(P_PAGES, [block], tokens) == on_cpu.digests(P_PAGES, [block], tokens)
    ours[5] ^= 1
    assert "CRC32C" in d.unpack(chunk, D_PAGES, ours)


def _on_gpu(packing: Packing, role: str, wire: str | None) -> Packing:
    cache = packing._caches[0]
    k, v = ([layer.to(GPU) for layer in layers] for layers in (cache.k, cache.v))
    return packing_of(pw.PagedKVCache(k, v, layout=cache.layout), role, wire)


def test_a_pair_in_one_process(tmp_path):
    """Several links one after the other: each maps and pins an arena."""
    from pagewire.serve.config import WorkerConfig

    path = make_tiny_llama(tmp_path / "tiny", num_layers=3, eos_token_id=None)
    pair = Stepped(
        WorkerConfig(model=str(path), page_size=4, pool_tokens=256, prefill_chunk=8, max_batch_size=4,
                     staging_bytes=4 * 2048, verify_kv=True, device=GPU)
    )  # fmt: skip
    for link in range(3):
        names = [f"{link}-{i}" for i in range(3)]
        for i, name in enumerate(names):
            pair.submit(name, prompt_of(21, i), 6, sampling=(GREEDY, DRAWN)[i % 2])
        pair.until_ended(*names)
        for name in names:
            assert len(pair.output(name)) == 6
            assert pair.reported("kv_verify", name)[0].args["equal"] == 1
        pair.until(pair.pages_free)
        pair.pair()


def test_the_server(tmp_path, capsys):
    """`auto`, which is a GPU here; greedy answers are those of a server on the CPU."""
    path = str(make_tiny_llama(tmp_path / "tiny", eos_token_id=None))
    answers = []
    for device in ("auto", "cpu"):
        began = time.monotonic()
        with serve("--model", path, "--page-size", "4", "--verify-kv", "--device", device, healthy=False) as server:
            server.wait_healthy(300)  # kernels are compiled
            with capsys.disabled():
                print(f"\n--device {device}: ready after {time.monotonic() - began:.1f} s")
            status, answer = server.post("/v1/completions", prompt=prompt_of(70), max_tokens=12, temperature=0)
            assert status == 200 and answer["usage"]["completion_tokens"] == 12

            def verified(server=server) -> list:
                newest = server.request("GET", "/debug/requests")[1]["requests"][0]
                return [event["args"]["equal"] for event in newest["events"] if event["name"] == "kv_verify"]

            wait_for(lambda verified=verified: verified() == [1], 10)
            assert not any("not pinned" in line for line in server.stderr)
            answers.append(answer["choices"][0]["text"])
    assert answers[0] == answers[1]
