"""Which tensors a model must have, under Hugging Face's names, and whether they are there."""

from collections.abc import Mapping

from pagewire.serve.model.config import ModelConfig, ModelError

EMBED = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face tensor name -> shape, for every tensor of the model."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_qo_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {EMBED: (config.vocab_size, hidden), FINAL_NORM: (hidden,)}
    if not config.tie_word_embeddings:
        shapes[LM_HEAD] = (config.vocab_size, hidden)
    attention = {"q": (q_size, hidden), "k": (kv_size, hidden), "v": (kv_size, hidden), "o": (hidden, q_size)}
    mlp = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    blocks = (("self_attn", attention, config.attention_bias), ("mlp", mlp, config.mlp_bias))
    for layer in (f"model.layers.{i}." for i in range(config.num_layers)):
        shapes[layer + "input_layernorm.weight"] = shapes[layer + "post_attention_layernorm.weight"] = (hidden,)
        for block, projections, bias in blocks:
            for short, shape in projections.items():
                shapes[f"{layer}{block}.{short}_proj.weight"] = shape
                if bias:
                    shapes[f"{layer}{block}.{short}_proj.bias"] = shape[:1]
    return shapes


def check_shapes(found: Mapping[str, tuple[int, ...]], config: ModelConfig, where: str) -> None:
    """Raises ModelError unless the file holds exactly the tensors of `config`.

    A tensor the config does not explain is refused too: ignoring a bias would give wrong text.
    """
    expected = expected_shapes(config)
    for name, shape in expected.items():
        if name not in found:
            raise ModelError(f"{where}: expected a tensor {name} of shape {shape}, got none")
        if tuple(found[name]) != shape:
            raise ModelError(f"{where}: {name}: expected shape {shape} (from the config), got {tuple(found[name])}")
    # Some tied checkpoints repeat the embedding as lm_head; old ones store RoPE frequencies.
    known = {*expected, LM_HEAD} if config.tie_word_embeddings else expected.keys()
    extra = sorted(name for name in found if name not in known and not name.endswith("rotary_emb.inv_freq"))
    if extra:
        only = f"expected only the tensors of a {config.num_layers}-layer Llama"
        raise ModelError(f"{where}: {only}, got {len(extra)} more, first {extra[0]}")
