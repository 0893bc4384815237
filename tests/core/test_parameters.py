"""No function takes more than twelve parameters, but for the public functions and what stands in for others' ones."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
MOST = 12
# arguments by keyword, as users and FlashAttention have them
PUBLIC = {"ops.py", "flash_attn.py"}
LONG = {"_write_kernel"}  # 32 numbers of a table, which Triton would compile for, one by one, in a tuple


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    a = function.args
    return len(a.posonlyargs) + len(a.args) + len(a.kwonlyargs)


def test_no_function_takes_more_than_twelve_parameters():
    files = [
        *(ROOT / "python" / "pagewire").rglob("*.py"),
        *(ROOT / "kernels").rglob("*.py"),
        *ROOT.glob("benches/*.py"),
    ]
    assert len(files) > 100
    long = []
    for path in files:
        if path.parent.name == "pagewire" and path.name in PUBLIC:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or node.name in LONG:
                continue
            if parameters(node) > MOST:
                long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {parameters(node)}")
    assert not long, "\n".join(long)
