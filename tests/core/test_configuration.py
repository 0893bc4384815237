"""docs/configuration.md names every environment variable of ours, and where it is read."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = dict(
    re.findall(r"^\| `(PAGEWIRE_\w+)` \|.*\| `([\w./]+)` \|$", (ROOT / "docs/configuration.md").read_text(), re.M)
)
# macros of the C++ sources
MACROS = re.compile(r"#\s*(?:define|ifdef|ifndef|undef)\s+(PAGEWIRE_\w+)|defined\((PAGEWIRE_\w+)\)")
READ = re.compile(r"[\"'](PAGEWIRE_[A-Z0-9_]+)[\"']")


def sources() -> list[Path]:
    files = [ROOT / "setup.py", ROOT / "tests/conftest.py", *(ROOT / "tests/fuzz").glob("*.py")]
    for folder, kinds in {
        "python": ("py",),
        "kernels": ("py",),
        "benches": ("py",),
        "csrc": ("py", "h", "cpp", "cu"),
    }.items():
        for kind in kinds:
            files += (ROOT / folder).rglob(f"*.{kind}")
    return files


def test_every_variable_has_a_row_and_every_row_a_variable():
    read, macros = set(), set()
    for path in sources():
        text = path.read_text()
        read |= set(READ.findall(text))
        macros |= {a or b for a, b in MACROS.findall(text)}
    assert read - macros == set(ROWS) and len(ROWS) > 20


@pytest.mark.parametrize("name", ROWS)
def test_it_is_read_where_the_page_says(name):
    assert name in READ.findall((ROOT / ROWS[name]).read_text())
