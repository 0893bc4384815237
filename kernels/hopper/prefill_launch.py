"""Whether a prefill is one for the Hopper kernel, and its launch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import bfloat16

from pagewire.kernels import hopper
from pagewire.kernels.hopper import FLAGS, MOST_PARTS, prefill
from pagewire.kernels.hopper.consumer import Results
from pagewire.kernels.hopper.matrices import boxes_of
from pagewire.kernels.hopper.merging import Partials
from pagewire.kernels.hopper.supported import unfit
from pagewire.kernels.launch import ARRIVED, NEXT, PLACES, Device, Tensors
from pagewire.kernels.place import Launch, Place
from pagewire.kernels.quant import FORMATS, scale_kind

if TYPE_CHECKING:
    from pagewire.types import Modifiers

_VECTOR = 16  # elements: what Triton can tell of a number; as many bytes are copied at once


class Config(NamedTuple):
    BLOCK_N: int  # keys
    STAGES: int


# (head_dim, of V) -> tiles that fit shared memory beside Q, and registers beside the sums
_CONFIGS = {(64, 64): Config(128, 4), (128, 128): Config(128, 2), (192, 128): Config(128, 2), (256, 256): Config(64, 2)}
# softcap, ALiBi and scales per token take registers for themselves
_MODIFIED = {(64, 64): Config(64, 4), (128, 128): Config(64, 4), (192, 128): Config(64, 4), (256, 256): Config(64, 2)}


class Prefill(NamedTuple):
    launch: Launch
    redo: Place  # fp32 [tiles, num_kv_heads, FLAGS]
    scratch: tuple[int, ...]
    num_counters: int


def why_not(t: Tensors, m: Modifiers, device: Device) -> str | None:
    """Why the `tl` kernel takes this prefill."""
    widths, of_bytes = _widths(t), t.k_cache.dtype in FORMATS
    if why := unfit(t, device):
        return why
    if widths not in _CONFIGS:
        return f"head_dim {widths[0]}, {widths[1]} of V: {', '.join(f'{k}/{v}' for k, v in _CONFIGS)}"
    if "token" in _kinds(m) and (not of_bytes or t.q.dtype != bfloat16):
        return f"scales per token, {t.q.dtype} over {t.k_cache.dtype}: bf16 over 8 bits"
    if "token" in _kinds(m) and widths[1] == 256:
        return "scales per token of 256 dims: there are no registers left for them"
    for name, cache in (("k_cache", t.k_cache), ("v_cache", t.v_cache)):
        if any(stride % _VECTOR for stride in cache.stride()[:-1]):
            return f"{name}'s strides {cache.stride()}: multiples of {_VECTOR}"
    return None


def _kinds(m: Modifiers) -> tuple[str, str]:
    return scale_kind(m.k_scale), scale_kind(m.v_scale)


def _widths(t: Tensors) -> tuple[int, int]:
    return t.k_cache.shape[3], t.v_cache.shape[3]


def prefill_of(
    t: Tensors, m: Modifiers, arguments: dict[str, Any], scratch: tuple[int, ...], device: Device
) -> Prefill:
    """arguments: of `kernels/prefill.py`'s launch with BLOCK_M rows; scratch: what others have of it."""
    crowded = m.softcap > 0 or m.alibi_slopes is not None or "token" in _kinds(m)
    config = (_MODIFIED if crowded else _CONFIGS)[_widths(t)]
    spec, num_kv_heads = arguments["spec"], t.k_cache.shape[2]
    rows = t.q.shape[0] * spec.GROUP_SIZE
    # more than ROW_LIMIT rows has each of the requests that are prefill's
    most_tiles = max(1, rows // spec.BLOCK_M + min(t.page_table.shape[0], rows // (spec.ROW_LIMIT + 1)))
    parts = device.num_processors // (max(1, rows // spec.BLOCK_M) * num_kv_heads)
    parts = 1 if m.split_size is not None else max(1, min(parts, MOST_PARTS))
    redo = Place(-len(scratch) - 1)
    scratch = (*scratch, most_tiles * num_kv_heads * FLAGS)
    turns, num_counters = hopper.is_ahead(), 0
    partials = Partials(None, None, None, None)
    if turns:
        partials, num_counters = Partials(None, None, ARRIVED, NEXT), MOST_PARTS
    if parts > 1:
        num_counters = MOST_PARTS + most_tiles * num_kv_heads * FLAGS
        num_rows = most_tiles * num_kv_heads * parts * spec.BLOCK_M
        partials = Partials(Place(-len(scratch) - 1), Place(-len(scratch) - 2), ARRIVED, NEXT)
        scratch = (*scratch, num_rows * spec.BLOCK_DV, num_rows)
    kept = ("q", "page_table", "seq_lens", "cu_seqlens_q", "call", "rule")
    given = {name: arguments[name] for name in kept} | _caches(t, arguments, config)
    given["results"] = Results._make((*arguments["out"], arguments["lse"], redo, *partials))
    given["spec"] = spec._replace(
        BLOCK_N=config.BLOCK_N,
        STAGES=config.STAGES,
        PARTS=parts > 1,
        BOXES=given["k_matrix"] is not None,
        KV_HEADS=num_kv_heads,
        TURNS=turns,
        ALONE=None,
    )
    options = {"num_warps": 4, "enable_fp_fusion": True}
    programs = min(most_tiles * num_kv_heads, device.num_processors)
    launch = Launch(prefill._prefill_kernel, (programs, 1, parts), given, options)
    return Prefill(launch, redo, scratch, num_counters)


def _caches(t: Tensors, arguments: dict[str, Any], config: Config) -> dict[str, Any]:
    k, v = arguments["k"], arguments["v"]
    if t.k_cache.dtype not in FORMATS:  # what is converted passes through registers
        columns = prefill.strips(t.k_cache.shape[3])[0]
        k_boxes = boxes_of(PLACES.k_cache, t.k_cache, k, config.BLOCK_N, columns)
        v_boxes = boxes_of(PLACES.v_cache, t.v_cache, v, config.BLOCK_N)
        if k_boxes is not None and v_boxes is not None:
            return {"k": k_boxes[0], "k_matrix": k_boxes[1], "v": v_boxes[0], "v_matrix": v_boxes[1]}
    return {"k": k, "k_matrix": None, "v": v, "v_matrix": None}
