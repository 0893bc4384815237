"""docs/architecture.md: every file it names exists and defines what the page says it does."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/architecture.md").read_text()
NAMED = sorted(set(re.findall(r"`([\w./-]+\.(?:py|cpp|cu|h))`:\s+`(\w+)`", PAGE)))
# a folder's name in a row may be the end of a list that begins with its parent's
FOLDERS = sorted(set(re.findall(r"`((?:python|kernels|csrc|benches|tests)/[\w/]*)`", PAGE)))


@pytest.mark.parametrize(("file", "name"), NAMED, ids=lambda x: str(x))
def test_the_file_defines_it(file, name):
    text = (ROOT / file).read_text()
    if file.endswith(".py"):
        assert re.search(rf"^\s*(?:def|class|async def) {name}\b", text, re.M)
    else:  # a function's head: its name and an open parenthesis, where no call's semicolon ends the line
        assert re.search(rf"^[^/;=]*\b{name}\([^;]*$", text, re.M)


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_folder_exists(folder):
    assert (ROOT / folder).is_dir()


def test_something_was_looked_up():
    assert len(NAMED) > 40 and len(FOLDERS) > 8


def test_the_walk_of_q_has_the_same_name_down_to_the_backend():
    for op in ("decode", "prefill"):
        for file in ("ops.py", "eager.py", "backends/triton.py", "backends/cuda.py", "backends/cpu.py"):
            assert re.search(rf"^def {op}\(", (ROOT / "python/pagewire" / file).read_text(), re.M)
