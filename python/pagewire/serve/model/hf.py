"""A Hugging Face directory: config.json, and safetensors weights in one file or in shards."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from pagewire.serve.model.config import ModelConfig, ModelError, RopeScaling
from pagewire.serve.model.weights import check_shapes

if TYPE_CHECKING:
    from torch import Tensor

STORED_DTYPES = ("F32", "F16", "BF16")
# Mistral without a sliding window is Llama without biases.
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")

_REQUIRED = object()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; raises ModelError if it is missing or not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: expected a JSON file, got no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: expected a JSON file, got {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def read_config(path: Path) -> ModelConfig:
    """The ModelConfig of the Hugging Face directory `path`.

    Raises:
        ModelError: config.json is missing, malformed, or of a model that `Llama` does not compute.
    """
    file = path / "config.json"
    raw = read_json(file)
    where = str(file)
    mistral = _check_architecture(raw, where) == "MistralForCausalLM"
    num_qo_heads = _int(raw, "num_attention_heads", where)
    hidden_size = _int(raw, "hidden_size", where)
    rope_theta, rope_scaling = _rope(raw, where)
    if raw.get("head_dim") is None and (num_qo_heads < 1 or hidden_size % num_qo_heads):
        raise ModelError(
            f"{where}: expected head_dim, or hidden_size to be a multiple of num_attention_heads, "
            f"got {hidden_size} and {num_qo_heads}"
        )
    config = ModelConfig(
        name=path.resolve().name,
        num_layers=_int(raw, "num_hidden_layers", where),
        hidden_size=hidden_size,
        num_qo_heads=num_qo_heads,
        # Llama's default is one KV head per query head, Mistral's is 8: there it must be said.
        num_kv_heads=_int(raw, "num_key_value_heads", where, _REQUIRED if mistral else num_qo_heads),
        head_dim=_int(raw, "head_dim", where, None) or hidden_size // num_qo_heads,
        intermediate_size=_int(raw, "intermediate_size", where),
        vocab_size=_int(raw, "vocab_size", where),
        max_context=_int(raw, "max_position_embeddings", where),
        rms_norm_eps=_number(raw, "rms_norm_eps", where),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tie_word_embeddings=_bool(raw, "tie_word_embeddings", where),
        attention_bias=_bool(raw, "attention_bias", where),
        mlp_bias=_bool(raw, "mlp_bias", where),
        bos_token_id=_int(raw, "bos_token_id", where, None),
        eos_token_ids=_eos_token_ids(path, raw, where),
    )
    config.check(where)
    return config


class HFWeights:
    """The safetensors of a Hugging Face directory, opened and checked. Nothing is unpickled."""

    def __init__(self, path: Path) -> None:
        self.config = read_config(path)
        self._file_of: dict[str, Any] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for file, names in weight_files(path).items():
            opened = _open(file)
            stored = set(opened.keys())
            for name in stored if names is None else names:
                if name not in stored:
                    raise ModelError(f"{file}: expected a tensor {name} (from the index), got none")
                described = opened.get_slice(name)
                shapes[name] = tuple(described.get_shape())
                if described.get_dtype() not in STORED_DTYPES and not name.endswith("rotary_emb.inv_freq"):
                    raise ModelError(
                        f"{file}: {name}: expected dtype {', '.join(STORED_DTYPES)}, got {described.get_dtype()}"
                    )
                self._file_of[name] = opened
        check_shapes(shapes, self.config, str(path))

    def read(self, name: str) -> "Tensor":
        tensor: Tensor = self._file_of[name].get_tensor(name)
        return tensor


def weight_files(path: Path) -> dict[Path, list[str] | None]:
    """Weight file -> the tensors it must hold (None: whatever it holds). Raises ModelError."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        return {single: None}
    if not index.is_file():
        pickles = sorted(p.name for p in path.glob("*.bin"))
        found = f"{pickles[0]}, a pickle, which is never read" if pickles else "neither"
        raise ModelError(f"{path}: expected model.safetensors or model.safetensors.index.json, got {found}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: weight_map: expected a non-empty object, got {type(weight_map).__name__}")
    files: dict[Path, list[str] | None] = {}
    by_name: dict[str, list[str]] = {}
    for tensor, file in weight_map.items():
        # A shard is a plain name in this directory: an index must not lead the reader elsewhere.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ModelError(f"{index}: {tensor}: expected the name of a .safetensors file, got {file!r}")
        by_name.setdefault(file, []).append(tensor)
    for file, tensors in sorted(by_name.items()):
        files[path / file] = tensors
    return files


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError:
        raise ModelError(f"{file}: expected a safetensors file (from the index), got no such file") from None
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: expected a complete safetensors file, got {error}") from error


