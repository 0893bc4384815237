"""Whether a prefill is one for the Hopper kernel, and its launch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, bfloat16, float16

from pagewire.kernels.arguments import varying
from pagewire.kernels.hopper import prefill
from pagewire.kernels.hopper.boxes import Boxes
from pagewire.kernels.hopper.consumer import Results
from pagewire.kernels.hopper.words import unsupported
from pagewire.kernels.launch import PLACES, Device, Tensors
from pagewire.kernels.place import Launch, MatrixPlace, Place
from pagewire.kernels.quant import FORMATS

if TYPE_CHECKING:
    from pagewire.types import Modifiers

_MOST_ROWS = 1 << 31  # of a matrix: the TMA unit counts them in 32 bits
_COLUMN_BYTES = 16  # and strides in these
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
    if device.arch != 90:
        return f"sm_{device.arch} is not sm_90"
    if t.q.dtype not in (float16, bfloat16) or t.k_cache.dtype not in (t.q.dtype, *FORMATS):
        return f"{t.q.dtype} over {t.k_cache.dtype}: fp16 or bf16, over the same or 8 bits"
    if isinstance(m.k_scale, Tensor) or isinstance(m.v_scale, Tensor):
        return "scales in tensors: numbers"
    if head_dim not in _CONFIGS or t.v_cache.shape[3] != head_dim:
        return f"head_dim {head_dim}, {t.v_cache.shape[3]} of V: 64, 128 or 256, of both"
    if m.softmax_scale * (1.0 if m.k_scale is None else m.k_scale) <= 0:
        return f"softmax_scale {m.softmax_scale}, k_scale {m.k_scale}: positive ones"
    for name, cache in (("k_cache", t.k_cache), ("v_cache", t.v_cache)):
        if any(stride % _VECTOR for stride in cache.stride()[:-1]):
            return f"{name}'s strides {cache.stride()}: multiples of {_VECTOR}"
    return unsupported()


def launch_of(t: Tensors, m: Modifiers, arguments: dict[str, Any], grid: tuple[int, int, int]) -> Launch:
    """arguments, grid: of `kernels/prefill.py`'s launch with BLOCK_M rows."""
    config = (_MODIFIED if m.softcap > 0 or m.alibi_slopes is not None else _CONFIGS)[t.k_cache.shape[3]]
    kept = ("q", "page_table", "seq_lens", "cu_seqlens_q", "call", "rule")
    given = {name: arguments[name] for name in kept}
    found = [_boxes(PLACES.k_cache, t.k_cache, config), _boxes(PLACES.v_cache, t.v_cache, config)]
    boxes = [x for x in found if x is not None]
    (k, k_matrix), (v, v_matrix) = boxes if len(boxes) == 2 else [(arguments["k"], None), (arguments["v"], None)]
    results = Results._make((*arguments["out"], arguments["lse"], arguments["redo"]))
    given |= {
        "k": k, "v": v, "k_matrix": k_matrix, "v_matrix": v_matrix, "results": results,
        "spec": arguments["spec"]._replace(
            BLOCK_N=config.BLOCK_N, STAGES=config.STAGES, BOXES=k_matrix is not None, ALONE=None
        ),
    }  # fmt: skip
    return Launch(prefill._prefill_kernel, grid, given, {"num_warps": 4})


class _Matrix(NamedTuple):
    """A cache as a matrix whose rows are stride_token apart."""

    rows: int
    columns: int
    per_page: int
    per_head: int
    per_head_column: int


def _matrix(cache: Tensor) -> _Matrix | None:
    """cache: [num_pages, page_size, num_kv_heads, head_dim], free strides."""
    num_pages, page_size, num_heads, width = cache.shape
    of_page, of_token, of_head, _ = cache.stride()
    if num_pages == 0 or of_token <= 0 or of_token * cache.element_size() % _COLUMN_BYTES or of_page % of_token:
        return None
    per_page = of_page // of_token
    if num_heads == 1 or of_head * (num_heads - 1) + width <= of_token:  # heads side by side
        if of_head * cache.element_size() % _COLUMN_BYTES and num_heads > 1:
            return None
        per_head, per_head_column, columns = 0, of_head, of_head * (num_heads - 1) + width
        rows = (num_pages - 1) * per_page + page_size
    elif of_head % of_token == 0:  # a head's tokens follow each other
        per_head, per_head_column, columns = of_head // of_token, 0, width
        rows = (num_pages - 1) * per_page + (num_heads - 1) * per_head + page_size
    else:
        return None
    fits = 0 < per_page and rows + per_page + per_head * num_heads < _MOST_ROWS
    return _Matrix(rows, columns, per_page, per_head, per_head_column) if fits else None


def _boxes(place: Place, cache: Tensor, config: Config) -> tuple[Boxes, MatrixPlace] | None:
    """None: rows have to be copied one by one."""
    page_size, width, of_token = cache.shape[1], cache.shape[3], cache.stride(1)
    matrix = None if cache.dtype in FORMATS else _matrix(cache)  # what is converted passes through registers
    if matrix is None or page_size < 8 or page_size & (page_size - 1):  # 8 rows are an atom of the swizzle
        return None
    # beyond the matrix, whichever head it is of
    nowhere = -(-matrix.rows // matrix.per_page)
    box = (min(page_size, config.BLOCK_N), width)
    numbers = Boxes(varying([nowhere])[0], matrix.per_page, matrix.per_head, matrix.per_head_column)
    return numbers, MatrixPlace(place.index, (matrix.rows, matrix.columns), (of_token, 1), box)
