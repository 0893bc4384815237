"""What a Llama-family model is, apart from its weights. No torch here: the front reads it too."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

# They keep a damaged file from asking for terabytes before its weights are even compared.
_BOUNDS = {
    "num_layers": 1 << 12, "hidden_size": 1 << 20, "num_qo_heads": 1 << 16, "num_kv_heads": 1 << 16,
    "head_dim": 1 << 16, "intermediate_size": 1 << 24, "vocab_size": 1 << 24, "max_context": 1 << 30,
}  # fmt: skip


class ModelError(ValueError):
    """A model file is missing, damaged or of a kind we do not run; the message says which."""


@dataclass(frozen=True)
class RopeScaling:
    """How the RoPE frequencies differ from `theta ** (-2 i / head_dim)`.

    A kind leaves the fields it does not use at their defaults.
    """

    kind: Literal["linear", "llama3", "factors"]
    factor: float = 1.0  # linear, llama3: low frequencies are divided by it
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 1.0  # llama3
    original_max_context: int = 0  # llama3
    factors: tuple[float, ...] = ()  # factors: one divisor per frequency, [head_dim / 2] (GGUF's rope_freqs.weight)


@dataclass(frozen=True)
class ModelConfig:
    """Geometry and constants of one model; the words are the design's."""

    name: str  # the directory's or file's stem; not part of the fingerprint
    num_layers: int
    hidden_size: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int  # need not be hidden_size / num_qo_heads
    intermediate_size: int
    vocab_size: int
    max_context: int  # tokens a request may span, prompt and output
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # on q, k, v and o
    mlp_bias: bool = False  # on gate, up and down
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def check(self, where: str) -> None:
        """Raises ModelError, naming `where`, if the numbers cannot describe a model."""
        for field, limit in _BOUNDS.items():
            value = getattr(self, field)
            if not 1 <= value <= limit:
                raise ModelError(f"{where}: {field}: expected 1 to {limit}, got {value}")
        for wrong in (*self._wrong(), *self._wrong_rope()):
            raise ModelError(f"{where}: {wrong}")

    def _wrong(self) -> Iterator[str]:
        if self.num_qo_heads % self.num_kv_heads:
            got = f"{self.num_qo_heads} and {self.num_kv_heads}"
            yield f"expected num_qo_heads to be a multiple of num_kv_heads, got {got}"
        if self.head_dim % 2:
            yield f"head_dim: expected an even number (RoPE pairs), got {self.head_dim}"
        for field in ("rms_norm_eps", "rope_theta"):
            if not getattr(self, field) > 0:
                yield f"{field}: expected a positive number, got {getattr(self, field)}"
        for token_id in (self.bos_token_id, *self.eos_token_ids):
            if token_id is not None and not 0 <= token_id < self.vocab_size:
                yield f"bos/eos token id: expected 0 to {self.vocab_size - 1} (vocab_size), got {token_id}"

    def _wrong_rope(self) -> Iterator[str]:
        rope = self.rope_scaling or RopeScaling("linear")
        if not rope.factor > 0:
            yield f"RoPE scaling factor: expected a positive number, got {rope.factor}"
        if rope.kind == "llama3" and not 0 < rope.low_freq_factor < rope.high_freq_factor:
            got = f"{rope.low_freq_factor} and {rope.high_freq_factor}"
            yield f"llama3 RoPE scaling: expected 0 < low_freq_factor < high_freq_factor, got {got}"
        if rope.kind == "llama3" and rope.original_max_context < 1:
            yield f"llama3: expected original_max_position_embeddings of at least 1, got {rope.original_max_context}"
        num_pairs = self.head_dim // 2
        if rope.kind == "factors" and not (len(rope.factors) == num_pairs and all(f > 0 for f in rope.factors)):
            yield f"rope_freqs.weight: expected {num_pairs} positive numbers (head_dim / 2), got {len(rope.factors)}"
