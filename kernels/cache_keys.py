"""Triton's cache keys made independent of which kernel a process happens to launch first."""

import sys

from triton.runtime.jit import JITFunction


def settle(package: str = "pagewire.kernels") -> None:
    """Computes the keys of all functions in the loaded modules of a package, callees before their callers.

    Triton 3.6 merges the globals that a callee uses into its caller's key as far as they are known by then: hashed on
    demand, a kernel has another key in every order of first launches, and what one process has compiled the next one
    compiles again. The interpreter's functions have no key.
    """
    seen: set[int] = set()
    for name in sorted(sys.modules):
        if name.startswith(f"{package}."):
            for function in list(vars(sys.modules[name]).values()):
                _visit(function, seen)


def _visit(function: object, seen: set[int]) -> None:
    if not isinstance(function, JITFunction) or id(function) in seen:
        return
    seen.add(id(function))
    for name in function.fn.__code__.co_names:  # globals, and attributes that are none
        _visit(function.__globals__.get(name), seen)
    function.cache_key  # noqa: B018  # computed on access
