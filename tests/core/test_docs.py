"""What the documents show is what happens: Python blocks and docstring examples are executed."""

import doctest
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCKS = [
    pytest.param(block, id=f"{path.name}-{i}")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if path.exists()
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.S))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_python_block_runs(block):
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", block],
        check=True,
        timeout=120,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )


@pytest.mark.parametrize("name", ["allocator", "check", "ops", "pages", "registry"])
def test_docstring_examples(name):
    result = doctest.testmod(importlib.import_module(f"pagewire.{name}"))
    assert result.failed == 0


def test_quickstart_is_the_readme_snippet():
    """The example file and the README show the same code."""
    example = (ROOT / "examples" / "quickstart.py").read_text().split("import pagewire as pw\n", 1)[1].strip()
    assert example in (ROOT / "README.md").read_text()


def test_info_names_every_backend():
    from pagewire import registry
    from pagewire.info import report

    assert all(f"  {b.name:<10} " in report() for b in registry.BACKENDS)
