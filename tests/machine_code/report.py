"""What the machine code of the CUDA kernels says of their speed, as a table, and with `--budgets` as
docs/tuning/instructions.md has it:

PYTHONPATH=tests python -m machine_code.report [--budgets]

Builds the extension first, which takes minutes where the sources have changed.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from collections.abc import Iterable, Mapping, Sequence

from machine_code import issue, sass
from machine_code.extension import ARCHITECTURES
from machine_code.kernels import ATTENTION, Kernel, block_of, blocks_of_a_multiprocessor, kernels
from machine_code.loops import Flow, innermost, plain_way
from machine_code.sass import Instruction

MOVES = ("copy_kernel", "convert_kernel")
STEP = r"\b[HIQ]G?MMA"  # of a tensor core
COPY = r"\bLDGSTS\S*128"
ARRIVAL = r"\bLDGSTS|\bSYNCS\S*TRYWAIT"  # of tiles: the warp's own copies, or a barrier that another warp's set off
ASIDE = r"\b(LDG|LDGSTS|LDS|STS|ATOMG|RED|MUFU|FCHK|CALL)\b"
STORED = {"128": 16, "64": 8, "U16": 2, "U8": 1}  # bytes of a lane; else 4


@dataclasses.dataclass(frozen=True)
class Row:
    kernel: Kernel
    way: Sequence[Instruction]  # once through the loop over tiles, or over layers; of merges through the kernel
    bytes_: int  # that a warp copies to shared memory, or stores, on this way
    blocks: int | None = None  # of a multiprocessor
    cycles: float | None = None  # of the way, predicted
    ceiling: float | None = None  # bytes a second, predicted

    @property
    def per_16_bytes(self) -> float:
        """Instructions of a lane."""
        return len(self.way) * 32 / (self.bytes_ / 16)

    @property
    def per_copy(self) -> float | None:
        """Instructions from a copy to the next, where they stand together."""
        marks = [(n, at.unit) for n, at in enumerate(self.way) if re.search(f"{COPY}|{STEP}", at.text)]
        gaps = [m - n for (n, a), (m, b) in zip(marks, marks[1:], strict=False) if a == b == "LDGSTS"]
        return sum(gaps) / len(gaps) if gaps else None


def addresses_of_rows(jumped_over: Sequence[Instruction]) -> bool:
    """Whether a key without a page would jump over it: wide products alone, of a page and its stride."""
    text = "\n".join(instruction.text for instruction in jumped_over)
    return bool(re.search(r"\bIMAD\.WIDE", text)) and not re.search(f"{STEP}|{ASIDE}", text)


def attention_row(kernel: Kernel) -> Row:
    """The plain way through the loop over tiles, of one that reads the page table where the loop does."""
    loop = innermost(Flow(sass.parse(kernel.code)).loops(), STEP, ARRIVAL)
    way = plain_way(loop, [STEP, COPY], with_a=r"\bLDG\b", not_over=addresses_of_rows)
    block, blocks = block_of(kernel), blocks_of_a_multiprocessor(kernel)
    warps = blocks * (block.threads // 64 * 2) / 4  # that multiply, of a scheduler
    cycles, ceiling = issue.ceiling(way, block.warp_tile, warps, issue.PROCESSORS[kernel.arch])
    return Row(kernel, way, block.warp_tile, blocks, cycles, ceiling)


def stored(way: Sequence[Instruction]) -> int:
    """Bytes of a warp."""
    ops = [instruction.op for instruction in way if instruction.unit == "STG"]
    wide = [op for op in ops if re.search("128|64", op)] or ops
    return 32 * sum(STORED.get(op.split(".")[-1], 4) for op in wide)


def moving_row(kernel: Kernel) -> Row:
    """Once through the loop over layers, K and V, with a row's chunk in flight."""
    loops = Flow(sass.parse(kernel.code)).loops()
    load, store = r"\bLDG\S*128", r"\bSTG\S*128"
    way = plain_way(innermost(loops, load, store), [store, load])
    return Row(kernel, way, stored(way))


def whole_row(kernel: Kernel) -> Row:
    """From the kernel's entry to its end, the plain way of whole, aligned rows; its loops are passed once. It has most
    divisions of 32 bits: the place of a row that exists is computed with them.
    """
    most = [r"\bSTG\S*128", r"\bSTG\S*64", r"\bLDG\S*(128|64)", r"\bI2F\.U32\.RP"]
    way = plain_way(Flow(sass.parse(kernel.code)).whole(), most)
    return Row(kernel, way, stored(way))


@functools.cache
def rows(arch: str) -> tuple[Row, ...]:
    def row(kernel: Kernel) -> Row:
        if kernel.function in ATTENTION:
            return attention_row(kernel)
        return moving_row(kernel) if kernel.function in MOVES else whole_row(kernel)

    # what moves and merges element by element has no plain way
    found = (kernel for kernel in kernels(arch) if kernel.plain or kernel.function in ATTENTION)
    return tuple(row(kernel) for kernel in found)


COLUMNS = (
    "kernel, q, cache, width", "arch", "KiB", "instr.", "per 16 B", "per copy", "regs", "spilt", "blocks", "cycles",
    "TB/s",
)  # fmt: skip


def cells(row: Row) -> list[str]:
    def shown(x: float | None, digits: int) -> str:
        return "-" if x is None else f"{x:.{digits}f}"

    return [
        row.kernel.case, row.kernel.arch, f"{row.bytes_ / 1024:g}", str(len(row.way)), shown(row.per_16_bytes, 1),
        shown(row.per_copy, 1), str(row.kernel.registers), str(row.kernel.spilled), shown(row.blocks, 0),
        shown(row.cycles, 0), shown(row.ceiling and row.ceiling / 1e12, 2),
    ]  # fmt: skip


def table(found: Iterable[Row]) -> str:
    lines = [list(COLUMNS), *map(cells, found)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    notes = [
        "KiB: copied, or else stored, by a warp on the plain way once through its loop; of merges through the kernel.",
        "per 16 B: instructions of a lane; per copy: from one to the next. blocks: of a multiprocessor.",
        f"cycles, TB/s: predicted where issue is the bound, {issue.ERROR:.0%} either way; "
        + ", ".join(f"{arch} as {processor.name}" for arch, processor in issue.PROCESSORS.items()),
    ]
    return "\n".join([*text, "", *notes])


def budgeted(found: Sequence[Row]) -> dict[str, int]:
    """case -> instructions, of the kernels without modifiers."""
    return {row.kernel.case: len(row.way) for row in found if row.kernel.plain}


def budgets(of_arch: Mapping[str, Sequence[Row]]) -> str:
    """Rows of markdown: a case and its instructions in each architecture."""
    counted = {arch: budgeted(found) for arch, found in of_arch.items()}
    cases = dict.fromkeys(case for found in counted.values() for case in found)
    return "\n".join(
        f"| `{case}` | " + " | ".join(str(found.get(case, "-")) for found in counted.values()) + " |" for case in cases
    )


def main() -> None:
    found = {arch: rows(arch) for arch in ARCHITECTURES}
    print(budgets(found) if "--budgets" in sys.argv[1:] else table(row for of in found.values() for row in of))


if __name__ == "__main__":
    main()
