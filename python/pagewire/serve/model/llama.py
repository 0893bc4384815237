"""Llama over a paged KV cache: attention and KV by pagewire ops, the rest in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import pagewire as pw
from pagewire.serve.model.config import ModelConfig
from pagewire.serve.model.files import open_weights
from pagewire.serve.model.rope import inverse_frequencies, rotate, rotation
from pagewire.serve.model.weights import EMBED, FINAL_NORM, LM_HEAD

OnLayer = Callable[[int], None] | None
RUN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Linear(NamedTuple):
    weight: Tensor  # [out_features, in_features]
    bias: Tensor | None  # [out_features]


@dataclass(frozen=True)
class Layer:
    attention_norm: Tensor  # [hidden_size]
    qkv: Linear  # [(num_qo_heads + 2 * num_kv_heads) * head_dim, hidden_size]
    out: Linear  # [hidden_size, num_qo_heads * head_dim]
    mlp_norm: Tensor  # [hidden_size]
    gate_up: Linear  # [2 * intermediate_size, hidden_size]
    down: Linear  # [hidden_size, intermediate_size]


class Llama:
    """The weights of one model in one dtype on one device."""

    def __init__(self, path: Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        """Reads a Hugging Face directory or a GGUF file.

        Args:
            dtype: of weights and activations: fp32, bf16 or fp16. Stored weights are converted.
        Raises:
            ModelError: a file is missing, damaged, or of a model that this class does not compute.
        """
        if dtype not in RUN_DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(map(str, RUN_DTYPES))}, got {dtype}")
        weights = open_weights(path)
        self.config, self.dtype, self.device = weights.config, dtype, torch.device(device)

        def stacked(*names: str) -> Tensor:
            return torch.cat([weights.read(name) for name in names]).to(self.device, dtype)

        # one after the other: never two whole models in memory
        self._embedding = stacked(EMBED)  # [vocab_size, hidden_size]
        self._layers = [_layer(i, self.config, stacked) for i in range(self.config.num_layers)]
        self._norm = stacked(FINAL_NORM)
        self._lm_head = self._embedding if self.config.tie_word_embeddings else stacked(LM_HEAD)
        self._frequencies = inverse_frequencies(self.config).to(self.device)

    @torch.inference_mode()
    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        cache: pw.PagedKVCache,
        *,
        slot_mapping: Tensor,
        page_table: Tensor,
        seq_lens: Tensor,
        cu_seqlens_q: Tensor | None = None,
        logit_rows: Tensor | None = None,
        on_layer: OnLayer = None,
    ) -> Tensor:
        """Run the tokens of a batch, writing their KV into `cache`; return the logits asked for.

        Args:
            token_ids, positions: [num_tokens]; a position is an index in its own request. All are int32 or int64.
            cache: one layer of `cache` per layer of the model, in the model's dtype or quantised.
            slot_mapping: [num_tokens], where each token's K and V go; negative: nowhere.
            page_table: int32 [batch_size, max_pages_per_seq].
            seq_lens: int32 [batch_size], KV tokens of each request, these included.
            cu_seqlens_q: int32 [batch_size + 1], or None for exactly one token per request.
            logit_rows: [num_rows], rows of `token_ids` whose logits are wanted; may be empty. None: all.
            on_layer: called with i once the KV of layer i is in the cache, before its attention.
        Returns:
            fp32 [num_rows, vocab_size].
        """
        config = self.config
        if cache.num_layers != config.num_layers:
            raise ValueError(f"cache: expected {config.num_layers} layers (the model's), got {cache.num_layers}")
        heads = [config.num_qo_heads, config.num_kv_heads, config.num_kv_heads]
        cos, sin = rotation(positions, self._frequencies)
        x = F.embedding(token_ids, self._embedding)  # [num_tokens, hidden_size]
        attended = x.new_empty(x.shape[0], config.num_qo_heads, config.head_dim)
        for i, layer in enumerate(self._layers):
            qkv = F.linear(self._rms_norm(x, layer.attention_norm), *layer.qkv)
            q, k, v = qkv.unflatten(1, (sum(heads), config.head_dim)).split(heads, dim=1)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            described: Any = {"layout": cache.layout, "k_scale": cache.k_scale[i], "v_scale": cache.v_scale[i]}
            pw.append_kv(k, v, cache.k[i], cache.v[i], slot_mapping, **described)
            if on_layer is not None:
                on_layer(i)
            paged = (q, cache.k[i], cache.v[i], page_table, seq_lens)
            if cu_seqlens_q is None:
                pw.decode(*paged, out=attended, **described)
            else:
                pw.prefill(*paged, cu_seqlens_q, out=attended, **described)
            x = x + F.linear(attended.flatten(1), *layer.out)
            gate, up = F.linear(self._rms_norm(x, layer.mlp_norm), *layer.gate_up).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, *layer.down)
        x = self._rms_norm(x if logit_rows is None else x[logit_rows], self._norm)
        return F.linear(x, self._lm_head).float()

    def _rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.config.rms_norm_eps)


def _layer(i: int, config: ModelConfig, stacked: Callable[..., Tensor]) -> Layer:
    """stacked: gives the tensors of these names, one below the other."""
    prefix, attention_bias, mlp_bias = f"model.layers.{i}.", config.attention_bias, config.mlp_bias

    def linear(has_bias: bool, *modules: str) -> Linear:
        weight = stacked(*(f"{prefix}{m}_proj.weight" for m in modules))
        return Linear(weight, stacked(*(f"{prefix}{m}_proj.bias" for m in modules)) if has_bias else None)

    return Layer(
        attention_norm=stacked(prefix + "input_layernorm.weight"),
        qkv=linear(attention_bias, "self_attn.q", "self_attn.k", "self_attn.v"),
        out=linear(attention_bias, "self_attn.o"),
        mlp_norm=stacked(prefix + "post_attention_layernorm.weight"),
        gate_up=linear(mlp_bias, "mlp.gate", "mlp.up"),
        down=linear(mlp_bias, "mlp.down"),
    )
