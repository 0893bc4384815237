"""From tensors and modifiers to kernel arguments; a launch is a value, so that it can be compiled without being run."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pagewire.kernels.alone import FEWEST_KEYS, FEWEST_ROWS
from pagewire.kernels.common import Spec
from pagewire.kernels.quant import format_of
from pagewire.kernels.tuning import KernelConfig, Problem

# Key indices are int32 and windows are added to them: this keeps the sums in range
_MAX_KEYS = 1 << 30
_LOG2_E = math.log2(math.e)


# Arguments that change from call to call: neither their values nor their alignment lead to another compilation. Those
# that a model fixes, strides foremost, travel in tuples, which Triton always specialises
PER_CALL = [
    "page_table", "table_stride", "num_pages", "seq_lens", "seq_lens_stride", "max_seq_len", "cu_seqlens_q",
    "num_tokens", "max_q_len", "lse", "lse_stride_token", "lse_stride_head", "head_rows", "part_rows", "token_rows",
    "request_rows", "batch_size", "window_left", "window_right", "split_size", "num_programs",
]  # fmt: skip


REGISTERS_OF_A_PROCESSOR = 1 << 16  # 32-bit ones


class Launch(NamedTuple):
    kernel: Any  # a triton.JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]


def options(config: KernelConfig) -> dict[str, Any]:
    threads = 32 * config.num_warps * config.programs_per_processor
    return {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        # left to itself, ptxas spills a few bytes for a higher occupancy than the row plans
        "maxnreg": min(255, REGISTERS_OF_A_PROCESSOR // threads // 8 * 8),
        # said explicitly: the default of fusing a * b + c changes in Triton 3.10
        "enable_fp_fusion": True,
    }


class Device(NamedTuple):
    arch: int  # compute capability, 90 for sm_90; 0: the interpreter
    num_processors: int


@functools.cache
def device_of(device: torch.device) -> Device:
    if device.type != "cuda":
        return Device(0, 3)  # few, so that small tests split and share work
    properties = torch.cuda.get_device_properties(device)
    return Device(10 * properties.major + properties.minor, properties.multi_processor_count)


def run(launches: Sequence[Launch], device: torch.device) -> None:
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        with torch.cuda.device(device):
            run(launches, torch.device("cuda"))
        return
    for kernel, grid, arguments, options in launches:
        kernel[grid](**arguments, **options)


def problem(q: Tensor, k_cache: Tensor, v_cache: Tensor, device: Device) -> Problem:
    head_dim = max(k_cache.shape[3], v_cache.shape[3])
    return Problem(device.arch, head_dim, q.element_size(), k_cache.element_size(), k_cache.shape[1])


def attention_spec(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    m: Any,  # Modifiers
    lse: Tensor | None,
    config: KernelConfig,
    arch: int,
    *,
    ragged: bool,
    row_limit: int = 0,
    read_once: bool = False,  # K and V, by the rows of a request
) -> Spec:
    stored = format_of(k_cache.dtype)
    return Spec(
        HEAD_DIM=k_cache.shape[3],
        HEAD_DIM_V=v_cache.shape[3],
        GROUP_SIZE=q.shape[1] // k_cache.shape[2],
        PAGE_SIZE=k_cache.shape[1],
        FORMAT=stored,
        NATIVE_E4M3=arch >= 89,
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_D=padded(k_cache.shape[3]),
        BLOCK_DV=padded(v_cache.shape[3]),
        BLOCK_B=128 if arch else 16,
        RAGGED=ragged,
        ROW_LIMIT=row_limit,
        LEFT=m.window_left >= 0,
        RIGHT=ragged and (m.causal or m.window_right >= 0),  # a lone row is the last: nothing is right of it
        SOFTCAP=m.softcap > 0,
        ALIBI=m.alibi_slopes is not None,
        SINKS=m.sinks is not None,
        LSE=lse is not None,
        K_SCALE=_scale_kind(m.k_scale),
        V_SCALE=_scale_kind(m.v_scale),
        LIFTS=_scale_kind(m.v_scale) == "token"
        and (q.dtype == torch.float16 or q.dtype == torch.bfloat16 and stored != "float"),
        EVICT="evict_first" if read_once else "",
        SPLIT=m.split_size is not None,
    )


def padded(width: int) -> int:
    """The block for a head's width: a power of two, at least the 16 of a tensor core."""
    return max(16, 1 << (width - 1).bit_length())


