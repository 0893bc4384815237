"""GGUF: the tiny model written as llama.cpp's converter does, and the embedded default, SmolLM2."""

import functools
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from pagewire.serve.model.config import ModelConfig, ModelError
from pagewire.serve.model.default import default_model_path
from pagewire.serve.model.files import load_config, open_weights
from pagewire.serve.model.llama import Llama
from pagewire.serve.model.weights import expected_shapes
from serve.paged import run
from serve.test_model_logits import LLAMA3_ROPE, worst_row_rms
from serve.tiny import make_tiny_llama
from serve.tiny_gguf import make_tiny_gguf

IDS = list(range(3, 60))


@pytest.mark.parametrize(
    "geometry",
    [{}, {"tie": True}, {"heads": 3, "kv_heads": 1, "head_dim": 20, "hidden": 48}, {"bias": True}],
    ids=["H4/2", "H4/2-tied", "H3/1-D20", "H4/2-bias"],
)
def test_gguf_holds_the_same_model_as_the_directory(tmp_path: Path, geometry: dict) -> None:
    directory = make_tiny_llama(tmp_path / "tiny", **geometry)
    file = make_tiny_gguf(directory, tmp_path / "tiny.gguf")
    expected, found = open_weights(directory), open_weights(file)
    for name in expected_shapes(expected.config):
        assert torch.equal(found.read(name), expected.read(name)), name
    as_config = vars(load_config(file)) | {"rms_norm_eps": 1e-5}  # GGUF keeps it in fp32
    assert ModelConfig(**as_config) == load_config(directory)


def test_matrices_are_dequantised(tmp_path: Path) -> None:
    directory = make_tiny_llama(tmp_path / "tiny")
    file = make_tiny_gguf(directory, tmp_path / "tiny.gguf", quant=gguf.GGMLQuantizationType.Q8_0)
    name = "model.layers.1.self_attn.q_proj.weight"
    expected, found = open_weights(directory).read(name), open_weights(file).read(name)
    largest = expected.abs().view(64, -1, 32).amax(-1).repeat_interleave(32, dim=1)  # of each block: its scale is fp16
    assert bool(((found - expected).abs() <= largest / 127 * 0.6).all())
    assert not torch.equal(found, expected)


def test_rope_factors_are_llama3_scaling(tmp_path: Path, device: torch.device) -> None:
    """Converted Llama 3 files keep their scaling as one divisor per frequency."""
    directory = make_tiny_llama(tmp_path / "tiny", rope_scaling=LLAMA3_ROPE)
    wavelengths = 2 * np.pi * 10000.0 ** (np.arange(0, 16, 2) / 16)
    smooth = np.clip((64 / wavelengths - 1) / (4 - 1), 0, 1)
    factors = 1 / ((1 - smooth) / 8 + smooth)
    file = make_tiny_gguf(directory, tmp_path / "tiny.gguf", rope_factors=factors)
    expected = run(Llama(directory, torch.float32, device), [IDS], [IDS], chunk=32)
    found = run(Llama(file, torch.float32, device), [IDS], [IDS], chunk=32)
    assert worst_row_rms(found, expected) < 1e-4


