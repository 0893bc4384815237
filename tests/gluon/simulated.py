"""A Gluon kernel of ours as an object that Plan launches: every program of its grid, one after the other, on a CPU."""

from __future__ import annotations

import importlib
import itertools
import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.machinery import SourceFileLoader
from types import CodeType, ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from gluon import words
from gluon.machine import Machine
from gluon.values import Pointer, Value
from pagewire import memo
from pagewire.kernels import counters
from pagewire.kernels.hopper import decode_launch, prefill_launch, supported

HOPPER = "pagewire.kernels.hopper"


def _compiled(edit: tuple[str, str, str], loader: SourceFileLoader, name: str) -> CodeType:
    file, before, after = edit
    path = loader.get_filename(name)
    source = loader.get_data(path).decode()
    if path.endswith(f"/hopper/{file}"):
        assert before in source, f"{file} has no {before!r}"
        source = source.replace(before, after)
    return compile(source, path, "exec", dont_inherit=True)


def imported(name: str, edit: tuple[str, str, str] | None = None) -> ModuleType:
    """A module of kernels/hopper/ and what it imports from there, anew, with the simulator's words for Triton's.

    edit: (file, text, what stands there instead), a fault to be found.
    """
    package = importlib.import_module(HOPPER)
    before = {n: m for n, m in sys.modules.items() if n.startswith(f"{HOPPER}.")}
    attributes = dict(package.__dict__)
    for module in before:
        del sys.modules[module]
    try:
        with mock.patch.dict(sys.modules, words.modules()), ExitStack() as stack:
            if edit is not None:
                stack.enter_context(mock.patch.object(SourceFileLoader, "get_code", lambda *of: _compiled(edit, *of)))
            return importlib.import_module(f"{HOPPER}.{name}")
    finally:
        for module in [n for n in sys.modules if n.startswith(f"{HOPPER}.")]:
            del sys.modules[module]
        sys.modules.update(before)
        package.__dict__.clear()
        package.__dict__.update(attributes)


class Kernel:
    """In place of a GluonJITFunction; `function`: the same source, imported with the simulator's words."""

    def __init__(self, real: Any, function: Any, seed: int = 0) -> None:
        self.arg_names, self.do_not_specialize, self.__name__ = real.arg_names, real.do_not_specialize, real.__name__
        self.function, self.seed, self.programs = function, seed, 0
        self.given: dict[str, Any] = {}  # of the last launch
        self.spec: Any = None

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(spec: Any, **given: Any) -> None:
            self.given = {name: given[name] for name in self.arg_names if name in given}  # the rest are options
            self.spec = spec
            if hasattr(given["results"], "redo"):
                given["results"].redo.fill_(-1)  # scratch memory holds anything
            if "partials" in given:
                given["partials"].out.fill_(torch.nan)
                given["partials"].lse.fill_(torch.nan)
            arguments = {name: _given(x) for name, x in self.given.items()}
            programs = list(itertools.product(*map(range, grid)))
            random.Random(self.seed).shuffle(programs)
            for ids in programs:
                self.run(ids, grid, **arguments, spec=spec)

        return launch

    def run(self, ids: tuple[int, ...], grid: tuple[int, ...], **arguments: Any) -> None:
        self.seed += 1
        self.programs += 1
        words.machine, words.program_ids, words.grid = Machine(self.seed), ids, grid
        words.unseen.clear()
        with torch.no_grad():
            self.function(**arguments)


def _given(x: Any) -> Any:
    if isinstance(x, Tensor):
        return Pointer(x)
    if isinstance(x, tuple):
        return type(x)(*map(_given, x))
    if isinstance(x, int) and not isinstance(x, bool):
        return Value(x)
    if isinstance(x, float):
        return Value(x, torch.float32)
    if hasattr(x, "block_shape"):  # a tensor descriptor
        whole = torch.as_strided(x.base, x.shape, x.strides, x.base.storage_offset())
        return SimpleNamespace(block_type=SimpleNamespace(shape=list(x.block_shape)), whole=whole, dtype=whole.dtype)
    return x


@contextmanager
def on_hopper(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, source: Any) -> Iterator[Kernel]:
    """As if on an H100: the kernel of that name in module is a Kernel of source."""
    kernel = Kernel(getattr(module, name), source)
    counters._halves.clear()  # of a call that went wrong
    unfit = supported.unfit
    monkeypatch.setenv("PAGEWIRE_HOPPER", "1")
    for launches in (prefill_launch, decode_launch):
        monkeypatch.setattr(launches, "unfit", lambda t, device: unfit(t, device._replace(arch=90)))
    monkeypatch.setattr(module, name, kernel)
    memo.forget()
    yield kernel
    memo.forget()
    counters._halves.clear()
