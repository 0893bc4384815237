"""A small wire for tests of the handoff: sizes without tensors."""

from pagewire.transfer.handoff import Wire


def small_wire(num_layers: int = 2, num_kv_heads: int = 2, head_dim: int = 4) -> Wire:
    def packed_bytes(layers: int, heads: int, tokens: int) -> int:
        return layers * heads * tokens * 2 * head_dim * 4

    return Wire(b"f" * 32, num_layers, num_kv_heads, head_dim, head_dim, "float32", "none", packed_bytes)
