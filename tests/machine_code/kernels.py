"""The kernels of the CUDA extension by their names, and what of their plans machine code does not say."""

from __future__ import annotations

import dataclasses
import re

from machine_code import extension

TYPES = {
    "pagewire::BFloat16": "bfloat16", "pagewire::Float16": "float16", "pagewire::Float8E4M3": "float8_e4m3fn",
    "pagewire::Float8E5M2": "float8_e5m2", "signed char": "int8", "float": "float32",
}  # fmt: skip
ATTENTION = ("attention_kernel",)
# bytes of shared memory of one multiprocessor, and what a block takes besides its own
SHARED = {"sm_80": 163 * 1024 + 1024, "sm_90a": 227 * 1024 + 1024}
SMALL = 99 * 1024 + 1024  # of sm_86 and sm_89, which run the code of sm_80
RESERVED = 1024
REGISTERS = 65536


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel of one architecture."""

    arch: str
    mangled: str
    function: str  # `attention_kernel`
    types: tuple[str, ...]  # of its template: those of q and the cache
    numbers: tuple[int, ...]  # the padded width
    flags: tuple[bool, ...]  # whether it is the attention kernel for 99 KiB of shared memory

    @property
    def case(self) -> str:
        """`attention_kernel bfloat16-float8_e4m3fn-128`; a flag that is set is a `+`."""
        words = [*self.types, *map(str, self.numbers), *("+" for flag in self.flags if flag)]
        return " ".join([self.function, "-".join(words)]).strip()

    @property
    def width(self) -> int:
        return self.numbers[0]

    @property
    def small(self) -> bool:
        return self.function in ATTENTION and self.flags[0]

    @property
    def launched(self) -> bool:
        """sm_90a has room for the large attention kernels: the others are empty there."""
        return self.arch == "sm_80" or not self.small

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


@dataclasses.dataclass(frozen=True)
class Block:
    """A decode block's, with one warp for the rows: threads, and bytes of shared memory."""

    threads: int
    stages: int
    stage: int  # K and V of a tile
    shared: int  # with what each block takes besides
    row_bytes: int  # of the query rows of one more warp, of which there may be threads / 32

    @property
    def warp_tile(self) -> int:
        """Bytes of K and V that a warp copies and multiplies in one pass of its loop."""
        return self.stage // (self.threads // 32)


def attention_block(kernel: Kernel) -> Block:
    """As the attention kernel's Shape has it."""
    width = kernel.width
    threads = 64 if width == 256 else 128
    stages = 4 if width == 64 else 2 if kernel.small else 3
    stage = 32 * 1024 * width // 128 * threads // 128
    # stages, query rows, the scan's and the scales' space
    used = stages * stage + 16 * width * 2
    used += 256 + threads * 16 + stages * 2 * threads * 4 + 128 + RESERVED
    return Block(threads, stages, stage, used, 16 * width * 2)


def shared_of_a_multiprocessor(kernel: Kernel) -> int:
    return SMALL if kernel.small else SHARED[kernel.arch]


def blocks_of_a_multiprocessor(kernel: Kernel, block: Block) -> int:
    return min(
        shared_of_a_multiprocessor(kernel) // block.shared, REGISTERS // (kernel.registers_taken * block.threads)
    )
