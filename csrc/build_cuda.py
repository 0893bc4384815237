"""Builds pagewire._cuda with nvcc and ninja; used by setup.py, by the campaign and by the tests that read machine code.

python csrc/build_cuda.py --arch 90a --save DIR     compiles the kernels' objects, for a machine with less time
python csrc/build_cuda.py --arch native --objects DIR     the extension in this source tree, from them if they fit
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

CSRC = Path(__file__).resolve().parent
KERNELS = sorted((CSRC / "cuda").rglob("*.cu"))
BINDINGS = CSRC / "bindings" / "cuda.cpp"
SOURCES = [*KERNELS, BINDINGS]
OLDEST = (12, 4)
MANIFEST = "objects.json"  # of a folder of compiled kernels: what they were compiled from

# sm_80 code runs on every 8.x, sm_90a on Hopper, the PTX of sm_90 on what comes after
EVERYWHERE = ("80", "90a", "90+PTX")
# without NDEBUG or fast-math: division and square root stay IEEE, which quantising relies on
FLAGS = ("-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden,-O2", "-Xptxas=-v")


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
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if nvcc is None:
        raise CannotBuild("no nvcc on PATH or in CUDA_HOME at build time")
    if nvcc_release(nvcc) < OLDEST:
        found = ".".join(map(str, nvcc_release(nvcc)))
        raise CannotBuild(f"CUDA {found} is older than {OLDEST[0]}.{OLDEST[1]}")
    return nvcc


def nvcc_release(nvcc: str) -> tuple[int, int]:
    words = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", words)
    if found is None:
        raise CannotBuild(f"{nvcc} --version does not name a release")
    return int(found[1]), int(found[2])


def architectures() -> tuple[str, ...]:
    """PAGEWIRE_CUDA_ARCH: what to compile for, e.g. `80,90a,90+PTX`, `native` for this machine's GPUs; unset: all."""
    named = os.environ.get("PAGEWIRE_CUDA_ARCH") or ",".join(EVERYWHERE)
    return native() if named == "native" else tuple(named.split(","))


def native() -> tuple[str, ...]:
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise CannotBuild(f"architecture native: nvidia-smi names no GPU ({error})") from error
    numbers = sorted({capability.replace(".", "") for capability in found})
    return tuple("90a" if number == "90" else number for number in numbers)


def gencode(architecture: str) -> str:
    """nvcc's flag for `90a` (machine code) or `90+PTX` (what a driver compiles for a newer device)."""
    found = re.fullmatch(r"(\d{2,3}[af]?)(\+PTX)?", architecture)
    if found is None:
        raise CannotBuild(f"PAGEWIRE_CUDA_ARCH: expected 80, 90a or 90+PTX, got {architecture!r}")
    kind = "compute" if found[2] else "sm"
    return f"-gencode=arch=compute_{found[1]},code={kind}_{found[1]}"


def flags() -> tuple[str, ...]:
    return (*FLAGS, *map(gencode, architectures()))


def manifest(nvcc: str) -> dict[str, str]:
    """What the kernels' objects depend on: objects of another manifest are not linked."""
    digest = hashlib.sha256()
    headers = [path for name in ("cuda", "pagewire") for path in sorted((CSRC / name).rglob("*.h"))]
    for path in (*headers, *KERNELS):
        digest.update(f"{path.relative_to(CSRC)}\n".encode() + path.read_bytes())
    release = ".".join(map(str, nvcc_release(nvcc)))
    return {"nvcc": release, "flags": " ".join(flags()), "sources": digest.hexdigest()}


def object_of(source: Path, folder: Path) -> Path:
    return folder / f"{source.stem}{source.suffix}.o"


def given_objects(nvcc: str) -> Path | None:
    """The folder PAGEWIRE_CUDA_OBJECTS names, if its objects are what this build would compile; else says why not."""
    named = os.environ.get("PAGEWIRE_CUDA_OBJECTS")
    if not named:
        return None
    folder = Path(named).resolve()
    try:
        found = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        print(f"pagewire: {folder} is not used: {error}", flush=True)
        return None
    wrong = [name for name, value in manifest(nvcc).items() if found.get(name) != value]
    wrong += [o.name for o in (object_of(k, folder) for k in KERNELS) if not o.exists()]
    if wrong:
        print(f"pagewire: {folder} is not used: {', '.join(wrong)} differ from this build", flush=True)
        return None
    return folder


