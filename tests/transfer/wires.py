"""A small wire for tests of the handoff: sizes without tensors."""

from pagewire.transfer.frames import Held
from pagewire.transfer.handoff import Wire


def small_wire(num_layers: int = 2, num_kv_heads: int = 2, head_dim: int = 4) -> Wire:
    return Wire(b"f" * 32, (Held(0, num_layers, 0, num_kv_heads, head_dim, head_dim, "float32", "none"),))
