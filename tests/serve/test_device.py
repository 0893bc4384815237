"""What a GPU needs of the model processes, as far as a CPU can tell: every tensor is made where it belongs, D's step
over tensors that stay is the plain one, and nothing in it waits. What only a GPU can tell is in test_cuda.py.
"""

import contextlib
import gc
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pagewire as pw
from pagewire.serve.config import EXIT_BAD_CONFIG, WorkerConfig
from pagewire.serve.model import llama
from pagewire.serve.model.llama import Llama
from pagewire.serve.model.rope import inverse_frequencies
from pagewire.serve.model.sampling import sample
from pagewire.serve.worker import engine as engines
from pagewire.serve.worker.engine import DecodeStep, Engine, Inputs, PromptChunk
from pagewire.transfer import packing as module
from pagewire.transfer.frames import Block
from pagewire.transfer.packing import Packing, new_hello
from pagewire.transfer.shm import Arena
from serve.steps import DRAWN, GREEDY, PAGE_SIZE, both, copy_of, engine_of, new_request, start
from serve.tiny import make_tiny_llama
from serve.tiny_gguf import make_tiny_gguf
from serve.workers import FrontEnd, Stepped, prompt_of, spawn
from transfer.test_packing import D_PAGES, P_PAGES, block_of, chunk_of, filled, make, rows

# every tensor says where it is made


@contextlib.contextmanager
def elsewhere():
    """A tensor made without a device has no memory: using it with another fails."""
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_the_default_device_does_not_matter(tmp_path, kv_dtype):
    config = dict(kv_dtype=kv_dtype, record_dir=str(tmp_path / "logits"), device="cpu")
    outputs = []
    for context in (contextlib.nullcontext(), elsewhere()):
        engine = engine_of(tmp_path, **config)
        made = [new_request(engine, f"r{i}", 5 + 3 * i, i, (GREEDY, DRAWN)[i % 2]) for i in range(3)]
        undecoded = new_request(engine, "undecoded", 4, 7)
        with context:
            Llama(Path(engine.config.model), torch.float32, "cpu")
            Engine(engine.config)
            start(engine, *made)
            for _ in range(4):
                for request, token in zip(made, engine.decode(made), strict=True):
                    request.output.append(token)
            for request in (*made, undecoded):
                engine.record(request, "decode", request.logits, request.output)
            hello = new_hello("decode", engine.cache, b"f" * 32)
            packing, arena = Packing(engine.cache, hello, hello), Arena.create(1, 1 << 14)
            block = Block(0, 0, 2, 0, engine.cache.geometry.num_kv_heads)
            _, digest = packing.pack(made[0].pages, block, (1, 5), arena.staging_slot(0))
        outputs.append(([request.output for request in made], digest, packing.digests(made[0].pages, [block], (0, 5))))
    assert outputs[0] == outputs[1]


SCALINGS = {
    "none": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}  # fmt: skip


def test_a_gguf_file_is_read_on_the_cpu(tmp_path):
    path = make_tiny_gguf(make_tiny_llama(tmp_path / "tiny"), tmp_path / "tiny.gguf")
    with elsewhere():
        model = Llama(path, torch.float32, "cpu")
    assert {layer.qkv.weight.device.type for layer in model._layers} == {"cpu"}


@pytest.mark.parametrize("scaling", SCALINGS)
def test_frequencies_are_made_on_the_cpu(tmp_path, scaling):
    path = make_tiny_llama(tmp_path / "tiny", rope_scaling=SCALINGS[scaling])
    model = Llama(path, torch.float32)
    with elsewhere():
        assert torch.equal(inverse_frequencies(model.config), model._frequencies)


def test_draws_are_made_where_the_logits_are():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    given = logits, [DRAWN, GREEDY, DRAWN], [4, 5, 6]
    expected = sample(*given)
    with elsewhere():
        assert sample(*given) == expected


# D's step over tensors that stay


def test_a_step_is_the_plain_one_whoever_joins_and_leaves(tmp_path):
    """Batches of 1 to 6: below, on and, with the largest, beside a power of two; rows change hands between steps."""
    engine = engine_of(tmp_path)
    requests = [new_request(engine, f"r{i}", 3 + 5 * i % 17, i) for i in range(6)]
    start(engine, *requests)
    cache = copy_of(engine.cache)
    a, b, c, d, e, f = requests
    for batch in ([a, b, c], [c, a, b], [b], [d, b, c], [d], [a, b, c, d, e, f], [f, e, d, c, b], [e, a, f], [b, a]):
        both(engine, cache, batch)
    assert sorted(engine._steps) == [1, 2, 4, 6]


def test_pages_that_change_hands(tmp_path):
    """The next request has the last one's row in the table and, in another order, its pages."""
    engine = engine_of(tmp_path)
    first = new_request(engine, "first", 9, 1)
    start(engine, first)
    cache = copy_of(engine.cache)
    both(engine, cache, [first])
    second = new_request(engine, "second", 6, 2)
    second.pages = first.pages[::-1]
    start(engine, second)
    cache = copy_of(engine.cache)
    both(engine, cache, [second])


