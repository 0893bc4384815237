"""The CUDA extension as nvcc builds it, without a GPU, and what cuobjdump reads out of it."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from machine_code import sass
from pagewire import emulation

sys.path.insert(0, str(emulation.CSRC))
import build_cuda  # noqa: E402

ARCHITECTURES = ("sm_80", "sm_90a")


class Missing(RuntimeError):
    """What is not on this machine: nvcc, or cuobjdump."""


@contextlib.contextmanager
def wanted() -> Iterator[None]:
    """The Makefile leaves CUDA out of its own build, not out of this."""
    with mock.patch.dict(os.environ):
        os.environ.pop("PAGEWIRE_CUDA", None)
        yield


def nvcc() -> str:
    with wanted():
        try:
            return str(build_cuda.find_nvcc())
        except build_cuda.CannotBuild as error:
            raise Missing(str(error)) from error


@functools.cache
def extension() -> Path:
    """Builds what has changed since the last time; the whole takes minutes.

    Raises:
        Missing: there is no nvcc.
    """
    import pybind11

    folder = emulation.cache_dir().parent / "nvcc"
    target = folder / "pagewire" / "_cuda.so"
    includes = [pybind11.get_include(), sysconfig.get_paths()["include"]]
    nvcc()
    with wanted():
        build_cuda.build(folder / "objects", includes, target)
    return target


def release() -> str:
    """nvcc's, `13.0`: other releases make other code."""
    return ".".join(map(str, build_cuda.nvcc_release(nvcc())))


@functools.cache
def cuobjdump() -> str:
    found = shutil.which("cuobjdump")
    if found is None:  # Triton brings its own
        try:
            import triton
        except ImportError as error:
            raise Missing("no cuobjdump on PATH, and no triton") from error
        found = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    if not Path(found).exists():
        raise Missing("no cuobjdump on PATH or in triton")
    return found


def dump(*arguments: str) -> str:
    tools = os.pathsep.join([os.path.dirname(cuobjdump()), os.environ["PATH"]])  # finds nvdisasm
    done = subprocess.run(
        [cuobjdump(), *arguments, str(extension())],
        capture_output=True, text=True, check=True, env={**os.environ, "PATH": tools},
    )  # fmt: skip
    return done.stdout


@functools.cache
def resources() -> dict[tuple[str, str], dict[str, int]]:
    """(architecture, mangled kernel) -> REG, STACK, LOCAL, SHARED..."""
    found, arch, name = {}, "", ""
    for line in dump("--dump-resource-usage").splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            arch = match[1]
        if match := re.search(r"Function (\S+):", line):
            name = match[1]
        if "REG:" in line:
            found[arch, name] = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)}
    return found


@functools.cache
def code(arch: str) -> dict[str, str]:
    """Mangled kernel -> its part of the dump, as sass.parse reads it."""
    return sass.functions(dump("--dump-sass", "-arch", arch))


def demangled(names: list[str]) -> list[tuple[str, str]]:
    """(mangled, readable) of each."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return list(zip(names, done.stdout.splitlines(), strict=True))
