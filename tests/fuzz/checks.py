"""check(problem, backend): what a failure tells you to paste."""

from __future__ import annotations

import traceback

import torch

import pagewire as pw
from fuzz import append, attention, merge, pack
from fuzz.problems import Append, Attention, Merge, Pack, Problem

_CHECKS = {Attention: attention.check, Append: append.check, Merge: merge.check, Pack: pack.check}


def check(problem: Problem, backend: str, device: torch.device | str = "cpu") -> None:
    """Runs one problem.

    Raises:
        AssertionError: naming the problem and the first wrong element, or what else was raised and where.
        BackendError: the backend refuses it.
    """
    try:
        _CHECKS[type(problem)](problem, backend, device)  # type: ignore[operator]
    except pw.BackendError:
        raise
    except Exception as error:
        said = str(error)
        if not isinstance(error, AssertionError):
            frame = traceback.extract_tb(error.__traceback__)[-1]
            said = f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"
        raise AssertionError(f"{said}\n    check({problem!r}, backend={backend!r})") from error
