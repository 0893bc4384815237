"""Words shared by every layer: dtypes, scales, the modifiers of attention, the facts a backend may refuse on."""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Layout = Literal["NHD", "HND"]
LAYOUTS: tuple[Layout, ...] = ("NHD", "HND")

ScaleKind = Literal["none", "tensor", "head", "batch_head", "token_head"]
StoredScaleKind = Literal["none", "tensor", "head", "token_head"]  # of a cache and of packed rows: no request is in it
Scale = float | Tensor | None

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# largest finite stored value; int8 is symmetric
QUANT_MAX = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0, torch.int8: 127.0}
KV_DTYPES = FLOAT_DTYPES + tuple(QUANT_MAX)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def dispatches(kind: type[Tensor]) -> bool:
    """Whether this class of tensors takes torch ops into its own hands, as fake and functional tensors do."""
    return kind is not Tensor and kind.__torch_dispatch__ is not Tensor.__torch_dispatch__


def dense(name: str, x: Tensor) -> None:
    """Raises TypeError for a tensor without strides or memory of its own, as a sparse one is."""
    if x.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor (layout torch.strided), got layout {x.layout}")


def scale_kind(scale: Scale) -> ScaleKind:
    """Which of the accepted forms a scale has; its shape has been checked before."""
    if scale is None:
        return "none"
    if not isinstance(scale, Tensor):
        return "tensor"
    return ("tensor", "head", "batch_head", "token_head")[scale.dim()]


class Options(NamedTuple):
    """What the caller asks of attention besides softmax(q k^T) v: arguments of the public functions, as they came."""

    softmax_scale: Any  # None: 1 / sqrt(head_dim)
    causal: Any
    window_size: Any
    softcap: Any
    alibi_slopes: Any
    sinks: Any
    k_scale: Any
    v_scale: Any
    split_size: Any
    max_q_len: Any


class Modifiers(NamedTuple):
    """The same, checked, as every kernel takes it; field names and meaning as in the public functions."""

    softmax_scale: float
    causal: bool = False
    window_left: int = -1  # < 0: unbounded
    window_right: int = -1
    softcap: float = 0.0  # 0: off
    alibi_slopes: Tensor | None = None  # fp32 [num_qo_heads] or [batch_size, num_qo_heads]
    sinks: Tensor | None = None  # fp32 [num_qo_heads]
    k_scale: Scale = None  # float, fp32 [], [num_kv_heads], [batch_size, num_kv_heads] or
    v_scale: Scale = None  # [num_pages, page_size, num_kv_heads]
    split_size: int | None = None  # tokens; None: the backend's choice
    max_q_len: int | None = None  # None: num_tokens


Kept = dict[Any, Any]  # what a backend keeps for the next call of a kind (`memo.py`), and nobody else reads
SHORT_QUERY = 16  # rows of a request: what a kernel for short queries takes


class Problem(NamedTuple):
    """The facts a backend may refuse on. Hashable, so that a choice is made once per kind of problem."""

    op: str
    device: str  # "cpu", "cuda"
    dtype: torch.dtype  # of q, k or out
    kv_dtype: torch.dtype
    head_dim: int
    head_dim_v: int
    page_size: int = 1
    group_size: int = 1
    max_q_len: int | None = None  # a promise of at most SHORT_QUERY, or none
    device_index: int | None = None
    row_step: int = 16  # bytes that rows of the caches lie a multiple of apart: a power of two up to 16
