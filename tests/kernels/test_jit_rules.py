"""What Triton 3.6 refuses and neither 3.9 nor the interpreter notices."""

import ast
from pathlib import Path

import pytest

pytest.importorskip("triton")

import pagewire.kernels  # noqa: E402
from pagewire.kernels.common import Spec  # noqa: E402

FILES = sorted(Path(pagewire.kernels.__path__[0]).glob("*.py"))
STRINGS = {name for name, kind in Spec.__annotations__.items() if kind in (str, "str")}
TUPLES = {"ALONE"}


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_no_string_of_a_tuple_is_read_in_a_call(file):
    """There it is a str and no constant: "'str' object has no attribute 'type'". A name bound before is one."""
    wrong = [
        f"{file.name}:{argument.lineno}: {ast.unparse(argument)}"
        for call in ast.walk(ast.parse(file.read_text()))
        if isinstance(call, ast.Call)
        for argument in (*call.args, *(k.value for k in call.keywords))
        if isinstance(argument, ast.Attribute) and argument.attr in STRINGS | TUPLES
    ]
    assert not wrong


def test_the_rule_has_something_to_look_for():
    assert {"FORMAT", "K_SCALE", "V_SCALE", "EVICT"} == STRINGS and len(FILES) > 10
