"""The model of a scheduler, on ways whose cycles can be told by hand."""

import pytest

from machine_code import issue
from machine_code.sass import NO_BARRIER, Instruction

H100 = issue.PROCESSORS["sm_90a"]


def instruction(text: str, stall: int = 1, sets: int = NO_BARRIER, frees: int = NO_BARRIER, waits: int = 0):
    return Instruction(0, text, stall, sets, frees, waits)


def test_stalls_of_one_warp_are_hidden_by_others():
    way = [instruction("FADD", stall=4)] * 10
    assert [issue.cycles(way, warps, H100) for warps in (1, 2, 4, 8)] == pytest.approx([40, 40, 40, 80], rel=0.01)


def test_a_barrier_is_waited_for():
    way = [instruction("LDS", sets=2), instruction("FADD", waits=1 << 2)]
    assert issue.cycles(way, 1, H100) == issue.LATENCY["LDS"] + 1
    assert issue.cycles([way[0], instruction("FADD", waits=1 << 3)], 1, H100) == issue.PIPE["LDS"][1]
    freed = [instruction("STS", frees=0), instruction("FADD", waits=1)]
    assert issue.cycles(freed, 1, H100) == issue.OPERANDS_READ + 1


def test_a_pipe_is_shared():
    way = [instruction("HMMA")] * 8
    each = [issue.cycles(way, warps, H100) / warps for warps in (1, 2)]
    assert each == pytest.approx([8 * H100.hmma] * 2, rel=0.02)


def test_ceiling():
    """16 KiB a pass: as issue 15 converts bytes and cycles of two warps a scheduler on H100."""
    way = [instruction("FADD")] * 1000
    cycles, ceiling = issue.ceiling(way, 8192, 2, H100)
    assert cycles == 2000
    assert ceiling == pytest.approx(8192 / 2000 * 2 * 528 * 1.9e9)
    assert issue.ceiling(way, 8192, 0.5, H100)[1] == pytest.approx(8192 / 1000 * 0.5 * 528 * 1.9e9)
