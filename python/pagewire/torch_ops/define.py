"""How an op is made known to torch, and when a call goes through one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pagewire.types import Scale, dispatches

_LIBRARY = torch.library.Library("pagewire", "DEF")


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """`schema`: name, arguments with true mutation marks, results. `define/impl`, because a mutating `custom_op` costs
    20 times more a call.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pagewire::{name}", fake, lib=_LIBRARY)


def define_with_results(
    name: str, arguments: str, run: Callable[..., Any], fake: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    """Two ops: one that makes out and lse, and `name.out` that is given them. `run` takes both as keywords."""

    def into(*args: Any, out: Tensor, lse: Tensor) -> None:
        run(*args, out=out, lse=lse)

    define(f"{name}({arguments}) -> (Tensor, Tensor)", run, fake)
    define(f"{name}.out({arguments}, *, Tensor(a!) out, Tensor(b!) lse) -> ()", into, nothing)


def call_with_results(
    op: Any, args: tuple[Any, ...], out: Tensor | None, lse: Tensor | None, new: Callable[[], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """The functional form, or the out-variant when either result was given."""
    if out is None and lse is None:
        return op.default(*args)  # type: ignore[no-any-return]
    if out is None or lse is None:
        made_out, made_lse = new()
        out, lse = (made_out if out is None else out), (made_lse if lse is None else lse)
    op.out(*args, out=out, lse=lse)
    return out, lse


def nothing(*args: Any, **keywords: Any) -> None:
    """The fake of an op that only writes."""
    return None


def traced(x: Any) -> bool:
    """The call is being compiled, or `x` is a tensor that takes torch ops into its own hands, as fake ones do."""
    if torch.compiler.is_compiling():
        return True
    return type(x) is not Tensor and isinstance(x, Tensor) and dispatches(type(x))


# a scale is two arguments of a schema: `Tensor? k_scale, float? k_scale_value`


def split_scale(scale: Scale) -> tuple[Tensor | None, float | None]:
    return (scale, None) if isinstance(scale, Tensor) else (None, scale)


def join_scale(tensor: Tensor | None, value: float | None) -> Scale:
    return tensor if tensor is not None else value