def test_the_pool_is_less_than_the_context(tmp_path):
    engine = engine_of(tmp_path, pool_tokens=44)
    request = new_request(engine, "r", 30, 1)
    start(engine, request)
    both(engine, copy_of(engine.cache), [request])


def test_inputs_begin_on_16_bytes_and_come_up_as_they_were_set(tmp_path):
    """A request of 3 tokens and a row beyond it; the rest is what `host` holds."""
    engine = engine_of(tmp_path)
    request = new_request(engine, "r", 5, 1)
    rows = dict.fromkeys(("token_ids", "positions", "slot_mapping", "seq_lens"), (5,))
    inputs = Inputs(torch.device("cpu"), **rows, none=(0,), page_table=(2, 11), more=(2,))
    inputs.host["more"][:] = 7, 8
    found = inputs.upload([PromptChunk(request, 2, 5)], PAGE_SIZE)
    assert len({part.data_ptr() % 16 for part in found.values()}) == 1
    assert found["token_ids"][:3].tolist() == request.submit.token_ids[2:]
    assert found["positions"][:3].tolist() == [2, 3, 4]
    a, b = request.pages[:2]
    assert found["slot_mapping"].tolist() == [a * PAGE_SIZE + 2, a * PAGE_SIZE + 3, b * PAGE_SIZE, -1, -1]
    assert found["seq_lens"].tolist() == [5, 0, 0, 0, 0]
    assert found["page_table"][0, :10].tolist() == request.pages
    assert found["none"].shape == (0,) and found["more"].tolist() == [7, 8]


class FakeGraph:
    """Stands for a graph of torch's: what a capture called forward with is called again, its result where it was."""

    def __init__(self, model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
        self.captured = None
        self.num_replays = 0
        self.forward, self.monkeypatch, self.model = model.forward, monkeypatch, model
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph", self.capture)

    @contextlib.contextmanager
    def capture(self, graph):
        assert graph is self and self.captured is None

        def record(**given):
            assert given["on_layer"] is None, "nothing in a graph can call"
            logits = torch.full((len(given["seq_lens"]), self.model.config.vocab_size), torch.nan)
            self.captured = given, logits
            return logits

        with self.monkeypatch.context() as patch:
            patch.setattr(self.model, "forward", record)
            yield

    def replay(self) -> None:
        given, logits = self.captured
        self.num_replays += 1
        logits.copy_(self.forward(**given))


def test_a_graph_is_replayed_over_new_contents(tmp_path, monkeypatch):
    engine = engine_of(tmp_path)
    requests = [new_request(engine, f"r{i}", 4 + 6 * i, i) for i in range(4)]
    start(engine, *requests)
    cache = copy_of(engine.cache)
    graph = FakeGraph(engine.model, monkeypatch)
    engine._steps[4] = DecodeStep(engine.model, engine.cache, 4, engine._max_pages, True)
    engine._record_dir = tmp_path
    calls, expected = [], []
    a, b, c, d = requests
    for batch in ([a, b, c], [d, c, b, a], [b, d, a], [a, c, d]):
        expected.append(both(engine, cache, batch)[batch.index(a)])
    assert graph.num_replays == 3
    assert torch.equal(torch.stack(a.logits), torch.stack(expected)), "a replay wrote over what was recorded"
    engine.decode([a, b, c], calls.append)
    assert calls == [2], "progress is counted once a step"


def test_a_row_with_nan_fails_alone_in_a_padded_batch(tmp_path):
    engine = engine_of(tmp_path, max_batch_size=4)
    requests = [new_request(engine, f"r{i}", 6, i, sampling) for i, sampling in enumerate((GREEDY, DRAWN, GREEDY))]
    start(engine, *requests)
    engine.cache.k[1][requests[1].pages[0], 0] = torch.nan
    tokens = engine.decode(requests)
    assert [token is None for token in tokens] == [False, True, False]


# nothing waits

SYNCS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "equal", "_unique2", "bincount"}


