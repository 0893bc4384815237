"""A Hugging Face directory: config.json, and safetensors weights in one file or in shards."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from pagewire.serve.model.config import ModelConfig, ModelError, RopeScaling
from pagewire.serve.model.metadata import Metadata
from pagewire.serve.model.weights import check_shapes

if TYPE_CHECKING:
    from torch import Tensor

STORED_DTYPES = ("F32", "F16", "BF16")
# Mistral without a sliding window is Llama without biases.
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; raises ModelError if it is missing or not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
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
    metadata = Metadata(raw.get, str(file))
    get, where = metadata.get, metadata.where
    mistral = _check_architecture(raw, where) == "MistralForCausalLM"
    num_qo_heads, hidden_size = get("num_attention_heads", int), get("hidden_size", int)
    head_dim = get("head_dim", int, None)
    if head_dim is None and (num_qo_heads < 1 or hidden_size % num_qo_heads):
        expected = "expected head_dim, or hidden_size to be a multiple of num_attention_heads"
        raise ModelError(f"{where}: {expected}, got {hidden_size} and {num_qo_heads}")
    rope_theta, rope_scaling = _rope(metadata)
    config = ModelConfig(
        name=path.resolve().name,
        num_layers=get("num_hidden_layers", int),
        hidden_size=hidden_size,
        num_qo_heads=num_qo_heads,
        # Llama's default is one KV head per query head, Mistral's is 8: there it must be said.
        num_kv_heads=get("num_key_value_heads", int, *(() if mistral else (num_qo_heads,))),
        head_dim=hidden_size // num_qo_heads if head_dim is None else head_dim,
        intermediate_size=get("intermediate_size", int),
        vocab_size=get("vocab_size", int),
        max_context=get("max_position_embeddings", int),
        rms_norm_eps=get("rms_norm_eps", float),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tie_word_embeddings=get("tie_word_embeddings", bool, False),
        attention_bias=get("attention_bias", bool, False),
        mlp_bias=get("mlp_bias", bool, False),
        bos_token_id=get("bos_token_id", int, None),
        eos_token_ids=_eos_token_ids(path, metadata),
    )
    config.check(where)
    return config


class HFWeights:
    """The safetensors of a Hugging Face directory, opened and checked: headers alone. Nothing is unpickled."""

    def __init__(self, path: Path) -> None:
        self.config = read_config(path)
        self._file_of: dict[str, Any] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for file, names in weight_files(path).items():
            try:
                opened: Any = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{file}: expected a complete safetensors file, got {error}") from error
            stored = set(opened.keys())
            for name in names or stored:
                if name not in stored:
                    raise ModelError(f"{file}: expected a tensor {name} (from the index), got none")
                described = opened.get_slice(name)
                shapes[name], dtype = tuple(described.get_shape()), described.get_dtype()
                if dtype not in STORED_DTYPES and not name.endswith("rotary_emb.inv_freq"):
                    raise ModelError(f"{file}: {name}: expected dtype {', '.join(STORED_DTYPES)}, got {dtype}")
                self._file_of[name] = opened
        check_shapes(shapes, self.config, str(path))

    def read(self, name: str) -> "Tensor":
        """On the CPU, in the file's dtype. It may be a view of the mapped file: copy it, do not write to it."""
        tensor: Tensor = self._file_of[name].get_tensor(name)
        return tensor


def weight_files(path: Path) -> dict[Path, list[str]]:
    """Weight file -> the tensors to read from it (none named: all). Raises ModelError."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        return {single: []}
    if not index.is_file():
        pickles = sorted(p.name for p in path.glob("*.bin"))
        found = f"{pickles[0]}, a pickle, which is never read" if pickles else "neither"
        raise ModelError(f"{path}: expected model.safetensors or model.safetensors.index.json, got {found}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: weight_map: expected a non-empty object, got {type(weight_map).__name__}")
    files: dict[Path, list[str]] = {}
    for tensor, file in weight_map.items():
        # A shard is a plain name in this directory: an index must not lead the reader elsewhere.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ModelError(f"{index}: {tensor}: expected the name of a .safetensors file, got {file!r}")
        files.setdefault(path / file, []).append(tensor)
    return files


def _check_architecture(raw: Mapping[str, Any], where: str) -> str:
    """The architecture, once everything that would change its computation is known to be absent."""
    architectures = raw.get("architectures")
    if architectures not in [[name] for name in ARCHITECTURES]:
        raise ModelError(f"{where}: architectures: expected one of {list(ARCHITECTURES)}, got {architectures!r}")
    for key, computed in (("hidden_act", "silu"), ("quantization_config", None), ("partial_rotary_factor", 1.0)):
        if raw.get(key, computed) != computed:
            raise ModelError(f"{where}: {key}: expected {computed!r}, got {raw[key]!r}")
    window = raw.get("sliding_window", "nothing, which means 4096")
    if architectures == ["MistralForCausalLM"] and window is not None:
        raise ModelError(f"{where}: sliding_window: expected null (windows are not supported), got {window!r}")
    return str(architectures[0])


def _rope(config: Metadata) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from the classic keys (rope_theta, rope_scaling) or from rope_parameters."""
    parameters = config.get("rope_parameters", dict, None)
    scaling = config.get("rope_scaling", dict, None) if parameters is None else parameters
    theta = config.get("rope_theta", float, 10000.0)
    if scaling is None:
        return theta, None
    get = Metadata(scaling.get, config.where).get
    if parameters is not None:
        theta = get("rope_theta", float, theta)
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", factor=get("factor", float))
    if kind == "llama3":
        factor, low, high = (get(key, float) for key in ("factor", "low_freq_factor", "high_freq_factor"))
        return theta, RopeScaling("llama3", factor, low, high, get("original_max_position_embeddings", int))
    raise ModelError(f"{config.where}: rope_scaling type: expected 'default', 'linear' or 'llama3', got {kind!r}")


def _eos_token_ids(path: Path, config: Metadata) -> tuple[int, ...]:
    """Every id that ends a text: config.json's and generation_config.json's, in that order."""
    sources, generation = [config], path / "generation_config.json"
    if generation.is_file():
        sources.append(Metadata(read_json(generation).get, str(generation)))
    ids: list[int] = []
    for source in sources:
        found = source.get("eos_token_id", int | list[int], [])
        ids += found if isinstance(found, list) else [found]
    return tuple(dict.fromkeys(ids))
