"""Which backend takes a call: an explicit name is obeyed or refused with its reason, else the first that fits."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from pagewire import emulation
from pagewire.environment import lookup
from pagewire.errors import BackendError
from pagewire.moves import Movement
from pagewire.types import FLOAT_DTYPES, KV_DTYPES, SHORT_QUERY, Kept, Modifiers, Problem, dtype_name

OPS = ("append_kv", "decode", "prefill", "merge_state", "merge_states", "pack_kv", "unpack_kv")


class Implementation(Protocol):
    """What a module of backends/ has. Arguments have been checked; page ids, slots and lengths have not, and a backend
    checks or masks every one. Caches are NHD views, `[num_pages, page_size, num_kv_heads, width]` with free strides but
    a contiguous last dim. Results go into the tensors given for them. `kept` is the same dict for all calls of a kind:
    of the same shapes, strides, dtypes, devices and numbers, which tensors are None included; but not addresses. Of a
    cache's pack_kv and unpack_kv it is the same for the same layers and heads.
    """

    def decode(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, seq_lens: Tensor,
        modifiers: Modifiers, out: Tensor, lse: Tensor | None, kept: Kept, /,
    ) -> None: ...  # fmt: skip

    def prefill(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor,
        modifiers: Modifiers, out: Tensor, lse: Tensor | None, kept: Kept, /,
    ) -> None: ...  # fmt: skip

    def merge_state(
        self, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor, kept: Kept, /
    ) -> None: ...

    def merge_states(self, outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor, kept: Kept, /) -> None:
        """Of one state or more."""

    def move(self, movement: Movement, kept: Kept, /) -> None:
        """append_kv, pack_kv or unpack_kv of one token or more."""


METHODS = ("decode", "prefill", "merge_state", "merge_states", "move")


@dataclass(frozen=True)
class Backend:
    """One module of backends/, imported on first use, and what it refuses."""

    name: str
    unavailable: Callable[[str], str | None]  # device type -> why it cannot run there on this machine, or None
    max_head_dim: int | None = None
    special: Callable[[Problem], str | None] = lambda problem: None
    has_kernels_of: bool = False  # its module says which of its kernels take a problem

    def refuses(self, problem: Problem) -> str | None:
        """None = takes it; else one line a user can act on."""
        reason = self.unavailable(problem.device) or _other_dtype(problem)
        if reason is not None:
            return reason
        widest = max(problem.head_dim, problem.head_dim_v)
        if self.max_head_dim is not None and widest > self.max_head_dim:
            return f"head_dim = {widest} is above {self.max_head_dim}"
        return self.special(problem)

    def kernels_of(self, problem: Problem) -> str:
        """Of a problem that it takes; as the end of a sentence."""
        return str(cast(Any, self.load()).kernels_of(problem)) if self.has_kernels_of else ""

    def load(self) -> Implementation:
        return _load(self.name)


def _other_dtype(problem: Problem) -> str | None:
    """Only `explain` can ask for one: the public functions have checked theirs."""
    for name, dtype in (("dtype", problem.dtype), ("kv_dtype", problem.kv_dtype)):
        if dtype not in KV_DTYPES:
            return f"{name} = {dtype_name(dtype)} is not one of {', '.join(sorted(map(dtype_name, KV_DTYPES)))}"
    return None


@functools.cache
def _load(name: str) -> Implementation:
    return cast(Implementation, importlib.import_module(f"pagewire.backends.{name}"))


def interpreting() -> bool:
    """TRITON_INTERPRET is read by Triton when it is imported; we read the same variable."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


@functools.cache
def _triton_missing() -> str | None:
    if "triton" in sys.modules or importlib.util.find_spec("triton") is not None:
        return None
    return "triton is not installed (pip install 'triton>=3.5')"


def _triton_unavailable(device: str) -> str | None:
    missing = _triton_missing()
    if missing is not None:
        return missing
    if device == "cpu" and not interpreting():
        return "runs on CPU tensors only under TRITON_INTERPRET=1"
    if device not in ("cpu", "cuda"):
        return f"device {device!r} is not one of 'cpu', 'cuda'"
    return None


@functools.cache
def _cpu_missing() -> str | None:
    """Looked up without importing the extension."""
    if importlib.util.find_spec("pagewire._cpu") is not None:
        return None
    note = Path(__file__).with_name("_cpu_missing.txt")  # left by setup.py
    reason = note.read_text().strip() if note.exists() else "python setup.py build_ext --inplace"
    return f"pagewire._cpu is not built ({reason})"


