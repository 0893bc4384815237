"""The C++ backend where it was built; elsewhere these tests are skipped with the reason."""

import pytest

import pagewire as pw


def pytest_collection_modifyitems(items):
    reason = pw.backends("cpu")["cpu"]
    for item in items:
        if reason is not None and item.path.parent.name == "cpu":
            item.add_marker(pytest.mark.skip(reason=reason))
