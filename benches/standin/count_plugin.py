"""pytest plugin: how many distinct Triton compilations the tests that a run collects would need on sm_90.

Nothing is compiled and no kernel writes its result, so most tests fail at their first comparison: a lower bound. For
rehearse.py, with the tests of the backend "triton".
"""

from __future__ import annotations

import json
import os
from typing import Any

# before anything imports Triton, and before tests/conftest.py, which leaves alone what is set
os.environ["TRITON_INTERPRET"] = "0"
os.environ["PAGEWIRE_TEST_DEVICE"] = "cpu"

import pytest  # noqa: E402
import triton  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from pagewire import registry  # noqa: E402
from pagewire.bench import pretend  # noqa: E402

_gpu = pretend.gpu(90)  # as long as the process runs
_launches = 0
_found: set[tuple[str, str]] = set()


def pytest_configure(config: pytest.Config) -> None:
    driver.set_active(pretend.NoDevice(90))
    chosen = registry.choose
    _gpu.__enter__()
    registry.choose = chosen  # tests also ask for other backends
    (backend,) = (b for b in registry.BACKENDS if b.name == "triton")
    object.__setattr__(backend, "unavailable", lambda device: None)  # it is frozen
    original = JITFunction.run

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        global _launches
        _launches += 1

        def note(*, key: str, **told: Any) -> bool:
            _found.add((self.__name__, key))
            return True  # do not compile

        triton.knobs.runtime.jit_cache_hook = note
        original(self, *args, grid=grid, warmup=True, **options)

    JITFunction.run = run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if "triton" in item.nodeid]


def pytest_unconfigure() -> None:
    print("\n" + json.dumps({"launches": _launches, "compilations": len(_found)}))
