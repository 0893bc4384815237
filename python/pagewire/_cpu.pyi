"""csrc/bindings/cpu.cpp."""

from torch import Tensor

from pagewire.moves import Movement
from pagewire.types import Modifiers

max_width: int

class Kernels:
    name: str

def choose_kernels(name: str) -> Kernels: ...
def usable_isas() -> list[str]: ...
def read(data: int, count: int, kernels: Kernels, num_threads: int) -> float: ...
def decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, seq_lens: Tensor, modifiers: Modifiers,
    out: Tensor, lse: Tensor | None, kernels: Kernels, num_threads: int, /,
) -> None: ...  # fmt: skip
def prefill(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor,
    modifiers: Modifiers, out: Tensor, lse: Tensor | None, kernels: Kernels, num_threads: int, /,
) -> None: ...  # fmt: skip
def move(movement: Movement, kernels: Kernels, num_threads: int, /) -> None: ...
def merge_state(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor,
    kernels: Kernels, num_threads: int, /,
) -> None: ...  # fmt: skip
def merge_states(
    outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor, kernels: Kernels, num_threads: int, /
) -> None: ...
