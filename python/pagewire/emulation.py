"""The CUDA backend on a CPU: the same .cu sources, built by g++ on demand, for tests and debugging only.

`PAGEWIRE_EMULATE_CUDA=1` lets `backend="cuda"` take CPU tensors; `PAGEWIRE_EMULATE_CUDA=asan` builds with
AddressSanitizer and UBSan (the process must then run with libasan preloaded). What is and is not shown:
csrc/emulation/block.h.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

_ROOT = Path(__file__).resolve().parents[2]
CSRC = _ROOT / "csrc"


def mode() -> str | None:
    """None, "plain" or "asan", from PAGEWIRE_EMULATE_CUDA."""
    value = os.environ.get("PAGEWIRE_EMULATE_CUDA", "0").lower()
    return {"0": None, "": None, "off": None, "false": None, "asan": "asan"}.get(value, "plain")


def unavailable() -> str | None:
    """Why the emulation cannot be built here, or None."""
    if not (CSRC / "emulation").is_dir():
        return f"PAGEWIRE_EMULATE_CUDA needs the sources: {CSRC / 'emulation'} does not exist"
    if shutil.which(_compiler()) is None:
        return f"PAGEWIRE_EMULATE_CUDA needs a C++ compiler: {_compiler()!r} is not on PATH (set CXX)"
    if importlib.util.find_spec("pybind11") is None:
        return "PAGEWIRE_EMULATE_CUDA needs pybind11 (pip install pybind11)"
    return None


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def sources() -> list[Path]:
    return [
        *sorted((CSRC / "cuda").rglob("*.cu")),
        *sorted((CSRC / "emulation").glob("*.cpp")),
        CSRC / "bindings" / "cuda.cpp",
    ]


def flags(kind: str) -> list[str]:
    common = ["-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden", "-DPAGEWIRE_EMULATE", f"-I{CSRC}"]
    if kind == "asan":
        # a null base plus an offset is how an absent tensor looks; it is never read
        return [*common, "-O1", "-fsanitize=address,undefined", "-fno-sanitize=pointer-overflow,vptr",
                "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]  # fmt: skip
    return [*common, "-O2"]


def compile_objects(files: list[Path], kind: str, extra: list[str], folder: Path) -> list[Path]:
    """Object files of `files`, each built unless `folder` holds one of the same sources and flags."""
    folder.mkdir(parents=True, exist_ok=True)
    headers = hashlib.sha256()
    for header in sorted(CSRC.rglob("*.h")):
        headers.update(header.read_bytes())

    def build(source: Path) -> Path:
        command = [_compiler(), *flags(kind), *extra, "-x", "c++", "-c", str(source)]
        digest = hashlib.sha256(headers.digest() + source.read_bytes() + shlex.join(command).encode())
        target = folder / f"{source.stem}-{digest.hexdigest()[:16]}.o"
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}.tmp")
            _run([*command, "-o", str(partial)])
            partial.replace(target)
        return target

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return list(pool.map(build, files))


def link(objects: list[Path], kind: str, target: Path, *, shared: bool) -> None:
    partial = target.with_suffix(f".{os.getpid()}.tmp")
    sanitizers = ["-fsanitize=address,undefined"] if kind == "asan" else []
    _run(
        [
            _compiler(), *(["-shared"] if shared else []), *sanitizers, *map(str, objects),
            "-o", str(partial), "-lpthread",
        ]
    )  # fmt: skip
    partial.replace(target)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"building the CUDA emulation failed: {shlex.join(command)}\n{done.stderr[-4000:]}")


def cache_dir() -> Path:
    base = os.environ.get("PAGEWIRE_CACHE_DIR") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "pagewire"
    )
    return Path(base) / "emulation"


def build(kind: str) -> Path:
    """The extension's file, built where needed (about a minute; objects and result stay in the cache)."""
    import fcntl

    import pybind11

    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    folder = cache_dir() / kind
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # one process builds, the others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        objects = compile_objects(sources(), kind, includes, folder)
        digest = hashlib.sha256("".join(o.name for o in objects).encode()).hexdigest()[:16]
        target = folder / f"_cuda_emulated-{digest}{sysconfig.get_config_var('EXT_SUFFIX')}"
        if not target.exists():
            link(objects, kind, target, shared=True)
    return target


@functools.cache
def load(kind: str) -> ModuleType:
    """The extension module, built first where needed."""
    spec = importlib.util.spec_from_file_location("_cuda_emulated", build(kind))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