def _cpu_unavailable(device: str) -> str | None:
    return _cpu_missing() if device == "cpu" else f"runs on CPU tensors only, not on {device!r}"


def _cuda_unavailable(device: str) -> str | None:
    if device == "cpu":
        if emulation.mode() is None:
            return "runs on CPU tensors only under PAGEWIRE_EMULATE_CUDA=1 (tests and debugging)"
        return emulation.unavailable()
    if device != "cuda":
        return f"device {device!r} is not one of 'cpu', 'cuda'"
    if importlib.util.find_spec("pagewire._cuda") is None:
        note = Path(__file__).with_name("_cuda_missing.txt")  # left by setup.py
        reason = note.read_text().strip() if note.exists() else "nvcc was not there at build time"
        return f"pagewire._cuda is not built ({reason})"
    too_old = _too_old(*cuda_versions())
    if too_old is not None:
        return too_old
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


@functools.cache
def cuda_versions() -> tuple[int, int]:
    """(what the driver supports, the runtime linked into the extension), 1000 * major + 10 * minor; no driver: 0."""
    extension = importlib.import_module("pagewire._cuda")
    return extension.driver_version(), extension.runtime_version()


def show_cuda(version: int) -> str:
    return f"CUDA {version // 1000}.{version % 1000 // 10}"


