"""A tiny random Llama as a Hugging Face directory: what every model and server test serves.

Two calls with the same arguments write the same bytes: two processes that make "the same" model
agree on its weights, its tokenizer and its fingerprint.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2
BOS_ID, EOS_ID = 1, 2

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Enough merges that a word is sometimes one token and sometimes several. "Ġ" is a space.
MERGES = [
    ("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n"), ("Ġ", "a"), ("r", "e"), ("o", "n"),
    ("e", "r"), ("Ġ", "w"), ("l", "l"), ("Ġa", "n"), ("Ġan", "d"), ("o", "u"), ("Ġ", "s"),
    ("he", "ll"), ("hell", "o"), ("o", "r"), ("l", "d"), ("Ġw", "or"), ("Ġwor", "ld"),
]  # fmt: skip

MIN_VOCAB = len(SPECIAL_TOKENS) + 256 + len(MERGES)


def tiny_tokenizer() -> Tokenizer:
    """Byte-level BPE with the three special tokens first, then the 256 bytes, then `MERGES`."""
    pieces = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in MERGES)]
    tokenizer = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    return tokenizer


def tiny_state_dict(config: dict, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random fp32 weights under Hugging Face's names; the logits spread over several units."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q_size = config["num_attention_heads"] * config["head_dim"]
    kv_size = config["num_key_value_heads"] * config["head_dim"]

    def linear(out_features: int, in_features: int) -> torch.Tensor:
        return torch.randn(out_features, in_features, generator=generator) * in_features**-0.5

    def norm() -> torch.Tensor:
        return 1 + 0.2 * torch.randn(hidden, generator=generator)

    state = {"model.embed_tokens.weight": linear(vocab, hidden) * 3}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        state |= {
            layer + "input_layernorm.weight": norm(),
            layer + "self_attn.q_proj.weight": linear(q_size, hidden) * 2,
            layer + "self_attn.k_proj.weight": linear(kv_size, hidden) * 2,
            layer + "self_attn.v_proj.weight": linear(kv_size, hidden),
            layer + "self_attn.o_proj.weight": linear(hidden, q_size),
            layer + "post_attention_layernorm.weight": norm(),
            layer + "mlp.gate_proj.weight": linear(inner, hidden),
            layer + "mlp.up_proj.weight": linear(inner, hidden),
            layer + "mlp.down_proj.weight": linear(hidden, inner),
        }
        if config["attention_bias"]:
            for name, size in (("q", q_size), ("k", kv_size), ("v", kv_size), ("o", hidden)):
                state[f"{layer}self_attn.{name}_proj.bias"] = 0.3 * torch.randn(size, generator=generator)
        if config["mlp_bias"]:
            for name, size in (("gate", inner), ("up", inner), ("down", hidden)):
                state[f"{layer}mlp.{name}_proj.bias"] = 0.3 * torch.randn(size, generator=generator)
    state["model.norm.weight"] = norm()
    if not config["tie_word_embeddings"]:
        state["lm_head.weight"] = linear(vocab, hidden) * 3
    return state


def make_tiny_llama(
    path: str | Path,
    *,
    num_layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    intermediate: int = 128,
    vocab: int = 320,
    tie: bool = False,
    bias: bool = False,
    max_context: int = 512,
    rope_theta: float = 10000.0,
    rope_scaling: dict | None = None,
    eos_token_id: int | list[int] | None = EOS_ID,
    dtype: torch.dtype = torch.float32,
    num_shards: int = 1,
    seed: int = 0,
) -> Path:
    """Write config.json, safetensors weights, tokenizer.json and a chat template to `path`.

    `eos_token_id=None` makes a model that only ends at max_tokens. `num_shards > 1` writes
    model-0000i-of-0000n.safetensors and model.safetensors.index.json. `vocab >= MIN_VOCAB`; ids the
    tokenizer does not know decode to nothing. Returns `path` as a Path.
    """
    if vocab < MIN_VOCAB:
        raise ValueError(f"vocab: expected at least {MIN_VOCAB} (the tokenizer's size), got {vocab}")
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "num_hidden_layers": num_layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "max_position_embeddings": max_context,
        "rms_norm_eps": 1e-5,
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling,
        "tie_word_embeddings": tie,
        "attention_bias": bias,
        "mlp_bias": bias,
        "bos_token_id": BOS_ID,
        "eos_token_id": eos_token_id,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    (path / "config.json").write_text(json.dumps(config, indent=2))
    _write_weights(path, {k: v.to(dtype) for k, v in tiny_state_dict(config, seed=seed).items()}, num_shards)
    tiny_tokenizer().save(str(path / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[BOS_ID],
        "eos_token": SPECIAL_TOKENS[EOS_ID],
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": max_context,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2))
    return path


def _write_weights(path: Path, state: dict[str, torch.Tensor], num_shards: int) -> None:
    if num_shards == 1:
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(state)
    weight_map = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        mine = names[shard::num_shards]
        save_file({n: state[n] for n in mine}, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
