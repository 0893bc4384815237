"""Names a red test as soon as it is known (pytest -p named): a run that is cut off has no summary."""

from __future__ import annotations

import pytest

_LINES = 3  # of the error, the last ones


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In the process that hands the tests out, which hears of every one."""
    if not report.failed:
        return
    lines = [line for line in str(report.longrepr).splitlines() if line.startswith("E  ")]
    why = " | ".join(line[1:].strip() for line in lines[-_LINES:])
    print(f"\nFAILED {report.nodeid} - {why[:600]}", flush=True)
