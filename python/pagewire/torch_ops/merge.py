"""torch.ops.pagewire.merge_state and .merge_states."""

from __future__ import annotations

import torch
from torch import Tensor

from pagewire import eager
from pagewire.torch_ops.define import call_with_results, define_with_results


def merge_state(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor | None, lse: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    args = (out_a, lse_a, out_b, lse_b, backend)
    return call_with_results(torch.ops.pagewire.merge_state, args, out, lse, lambda: _fake_state(*args))


def _run_state(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, backend: str | None,
    out: Tensor | None = None, lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return eager.merge_state(out_a, lse_a, out_b, lse_b, out, lse, backend)


def _fake_state(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, backend: str | None
) -> tuple[Tensor, Tensor]:
    return out_a.new_empty(out_a.shape), out_a.new_empty(out_a.shape[:-1], dtype=torch.float32)


define_with_results(
    "merge_state", "Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, str? backend", _run_state, _fake_state
)


def merge_states(
    outs: Tensor, lses: Tensor, out: Tensor | None, lse: Tensor | None, backend: str | None
) -> tuple[Tensor, Tensor]:
    args = (outs, lses, backend)
    return call_with_results(torch.ops.pagewire.merge_states, args, out, lse, lambda: _fake_states(*args))


def _run_states(
    outs: Tensor, lses: Tensor, backend: str | None, out: Tensor | None = None, lse: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return eager.merge_states(outs, lses, out, lse, backend)


def _fake_states(outs: Tensor, lses: Tensor, backend: str | None) -> tuple[Tensor, Tensor]:
    return outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])


define_with_results("merge_states", "Tensor outs, Tensor lses, str? backend", _run_states, _fake_states)
