"""Builds pagewire._cuda with nvcc and ninja; used by setup.py and by the tests that read the machine code."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

CSRC = Path(__file__).resolve().parent
SOURCES = [*sorted((CSRC / "cuda").glob("*.cu")), CSRC / "bindings" / "cuda.cpp"]
OLDEST = (12, 4)

# sm_80 code runs on every 8.x, sm_90a on Hopper, the PTX of sm_90 on what comes after
TARGETS = (
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_90,code=compute_90",
)
# without NDEBUG or fast-math: division and square root stay IEEE, which quantising relies on
FLAGS = (
    "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden,-O2",
    "-Xptxas=-v", "--compiler-bindir={cxx}", *TARGETS,
)  # fmt: skip


class CannotBuild(RuntimeError):
    """Why there is no CUDA extension, in one line."""


def find_nvcc() -> str:
    """The nvcc that NVCC, PATH or CUDA_HOME names.

    Raises:
        CannotBuild: there is none, or it is older than CUDA 12.4.
    """
    if os.environ.get("PAGEWIRE_CUDA") == "0":
        raise CannotBuild("PAGEWIRE_CUDA=0 at build time")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = (
        os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    )
    if nvcc is None:
        raise CannotBuild("no nvcc on PATH or in CUDA_HOME at build time")
    words = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", words)
    if found is None:
        raise CannotBuild(f"{nvcc} --version does not name a release")
    if (int(found[1]), int(found[2])) < OLDEST:
        raise CannotBuild(f"CUDA {found[1]}.{found[2]} is older than {OLDEST[0]}.{OLDEST[1]}")
    return nvcc


def write_ninja(nvcc: str, folder: Path, includes: list[str], target: Path) -> Path:
    """build.ninja in `folder`: objects there, the extension at `target`."""
    flags = " ".join(FLAGS).format(cxx=os.environ.get("CXX", "g++"))
    include = " ".join(f"-I{path}" for path in (CSRC, *includes))
    lines = [
        "rule compile",
        f"  command = {nvcc} {flags} {include} -MD -MF $out.d -c $in -o $out > $out.log 2>&1 || "
        "(cat $out.log && false)",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = nvcc $in",
        "rule link",
        f"  command = {nvcc} -shared --cudart=static --compiler-bindir={os.environ.get('CXX', 'g++')} "
        "-Xlinker=--exclude-libs,ALL -o $out $in",
        "  description = link $out",
    ]
    objects = []
    for source in SOURCES:
        objects.append(folder / f"{source.stem}{source.suffix}.o")
        lines.append(f"build {objects[-1]}: compile {source}")
    lines.append(f"build {target}: link {' '.join(map(str, objects))}")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "build.ninja"
    path.write_text("\n".join(lines) + "\n")
    return path


def ninja() -> str:
    found = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
    if found is None:
        raise CannotBuild("no ninja at build time (pip install ninja)")
    return found


def build(folder: Path, includes: list[str], target: Path) -> None:
    """Compiles what has changed and links `target`.

    Raises:
        CannotBuild: nvcc or ninja is missing, or a source does not compile (nvcc's words are printed).
    """
    recipe = write_ninja(find_nvcc(), folder.resolve(), includes, target.resolve())
    jobs = os.environ.get("PAGEWIRE_BUILD_JOBS") or str(os.cpu_count() or 1)
    target.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([ninja(), "-f", str(recipe), "-j", jobs])
    if done.returncode:
        raise CannotBuild(f"nvcc failed ({done.returncode})")