def _too_old(driver: int, runtime: int) -> str | None:
    """A driver runs every runtime of its own major version and nothing newer; arguments above 4 KiB came with 12.1."""
    if driver == 0 or (driver // 1000 >= runtime // 1000 and driver >= 12010):
        return None
    least = max(runtime // 1000 * 1000, 12010)
    return (
        f"pagewire._cuda was built with {show_cuda(runtime)}, this machine's driver supports {show_cuda(driver)}: "
        f"expected a driver of {show_cuda(least)} or newer (or build pagewire with an older nvcc)"
    )


def _before_sm_80(problem: Problem) -> str | None:
    """No asynchronous copies, and too little shared memory for the tiles."""
    if problem.device != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(problem.device_index)
    return f"needs sm_80 or newer, this device is sm_{major}{minor}" if major < 8 else None


def _cuda_special(problem: Problem) -> str | None:
    if problem.device == "cuda":
        old = _before_sm_80(problem)
        if old is not None:
            return old
        major, minor = torch.cuda.get_device_capability(problem.device_index)
        driver, runtime = cuda_versions()
        if major > 9 and driver < runtime:  # the driver compiles the extension's PTX there
            return (
                f"this device is sm_{major}{minor}, for which the driver compiles PTX of {show_cuda(runtime)}; "
                f"it supports {show_cuda(driver)}"
            )
    if problem.op not in ("decode", "prefill"):
        return None
    if problem.dtype == torch.float32:
        return "queries are fp16 or bf16, not float32: they meet K and V on the tensor core"
    widest = max(problem.head_dim, problem.head_dim_v)
    if widest > 256:
        return f"head_dim = {widest} is above 256"
    if problem.row_step < 16:
        return (
            f"rows of the caches lie {problem.row_step} bytes or a multiple apart; it copies 16 bytes at a time: "
            "expected strides of page, token and head that are multiples of 16 bytes (triton takes any)"
        )
    if problem.op == "prefill" and problem.max_q_len is None:
        return f"prefill is for short queries: it needs the caller's promise max_q_len <= {SHORT_QUERY}"
    return None


# in order of preference; adding one is an entry here and a file in backends/. triton before cuda: it was the faster in
# every case on an H200 (benches/results/h200-2026-11-26)
BACKENDS: tuple[Backend, ...] = (
    Backend("triton", _triton_unavailable, max_head_dim=256, special=_before_sm_80, has_kernels_of=True),
    Backend("cuda", _cuda_unavailable, special=_cuda_special),
    Backend("cpu", _cpu_unavailable, max_head_dim=1024),
    Backend("reference", lambda device: None),
)
_BY_NAME = {b.name: b for b in BACKENDS}
_warned: set[tuple[str, str]] = set()


def choose(problem: Problem, backend: str | None) -> Implementation:
    """The module that runs `problem`.

    Raises:
        BackendError: `backend` (or PAGEWIRE_BACKEND) refuses it or does not exist, or nothing takes it.
    """
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"backend: expected one of {', '.join(_BY_NAME)} or None, got {backend!r}")
    if problem.device == "meta":
        return _load("meta")
    environment = None if backend is not None else lookup("PAGEWIRE_BACKEND") or None
    # what a choice by name depends on besides: triton and cuda run on a CPU only if a variable says so
    variables: tuple[object, ...] = ()
    if problem.device == "cpu" and (backend or environment) in ("triton", "cuda"):
        variables = (interpreting(), emulation.mode())
    return _choose(problem, backend, environment, variables)


@functools.cache
def _choose(
    problem: Problem,
    argument: str | None,
    environment: str | None,
    variables: tuple[object, ...],  # a part of the key only
) -> Implementation:
    taken = _select(problem, argument, environment)
    if taken.name == "reference" and argument is None and environment is None:
        _warn_slow(problem)
    return taken.load()


def _select(problem: Problem, argument: str | None, environment: str | None) -> Backend:
    name, source = (argument, "backend=") if argument is not None else (environment, "PAGEWIRE_BACKEND=")
    if name is not None:
        if name not in _BY_NAME:
            raise BackendError(f"{source}{name!r}: expected one of {', '.join(_BY_NAME)}")
        reason = _BY_NAME[name].refuses(problem)
        if reason is not None:
            raise BackendError(f"{source}{name!r} refuses this {problem.op}: {reason}")
        return _BY_NAME[name]
    for candidate in BACKENDS:
        if candidate.name in ("cuda", "triton") and problem.device == "cpu":
            continue  # emulated or interpreted: for tests and debugging, by name only
        if candidate.refuses(problem) is None:
            return candidate
    raise BackendError(f"no backend takes this {problem.op}:\n" + _table(problem))


def _warn_slow(problem: Problem) -> None:
    """A silent slow path is a bug report waiting to be written. Once per op and device."""
    if (problem.op, problem.device) not in _warned:
        _warned.add((problem.op, problem.device))
        warnings.warn(
            f"pagewire.{problem.op} runs on the reference backend (plain PyTorch, slow) on {problem.device}; "
            "pagewire.explain() says why, backend='reference' asks for it explicitly",
            stacklevel=5,
        )


def _table(problem: Problem) -> str:
    width = max(len(b.name) for b in BACKENDS)
    return "\n".join(f"  {b.name:<{width}}  {b.refuses(problem) or 'takes it'}" for b in BACKENDS)


def backends(device: str | None = None) -> dict[str, str | None]:
    """Every backend, in order of preference, with None if it can run here or the reason why not.

    Args:
        device: "cpu" or "cuda"; default: cuda if this machine has one.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return {b.name: b.unavailable(device) for b in BACKENDS}


def explain(
    op: str,
    *,
    device: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    kv_dtype: torch.dtype | None = None,
    head_dim: int = 128,
    head_dim_v: int | None = None,
    page_size: int = 16,
    group_size: int = 1,
    max_q_len: int | None = None,
) -> str:
    """Why each backend would or would not take a problem, one line each, the one taken marked with `->`.

    On Hopper Triton's line also says whether its kernels for Hopper would take it, and why not.

    >>> print(explain("decode", device="cpu", dtype=torch.int8))  # doctest: +SKIP
    """
    if op not in OPS:
        raise ValueError(f"op: expected one of {', '.join(OPS)}, got {op!r}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if op in ("decode", "prefill") and dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype: expected float16, bfloat16 or float32, got {dtype_name(dtype)}")
    problem = Problem(
        op, device, dtype, kv_dtype or dtype, head_dim, head_dim_v or head_dim, page_size, group_size, max_q_len,
        torch.cuda.current_device() if device == "cuda" and torch.cuda.is_available() else None,
    )  # fmt: skip
    try:
        taken = _select(problem, None, os.environ.get("PAGEWIRE_BACKEND") or None).name
    except BackendError:
        taken = ""
    lines = [f"{op} on {device}, {dtype_name(dtype)} q, {dtype_name(problem.kv_dtype)} kv, head_dim {head_dim}:"]
    width = max(len(b.name) for b in BACKENDS)
    for b in BACKENDS:
        mark = "->" if b.name == taken else "  "
        lines.append(f"{mark} {b.name:<{width}}  {b.refuses(problem) or 'takes it' + b.kernels_of(problem)}")
    return "\n".join(lines)
