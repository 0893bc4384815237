"""What the scripts that compile a Hopper kernel have in common: one JSON line per case, facts of any of the kernels."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from gluon import layouts, sass
from pagewire.kernels.place import Launch


def compiled(of: Launch) -> Any:
    return of.kernel.warmup(**of.arguments, grid=of.grid, **of.options)


def facts(kernel: Any, code: str) -> dict[str, Any]:
    """code: its machine code."""
    ptx, ir = kernel.asm["ptx"], kernel.asm["ttgir"]
    return {
        "shared": kernel.metadata.shared, "registers": sass.registers(ptx), "shapes": sass.shapes(ptx),
        "boxes": code.count("UTMALDG"), "fences": ptx.count("fence.proxy.async"),
        "swizzles": sorted(set(layouts.encodings(ir).values())), "copies": layouts.copies(ir),
        "operands": layouts.operands(ir), "atomics": layouts.surroundings(ptx),
    }  # fmt: skip


def compilations(launches: Sequence[Launch]) -> int:
    """Of a kernel, by these launches and those before."""
    for of in launches:
        compiled(of)
    return len(of.kernel.device_caches[90][0])


def main(cases: Sequence[Any], facts_of: Callable[[Any], dict[str, Any]], others: Callable[[], list[Launch]]) -> None:
    """others: launches that are to share compilations."""
    if sys.argv[1:] == ["shapes"]:
        print(json.dumps({"compilations": compilations(others())}))
        return
    for case in cases:
        if not sys.argv[1:] or case.id in sys.argv[1:]:
            print(json.dumps(facts_of(case)), flush=True)
