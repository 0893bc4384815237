"""The tiny Llama as a GGUF file, as llama.cpp's converter writes one: Q and K rows permuted."""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
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


def make_tiny_gguf(
    directory: Path,
    file: Path,
    *,
    quant: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    rope_factors: np.ndarray | None = None,
    metadata: dict | None = None,
) -> Path:
    """Convert what `make_tiny_llama(directory)` wrote (unsharded).

    `quant`: the type of the matrices; `metadata`: integers or strings by key, None drops one.
    """
    config = json.loads((directory / "config.json").read_text())
    writer = gguf.GGUFWriter(file, "llama")
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    values = {
        "llama.block_count": config["num_hidden_layers"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": heads["q"],
        "llama.attention.head_count_kv": heads["k"],
        "llama.attention.key_length": config["head_dim"],
        "llama.attention.value_length": config["head_dim"],
        "llama.rope.dimension_count": config["head_dim"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.vocab_size": config["vocab_size"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.bos_token_id": config["bos_token_id"],
        "tokenizer.ggml.eos_token_id": config["eos_token_id"],
        "tokenizer.chat_template": json.loads((directory / "tokenizer_config.json").read_text())["chat_template"],
    } | (metadata or {})
    for key, value in values.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", config["rms_norm_eps"])
    writer.add_float32("llama.rope.freq_base", config["rope_theta"])
    _add_tokenizer(writer, directory, config["vocab_size"])
    for name, tensor in load_file(directory / "model.safetensors").items():
        array = tensor.to(torch.float32).numpy()
        for short, num_heads in heads.items():
            if f".{short}_proj." in name:
                array = _permuted(array, num_heads)
        kind = quant if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(_gguf_name(name), gguf.quants.quantize(array, kind), raw_dtype=kind)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_tokenizer(writer: gguf.GGUFWriter, directory: Path, vocab_size: int) -> None:
    model = json.loads((directory / "tokenizer.json").read_text())
    piece_of = {token_id: piece for piece, token_id in model["model"]["vocab"].items()}
    special = {added["id"] for added in model["added_tokens"]}
    kinds = gguf.TokenType
    writer.add_token_list([piece_of.get(i, f"[PAD{i}]") for i in range(vocab_size)])
    writer.add_token_types(
        [kinds.CONTROL if i in special else kinds.NORMAL if i in piece_of else kinds.UNUSED for i in range(vocab_size)]
    )
    writer.add_token_merges([" ".join(pair) for pair in model["model"]["merges"]])


def _gguf_name(name: str) -> str:
    module, kind = name.rsplit(".", 1)
    if module in _NAMES:
        return f"{_NAMES[module]}.{kind}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{_NAMES[rest]}.{kind}"


def _permuted(array: np.ndarray, num_heads: int) -> np.ndarray:
    """Row i of a head's first half and row i of its second half become neighbours."""
    head_dim = array.shape[0] // num_heads
    rows = [
        head * head_dim + half * head_dim // 2 + i
        for head in range(num_heads)
        for i in range(head_dim // 2)
        for half in (0, 1)
    ]
    return array[rows]
