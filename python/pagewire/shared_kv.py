"""V kept within K (MLA): v_cache is the first columns of k_cache. One copy of the bytes, so one scale for both."""

from __future__ import annotations

import torch
from torch import Tensor

from pagewire.overlap import is_prefix, same
from pagewire.types import Scale, scale_kind


def one_scale(name: str, k_scale: Scale, v_scale: Scale, *, may_wait: bool) -> None:
    """Refuses two scales for the same bytes. Per token and head the op itself writes one value into both.

    may_wait: whether values may be fetched from a GPU to be compared; if not, there they must be the same tensor.
    """
    kinds = scale_kind(k_scale), scale_kind(v_scale)
    if "token_head" in kinds:
        if kinds[0] != kinds[1]:
            raise _differ(name, f"kind {kinds[0]!r} for K and {kinds[1]!r} for V")
        return
    if isinstance(k_scale, Tensor) and isinstance(v_scale, Tensor):
        if same(k_scale, v_scale):
            return
        if not may_wait and k_scale.device.type != "cpu":
            raise _differ(name, "two tensors (on a GPU their values are not compared)")
    if k_scale is None or v_scale is None:
        if k_scale is not v_scale:
            raise _differ(name, f"{k_scale!r} for K and {v_scale!r} for V")
        return
    k, v = (torch.as_tensor(s, dtype=torch.float32, device="cpu") for s in (k_scale, v_scale))
    if not bool((k == v).all()):
        raise _differ(name, f"{k.tolist()} for K and {v.tolist()} for V")


def _differ(name: str, got: str) -> ValueError:
    return ValueError(f"{name}: expected one scale for both (v_cache is a view of k_cache), got {got}")


def second_scale(k_scale: Scale, v_scale: Scale) -> Scale:
    """What is to be written or read beside k_scale: itself, unless V's scales per token are tensors of their own."""
    if isinstance(k_scale, Tensor) and isinstance(v_scale, Tensor) and k_scale.dim() == 3:
        return k_scale if same(k_scale, v_scale) else v_scale
    return k_scale


def same_rows(k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Refuses values that are not the first columns of the keys, where that can be seen without waiting for a GPU."""
    if is_prefix(v, k) or k.device.type != "cpu":
        return
    n = slots.shape[0]
    kept = slots >= 0
    bits = {2: torch.int16, 4: torch.int32}[k.element_size()]
    columns = k[:n, :, : v.shape[-1]]
    differs = (columns.view(bits) != v[:n].view(bits)).any(-1).any(-1) & kept
    if bool(differs.any()):
        raise ValueError(
            f"v: expected k[..., :{v.shape[-1]}] (v_cache is a view of k_cache), got other values in token "
            f"{int(differs.nonzero()[0])}"
        )


def same_token_scales(k_scale: Tensor, v_scale: Tensor, slots: Tensor, layer: int) -> None:
    """As `same_rows`, of the scales [num_pages, page_size, num_heads] of the tokens that are packed."""
    if k_scale.device.type != "cpu" or same(k_scale, v_scale):
        return
    num_slots = k_scale.shape[0] * k_scale.shape[1]
    fits = (slots >= 0) & (slots < num_slots)  # others are refused where they are used
    if num_slots == 0:
        return
    at = slots.clamp(0, num_slots - 1)
    page, offset = at // k_scale.shape[1], at % k_scale.shape[1]
    differs = (k_scale[page, offset] != v_scale[page, offset]).any(-1) & fits
    if bool(differs.any()):
        token = int(differs.nonzero()[0])
        raise _differ(f"v_scales[{layer}]", f"others for K and V in slots[{token}] = {int(slots[token])}")