def attention_arguments(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor | None,
    m: Any,
    out: Tensor,
    lse: Tensor | None,
    error_word: Tensor,
    spec: Spec,
) -> dict[str, Any]:
    """The arguments that `_decode_kernel` and `_prefill_kernel` have in common."""
    num_tokens = q.shape[0]
    scale_log2 = m.softmax_scale * _LOG2_E
    if isinstance(m.k_scale, (int, float)):
        scale_log2 *= m.k_scale
    if spec.SOFTCAP:
        scale_log2 *= 2 / m.softcap
    v_factor = 1.0
    if isinstance(m.v_scale, (int, float)):
        v_factor *= m.v_scale
    capacity = page_table.shape[1] * spec.PAGE_SIZE
    right = 0 if m.causal else m.window_right
    if m.causal and m.window_right >= 0:
        right = min(0, m.window_right)
    longest = num_tokens if m.max_q_len is None else min(m.max_q_len, num_tokens)
    return {
        "q": (q, q.stride(0), q.stride(1)),
        "k": _cache(k_cache),
        "v": _cache(v_cache),
        "k_scale": _scale(m.k_scale),
        "v_scale": _scale(m.v_scale),
        "page_table": page_table,
        "table_stride": page_table.stride(0),
        "num_pages": k_cache.shape[0],
        "seq_lens": seq_lens,
        "seq_lens_stride": seq_lens.stride(0),
        "max_seq_len": min(capacity, _MAX_KEYS),
        "cu_seqlens_q": cu_seqlens_q,
        "num_tokens": num_tokens,
        "max_q_len": longest,
        "alibi": _per_request(m.alibi_slopes),
        "sinks": None if m.sinks is None else (m.sinks, m.sinks.stride(0)),
        "out": (out, out.stride(0), out.stride(1)),
        "lse": lse,
        "lse_stride_token": 0 if lse is None else lse.stride(0),
        "lse_stride_head": 0 if lse is None else lse.stride(1),
        "error_word": error_word,
        "batch_size": page_table.shape[0],
        "window_left": min(m.window_left, _MAX_KEYS),
        "window_right": min(right, _MAX_KEYS),
        "scale_log2": float(scale_log2),
        "softcap": float(m.softcap),
        "v_factor": float(v_factor),
        "spec": spec,
        "alone": spec._replace(BLOCK_M=min(spec.BLOCK_M, FEWEST_ROWS), BLOCK_N=min(spec.BLOCK_N, FEWEST_KEYS)),
    }


def _scale_kind(scale: Any) -> str:
    if not isinstance(scale, Tensor):
        return "value"
    return "token" if scale.dim() == 3 else "head"


def _cache(cache: Tensor) -> tuple[Tensor, int, int, int]:
    stored = cache.view(torch.uint8) if format_of(cache.dtype) in ("e4m3", "e5m2") else cache
    return stored, cache.stride(0), cache.stride(1), cache.stride(2)


def _scale(scale: Any) -> tuple[Any, ...] | None:
    if not isinstance(scale, Tensor):
        return None
    return (scale, *scale.stride()) if scale.dim() == 3 else _per_request(scale)


def _per_request(x: Tensor | None) -> tuple[Tensor, int, int] | None:
    """[], [heads] or [batch_size, heads] as (tensor, stride_request, stride_head)."""
    if x is None:
        return None
    strides = (0,) * (2 - x.dim()) + x.stride()
    return x, strides[0], strides[1]
