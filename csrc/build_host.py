"""Builds pagewire._host in this source tree, in seconds and with no more than a C++ compiler and pybind11: what a bare
machine needs so that repeated calls cost little. An installation builds it by setup.py."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11

CSRC = Path(__file__).resolve().parent
SOURCES = [CSRC / "bindings" / "host.cpp", *sorted((CSRC / "host").glob("*.cpp"))]
TARGET = CSRC.parent / "python" / "pagewire" / f"_host{sysconfig.get_config_var('EXT_SUFFIX')}"
FLAGS = ("-std=c++20", "-O2", "-fvisibility=hidden", "-fPIC", "-shared")


def main() -> int:
    includes = (CSRC, pybind11.get_include(), sysconfig.get_paths()["include"])
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    part = TARGET.with_name(f"{TARGET.name}.part")  # whoever imports it meanwhile finds the whole one
    command = [*compiler, *FLAGS, *(f"-I{path}" for path in includes), *map(str, SOURCES), "-o", str(part), "-ldl"]
    done = subprocess.run(command)
    if done.returncode == 0:
        part.replace(TARGET)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
