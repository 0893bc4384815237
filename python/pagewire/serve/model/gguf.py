"""A GGUF file of the llama architecture, read and dequantised by the `gguf` package.

GGUF stores the rows of Q and K so that RoPE pairs are neighbours. They are put back in half-split
order here: nothing behind this file knows two orders.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import MODEL_ARCH, GGUFReader, get_tensor_name_map
from gguf.quants import dequantize

from pagewire.serve.model.config import ModelConfig, ModelError, RopeScaling
from pagewire.serve.model.metadata import Metadata
from pagewire.serve.model.weights import check_shapes, expected_shapes

if TYPE_CHECKING:
    from torch import Tensor

ROPE_FREQS = "rope_freqs.weight"


class _Reader(GGUFReader):
    """GGUFReader with every length bounded by the file, and three times as fast.

    Its own slices of a short file come back short, a damaged array length would loop for ever, and slicing a memmap is
    slow: frombuffer raises ValueError for what the file does not hold.
    """

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
        values = np.frombuffer(self.data, dtype, int(count), int(offset))
        return values.view(values.dtype.newbyteorder(override_order or self.byte_order))


class GGUFFile(Metadata):
    """Metadata, and the tensor directory."""

    def __init__(self, path: Path) -> None:
        super().__init__(self._contents, str(path))
        self.path = path
        try:
            self._reader = _Reader(path)
        # The parser meets a damaged file with whatever its first bad byte leads to.
        except Exception as error:
            raise ModelError(f"{path}: expected a complete GGUF file, got {error}") from error
        self.tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    def _contents(self, key: str) -> Any:
        field = self._reader.get_field(key)
        try:
            return None if field is None else field.contents()
        except UnicodeDecodeError as error:
            raise ModelError(f"{self.path}: {key}: expected UTF-8 text, got {error}") from error


def config_of(file: GGUFFile) -> ModelConfig:
    """The ModelConfig of an opened file. ModelError if `Llama` does not compute such a model."""
    get, where = file.get, file.where
    if (architecture := get("general.architecture", str)) != "llama":
        raise ModelError(f"{where}: general.architecture: expected 'llama', got {architecture!r}")
    hidden_size, num_qo_heads = get("llama.embedding_length", int), get("llama.attention.head_count", int)
    head_dim = get("llama.attention.key_length", int, None) or hidden_size // max(num_qo_heads, 1)
    for key, expected, meaning in (
        ("llama.expert_count", 0, "no mixture of experts"),
        ("llama.attention.value_length", head_dim, "head_dim"),
        ("llama.rope.dimension_count", head_dim, "head_dim"),
    ):
        if (found := get(key, int, expected)) != expected:
            raise ModelError(f"{where}: {key}: expected {expected} ({meaning}), got {found}")
    eos_token_ids = [get(f"tokenizer.ggml.{end}_token_id", int, None) for end in ("eos", "eot")]
    config = ModelConfig(
        name=file.path.stem,
        num_layers=get("llama.block_count", int),
        hidden_size=hidden_size,
        num_qo_heads=num_qo_heads,
        num_kv_heads=get("llama.attention.head_count_kv", int, num_qo_heads),
        head_dim=head_dim,
        intermediate_size=get("llama.feed_forward_length", int),
        vocab_size=get("llama.vocab_size", int, None) or len(get("tokenizer.ggml.tokens", list[str])),
        max_context=get("llama.context_length", int),
        rms_norm_eps=get("llama.attention.layer_norm_rms_epsilon", float),
        rope_theta=get("llama.rope.freq_base", float, 10000.0),
        rope_scaling=_rope_scaling(file),
        tie_word_embeddings="output.weight" not in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        bos_token_id=get("tokenizer.ggml.bos_token_id", int, None),
        eos_token_ids=tuple(dict.fromkeys(i for i in eos_token_ids if i is not None)),
    )
    config.check(where)
    return config


class GGUFWeights:
    """The tensors of a GGUF file under Hugging Face's names, dequantised to fp32 one at a time."""

    def __init__(self, path: Path) -> None:
        self._file = GGUFFile(path)
        self.config = config_of(self._file)
        names = get_tensor_name_map(MODEL_ARCH.LLAMA, self.config.num_layers)
        self._names = {name: str(names.get_name(name, (".weight", ".bias"))) for name in expected_shapes(self.config)}
        to_hf = {theirs: ours for ours, theirs in self._names.items()}
        shapes = {
            # GGUF writes the fastest dimension first. A name we do not know stays, to be refused.
            to_hf.get(name, name): tuple(int(n) for n in reversed(tensor.shape))
            for name, tensor in self._file.tensors.items()
            if name != ROPE_FREQS
        }
        check_shapes(shapes, self.config, str(path))

    def read(self, name: str) -> Tensor:
        """On the CPU, fp32. It may be a view of the mapped file: copy it, do not write to it."""
        import torch  # here, so that the front can read metadata without it

        values = _dequantize(self._file.tensors[self._names[name]], self._file.path)
        for part, num_heads in ((".q_proj.", self.config.num_qo_heads), (".k_proj.", self.config.num_kv_heads)):
            if part in name:
                values = _half_split(values, num_heads)
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


def _rope_scaling(file: GGUFFile) -> RopeScaling | None:
    kind = file.get("llama.rope.scaling.type", str, "none")
    tensor = file.tensors.get(ROPE_FREQS)
    if kind not in ("none", "linear"):
        raise ModelError(f"{file.path}: llama.rope.scaling.type: expected 'none' or 'linear', got {kind!r}")
    if kind == "linear" and tensor is not None:
        raise ModelError(f"{file.path}: expected linear RoPE scaling or {ROPE_FREQS}, got both")
    if kind == "linear":
        return RopeScaling("linear", factor=file.get("llama.rope.scaling.factor", float))
    if tensor is None:
        return None
    return RopeScaling("factors", factors=tuple(_dequantize(tensor, file.path).ravel().tolist()))
