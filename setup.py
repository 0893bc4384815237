"""Builds pagewire._cpu and ._host, and ._cuda where nvcc is found. The package installs without any and says why."""

from __future__ import annotations

import importlib.util
import os
import re
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext

SANITIZE = os.environ.get("PAGEWIRE_SANITIZE", "")  # e.g. address,undefined
HEADERS = sorted(glob("csrc/**/*.h", recursive=True))
FLAGS = ["-std=c++20", "-O2", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]
FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # GCC's own AVX-512 headers, when inlined
MISSING = "_cpu_missing.txt"  # next to the extensions: why _cpu and _host were not built
CUDA_MISSING = "_cuda_missing.txt"
CUDA_SOURCES = sorted(["csrc/bindings/cuda.cpp", *glob("csrc/cuda/**/*.cu", recursive=True)])
# the emulation is built on demand, from a checkout or an unpacked sdist
CUDA_DEPENDS = [*HEADERS, "csrc/build_cuda.py", *sorted(glob("csrc/emulation/*.cpp"))]


def needs_recompile(obj: str, src: str) -> bool:
    if not os.path.exists(obj):
        return True
    built = os.path.getmtime(obj)
    return any(os.path.getmtime(path) > built for path in (src, *HEADERS))


def why(error: Exception) -> str:
    """One line; the compiler's own words have been printed already."""
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    command = re.search(r"Command '?\['([^']+)'.* returned (.*)", text)
    return f"{command[1]} returned {command[2]}" if command else text


class BuildExtension(build_ext):
    """build_ext whose failure is recorded instead of fatal, unless PAGEWIRE_REQUIRE_CPU=1."""

    def run(self) -> None:
        reason_file = Path(self.get_ext_fullpath("pagewire._cpu")).with_name(MISSING)
        reason_file.unlink(missing_ok=True)
        try:
            super().run()
        except Exception as error:
            if os.environ.get("PAGEWIRE_REQUIRE_CPU") == "1" or SANITIZE:
                raise
            reason = why(error)
            print(f"pagewire: its extensions were not built ({reason}); the rest installs without them")
            reason_file.parent.mkdir(parents=True, exist_ok=True)
            reason_file.write_text(reason + "\n")

    def build_extension(self, ext: Extension) -> None:
        if ext.name == "pagewire._cuda":
            self.build_cuda()
        else:
            super().build_extension(ext)

    def build_cuda(self) -> None:
        """With nvcc; a failure is recorded instead of fatal, unless PAGEWIRE_REQUIRE_CUDA=1."""
        import pybind11

        target = Path(self.get_ext_fullpath("pagewire._cuda"))
        note = target.with_name(CUDA_MISSING)
        note.unlink(missing_ok=True)
        recipe = load("csrc/build_cuda.py")
        includes = [pybind11.get_include(), sysconfig.get_paths()["include"]]
        try:
            recipe.build(Path(self.build_temp) / "cuda", includes, target)
        except recipe.CannotBuild as error:
            if os.environ.get("PAGEWIRE_REQUIRE_CUDA") == "1":
                raise
            print(f"pagewire: the CUDA extension was not built ({error}); the rest installs without it")
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(f"{error}\n")

    def get_outputs(self) -> list[str]:
        outputs = super().get_outputs()
        built = [path for path in outputs if os.path.exists(path)]
        folder = Path(self.get_ext_fullpath("pagewire._cpu")).parent
        notes = [folder / MISSING, folder / CUDA_MISSING]
        return built + [str(note) for note in notes if note.exists()]

    def copy_extensions_to_source(self) -> None:  # editable and in-place builds
        everything, built = self.extensions, Path(self.build_lib)
        self.extensions = [e for e in everything if (built / self.get_ext_filename(e.name)).exists()]
        super().copy_extensions_to_source()
        self.extensions = everything
        note = Path(self.get_ext_fullpath("pagewire._cuda")).with_name(CUDA_MISSING)
        note.unlink(missing_ok=True)
        if (built / "pagewire" / CUDA_MISSING).exists():
            self.copy_file(str(built / "pagewire" / CUDA_MISSING), str(note))

    def build_extensions(self) -> None:
        # imported here: without it the reason is recorded like any other
        import pybind11
        from pybind11.setup_helpers import ParallelCompile

        for extension in self.extensions:
            extension.include_dirs.append(pybind11.get_include())
        jobs = int(os.environ.get("PAGEWIRE_BUILD_JOBS", "2"))
        with ParallelCompile(default=jobs, needs_recompile=needs_recompile):
            super().build_extensions()


def extension(name: str) -> Extension:
    """pagewire._<name>, from csrc/<name> and its bindings."""
    sanitize = [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-g", "-O1"] if SANITIZE else []
    return Extension(
        f"pagewire._{name}",
        sorted([f"csrc/bindings/{name}.cpp", *glob(f"csrc/{name}/*.cpp")]),
        depends=HEADERS,
        include_dirs=["csrc"],
        language="c++",
        extra_compile_args=FLAGS + sanitize,
        extra_link_args=["-pthread", "-ldl", *(f for f in sanitize if f.startswith("-fsan"))],
    )


def cuda_extension() -> Extension:
    # optional: copied into the source tree only if it was built
    return Extension("pagewire._cuda", CUDA_SOURCES, depends=CUDA_DEPENDS, optional=True)


def load(path: str):  # noqa: ANN201
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BinaryDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


setup(
    # a sanitized build is of these two alone
    ext_modules=[extension("cpu"), extension("host"), *([] if SANITIZE else [cuda_extension()])],
    cmdclass={"build_ext": BuildExtension},
    distclass=BinaryDistribution,
)
