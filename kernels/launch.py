"""From the tensors and modifiers of an attention call to the arguments of its kernels, with places for the tensors."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pagewire.kernels.alone import FEWEST_KEYS, FEWEST_ROWS
from pagewire.kernels.arguments import Cache, Call, Heads, Rule, Varying, varying
from pagewire.kernels.common import Spec
from pagewire.kernels.place import Place
from pagewire.kernels.quant import format_of, scale_kind
from pagewire.kernels.tuning import KernelConfig, Traits

if TYPE_CHECKING:
    from pagewire.types import Modifiers, Scale

# Key indices are int32 and windows are added to them: this keeps the sums in range
_MAX_KEYS = 1 << 30
_LOG2_E = math.log2(math.e)


REGISTERS_OF_A_PROCESSOR = 1 << 16  # 32-bit ones


class Tensors(NamedTuple):
    """What an attention call brings, in the order in which its places count them."""

    q: Any  # [num_tokens, num_qo_heads, head_dim]
    k_cache: Any  # [num_pages, page_size, num_kv_heads, head_dim], free strides
    v_cache: Any
    page_table: Any  # [batch_size, max_pages_per_seq] int32
    seq_lens: Any  # [batch_size] int32
    cu_seqlens_q: Any  # [batch_size + 1] int32; None: one row per request
    out: Any  # [num_tokens, num_qo_heads, head_dim_v]
    lse: Any  # [num_tokens, num_qo_heads] fp32, or None
    sinks: Any  # of the modifiers
    alibi_slopes: Any
    k_scale: Any  # a number has no place
    v_scale: Any


PLACES = Tensors._make(map(Place, range(len(Tensors._fields))))
# of a plan with counters: those of a call, and those of the next one on its stream (`counters.py`)
ARRIVED, NEXT = (Place(len(PLACES) + n) for n in range(2))


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


def traits(t: Tensors, device: Device) -> Traits:
    head_dim = max(t.k_cache.shape[3], t.v_cache.shape[3])
    return Traits(device.arch, head_dim, t.q.element_size(), t.k_cache.element_size(), t.k_cache.shape[1])


def attention_spec(
    t: Tensors,
    m: Modifiers,
    config: KernelConfig,
    arch: int,
    *,
    row_limit: int = 0,
    read_once: bool = False,  # K and V, by the rows of a request
    redo: bool = False,
) -> Spec:
    k_cache, v_cache, ragged = t.k_cache, t.v_cache, t.cu_seqlens_q is not None
    stored = format_of(k_cache.dtype)
    alone = Spec(
        HEAD_DIM=k_cache.shape[3],
        HEAD_DIM_V=v_cache.shape[3],
        GROUP_SIZE=t.q.shape[1] // k_cache.shape[2],
        PAGE_SIZE=k_cache.shape[1],
        FORMAT=stored,
        NATIVE_E4M3=arch >= 89,
        BLOCK_M=min(config.BLOCK_M, FEWEST_ROWS),
        BLOCK_N=min(config.BLOCK_N, FEWEST_KEYS),
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
        LSE=t.lse is not None,
        K_SCALE=scale_kind(m.k_scale),
        V_SCALE=scale_kind(m.v_scale),
        LIFTS=scale_kind(m.v_scale) == "token"
        and (t.q.dtype == torch.float16 or t.q.dtype == torch.bfloat16 and stored != "float"),
        EVICT="evict_first" if read_once else "",
        DEPENDENT=config.dependent_merge and arch >= 90,
        REDO=redo,
        SPLIT=m.split_size is not None,
    )
    return alone._replace(BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N, ALONE=alone)


def padded(width: int) -> int:
    """The block for a head's width: a power of two, at least the 16 of a tensor core."""
    return max(16, 1 << (width - 1).bit_length())


def attention_arguments(t: Tensors, m: Modifiers, error_word: Tensor, spec: Spec) -> dict[str, Any]:
    """The arguments of `_prefill_kernel`; `_decode_kernel` has them too."""
    return {
        "q": _heads(PLACES.q, t.q),
        "k": _cache(PLACES.k_cache, t.k_cache, PLACES.k_scale, t.k_scale),
        "v": _cache(PLACES.v_cache, t.v_cache, PLACES.v_scale, t.v_scale),
        "out": _heads(PLACES.out, t.out),
        "lse": _placed(PLACES.lse, t.lse),
        "page_table": PLACES.page_table,
        "seq_lens": PLACES.seq_lens,
        "cu_seqlens_q": _placed(PLACES.cu_seqlens_q, t.cu_seqlens_q),
        "call": Call(error_word, *_numbers(t, m.max_q_len)),
        "rule": _rule(t, m, spec),
        "spec": spec,
    }


def _rule(t: Tensors, m: Modifiers, spec: Spec) -> Rule:
    scale_log2 = m.softmax_scale * _LOG2_E
    if isinstance(m.k_scale, (int, float)):
        scale_log2 *= m.k_scale
    if spec.SOFTCAP:
        scale_log2 *= 2 / m.softcap
    v_factor = 1.0
    if isinstance(m.v_scale, (int, float)):
        v_factor *= m.v_scale
    right = 0 if m.causal else m.window_right
    if m.causal and m.window_right >= 0:
        right = min(0, m.window_right)
    sinks, alibi = _per_head(t.sinks), _per_head(t.alibi_slopes)
    return Rule(
        scale_log2=float(scale_log2),
        softcap=float(m.softcap),
        v_factor=float(v_factor),
        window_left=min(m.window_left, _MAX_KEYS),
        window_right=min(right, _MAX_KEYS),
        split_size=min(m.split_size or 0, _MAX_KEYS),
        sinks=_placed(PLACES.sinks, t.sinks),
        stride_sinks=sinks[1],
        alibi=_placed(PLACES.alibi_slopes, t.alibi_slopes),
        stride_alibi_request=alibi[0],
        stride_alibi_head=alibi[1],
    )


def _numbers(t: Tensors, max_q_len: int | None) -> list[Varying]:
    num_tokens, (num_pages, page_size) = t.q.shape[0], t.k_cache.shape[:2]
    batch_size, max_pages = t.page_table.shape
    return varying(
        (
            batch_size,
            num_tokens,
            num_tokens if max_q_len is None else min(max_q_len, num_tokens),
            min(max_pages, _MAX_KEYS // page_size),
            t.seq_lens.stride(0),
            num_pages,
            t.page_table.stride(0),
            *((0, 0) if t.lse is None else t.lse.stride()),
        )
    )


def _placed(place: Place, x: Scale) -> Place | None:
    return place if isinstance(x, Tensor) else None


def _heads(place: Place, x: Tensor) -> Heads:
    return Heads(place, x.stride(0), x.stride(1))


def _cache(place: Place, cache: Tensor, scale_place: Place, scale: Scale) -> Cache:
    of_page, of_token, of_head, _ = cache.stride()
    return Cache(place, of_page, of_token, of_head, _placed(scale_place, scale), *_scale_strides(scale))


def _scale_strides(scale: Scale) -> tuple[int, ...]:
    """As Cache has them."""
    if not isinstance(scale, Tensor):
        return 0, 0, 0
    if scale.dim() < 3:
        of_request, of_head = _per_head(scale)
        return of_request, 0, of_head
    return scale.stride()


def _per_head(x: Tensor | None) -> tuple[int, ...]:
    """Strides of request and head of [], [num_heads] or [batch_size, num_heads]; 0 where it does not vary."""
    return (0, 0) if x is None else (0,) * (2 - x.dim()) + x.stride()
