"""torch.ops.pagewire.append_kv."""

from __future__ import annotations

import torch
from torch import Tensor

from pagewire import eager
from pagewire.torch_ops.define import define, join_scale, nothing, split_scale
from pagewire.types import Layout, Scale


def append_kv(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, layout: Layout,
    k_scale: Scale, v_scale: Scale, backend: str | None,
) -> None:  # fmt: skip
    scales = *split_scale(k_scale), *split_scale(v_scale)
    torch.ops.pagewire.append_kv(k, v, k_cache, v_cache, slot_mapping, layout, *scales, backend)


def _run(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, layout: Layout,
    k_scale: Tensor | None, k_value: float | None, v_scale: Tensor | None, v_value: float | None, backend: str | None,
) -> None:  # fmt: skip
    scales = join_scale(k_scale, k_value), join_scale(v_scale, v_value)
    eager.append_kv(k, v, k_cache, v_cache, slot_mapping, layout, *scales, backend)


define(
    "append_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, str layout, "
    # written per token and head; other scales are read, but a schema cannot tell the two apart
    "Tensor(c!)? k_scale, float? k_scale_value, Tensor(d!)? v_scale, float? v_scale_value, str? backend) -> ()",
    _run,
    nothing,
)
