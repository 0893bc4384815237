"""The tables of docs/tuning/instructions.md, which are budgets."""

import pathlib

import pytest

TABLE = pathlib.Path(__file__).parents[2] / "docs" / "tuning" / "instructions.md"


def budgets(first_word: str, version: str | None = None) -> dict[str, int]:
    """case -> instructions, of the table whose header begins with this word, in the column of this version of a
    compiler; None: of the installed Triton.
    """
    if version is None:
        import triton

        version = "Triton " + ".".join(triton.__version__.split(".")[:2])
    tables = [block.splitlines() for block in TABLE.read_text().split("\n\n") if block.startswith(f"| {first_word}")]
    ((header, _, *rows),) = ([line.strip("| ").split(" | ") for line in lines] for lines in tables)
    if version not in header:
        pytest.skip(f"{TABLE.name} has no budgets for {version}")
    found = {row[0].strip("`"): row[header.index(version)] for row in rows}
    return {case: int(count) for case, count in found.items() if count != "-"}


def check(counted: dict[str, int], budgets: dict[str, int]) -> None:
    for case, budget in budgets.items():
        assert 0.95 * budget <= counted[case] <= budget, f"{case}: {counted[case]} instructions, {budget} in {TABLE}"