class Syncs(TorchDispatchMode):
    """The operators for which a GPU would be waited for, but for those within pagewire's own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.found: list[str] = []
        self.ours = False
        for name in ("append_kv", "decode"):
            monkeypatch.setattr(llama.pw, name, self.marked(getattr(pw, name)))
        for name in ("tolist", "numpy", "cpu"):  # of a tensor on the CPU they pass no dispatcher
            monkeypatch.setattr(torch.Tensor, name, self.noted(name, getattr(torch.Tensor, name)))

    def marked(self, op):
        def run(*args, **kwargs):
            self.ours = True
            try:
                return op(*args, **kwargs)
            finally:
                self.ours = False

        return run

    def noted(self, name, method):
        def run(*args, **kwargs):
            self.found.append(name)
            return method(*args, **kwargs)

        return run

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if not self.ours and (name in SYNCS or name.startswith("index") and _has_mask(args)):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def _has_mask(args) -> bool:
    indices = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ()
    return any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in indices)


def test_a_step_waits_once(tmp_path, monkeypatch):
    """For the tokens. The first step of a size makes its tensors; this is the second."""
    engine = engine_of(tmp_path)
    requests = [new_request(engine, f"r{i}", 6, i, sampling) for i, sampling in enumerate((GREEDY, DRAWN, DRAWN))]
    start(engine, *requests)
    for _ in range(2):
        with monkeypatch.context() as patch, Syncs(patch) as syncs:
            tokens = engine.decode(requests)
        for request, token in zip(requests, tokens, strict=True):
            request.output.append(token)
    assert syncs.found == ["tolist"]


# bytes through a device of their own


def test_packed_on_a_device_and_unpacked_from_what_was_verified(monkeypatch):
    """The scratch memory stands for a GPU's: what lies in it is neither the slot's nor the verified copy."""
    p, d, arena = filled(make("prefill")), make(), Arena.create(1, 16384)
    plain = Arena.create(1, 16384).staging_slot(0)
    packed = p.pack(P_PAGES, block_of((1, 4)), (2, 13), plain)
    for packing in (p, d):
        packing._through_host = lambda slot: True
        packing._scratch = torch.full_like(packing._private, 7)
    staging = arena.staging_slot(0)
    assert p.pack(P_PAGES, block_of((1, 4)), (2, 13), staging) == packed
    assert torch.equal(staging[: packed[0]], plain[: packed[0]]) and not staging[packed[0] :].any()
    chunk = chunk_of(p, (1, 4), (2, 13), packed)
    checksum = module.checksum

    def then_changed(kind, checked):
        found = checksum(kind, checked)
        staging[:64] ^= 1  # P writes once more
        return found

    with monkeypatch.context() as patch:
        patch.setattr(module, "checksum", then_changed)
        assert d.unpack(chunk, D_PAGES, staging) is None
    assert torch.equal(rows(d, D_PAGES, (2, 13))[1:4], rows(p, P_PAGES, (2, 13))[1:4])
    before = [layer.clone() for layer in (*d._caches[0].k, *d._caches[0].v)]
    assert "CRC32C" in d.unpack(chunk, D_PAGES, staging)
    assert all(map(torch.equal, before, (*d._caches[0].k, *d._caches[0].v)))


def test_an_arena_is_pinned_as_long_as_it_lives(monkeypatch):
    calls = []

    class Cudart:
        cudaHostRegister = staticmethod(lambda *args: calls.append(("register", *args)) or len(calls) - 1)
        cudaHostUnregister = staticmethod(lambda *args: calls.append(("unregister", *args)))

    def launch(*size, device):
        calls.append("launch")
        raise RuntimeError("CUDA error: no")

    def check_error(code: int) -> None:
        if code:
            raise RuntimeError("CUDA error: no")

    monkeypatch.setattr(torch.cuda, "cudart", lambda: Cudart)
    monkeypatch.setattr(torch.cuda, "check_error", check_error)
    monkeypatch.setattr(torch, "ones", launch)
    arena, other = Arena.create(2, 128), Arena.create(1, 64)
    address = arena.staging_slot(0).data_ptr()
    assert arena.pin() is None
    assert other.pin() == "CUDA error: no"
    refused = other.staging_slot(0).data_ptr()
    assert calls == [("register", address, 256, 0), ("register", refused, 64, 0), "launch"]
    del arena, other
    gc.collect()
    assert calls[3:] == [("unregister", address)]


# which device, and what a broken one does


@pytest.mark.parametrize(
    "name, count, expected",
    [("auto", 0, "cpu"), ("auto", 2, "cuda:0"), ("cpu", 2, "cpu"), ("cuda", 1, "cuda:0"), ("cuda:1", 2, "cuda:1")],
)
def test_which_device(name, count, expected, monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert engines._device(name) == torch.device(expected)
    assert current == ([] if expected == "cpu" else [torch.device(expected)])


@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:-1", "cuda:0x1", "cpu:0", "cuda:99999"])
def test_a_device_of_no_known_form_is_refused(name):
    with pytest.raises(ValueError, match=f"device: expected auto, cpu, cuda or cuda:<index>, got {name!r}"):
        WorkerConfig(model="m", device=name).check()


def test_a_gpu_that_is_not_there_ends_the_worker_before_the_model_loads(tmp_path):
    count = torch.cuda.device_count()
    process = spawn(
        "prefill", WorkerConfig(model=str(tmp_path / "none"), device=f"cuda:{count}"), FrontEnd().connect("p")
    )
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == EXIT_BAD_CONFIG
    assert stderr == f"prefill: device: expected cpu or one of the {count} GPUs that torch sees, got cuda:{count}\n"


def test_a_failing_gpu_ends_the_process_and_not_the_request(tmp_path, monkeypatch):
    path = make_tiny_llama(tmp_path / "tiny", eos_token_id=None)
    pair = Stepped(WorkerConfig(model=str(path), page_size=4, pool_tokens=256, device="cpu"))
    pair.submit("a", prompt_of(9), 4)

    def broken(*args):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    for worker in (pair.d, pair.p):
        monkeypatch.setattr(worker.engine, "prefill", broken)
        monkeypatch.setattr(worker.engine, "decode", broken)
    with pytest.raises(torch.AcceleratorError):
        pair.turns(20)
    assert not pair.ends["a"]
