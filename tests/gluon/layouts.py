"""What Triton's IR says of shared memory, which the simulator does not see: where copies put what products read."""

from __future__ import annotations

import re
from typing import Any

_SHARED = re.compile(
    r"(#\w+) = #ttg\.nvmma_shared<\{swizzlingByteWidth = (\d+), transposed = (\w+), elementBitWidth = (\d+)"
)
_SLICE = re.compile(r"(%\w+) = ttg\.memdesc_subslice %\w+\[(\d+), (\d+)\] : !ttg\.memdesc<(\d+)x\d+x")
_COPY = re.compile(
    r"async_tma_copy_global_to_local [^:]*\] (%\w+), .*?"
    r"tensordesc<(?:tensor<)?(\d+)x(\d+)x\w+, (#\w+)>.*-> !ttg\.memdesc<(\d+)x(\d+)x\w+, (#\w+), "
)


def encodings(ir: str) -> dict[str, tuple[int, int]]:
    """Of what lies in shared memory for the TMA unit and wgmma: (bytes of the swizzle, bits of an element)."""
    return {name: (int(width), int(bits)) for name, width, _, bits in _SHARED.findall(ir)}


def copies(ir: str) -> list[dict[str, Any]]:
    """Of the TMA unit: its box as the descriptor has it and as its place does, and where that lies in a tile."""
    known = encodings(ir)
    slices: dict[str, tuple[int, ...]] = {}
    found = []
    for line in ir.splitlines():  # names are of a region: the last one before
        if match := _SLICE.search(line):
            slices[match[1]] = tuple(map(int, match.groups()[1:]))
        elif match := _COPY.search(line):
            place, *box, told, rows, columns, laid = match.groups()
            row, column, of_rows = slices.get(place, (0, 0, int(rows)))
            found.append(
                {"told": [*map(int, box), known[told]], "laid": [int(rows), int(columns), known[laid]],
                 "row": row, "column": column, "of_rows": of_rows}
            )  # fmt: skip
    return found


def operands(ir: str) -> list[tuple[int, int]]:
    """Of products that lie in shared memory, each kind once."""
    known = encodings(ir)
    lines = "\n".join(line for line in ir.splitlines() if "warp_group_dot " in line)
    return sorted({known[name] for name in re.findall(r"memdesc<\w+, (#\w+), #smem", lines)})


def surroundings(ptx: str) -> list[list[str]]:
    """Of each atomic that others' memory is read behind: what orders it, of the block and of memory, nearest first
    (stores before, loads behind)."""
    words = re.findall(r"\b(bar\.sync|barrier\.sync|st\.global|ld\.global|atom\.global\.gpu\.acq_rel)", ptx)
    found = []
    for i, word in enumerate(words):
        if word.startswith("atom"):
            before = next(w for w in reversed(words[:i]) if w != "ld.global")
            after = next(w for w in words[i + 1 :] if w != "st.global")
            found.append([before, after])
    return found