def write_ninja(
    nvcc: str, folder: Path, includes: Sequence[str], objects: dict[Path, Path], target: Path | None
) -> Path:
    """build.ninja in `folder`: `objects` (source -> file), compiled where they lie in `folder`, linked to `target`."""
    cxx = os.environ.get("CXX", "g++")
    include = " ".join(f"-I{path}" for path in (CSRC, *includes))
    lines = [
        f"builddir = {folder}",  # ninja's own log
        "rule compile",
        f"  command = {nvcc} {' '.join(flags())} --compiler-bindir={cxx} {include} -MD -MF $out.d -c $in -o $out "
        "> $out.log 2>&1 || (cat $out.log && false)",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = nvcc $in",
        "rule link",
        f"  command = {nvcc} -shared --cudart=static --compiler-bindir={cxx} -Xlinker=--exclude-libs,ALL -o $out $in",
        "  description = link $out",
    ]
    for source, path in objects.items():
        if path.parent == folder:
            lines.append(f"build {path}: compile {source}")
    if target is not None:
        lines.append(f"build {target}: link {' '.join(map(str, objects.values()))}")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "build.ninja"
    path.write_text("\n".join(lines) + "\n")
    return path


def ninja() -> str:
    found = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
    if found is None:
        raise CannotBuild("no ninja at build time (pip install ninja)")
    return found


def _run(recipe: Path) -> None:
    jobs = os.environ.get("PAGEWIRE_BUILD_JOBS") or str(os.cpu_count() or 1)
    done = subprocess.run([ninja(), "-f", str(recipe), "-j", jobs])
    if done.returncode:
        raise CannotBuild(f"nvcc failed ({done.returncode})")


def build(folder: Path, includes: Sequence[str], target: Path) -> None:
    """Compiles what has changed and links `target`; PAGEWIRE_CUDA_ARCH, _OBJECTS and PAGEWIRE_BUILD_JOBS are obeyed.

    Raises:
        CannotBuild: nvcc or ninja is missing, or a source does not compile (nvcc's words are printed).
    """
    nvcc, folder = find_nvcc(), folder.resolve()
    given = given_objects(nvcc) or folder
    objects = {kernel: object_of(kernel, given) for kernel in KERNELS}
    objects[BINDINGS] = object_of(BINDINGS, folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    _run(write_ninja(nvcc, folder, includes, objects, target.resolve()))


def save_objects(folder: Path) -> None:
    """Compiles the kernels, which need neither Python nor pybind11, into `folder`, with the manifest beside them."""
    nvcc, folder = find_nvcc(), folder.resolve()
    (folder / MANIFEST).unlink(missing_ok=True)
    compiled = manifest(nvcc)
    _run(write_ninja(nvcc, folder, (), {k: object_of(k, folder) for k in KERNELS}, None))
    if manifest(nvcc) != compiled:
        raise CannotBuild("the sources changed while they were compiled: once more")
    (folder / MANIFEST).write_text(json.dumps(compiled, indent=1) + "\n")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("build_cuda", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", help="as PAGEWIRE_CUDA_ARCH: 80,90a,90+PTX or native")
    parser.add_argument("--objects", help="as PAGEWIRE_CUDA_OBJECTS: kernels compiled with --save")
    parser.add_argument("--save", type=Path, metavar="DIR", help="compile the kernels into DIR, link nothing")
    options = parser.parse_args(argv)
    for name, value in (("ARCH", options.arch), ("OBJECTS", options.objects)):
        if value:
            os.environ[f"PAGEWIRE_CUDA_{name}"] = value
    try:
        if options.save:
            save_objects(options.save)
            return 0
        try:
            import pybind11
        except ImportError as error:
            raise CannotBuild("no pybind11 at build time (pip install pybind11)") from error
        includes = [pybind11.get_include(), sysconfig.get_paths()["include"]]
        target = CSRC.parent / "python" / "pagewire" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
        build(CSRC.parent / "build" / f"cuda-{'-'.join(architectures())}", includes, target)
        target.with_name("_cuda_missing.txt").unlink(missing_ok=True)
    except CannotBuild as error:
        print(f"pagewire: the CUDA extension was not built ({error})", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
