"""What is read from the machine code of a kernel: its loops over tiles, what stands in them and in which order."""

from __future__ import annotations

import re
import subprocess
import tempfile
from typing import Any

import triton

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


def loops(sass: str) -> list[list[str]]:
    """The instructions of each loop that multiplies, shortest first: of the ways through it that take all of its
    products, the shortest.
    """
    code = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;]+);", sass)
    at = {int(address, 16): i for i, (address, _) in enumerate(code)}
    texts = [text for _, text in code]
    targets = [_target(text, at) for text in texts]
    found = []
    for end, start in enumerate(targets):
        if start is not None and start < end and any("HGMMA" in text for text in texts[start : end + 1]):
            way = _way(texts, targets, start, end)
            found.append([texts[n] for n in way])
    return sorted(found, key=len)


def _target(text: str, at: dict[int, int]) -> int | None:
    found = re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)
    return at.get(int(found.group(1), 16)) if found else None


def _way(texts: list[str], targets: list[int | None], start: int, end: int) -> list[int]:
    """Forwards from start to end, of most products and then of fewest instructions."""
    best: dict[int, tuple[int, int, list[int]]] = {}  # from there to the end
    for n in range(end, start - 1, -1):
        nexts = [] if texts[n].startswith(("BRA", "EXIT")) or n == end else [n + 1]
        target = targets[n]
        if target is not None and n < target <= end:
            nexts.append(target)
        ways = [best[m] for m in nexts if m in best]
        if n == end:
            best[n] = (0, -1, [n])
        elif ways:
            products, length, way = max(ways, key=lambda way: way[:2])
            best[n] = (products + ("HGMMA" in texts[n]), length - 1, [n, *way])
    return best[start][2] if start in best else list(range(start, end + 1))


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
