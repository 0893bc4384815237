"""The kernels of the CUDA extension by their names, and what of their plans machine code does not say."""

from __future__ import annotations

import dataclasses
import functools
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

from machine_code import extension
from pagewire import emulation

TYPES = {
    "pagewire::BFloat16": "bfloat16", "pagewire::Float16": "float16", "pagewire::Float8E4M3": "float8_e4m3fn",
    "pagewire::Float8E5M2": "float8_e5m2", "signed char": "int8", "float": "float32",
}  # fmt: skip
ATTENTION = ("decode_kernel", "decode_sm90_kernel")
# bytes of shared memory that a block may have; a multiprocessor has one KiB more
SHARED = {"sm_80": 163 * 1024, "sm_90a": 227 * 1024}
SMALL = 99 * 1024  # of sm_86 and sm_89, which run the code of sm_80
RESERVED = 1024  # of a multiprocessor, for each block
REGISTERS = 65536


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel of one architecture."""

    arch: str
    mangled: str
    function: str  # `decode_kernel`
    types: tuple[str, ...]  # of its template: the cache's
    numbers: tuple[
        int, ...
    ]  # the padded width, of decode_sm90_kernel also the rows; of moves layers, elements at a time
    flags: tuple[bool, ...]  # of decode_kernel: for 17 to 64 rows; plain. Of merges: 16 bytes at a time

    @property
    def case(self) -> str:
        """`decode_kernel bfloat16-128-wide`"""
        words = [*self.types, *map(str, self.numbers), *["wide"] * self.wide, *["general"] * (not self.plain)]
        return f"{self.function} {'-'.join(words)}".strip()

    @property
    def shape(self) -> str:
        """The case of its block, the same for plain and general."""
        return self.case.removesuffix("-general")

    @property
    def width(self) -> int:
        return self.numbers[0]

    @property
    def wide(self) -> bool:
        return self.function == "decode_kernel" and self.flags[0]

    @property
    def plain(self) -> bool:
        """No modifier, no row that is narrower than the padded width, or off 16 bytes."""
        if self.function == "convert_kernel":
            return self.numbers[1] > 1
        return not self.flags or self.flags[-1]

    @property
    def launched(self) -> bool:
        """sm_80 has no TMA: kernels for it are empty there."""
        return not (self.arch == "sm_80" and self.function == "decode_sm90_kernel")

    @property
    def registers(self) -> int:
        """Of a thread."""
        return extension.resources()[self.arch, self.mangled]["REG"]

    @property
    def registers_taken(self) -> int:
        """Of a thread, as they are given out."""
        return -(-self.registers // 8) * 8

    @property
    def spilled(self) -> int:
        """Bytes of a thread outside of registers."""
        use = extension.resources()[self.arch, self.mangled]
        return use["STACK"] + use["LOCAL"]

    @property
    def code(self) -> str:
        return extension.code(self.arch)[self.mangled]


def read(arch: str, mangled: str, readable: str) -> Kernel:
    """`void pagewire::f<pagewire::BFloat16, signed char, 128, false>(...)`; the only place that knows what templates
    look like.
    """
    found = re.search(r"(\w+)(?:<(.*)>)?\(", readable.replace("(anonymous namespace)::", ""))
    assert found is not None, readable
    words = re.findall(r"pagewire::\w+|signed char|\w+", found[2] or "")
    return Kernel(
        arch, mangled, found[1],
        tuple(TYPES[word] for word in words if word in TYPES),
        tuple(int(word) for word in words if word.isdigit()),
        tuple(word == "true" for word in words if word in ("true", "false")),
    )  # fmt: skip


def kernels(arch: str, *functions: str) -> list[Kernel]:
    """Those that are launched; of these functions, or all."""
    found = [read(arch, *names) for names in extension.demangled(list(extension.code(arch)))]
    chosen = [kernel for kernel in found if kernel.launched and (not functions or kernel.function in functions)]
    assert chosen, f"no {functions} in {arch}: {[kernel.function for kernel in found][:4]}"
    return sorted(chosen, key=lambda kernel: (kernel.function, kernel.numbers, kernel.flags, kernel.types))


class Block(NamedTuple):
    """A block of an attention kernel on some device."""

    threads: int
    planned: int  # blocks of a multiprocessor
    stages: int
    stage: int  # bytes of K and V of a tile
    shared: int  # bytes, with these stages

    @property
    def warp_tile(self) -> int:
        """Bytes of K and V that a warp multiplies in one pass of its loop."""
        return self.stage // (self.threads // 64 * 2)  # of an odd number of warps one only loads


@functools.cache
def blocks(shared: int) -> dict[str, Block]:
    """Shape -> its block, where one may have so many bytes of shared memory: as the sources themselves say."""
    folder = emulation.cache_dir() / "plain"
    sources = [Path(__file__).with_name("blocks.cpp"), *sorted((emulation.CSRC / "emulation").glob("*.cpp"))]
    objects = emulation.compile_objects(sources, "plain", [], folder)
    program = folder / f"blocks-{objects[0].stem[-16:]}"
    if not program.exists():
        emulation.link(objects, "plain", program, shared=False)
    command = [program, str(shared), str(shared + RESERVED)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = (line.split(": ") for line in printed.splitlines())
    return {shape: Block(*map(int, numbers.split())) for shape, numbers in found}


def block_of(kernel: Kernel, shared: int | None = None) -> Block:
    return blocks(shared or SHARED[kernel.arch])[kernel.shape]


def blocks_of_a_multiprocessor(kernel: Kernel, shared: int | None = None) -> int:
    """By shared memory and by registers, which are given to whole warps of each of four schedulers."""
    block, of_a_block = block_of(kernel, shared), shared or SHARED[kernel.arch]
    by_shared = (of_a_block + RESERVED) // (block.shared + RESERVED)
    warps = REGISTERS // 4 // (kernel.registers_taken * 32) * 4
    return min(by_shared, warps // (block.threads // 32))
