"""Lower layers never import higher ones: the imports and includes, walked."""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python" / "pagewire"

# lowest first; a module may import its own layer and those before it
LAYERS = [
    {"kernels", "net", "version"},
    {"types", "environment", "errors", "emulation", "memo", "native", "overlap", "results", "scalars", "views"},
    {"quant", "packed", "pages", "allocator", "cache", "shared_kv"},
    {"check", "cache_part"},
    {"moves"},
    {"registry"},
    {"backends"},  # reached by name only, from the registry
    {"eager"},
    {"torch_ops"},
    {"ops"},
    {"_api"},
    {"flash_attn", "info"},
    {"transfer"},
    {"bench"},
    {"serve"},
    {"__init__", "__main__"},
]
LEVEL = {name: i for i, layer in enumerate(LAYERS) for name in layer}


# what a part of serve/, a module or a folder, may import of the others
SHARED = {"channel", "config", "messages"}
SERVE = dict.fromkeys(SHARED, SHARED) | {
    "front": {"front", *SHARED},
    "worker": {"worker", "model", *SHARED},
    "model": {"model", *SHARED},
    "cli": {"front", "model", *SHARED},
}


def modules(path: Path, *, run: bool = False) -> set[str]:
    """What a file imports, wherever in the file; `from a import b` is a and a.b, which may be a module. run: but for
    a type checker.
    """
    found = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if run and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path}: a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def imported(path: Path, *, run: bool = False) -> set[str]:
    """Top-level parts of pagewire that a file imports."""
    return {name.split(".")[1] for name in modules(path, run=run) if name.startswith("pagewire.")}


def layer_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0].removesuffix(".py")


def test_python_layers_only_look_down():
    files = [p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py" or p.parent != PACKAGE]
    assert len(files) > 20
    wrong = []
    for path in files:
        me = layer_of(path)
        assert me in LEVEL, f"{path}: give {me} a layer"
        for name in imported(path, run=me == "kernels"):
            if name in LEVEL and LEVEL[name] > LEVEL[me]:
                wrong.append(f"{path.relative_to(ROOT)} imports pagewire.{name}")
    assert not wrong, wrong


def test_front_and_worker_do_not_know_each_other_and_the_model_knows_neither():
    wrong = []
    for path in (PACKAGE / "serve").rglob("*.py"):
        part = path.relative_to(PACKAGE / "serve").parts[0].removesuffix(".py")
        for name in modules(path):
            if name.startswith("pagewire.serve.") and name.split(".")[2] not in SERVE.get(part, ()):
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not wrong, wrong


def test_the_front_has_no_torch():
    """Neither in front/ nor in what it may import. That the cli reads a tokenizer without it is test_front.py's."""
    shared = [PACKAGE / "serve" / f"{part}.py" for part in SHARED]
    files = [*(PACKAGE / "serve/front").rglob("*.py"), *shared]
    assert len(files) > 8
    for path in files:
        assert not any(name.split(".")[0] == "torch" for name in modules(path)), path
        assert imported(path) <= {"net", "serve"}, path


def test_net_needs_nothing_that_is_not_in_every_python():
    files = sorted((PACKAGE / "net").glob("*.py"))
    assert len(files) > 2
    for path in files:
        assert {name.split(".")[0] for name in modules(path)} <= sys.stdlib_module_names, path


def test_kernels_import_only_torch_triton_and_siblings():
    allowed = {"torch", "triton", "pagewire", *sys.stdlib_module_names}
    for path in (ROOT / "kernels").rglob("*.py"):
        roots = {name.split(".")[0] for name in modules(path)}
        assert roots <= allowed, f"{path.name}: {roots}"
        assert imported(path, run=True) <= {"kernels", "_host"}, path.name
        assert imported(path) <= {"kernels", "_host", "moves", "packed", "types"}, (
            path.name
        )  # what they are handed has a type


def test_includes_only_look_down():
    """csrc/pagewire knows neither backend nor binding; cpu, cuda and emulation do not know the bindings; no torch."""
    above = {
        "pagewire": ("cpu/", "cuda/", "emulation/", "bindings/"),
        "cpu": ("cuda/", "bindings/"),
        "cuda": ("cpu/", "bindings/"),
        "host": ("pagewire/", "cpu/", "cuda/", "emulation/", "bindings/"),
    }
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix not in (".h", ".cpp", ".cu", ".cuh"):
            continue
        includes = re.findall(r'#include\s+[<"]([^>"]+)[>"]', path.read_text())
        folder = path.relative_to(ROOT / "csrc").parts[0]
        for include in includes:
            assert not include.startswith(("torch/", "ATen/", "c10/")), f"{path}: {include}"
            assert not include.startswith(above.get(folder, ())), f"{path}: {include}"


def test_no_package_named_kernels_and_the_link_is_there():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (PACKAGE / "kernels").resolve() == ROOT / "kernels"
