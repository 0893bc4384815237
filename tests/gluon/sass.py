"""What is read from the machine code of a kernel: its loops over tiles, what stands in them and in which order."""

from __future__ import annotations

import re
import subprocess
import tempfile
from typing import Any

import triton

from machine_code import sass
from machine_code.loops import Flow, plain_way

WORDS = {
    "HGMMA": "product", "WARPGROUP.DEPBAR.LE gsb0, 0x1": "wait(1)", "WARPGROUP.DEPBAR.LE gsb0, 0x0": "wait(0)",
    "MUFU.EX2": "exp2",
}  # fmt: skip


def of(kernel: Any) -> str:
    """kernel: a triton.CompiledKernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", cubin.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def loops(dump: str) -> list[list[str]]:
    """The instructions of each loop that multiplies, shortest first: of the ways through it that take all of its
    products, the shortest.
    """
    ways = [plain_way(loop, ["HGMMA"]) for loop in Flow(sass.parse(dump)).loops() if loop.has("HGMMA")]
    texts = [[instruction.text for instruction in way] for way in ways]
    return sorted((way for way in texts if any("HGMMA" in text for text in way)), key=len)


def spills(texts: list[str]) -> int:
    return sum("STL" in text or "LDL" in text for text in texts)


def order(texts: list[str], words: dict[str, str] = WORDS) -> list[str]:
    """What matters of them, each once."""
    found: list[str] = []
    for text in texts:
        word = next((name for part, name in words.items() if part in f" {text}"), None)
        if word is not None and (not found or found[-1] != word):
            found.append(word)
    return found


def registers(ptx: str) -> list[str]:
    """That roles ask for."""
    return re.findall(r"setmaxnreg\.(?:inc|dec)\.sync\.aligned\.u32\s+(\d+)", ptx)


def shapes(ptx: str) -> list[str]:
    return sorted(set(re.findall(r"wgmma\.mma_async\S*\.(m64n\d+k16)", ptx)))
