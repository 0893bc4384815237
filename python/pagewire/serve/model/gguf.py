"""A GGUF file of the llama architecture, read and dequantised by the `gguf` package.

GGUF stores the rows of Q and K so that RoPE pairs are neighbours. They are put back in half-split
order here: nothing behind this file knows two orders.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGUFReader, GGUFValueType
from gguf.quants import dequantize

from pagewire.serve.model.config import ModelConfig, ModelError, RopeScaling
from pagewire.serve.model.weights import EMBED, FINAL_NORM, LM_HEAD, check_shapes, expected_shapes

if TYPE_CHECKING:
    from torch import Tensor

ROPE_FREQS = "rope_freqs.weight"

# Hugging Face's name inside a layer -> GGUF's
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TOP_NAMES = {EMBED: "token_embd.weight", FINAL_NORM: "output_norm.weight", LM_HEAD: "output.weight"}

_INTEGERS = (
    GGUFValueType.UINT8,
    GGUFValueType.INT8,
    GGUFValueType.UINT16,
    GGUFValueType.INT16,
    GGUFValueType.UINT32,
    GGUFValueType.INT32,
    GGUFValueType.UINT64,
    GGUFValueType.INT64,
)
_FLOATS = (GGUFValueType.FLOAT32, GGUFValueType.FLOAT64)
_REQUIRED = object()


class _Reader(GGUFReader):
    """GGUFReader with every length bounded by the file, and three times as fast.

    Its own slices of a short file come back short, and a damaged array length would loop for ever.
    """

    @property  # type: ignore[override]
    def data(self) -> np.ndarray:
        return self._bytes

    @data.setter
    def data(self, mapped: np.ndarray) -> None:
        self._bytes = np.asarray(mapped)  # slicing a memmap is what makes the parse slow

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
        end = int(offset) + int(count) * np.dtype(dtype).itemsize
        if end > self._bytes.size:
            raise ValueError(f"a value that ends at byte {end} of a {self._bytes.size}-byte file")
        return super()._get(offset, dtype, count, override_order)


class GGUFFile:
    """Metadata with checked types, and the tensor directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._reader = _Reader(path)
        # The parser meets a damaged file with whatever its first bad byte leads to.
        except Exception as error:
            raise ModelError(f"{path}: expected a complete GGUF file, got {error}") from error
        self.tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    def integer(self, key: str, default: Any = _REQUIRED) -> Any:
        value, types = self._value(key, default)
        if types and types[0] not in _INTEGERS:
            raise self._unexpected(key, "an integer", types)
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> Any:
        value, types = self._value(key, default)
        if types and types[0] not in _FLOATS:
            raise self._unexpected(key, "a float", types)
        return value

    def flag(self, key: str, default: Any = _REQUIRED) -> Any:
        value, types = self._value(key, default)
        if types and types[0] != GGUFValueType.BOOL:
            raise self._unexpected(key, "a bool", types)
        return value

    def text(self, key: str, default: Any = _REQUIRED) -> Any:
        value, types = self._value(key, default)
        if types and types[0] != GGUFValueType.STRING:
            raise self._unexpected(key, "a string", types)
        return value

    def texts(self, key: str) -> list[str]:
        value: list[str]
        value, types = self._value(key, _REQUIRED)
        if types != [GGUFValueType.ARRAY, GGUFValueType.STRING]:
            raise self._unexpected(key, "an array of strings", types)
        return value

    def integers(self, key: str) -> list[int]:
        value: list[int]
        value, types = self._value(key, _REQUIRED)
        if len(types) != 2 or types[0] != GGUFValueType.ARRAY or types[1] not in _INTEGERS:
            raise self._unexpected(key, "an array of integers", types)
        return value

    def _value(self, key: str, default: Any) -> tuple[Any, list[GGUFValueType]]:
        field = self._reader.get_field(key)
        if field is None:
            if default is _REQUIRED:
                raise ModelError(f"{self.path}: expected metadata {key}, got none")
            return default, []
        try:
            return field.contents(), list(field.types)
        except UnicodeDecodeError as error:
            raise ModelError(f"{self.path}: {key}: expected UTF-8 text, got {error}") from error

    def _unexpected(self, key: str, expected: str, types: list[GGUFValueType]) -> ModelError:
        return ModelError(f"{self.path}: {key}: expected {expected}, got {' of '.join(t.name for t in types)}")


def read_config(path: Path) -> ModelConfig:
    """The ModelConfig of the GGUF file `path`. Raises ModelError."""
    return config_of(GGUFFile(path))


