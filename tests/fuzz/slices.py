"""Hypothesis in slices until the time is spent: a new slice is a new seed, so that no run repeats another one."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

import pagewire as pw
from fuzz.problems import Problem

SLICE = 40  # problems; each slice also tries the simplest one
SHRINKING_S = 45.0  # then the smallest failure so far is the answer


def run(
    strategy: SearchStrategy[Problem], body: Callable[[Problem], None], seconds: float, journal: Path
) -> tuple[Counter, str]:
    """(counts of "run" and "refused", what the smallest failing problem said or ""); stops at the first failure.

    body: raises AssertionError for a wrong result, BackendError for a refusal.
    journal: holds the problem under way, for the case that it ends the process; removed at the end.
    """
    counts: Counter = Counter()
    stop = time.monotonic() + seconds
    failures: dict[Problem, AssertionError] = {}
    shrink_until = [stop]

    @settings(
        max_examples=SLICE, database=None, deadline=None, suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink), report_multiple_bugs=False, print_blob=False,
    )  # fmt: skip
    @given(problem=strategy)
    def one(problem: Problem) -> None:
        if problem in failures:  # Hypothesis replays its answer, which must fail again
            raise failures[problem]
        if time.monotonic() > (shrink_until[0] if failures else stop):
            return
        journal.write_text(f"{problem!r}\n")
        try:
            body(problem)
            counts["run"] += 1
        except pw.BackendError:
            counts["refused"] += 1
        except AssertionError as error:
            if not failures:
                shrink_until[0] = time.monotonic() + SHRINKING_S
            failures[problem] = error
            raise

    try:
        while time.monotonic() < stop:
            one()
    except AssertionError as error:
        return counts, str(error)
    finally:
        journal.unlink(missing_ok=True)
    return counts, ""
