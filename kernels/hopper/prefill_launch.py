"""Whether a prefill is one for the Hopper kernel, and its launch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from pagewire.kernels.hopper import prefill
from pagewire.kernels.hopper.matrices import boxes_of
from pagewire.kernels.hopper.rows_out import Results
from pagewire.kernels.hopper.supported import unfit
from pagewire.kernels.launch import PLACES, Device, Tensors
from pagewire.kernels.place import Launch
from pagewire.kernels.quant import FORMATS

if TYPE_CHECKING:
    from pagewire.types import Modifiers

_VECTOR = 16  # elements: what Triton can tell of a number; as many bytes are copied at once


class Config(NamedTuple):
    BLOCK_N: int  # keys
    STAGES: int


# head_dim -> tiles that fit shared memory beside Q, and registers beside the sums
_CONFIGS = {64: Config(128, 4), 128: Config(128, 2), 256: Config(64, 2)}
# softcap and ALiBi take registers for themselves
_MODIFIED = {64: Config(64, 4), 128: Config(64, 4), 256: Config(64, 2)}


def why_not(t: Tensors, m: Modifiers, device: Device) -> str | None:
    """Why the `tl` kernel takes this prefill."""
    head_dim = t.k_cache.shape[3]
    if why := unfit(t, device):
        return why
    if isinstance(m.k_scale, Tensor) or isinstance(m.v_scale, Tensor):
        return "scales in tensors: numbers"
    if head_dim not in _CONFIGS or t.v_cache.shape[3] != head_dim:
        return f"head_dim {head_dim}, {t.v_cache.shape[3]} of V: 64, 128 or 256, of both"
    if m.softmax_scale * (1.0 if m.k_scale is None else m.k_scale) <= 0:
        return f"softmax_scale {m.softmax_scale}, k_scale {m.k_scale}: positive ones"
    for name, cache in (("k_cache", t.k_cache), ("v_cache", t.v_cache)):
        if any(stride % _VECTOR for stride in cache.stride()[:-1]):
            return f"{name}'s strides {cache.stride()}: multiples of {_VECTOR}"
    return None


def launch_of(t: Tensors, m: Modifiers, arguments: dict[str, Any], grid: tuple[int, int, int]) -> Launch:
    """arguments, grid: of `kernels/prefill.py`'s launch with BLOCK_M rows."""
    config = (_MODIFIED if m.softcap > 0 or m.alibi_slopes is not None else _CONFIGS)[t.k_cache.shape[3]]
    kept = ("q", "page_table", "seq_lens", "cu_seqlens_q", "call", "rule")
    given = {name: arguments[name] for name in kept}
    k, k_matrix, v, v_matrix = arguments["k"], None, arguments["v"], None
    if t.k_cache.dtype not in FORMATS:  # what is converted passes through registers
        k_boxes = boxes_of(PLACES.k_cache, t.k_cache, k, config.BLOCK_N)
        v_boxes = boxes_of(PLACES.v_cache, t.v_cache, v, config.BLOCK_N)
        if k_boxes is not None and v_boxes is not None:
            (k, k_matrix), (v, v_matrix) = k_boxes, v_boxes
    results = Results._make((*arguments["out"], arguments["lse"], arguments["redo"]))
    given |= {
        "k": k, "v": v, "k_matrix": k_matrix, "v_matrix": v_matrix, "results": results,
        "spec": arguments["spec"]._replace(
            BLOCK_N=config.BLOCK_N, STAGES=config.STAGES, BOXES=k_matrix is not None, ALONE=None
        ),
    }  # fmt: skip
    return Launch(prefill._prefill_kernel, grid, given, {"num_warps": 4, "enable_fp_fusion": True})
