"""The way through machine code that budgets count, on a few lines of an instruction each: `0x30` is the fourth."""

import re

import pytest

from machine_code import sass
from machine_code.loops import Flow, innermost, plain_way

DUMP = """
        Function : _Z1fv
    /*0000*/              @!P0 LDS.64 R2, [R4+0x10] ;          /* 0x0000100004028984 */
                                                               /* 0x004fe20000000a00 */
    /*0010*/                   HMMA.16816.F32 R4, R8.reuse, R2, R4 ;  /* 0x000000020804723c */
                                                               /* 0x081fe40000001804 */
        Function : _Z1gv
    /*0000*/                   EXIT ;                          /* 0x000000000000794d */
                                                               /* 0x000fea0003800000 */
"""


def code(text: str) -> list[sass.Instruction]:
    lines = [line.strip() for line in text.strip().splitlines()]
    return [sass.Instruction(16 * n, line, 1, sass.NO_BARRIER, sass.NO_BARRIER, 0) for n, line in enumerate(lines)]


def way(text: str, *arguments, **options) -> list[int]:
    """Positions on the plain way through the innermost loop with a tensor core step."""
    loop = innermost(Flow(code(text)).loops(), "HMMA")
    return [instruction.address // 16 for instruction in plain_way(loop, *arguments, **options)]


def test_parsing():
    functions = sass.functions(DUMP)
    load, step = sass.parse(functions["_Z1fv"])
    assert (load.address, load.text, load.op, load.unit) == (0, "@!P0 LDS.64 R2, [R4+0x10]", "LDS.64", "LDS")
    assert (load.stall, load.sets, load.frees, load.waits) == (1, 7, 7, 4)
    assert (step.unit, step.stall, step.waits, step.address) == ("HMMA", 2, 1, 16)
    (end,) = sass.parse(functions["_Z1gv"])
    assert Flow([end]).after == [[]]


def test_most_steps_then_most_copies_then_shortest():
    text = """
        MOV R0, RZ
        @P0 BRA 0x50
        HMMA R0
        LDGSTS.E.128 [R0]
        LDGSTS.E.128 [R1]
        @P1 BRA 0x80
        FMUL R0
        FMUL R1
        @P2 BRA 0x0
        EXIT
    """
    assert way(text, ["HMMA", "LDGSTS"]) == [0, 1, 2, 3, 4, 5, 8]
    assert way(text, ["FMUL"]) == [0, 1, 5, 6, 7, 8]
    assert way(text, []) == [0, 1, 5, 8]


def test_one_of_a_kind_comes_before_the_length():
    text = """
        @P0 BRA 0x30
        LDG.E R0
        LDG.E R1
        @P1 BRA 0x50
        LDG.E R2
        HMMA R0
        @P2 BRA 0x0
    """
    assert way(text, ["HMMA"]) == [0, 3, 5, 6]
    assert way(text, ["HMMA"], with_a="LDG") == [0, 3, 4, 5, 6]
    assert way(text, ["HMMA"], with_a="STG") == [0, 3, 5, 6]


def test_what_may_not_be_jumped_over():
    text = """
        @!P0 BRA 0x20
        IMAD.WIDE R0, R1, R2, R4
        HMMA R0
        @P2 BRA 0x0
    """
    assert way(text, ["HMMA"]) == [0, 2, 3]
    assert way(text, ["HMMA"], not_over=lambda code: "IMAD.WIDE" in code[0].text) == [0, 1, 2, 3]


def test_loops_inside_are_passed_once():
    asked_at_its_end = """
        MOV R0
        HMMA R0
        @P0 BRA 0x10
        @P1 BRA 0x0
    """
    outer = Flow(code(asked_at_its_end)).loops()[-1]
    assert [each.text for each in plain_way(outer, ["HMMA"])] == ["MOV R0", "HMMA R0", "@P0 BRA 0x10", "@P1 BRA 0x0"]
    asked_at_its_beginning = """
        MOV R0
        @P0 BRA 0x40
        HMMA R0
        BRA 0x10
        @P1 BRA 0x0
    """
    outer = Flow(code(asked_at_its_beginning)).loops()[-1]
    assert len(plain_way(outer, ["HMMA"])) == 5


def test_branches_of_every_kind():
    after = Flow(
        code("""
        BRA.DIV UR4, 0x50
        @P0 BRA P1, 0x50
        BRA P1, 0x50
        @P0 CALL.REL.NOINC 0x50
        BRA 0x0
        @P0 EXIT
        RET.REL.NODEC R4 0x0
    """)
    ).after
    assert after == [[1], [2, 5], [3, 5], [4, 5], [0], [6], []]


def test_a_table_leads_wherever_nothing_else_does():
    flow = Flow(code("BRX R2 -0x10\nHMMA R0\nBRA 0x40\nNOP\nEXIT"))
    assert flow.after == [[1, 3], [2], [4], [4], []]
    assert len(plain_way(flow.whole(), ["HMMA"])) == 4


def test_no_loop():
    with pytest.raises(LookupError, match=re.escape("no loop with HMMA and LDGSTS|SYNCS")):
        innermost(Flow(code("HMMA R0\nEXIT")).loops(), "HMMA", "LDGSTS|SYNCS")
