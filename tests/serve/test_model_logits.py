"""`Llama` through pagewire ops against Hugging Face transformers on the same weights.

The rule is the kernels' own: against an fp64 run, our error is at most twice that of transformers in
the same dtype. Errors are RMS over a row of logits, and the worst row counts: one wrong row is seen,
one unlucky rounding is not.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pagewire.serve.model.llama import Llama
from serve.paged import PagedRun, run
from serve.tiny import make_tiny_llama

PROMPT_LENS = (37, 11, 1)
NUM_DECODE_STEPS = 32

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES = {
    "H4/2": {},
    "H4/2-tied": {"tie": True},
    "H3/1-D20-hidden48": {"heads": 3, "kv_heads": 1, "head_dim": 20, "hidden": 48},
    "H4/4-D32-bias": {"kv_heads": 4, "head_dim": 32, "bias": True},
    "H4/2-llama3": {"rope_scaling": LLAMA3_ROPE, "max_context": 1024},
    "H4/2-linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "H4/2-shards3-bf16": {"num_shards": 3, "dtype": torch.bfloat16},
}


def texts(seed: int) -> list[list[int]]:
    """Random ids, prompt and output together, one text per length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 300, (n + NUM_DECODE_STEPS,), generator=generator).tolist() for n in PROMPT_LENS]


def ours(model: Llama, ids: list[list[int]], *, chunk: int, page_size: int = 3) -> list[torch.Tensor]:
    prompts = [text[:n] for text, n in zip(ids, PROMPT_LENS, strict=True)]
    outputs = [text[n:] for text, n in zip(ids, PROMPT_LENS, strict=True)]
    return run(model, prompts, outputs, chunk=chunk, page_size=page_size)


def theirs(path: Path, dtype: torch.dtype, ids: list[list[int]], device: torch.device) -> list[torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device)
    with torch.inference_mode():
        return [model(torch.tensor([text], device=device)).logits[0] for text in ids]


def worst_row_rms(actual: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    return max(
        float((a.double() - e.double()).square().mean(-1).sqrt().max()) for a, e in zip(actual, exact, strict=True)
    )


def assert_as_close_as_transformers(
    path: Path, dtype: torch.dtype, device: torch.device, *, seed: int, chunk: int
) -> None:
    ids = texts(seed)
    exact = theirs(path, torch.float64, ids, device)
    found = worst_row_rms(ours(Llama(path, dtype, device), ids, chunk=chunk), exact)
    limit = 2 * worst_row_rms(theirs(path, dtype, ids, device), exact) + 1e-5
    assert found <= limit, f"{dtype}: worst row RMS {found:.3g} against fp64, limit {limit:.3g} (twice transformers')"


@pytest.mark.parametrize("case", CASES)
def test_logits_fp32(tmp_path: Path, device: torch.device, case: str) -> None:
    path = make_tiny_llama(tmp_path / "tiny", **CASES[case])
    assert_as_close_as_transformers(path, torch.float32, device, seed=len(case), chunk=7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_logits_half(tmp_path: Path, device: torch.device, dtype: torch.dtype) -> None:
    path = make_tiny_llama(tmp_path / "tiny", heads=6, kv_heads=2, hidden=48, bias=True)
    assert_as_close_as_transformers(path, dtype, device, seed=1, chunk=16)


def test_mistral_without_a_window_is_llama(tmp_path: Path, device: torch.device) -> None:
    path = make_tiny_llama(tmp_path / "tiny")
    file = path / "config.json"
    text = file.read_text().replace("LlamaForCausalLM", "MistralForCausalLM")
    file.write_text(text.replace('"model_type": "llama"', '"model_type": "mistral", "sliding_window": null'))
    assert_as_close_as_transformers(path, torch.float32, device, seed=2, chunk=9)


@pytest.mark.parametrize("chunk, page_size", [(1, 1), (5, 16), (64, 3)])
def test_chunks_and_pages_do_not_change_the_logits(
    tmp_path: Path, device: torch.device, chunk: int, page_size: int
) -> None:
    model = Llama(make_tiny_llama(tmp_path / "tiny"), torch.float32, device)
    ids = texts(3)
    whole = ours(model, ids, chunk=37, page_size=8)
    assert worst_row_rms(ours(model, ids, chunk=chunk, page_size=page_size), whole) < 5e-5


def test_on_layer_comes_when_the_layers_kv_is_in_the_cache(tmp_path: Path, device: torch.device) -> None:
    model = Llama(make_tiny_llama(tmp_path / "tiny", num_layers=3), torch.float32, device)
    batch = PagedRun(model, [8])
    num_written = []  # per call: KV tokens in each layer's K cache

    def on_layer(i: int) -> None:
        num_written.append([int((~k.isnan().any(-1).any(-1)).sum()) for k in batch.cache.k])
        assert not batch.cache.v[i].isnan().all()

    batch.forward({0: [5, 6, 7, 8, 9]}, on_layer=on_layer)
    batch.forward({0: [10]}, decode=True, on_layer=on_layer)
    assert num_written == [[5, 0, 0], [5, 5, 0], [5, 5, 5], [6, 5, 5], [6, 6, 5], [6, 6, 6]]


def test_quantised_cache(tmp_path: Path, device: torch.device) -> None:
    """int8 KV with a scale per token and head: 1/254 of each vector's largest element is lost, no more."""
    model = Llama(make_tiny_llama(tmp_path / "tiny"), torch.float32, device)
    plain = PagedRun(model, [33])
    quantised = PagedRun(model, [33], dtype=torch.int8, scale="token_head")
    ids = list(range(40, 73))
    difference = plain.forward({0: ids})[0] - quantised.forward({0: ids})[0]
    assert 0 < float(difference.square().mean().sqrt()) < 0.1  # the logits spread by 3


def test_no_logits_asked_for(tmp_path: Path, device: torch.device) -> None:
    model = Llama(make_tiny_llama(tmp_path / "tiny"), torch.float32, device)
    asked, unasked = PagedRun(model, [3]), PagedRun(model, [3])
    asked.forward({0: [5, 6]})
    assert unasked.forward({0: [5, 6]}, want_logits=False)[0].shape == (0, 320)
    assert torch.equal(asked.forward({0: [7]}, decode=True)[0], unasked.forward({0: [7]}, decode=True)[0])


def test_a_cache_of_other_depth_is_refused(tmp_path: Path, device: torch.device) -> None:
    model = Llama(make_tiny_llama(tmp_path / "tiny"), torch.float32, device)
    other = PagedRun(Llama(make_tiny_llama(tmp_path / "deep", num_layers=3), torch.float32, device), [4])
    other.model = model
    with pytest.raises(ValueError, match="cache: expected 2 layers .* got 3"):
        other.forward({0: [5]})