def config_of(file: GGUFFile) -> ModelConfig:
    """The ModelConfig of an opened file. ModelError if `Llama` does not compute such a model."""
    where = str(file.path)
    architecture = file.text("general.architecture")
    if architecture != "llama":
        raise ModelError(f"{where}: general.architecture: expected 'llama', got {architecture!r}")
    num_experts = file.integer("llama.expert_count", 0)
    if num_experts:
        raise ModelError(f"{where}: llama.expert_count: expected 0 (no mixture of experts), got {num_experts}")
    hidden_size, num_qo_heads = (file.integer("llama.embedding_length"), file.integer("llama.attention.head_count"))
    head_dim = file.integer("llama.attention.key_length", None) or hidden_size // max(num_qo_heads, 1)
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if file.integer(key, head_dim) != head_dim:
            raise ModelError(f"{where}: {key}: expected {head_dim} (head_dim), got {file.integer(key)}")
    eos_token_ids = [file.integer(f"tokenizer.ggml.{end}_token_id", None) for end in ("eos", "eot")]
    config = ModelConfig(
        name=file.path.stem,
        num_layers=file.integer("llama.block_count"),
        hidden_size=hidden_size,
        num_qo_heads=num_qo_heads,
        num_kv_heads=file.integer("llama.attention.head_count_kv", num_qo_heads),
        head_dim=head_dim,
        intermediate_size=file.integer("llama.feed_forward_length"),
        vocab_size=file.integer("llama.vocab_size", None) or len(file.texts("tokenizer.ggml.tokens")),
        max_context=file.integer("llama.context_length"),
        rms_norm_eps=file.number("llama.attention.layer_norm_rms_epsilon"),
        rope_theta=file.number("llama.rope.freq_base", 10000.0),
        rope_scaling=_rope_scaling(file),
        tie_word_embeddings=_TOP_NAMES[LM_HEAD] not in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        bos_token_id=file.integer("tokenizer.ggml.bos_token_id", None),
        eos_token_ids=tuple(dict.fromkeys(i for i in eos_token_ids if i is not None)),
    )
    config.check(where)
    return config


class GGUFWeights:
    """The tensors of a GGUF file under Hugging Face's names, dequantised to fp32 one at a time."""

    def __init__(self, path: Path) -> None:
        self._file = GGUFFile(path)
        self.config = config_of(self._file)
        to_hf = {_gguf_name(name): name for name in expected_shapes(self.config)}
        shapes = {
            # GGUF writes the fastest dimension first. A name we do not know stays, to be refused.
            to_hf.get(name, name): tuple(int(n) for n in reversed(tensor.shape))
            for name, tensor in self._file.tensors.items()
            if name != ROPE_FREQS
        }
        check_shapes(shapes, self.config, str(path))

    def read(self, name: str) -> Tensor:
        import torch  # here, so that the front can read metadata without it

        tensor = self._file.tensors[_gguf_name(name)]
        values = _dequantize(tensor, self._file.path)
        if ".q_proj." in name:
            values = _half_split(values, self.config.num_qo_heads)
        elif ".k_proj." in name:
            values = _half_split(values, self.config.num_kv_heads)
        # from_numpy warns of a read-only mapping; nobody writes to what read() returns.
        return torch.from_numpy(values if values.flags.writeable else values.copy())


def _half_split(values: np.ndarray, num_heads: int) -> np.ndarray:
    """values [num_heads * head_dim, ...]: a head's rows 0, d/2, 1, d/2 + 1, … back to 0, 1, 2, …"""
    rows = values.shape[0]
    pairs = values.reshape(num_heads, rows // num_heads // 2, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)


def _dequantize(tensor: Any, path: Path) -> np.ndarray:
    try:
        return dequantize(tensor.data, tensor.tensor_type)
    except (NotImplementedError, ValueError) as error:
        raise ModelError(f"{path}: {tensor.name}: expected a type gguf can dequantise, got {error}") from error


def _gguf_name(name: str) -> str:
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    _, _, layer, rest = name.split(".", 3)  # model.layers.<i>.<module>.<weight or bias>
    module, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{_LAYER_NAMES[module]}.{kind}"


def _rope_scaling(file: GGUFFile) -> RopeScaling | None:
    kind = file.text("llama.rope.scaling.type", "none")
    tensor = file.tensors.get(ROPE_FREQS)
    if kind not in ("none", "linear"):
        raise ModelError(f"{file.path}: llama.rope.scaling.type: expected 'none' or 'linear', got {kind!r}")
    if kind == "linear" and tensor is None:
        return RopeScaling("linear", factor=file.number("llama.rope.scaling.factor"))
    if tensor is None:
        return None
    if kind == "linear":
        raise ModelError(f"{file.path}: expected linear RoPE scaling or {ROPE_FREQS}, got both")
    return RopeScaling("factors", factors=tuple(_dequantize(tensor, file.path).ravel().tolist()))
