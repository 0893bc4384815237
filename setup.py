"""Builds pagewire._cpu. Without a C++ compiler the package still installs, and says why the extension is missing."""

from __future__ import annotations

import os
import re
from glob import glob
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext

SANITIZE = os.environ.get("PAGEWIRE_SANITIZE", "")  # e.g. address,undefined
SOURCES = sorted(["csrc/bindings/cpu.cpp", *glob("csrc/cpu/*.cpp")])
HEADERS = sorted(glob("csrc/**/*.h", recursive=True))
FLAGS = ["-std=c++17", "-O2", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]
FLAGS += [
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
]  # GCC's own AVX-512 headers, when inlined
MISSING = "_cpu_missing.txt"  # next to the extension: why it was not built


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
            print(
                f"pagewire: the CPU extension was not built ({reason}); the rest installs without it"
            )
            reason_file.parent.mkdir(parents=True, exist_ok=True)
            reason_file.write_text(reason + "\n")

    def get_outputs(self) -> list[str]:
        outputs = super().get_outputs()
        built = [path for path in outputs if os.path.exists(path)]
        missing = Path(self.get_ext_fullpath("pagewire._cpu")).with_name(MISSING)
        return built + ([str(missing)] if missing.exists() else [])

    def copy_extensions_to_source(self) -> None:  # editable and in-place builds
        if os.path.exists(self.get_ext_fullpath("pagewire._cpu")) or self._built():
            super().copy_extensions_to_source()

    def _built(self) -> bool:
        return os.path.exists(os.path.join(self.build_lib, self.get_ext_filename("pagewire._cpu")))

    def build_extensions(self) -> None:
        # imported here: without it the reason is recorded like any other
        import pybind11
        from pybind11.setup_helpers import ParallelCompile

        for extension in self.extensions:
            extension.include_dirs.append(pybind11.get_include())
        jobs = int(os.environ.get("PAGEWIRE_BUILD_JOBS", "2"))
        with ParallelCompile(default=jobs, needs_recompile=needs_recompile):
            super().build_extensions()


def extension() -> Extension:
    sanitize = (
        [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-g", "-O1"] if SANITIZE else []
    )
    return Extension(
        "pagewire._cpu",
        SOURCES,
        depends=HEADERS,
        include_dirs=["csrc"],
        language="c++",
        extra_compile_args=FLAGS + sanitize,
        extra_link_args=["-pthread", *(f for f in sanitize if f.startswith("-fsan"))],
    )


class BinaryDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


setup(
    ext_modules=[extension()], cmdclass={"build_ext": BuildExtension}, distclass=BinaryDistribution
)
