"""What a Llama-family model is, apart from its weights. No torch here: the front reads it too."""

from dataclasses import dataclass
from typing import Literal


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
        # Bounds keep a damaged file from asking for terabytes before its weights are even compared.
        for field, limit in (
            ("num_layers", 4096),
            ("hidden_size", 1 << 20),
            ("num_qo_heads", 1 << 16),
            ("num_kv_heads", 1 << 16),
            ("head_dim", 1 << 16),
            ("intermediate_size", 1 << 24),
            ("vocab_size", 1 << 24),
            ("max_context", 1 << 30),
        ):
            value = getattr(self, field)
            if not 1 <= value <= limit:
                raise ModelError(f"{where}: {field}: expected 1 to {limit}, got {value}")
        if self.num_qo_heads % self.num_kv_heads:
            raise ModelError(
                f"{where}: expected num_qo_heads to be a multiple of num_kv_heads, "
                f"got {self.num_qo_heads} and {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ModelError(f"{where}: head_dim: expected an even number (RoPE pairs), got {self.head_dim}")
        for field in ("rms_norm_eps", "rope_theta"):
            if not getattr(self, field) > 0:
                raise ModelError(f"{where}: {field}: expected a positive number, got {getattr(self, field)}")
        for token_id in (*self.eos_token_ids, *(() if self.bos_token_id is None else (self.bos_token_id,))):
            if not 0 <= token_id < self.vocab_size:
                raise ModelError(
                    f"{where}: bos/eos token id: expected 0 to {self.vocab_size - 1} (vocab_size), got {token_id}"
                )
        self._check_rope(where)

    def _check_rope(self, where: str) -> None:
        rope = self.rope_scaling
        if rope is None:
            return
        if not rope.factor > 0:
            raise ModelError(f"{where}: RoPE scaling factor: expected a positive number, got {rope.factor}")
        if rope.kind == "llama3":
            if not 0 < rope.low_freq_factor < rope.high_freq_factor:
                raise ModelError(
                    f"{where}: llama3 RoPE scaling: expected 0 < low_freq_factor < "
                    f"high_freq_factor, got {rope.low_freq_factor} and {rope.high_freq_factor}"
                )
            if rope.original_max_context < 1:
                raise ModelError(
                    f"{where}: llama3 RoPE scaling: expected "
                    f"original_max_position_embeddings >= 1, got {rope.original_max_context}"
                )
        if rope.kind == "factors" and (len(rope.factors) != self.head_dim // 2 or not all(f > 0 for f in rope.factors)):
            raise ModelError(
                f"{where}: rope_freqs.weight: expected {self.head_dim // 2} positive numbers "
                f"(head_dim / 2), got {len(rope.factors)}"
            )
