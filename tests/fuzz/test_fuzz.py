"""Random problems for every backend against an oracle of their own: `make fuzz MINUTES=10`.

PAGEWIRE_FUZZ_MINUTES is for each backend, shared out over the families of ops. A problem that crashes the process
is the one left in <temporary directory>/pagewire-fuzz-<backend>-<family>.txt.
"""

import os
import tempfile
from pathlib import Path

import pytest

from fuzz import slices
from fuzz.checks import check
from fuzz.strategies import FAMILIES

MINUTES = float(os.environ.get("PAGEWIRE_FUZZ_MINUTES") or 1)
SHARES = {"attention": 0.55, "append": 0.15, "merge": 0.1, "pack": 0.2}

# beside the share: shrinking, and building the CUDA emulation
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(60 * MINUTES + 600),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy under the Triton interpreter
]


@pytest.mark.parametrize("family", FAMILIES)
def test_random_problems(family, backend, device, capsys):
    journal = Path(tempfile.gettempdir()) / f"pagewire-fuzz-{backend}-{family}.txt"
    counts, failure = slices.run(
        FAMILIES[family](backend),
        lambda problem: check(problem, backend, device),
        60 * MINUTES * SHARES[family],
        journal,
    )
    with capsys.disabled():
        print(f"\nfuzz {backend} {family}: {counts['run']} problems, {counts['refused']} refused")
    if failure:  # a sentence and a problem to paste, instead of Hypothesis's frames
        pytest.fail(failure, pytrace=False)
    assert counts["run"], "every problem was refused"
