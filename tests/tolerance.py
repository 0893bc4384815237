"""The tolerance rule: error against fp64 at most twice that of naive same-dtype PyTorch, plus 1e-5."""

from __future__ import annotations

import torch
from torch import Tensor

from cases import Call
from pagewire.backends import reference
from pagewire.cache import nhd
from pagewire.types import Modifiers


def evaluate(call: Call, compute_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The definition computed in `compute_dtype`, results in fp64."""
    kw = dict(call.kwargs)
    q, k_cache, v_cache, *rest = call.args
    layout = kw.pop("layout")
    left, right = kw.pop("window_size")
    scale = kw.pop("softmax_scale", q.shape[-1] ** -0.5)
    m = Modifiers(scale, window_left=left, window_right=right, **kw)
    out = torch.empty((*q.shape[:-1], v_cache.shape[-1]), dtype=torch.float64, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=torch.float64, device=q.device)
    op = getattr(reference, call.op)
    op(q, nhd(k_cache, layout), nhd(v_cache, layout), *rest, m, out, lse, compute_dtype=compute_dtype)
    return out, lse


def check(call: Call, out: Tensor, lse: Tensor) -> None:
    """Assert `out` and `lse` against the rule; a failure names the worst coordinate, its values and the case."""
    exact_out, exact_lse = evaluate(call, torch.float64)
    naive_out, naive_lse = evaluate(call, call.args[0].dtype)
    # a result in q's dtype is rounded once more than the fp64 evaluation of the naive version
    naive_out = naive_out.to(out.dtype).double()
    for name, got, exact, naive in (("out", out, exact_out, naive_out), ("lse", lse, exact_lse, naive_lse)):
        close(name, got.double(), exact, 2 * max_error(naive, exact) + 1e-5, call.case.id)


def max_error(got: Tensor, exact: Tensor) -> float:
    finite = exact.isfinite()
    return float((got - exact)[finite].abs().max()) if bool(finite.any()) else 0.0


def close(name: str, got: Tensor, exact: Tensor, limit: float, where: str) -> None:
    same = (got == exact) | ((got - exact).abs() <= limit)  # the first term: infinities agree exactly
    if bool(same.all()):
        return
    error = torch.where(same, 0.0, (got - exact).abs().nan_to_num(nan=torch.inf))
    at = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    raise AssertionError(
        f"{name}{list(at)} = {float(got[at])}, expected {float(exact[at])} within {limit:.3g}; "
        f"{int((~same).sum())} of {same.numel()} wrong; case {where}"
    )
