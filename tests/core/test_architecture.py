"""docs/architecture.md and docs/adding.md: every file they name exists and defines what they say it does."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [(ROOT / "docs" / page).read_text() for page in ("architecture.md", "adding.md")]
# `file`: `name`, or `file`: `name`, `name` and `name`
LIST = re.compile(r"`([\w./-]+\.(?:py|cpp|cu|h))`:\s+(`\w+`(?:(?:,|,?\s+and)\s+`\w+`)*)")
NAMED = sorted({(m[1], name) for page in PAGES for m in LIST.finditer(page) for name in re.findall(r"\w+(?=`)", m[2])})
FILES = sorted({name for page in PAGES for name in re.findall(r"`([\w-]+/[\w./-]+\.(?:py|cpp|cu|h))`", page)})
# a folder's name in a row may be the end of a list that begins with its parent's
FOLDERS = sorted({x for page in PAGES for x in re.findall(r"`((?:python|kernels|csrc|benches|tests)/[\w/]*)`", page)})


@pytest.mark.parametrize(("file", "name"), NAMED, ids=lambda x: str(x))
def test_the_file_defines_it(file, name):
    text = (ROOT / file).read_text()
    if file.endswith(".py"):  # a function, a class, or a table
        assert re.search(rf"^\s*(?:def|class|async def) {name}\b|^{name}\b[^=\n]*=", text, re.M)
    else:  # a type, or a function's head: its name and an open parenthesis, where no call's semicolon ends the line
        assert re.search(rf"^(?:struct|enum class) {name}\b|^[^/;=]*\b{name}\([^;]*$", text, re.M)


@pytest.mark.parametrize("file", FILES)
def test_the_file_exists(file):
    assert (ROOT / file).is_file()


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_folder_exists(folder):
    assert (ROOT / folder).is_dir()


def test_something_was_looked_up():
    assert len(NAMED) > 100 and len(FILES) > 60 and len(FOLDERS) > 8


def test_the_walk_of_q_has_the_same_name_down_to_the_backend():
    for op in ("decode", "prefill"):
        for file in ("ops.py", "eager.py", "backends/triton.py", "backends/cuda.py", "backends/cpu.py"):
            assert re.search(rf"^def {op}\(", (ROOT / "python/pagewire" / file).read_text(), re.M)
