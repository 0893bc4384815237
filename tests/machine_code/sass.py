"""Machine code as cuobjdump prints it: each instruction with what the compiler wrote into it about its issue."""

from __future__ import annotations

import dataclasses
import functools
import re

LINE = re.compile(
    r"/\*([0-9a-f]{4,6})\*/\s+([^;]+?)\s*;\s*/\* 0x[0-9a-f]{16} \*/\s*/\* 0x([0-9a-f]{16}) \*/"  # of 16 bytes
)
CONTROL = 105 - 64  # the first of its bits, in the upper 8 bytes
NO_BARRIER = 7


@dataclasses.dataclass(frozen=True)
class Instruction:
    """Of sm_70 and newer. The scheduler counts on the compiler: an instruction of fixed latency is waited for by stall
    cycles, one of variable latency through one of six barriers.
    """

    address: int
    text: str  # with its predicate: `@!P0 BRA 0x230`
    stall: int  # cycles before the warp's next instruction
    sets: int  # barrier that falls when its result is there, or NO_BARRIER
    frees: int  # barrier that falls when its operands are read, or NO_BARRIER
    waits: int  # for these barriers, a bit each

    @functools.cached_property
    def op(self) -> str:
        """`LDGSTS.E.BYPASS.128`"""
        return self.text.split()[1 if self.text.startswith("@") else 0]

    @functools.cached_property
    def unit(self) -> str:
        """`LDGSTS`"""
        return self.op.split(".")[0]


def parse(dump: str) -> list[Instruction]:
    """Of one function."""
    found = []
    for address, text, upper in LINE.findall(dump):
        bits = int(upper, 16) >> CONTROL
        # the fifth bit asks the scheduler to prefer another warp, which it may do or not
        fields = bits & 15, bits >> 5 & 7, bits >> 8 & 7, bits >> 11 & 63
        found.append(Instruction(int(address, 16), " ".join(text.split()), *fields))
    return found


def functions(dump: str) -> dict[str, str]:
    """Mangled name -> its part of a dump of several."""
    parts = re.split(r"\n\s*Function : (\S+)", dump)
    return dict(zip(parts[1::2], parts[2::2], strict=True))
