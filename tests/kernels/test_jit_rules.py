"""What Triton 3.6 refuses and neither 3.9 nor the interpreter notices, and types wherever there can be some."""

import ast
from pathlib import Path
from typing import get_type_hints

import pytest

pytest.importorskip("triton")

import pagewire.kernels  # noqa: E402
from pagewire.kernels.common import Spec  # noqa: E402
from pagewire.kernels.move import Move  # noqa: E402
from pagewire.kernels.rows import Stored  # noqa: E402

FILES = sorted(Path(pagewire.kernels.__path__[0]).rglob("*.py"))
KINDS = {name: kind for tuple_ in (Spec, Move, Stored) for name, kind in get_type_hints(tuple_).items()}
STRINGS = {name for name, kind in KINDS.items() if kind is str}
TUPLES = {"ALONE"} | {name for name, kind in KINDS.items() if kind is Stored}


JITS = ("triton.jit", "gluon.jit")


def _functions(source: str, *decorators: str, without: bool = False) -> list[ast.FunctionDef]:
    every = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))
    return [f for f in every if any(d in ast.unparse(x) for x in f.decorator_list for d in decorators) != without]


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_no_string_of_a_tuple_is_read_in_a_call(file):
    """There it is a str and no constant: "'str' object has no attribute 'type'". A name bound before is one."""
    wrong = [
        f"{file.name}:{argument.lineno}: {ast.unparse(argument)}"
        for function in _functions(file.read_text(), *JITS)
        for call in ast.walk(function)
        if isinstance(call, ast.Call)
        for argument in (*call.args, *(k.value for k in call.keywords))
        if isinstance(argument, ast.Attribute) and argument.attr in STRINGS | TUPLES
    ]
    assert not wrong


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_no_number_of_the_spec_is_read_in_a_list(file):
    """A shape, above all. In Gluon it is an int there and no constant: "'int' object has no attribute 'type'"."""
    wrong = [
        f"{file.name}:{element.lineno}: {ast.unparse(element)}"
        for function in _functions(file.read_text(), "gluon.jit")
        for shape in ast.walk(function)
        if isinstance(shape, ast.List)
        for element in shape.elts
        if isinstance(element, ast.Attribute) and element.attr in KINDS
    ]
    assert not wrong


def test_constexpr_functions_take_no_tuples():
    """Triton 3.6's interpreter hands them tuples without names, and its compiler too."""
    found = [f for file in FILES for f in _functions(file.read_text(), "constexpr_function")]
    assert found
    for function in found:
        kinds = {a.arg: ast.unparse(a.annotation) for a in function.args.args if a.annotation}
        assert set(kinds.values()) <= {"str", "int", "bool", "float", "gl.dtype"}, f"{function.name}: {kinds}"


def test_the_rule_has_something_to_look_for():
    assert {"FORMAT", "K_SCALE", "V_SCALE", "EVICT", "ELEMENT", "SCALE"} == STRINGS and len(FILES) > 10
    assert {"ALONE", "K_CACHE", "V_CACHE", "ROWS"} == TUPLES


def _untyped(source: str) -> list[str]:
    """Functions that are not jitted and whose arguments and result do not all have types."""
    found = []
    for function in _functions(source, *JITS, without=True):
        given = function.args
        every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
        names = [a.arg for a in every if a is not None and a.annotation is None and a.arg not in ("self", "cls")]
        if names or function.returns is None:
            found.append(f"{function.name}:{function.lineno}: {names or 'its result'}")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_what_is_not_jitted_has_types(file):
    """mypy cannot tell one from the other, so that it asks for none in this folder."""
    assert not _untyped(file.read_text())


def test_a_function_without_types_is_found():
    jitted = "@triton.jit(do_not_specialize=X)\ndef f(x): pass\n"
    assert _untyped(jitted + "def g(x, *, y: int) -> int: pass\ndef h(x: int): pass") == [
        "g:3: ['x']",
        "h:4: its result",
    ]