def _check_architecture(raw: Mapping[str, Any], where: str) -> str:
    """The architecture, once everything that would change its computation is known to be absent."""
    architectures = raw.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1 or architectures[0] not in ARCHITECTURES:
        raise ModelError(f"{where}: architectures: expected one of {list(ARCHITECTURES)}, got {architectures!r}")
    architecture: str = architectures[0]
    if raw.get("hidden_act", "silu") != "silu":
        raise ModelError(f"{where}: hidden_act: expected 'silu', got {raw['hidden_act']!r}")
    if raw.get("quantization_config") is not None:
        raise ModelError(
            f"{where}: expected unquantised weights (float32, float16 or bfloat16), got a quantization_config"
        )
    if raw.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError(f"{where}: partial_rotary_factor: expected 1.0, got {raw['partial_rotary_factor']!r}")
    # An absent sliding_window means 4096 to Mistral.
    if architecture == "MistralForCausalLM" and raw.get("sliding_window", 4096) is not None:
        raise ModelError(
            f"{where}: sliding_window: expected null (windows are not supported), "
            f"got {raw.get('sliding_window', 'nothing, which means 4096')!r}"
        )
    return architecture


def _rope(raw: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from the classic keys (rope_theta, rope_scaling) or from rope_parameters."""
    parameters = raw.get("rope_parameters")
    scaling = raw.get("rope_scaling") if parameters is None else parameters
    theta_from = raw if parameters is None or "rope_theta" not in parameters else parameters
    theta = _number(theta_from, "rope_theta", where, 10000.0)
    if scaling is None:
        return theta, None
    if not isinstance(scaling, dict):
        raise ModelError(f"{where}: rope_scaling: expected null or an object, got {scaling!r}")
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", factor=_number(scaling, "factor", where))
    if kind == "llama3":
        return theta, RopeScaling(
            "llama3",
            factor=_number(scaling, "factor", where),
            low_freq_factor=_number(scaling, "low_freq_factor", where),
            high_freq_factor=_number(scaling, "high_freq_factor", where),
            original_max_context=_int(scaling, "original_max_position_embeddings", where),
        )
    raise ModelError(f"{where}: rope_scaling type: expected 'default', 'linear' or 'llama3', got {kind!r}")


def _eos_token_ids(path: Path, raw: Mapping[str, Any], where: str) -> tuple[int, ...]:
    """Every id that ends a text: config.json's and generation_config.json's, in that order."""
    sources = [(raw, where)]
    generation = path / "generation_config.json"
    if generation.is_file():
        sources.append((read_json(generation), str(generation)))
    ids: list[int] = []
    for source, file in sources:
        value = source.get("eos_token_id")
        values = value if isinstance(value, list) else [] if value is None else [value]
        for token_id in values:
            if type(token_id) is not int:
                raise ModelError(f"{file}: eos_token_id: expected an integer or a list of them, got {value!r}")
            ids.append(token_id)
    return tuple(dict.fromkeys(ids))


def _get(raw: Mapping[str, Any], key: str, where: str, default: Any) -> Any:
    value = raw.get(key)
    if value is not None:
        return value
    if default is _REQUIRED:
        raise ModelError(f"{where}: expected {key}, got nothing")
    return default


def _int(raw: Mapping[str, Any], key: str, where: str, default: Any = _REQUIRED) -> Any:
    value = _get(raw, key, where, default)
    if value is not None and type(value) is not int:  # bool is an int to isinstance
        raise ModelError(f"{where}: {key}: expected an integer, got {value!r}")
    return value


def _number(raw: Mapping[str, Any], key: str, where: str, default: Any = _REQUIRED) -> float:
    value = _get(raw, key, where, default)
    if type(value) not in (int, float):
        raise ModelError(f"{where}: {key}: expected a number, got {value!r}")
    return float(value)


def _bool(raw: Mapping[str, Any], key: str, where: str) -> bool:
    value = _get(raw, key, where, False)
    if type(value) is not bool:
        raise ModelError(f"{where}: {key}: expected true or false, got {value!r}")
    return value