def test_transformers_reads_our_tiny_file_alike(tmp_path: Path) -> None:
    """The un-permutation, checked against a reader that is not ours."""
    directory = make_tiny_llama(tmp_path / "tiny", heads=4, kv_heads=2)
    file = make_tiny_gguf(directory, tmp_path / "tiny.gguf")
    config = LlamaConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    with torch.device("meta"):
        empty = LlamaForCausalLM(config)
    theirs = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=empty)["tensors"]
    weights = open_weights(file)
    assert len(theirs) == len(expected_shapes(weights.config))
    for name, tensor in theirs.items():
        assert torch.equal(weights.read(name), tensor), name


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({"general.architecture": "qwen2"}, "general.architecture: expected 'llama', got 'qwen2'"),
        ({"llama.block_count": None}, "expected llama.block_count, got nothing"),
        ({"llama.block_count": "two"}, "llama.block_count: expected an integer, got 'two'"),
        ({"llama.block_count": 3}, "expected a tensor model.layers.2.* got none"),
        ({"llama.block_count": 1}, "expected only the tensors of a 1-layer Llama, got 9 more"),
        ({"llama.feed_forward_length": 64}, r"gate_proj.weight: expected shape \(64, 64\).*got \(128, 64\)"),
        ({"llama.attention.head_count_kv": 3}, "num_qo_heads to be a multiple of num_kv_heads, got 4 and 3"),
        ({"llama.rope.dimension_count": 8}, r"rope.dimension_count: expected 16 \(head_dim\), got 8"),
        ({"llama.rope.scaling.type": "yarn"}, "expected 'none' or 'linear', got 'yarn'"),
        ({"llama.expert_count": 8}, r"expert_count: expected 0 .*, got 8"),
        ({"tokenizer.ggml.eos_token_id": 320}, r"expected 0 to 319 \(vocab_size\), got 320"),
    ],
    ids=lambda value: str(next(iter(value.items()))) if isinstance(value, dict) else "",
)
def test_a_model_we_do_not_compute_is_refused(tmp_path: Path, metadata: dict, message: str) -> None:
    file = make_tiny_gguf(make_tiny_llama(tmp_path / "tiny"), tmp_path / "tiny.gguf", metadata=metadata)
    with pytest.raises(ModelError, match=message) as refused:
        open_weights(file)
    assert str(file) in str(refused.value)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    whole = make_tiny_gguf(make_tiny_llama(tmp_path / "tiny"), tmp_path / "tiny.gguf").read_bytes()
    damaged = tmp_path / "damaged.gguf"
    lengths = [0, 3, 10, 24, 100, 3000, 9000, len(whole) // 2, len(whole) - 32]
    cases = {f"cut at {n}": whole[:n] for n in lengths}
    cases["other magic"] = b"GGML" + whole[4:]
    # An array length no file can hold must not be believed.
    at = whole.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type") + 4 + 4
    cases["2^60 entries"] = whole[:at] + (1 << 60).to_bytes(8, "little") + whole[at + 8 :]
    for case, content in cases.items():
        damaged.write_bytes(content)
        with pytest.raises(ModelError, match="damaged.gguf: expected a complete GGUF file, got .+"):
            open_weights(damaged)
            pytest.fail(case)


@pytest.fixture(scope="module")
def smollm2() -> Path:
    try:
        return default_model_path()
    except ModelError as error:
        pytest.skip(str(error))


def test_smollm2_logits(smollm2: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill of three prompts and 32 decode steps against transformers, which reads the GGUF by its own code."""
    # transformers builds this table anew for each of 400 modules, 5 s in all.
    monkeypatch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
    # What the model card says, not what our reader says.
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_theta=100000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    reference = LlamaForCausalLM(config).eval()
    state = load_gguf_checkpoint(str(smollm2), return_tensors=True, model_to_load=reference)["tensors"]
    reference.load_state_dict(state, strict=False, assign=True)
    reference.tie_weights()
    reference.to(device)
    generator = torch.Generator().manual_seed(0)
    lens = (33, 9, 1)
    ids = [torch.randint(17, 49152, (n + 32,), generator=generator).tolist() for n in lens]
    with torch.inference_mode():
        single = [reference(torch.tensor([text], device=device)).logits[0] for text in ids]
        exact = [reference.double()(torch.tensor([text], device=device)).logits[0] for text in ids]
    prompts, outputs = zip(*((text[:n], text[n:]) for text, n in zip(ids, lens, strict=True)), strict=True)
    found = run(Llama(smollm2, torch.float32, device), prompts, outputs, chunk=16, page_size=16)
    limit = 2 * worst_row_rms(single, exact) + 1e-5
    assert worst_row_rms(found, exact) <= limit
