"""Whether a decode is one for the Hopper kernel, and its launch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from pagewire.kernels.common import Spec
from pagewire.kernels.hopper import decode
from pagewire.kernels.hopper.matrices import boxes_of
from pagewire.kernels.hopper.merging import Partials
from pagewire.kernels.hopper.rows_out import Results
from pagewire.kernels.hopper.supported import unfit
from pagewire.kernels.launch import (
    ARRIVED,
    NEXT,
    PLACES,
    REGISTERS_OF_A_PROCESSOR,
    Device,
    Tensors,
    attention_arguments,
    attention_spec,
)
from pagewire.kernels.place import Launch, Place
from pagewire.kernels.quant import FORMATS, scale_kind
from pagewire.kernels.tuning import KernelConfig

if TYPE_CHECKING:
    from pagewire.types import Modifiers

_FEWEST_ROWS, _MOST_ROWS = 8, 32  # columns of a product; more need registers that there are not
_TILE_BYTES = 16 << 10  # of K
_SHARED = 227 << 10  # of a program, or less 1 KiB each of two
_THREADS = 256  # four warps that multiply and one that loads, which counts as four


class Config(NamedTuple):
    BLOCK_M: int  # rows
    BLOCK_N: int  # keys
    STAGES: int
    programs_per_processor: int


class Decode(NamedTuple):
    launch: Launch
    scratch: tuple[int, int]
    num_counters: int


def why_not(t: Tensors, m: Modifiers, device: Device) -> str | None:
    """Why the `tl` kernels take this decode."""
    head_dim, group_size = t.k_cache.shape[3], t.q.shape[1] // t.k_cache.shape[2]
    if why := unfit(t, device):
        return why
    if t.cu_seqlens_q is not None:
        return "rows in cu_seqlens_q: a row per request"
    if m.split_size is not None:
        return f"split_size {m.split_size}: None"
    if "token" in (scale_kind(m.k_scale), scale_kind(m.v_scale)) and t.k_cache.dtype not in FORMATS:
        return f"scales per token of {t.k_cache.dtype}: 8 bits"
    if head_dim not in (64, 128, 256) or t.v_cache.shape[3] != head_dim:
        return f"head_dim {head_dim}, {t.v_cache.shape[3]} of V: 64, 128 or 256, of both"
    if group_size > _MOST_ROWS:
        return f"{group_size} query heads to a kv head: at most {_MOST_ROWS}"
    numbers = attention_arguments(t, m, Tensor(), _spec(t, m, device))
    for name, cache in (("k", t.k_cache), ("v", t.v_cache)):
        if boxes_of(PLACES.k_cache, cache, numbers[name], _config(t).BLOCK_N) is None:
            return f"{name}_cache with pages of {cache.shape[1]} and strides {cache.stride()} is no matrix of TMA boxes"
    return None


def decode_of(t: Tensors, m: Modifiers, error_word: Tensor, device: Device) -> Decode:
    config, spec, num_kv_heads = _config(t), _spec(t, m, device), t.k_cache.shape[2]
    arguments = attention_arguments(t, m, error_word, spec)
    k_boxes = boxes_of(PLACES.k_cache, t.k_cache, arguments["k"], config.BLOCK_N)
    v_boxes = boxes_of(PLACES.v_cache, t.v_cache, arguments["v"], config.BLOCK_N)
    assert k_boxes is not None and v_boxes is not None
    kept = ("q", "page_table", "seq_lens", "call", "rule")
    given: dict[str, Any] = {name: arguments[name] for name in kept}
    given |= {
        "k": k_boxes[0], "k_matrix": k_boxes[1], "v": v_boxes[0], "v_matrix": v_boxes[1],
        "results": Results._make((*arguments["out"], arguments["lse"])),
        "partials": Partials(Place(-1), Place(-2), ARRIVED, NEXT),
        "spec": spec,
    }  # fmt: skip
    num_programs = max(2, device.num_processors * config.programs_per_processor // num_kv_heads)
    num_rows = 2 * num_programs * num_kv_heads * spec.GROUP_SIZE
    registers = REGISTERS_OF_A_PROCESSOR // (_THREADS * config.programs_per_processor)
    options = {"num_warps": 4, "maxnreg": min(registers, 255), "enable_fp_fusion": True}
    launch = Launch(decode._decode_kernel, (num_kv_heads, num_programs, 1), given, options)
    return Decode(launch, (num_rows * spec.BLOCK_D, num_rows), num_programs * num_kv_heads)


def _config(t: Tensors) -> Config:
    """Two programs with three stages of K and V, or one with as many as there is room for beside q, P and a result."""
    head_dim, group_size, size = t.k_cache.shape[3], t.q.shape[1] // t.k_cache.shape[2], t.k_cache.element_size()
    rows = max(_FEWEST_ROWS, 1 << (group_size - 1).bit_length())
    keys = max(64, min(128, _TILE_BYTES // (head_dim * size)))
    scale_bytes = 4 if "token" in (scale_kind(t.k_scale), scale_kind(t.v_scale)) else 0
    beside = rows * (2 * head_dim + 2 * keys + 4 * head_dim) + 1024
    for programs in (2, 1):
        stages = (_SHARED // programs - beside) // (2 * keys * (head_dim * size + scale_bytes))
        if stages >= 3 or programs == 1:
            return Config(rows, keys, min(stages, 6), programs)
    raise AssertionError


def _spec(t: Tensors, m: Modifiers, device: Device) -> Spec:
    config = _config(t)
    tile = KernelConfig(config.BLOCK_M, config.BLOCK_N, 4, config.STAGES, config.programs_per_processor)
    return attention_spec(t, m, tile, device.arch)._replace(STAGES=config.STAGES, BOXES=True, ALONE=None)
