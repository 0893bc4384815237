"""A CUDA fault stays with its context: after one, no later test of the process can pass, whatever it tests.

So the process ends with the test that left it. Under pytest-xdist another worker runs the rest; alone, the session
stops. Registered by conftest.py on a GPU only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from typing import Any

import pytest

LOST = "its CUDA context is lost"
_RESTARTS = "500"  # xdist's own limit, 4 a worker, is for workers that never start; here each costs a failed test


class CudaFault:
    """`synchronise` raises once the context is lost. One object a process: the workers, and who hands the tests out."""

    def __init__(self, config: pytest.Config, synchronise: Callable[[], object]) -> None:
        self.synchronise = synchronise
        self.is_worker = hasattr(config, "workerinput")
        self.session: pytest.Session | None = None  # of the test after which the context was lost
        self.ended: set[str] = set()  # workers
        if getattr(config.option, "maxworkerrestart", "") is None:
            config.option.maxworkerrestart = _RESTARTS

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, Any, Any]:
        report = yield
        if report.failed and self.session is None and self._lost():
            self.session = item.session
            report.cuda_fault = True
            line = f"the {'worker' if self.is_worker else 'session'} ended: {LOST}"
            if hasattr(report.longrepr, "addsection"):
                report.longrepr.addsection("CUDA", line)
            else:
                report.longrepr = f"{report.longrepr}\n{line}"
        return report

    def _lost(self) -> bool:
        try:
            self.synchronise()
        except Exception:
            return True
        return False

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """The report has been printed or sent by now."""
        if not getattr(report, "cuda_fault", False):
            return
        if self.session is None:  # a worker's report arrives
            self.ended.add(report.worker_id)
            return
        try:  # servers of fixtures are stopped; what those say about the context is known
            self.session._setupstate.teardown_exact(None)
        except BaseException:
            pass
        if not self.is_worker:
            pytest.exit(f"{report.nodeid}: the session ended: {LOST}")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self) -> None:
        """The worker ends where its next test would begin: the one that failed is complete, and not run again."""
        if self.session is not None:
            os._exit(1)

    @pytest.hookimpl(wrapper=True, optionalhook=True)
    def pytest_xdist_make_scheduler(self) -> Generator[None, Any, Any]:
        """xdist 3.8 hands a file to a new worker that has not collected yet, when two end at about the same time."""
        sched = yield
        if hasattr(sched, "registered_collections"):  # distribution by file or scope
            reschedule = sched._reschedule
            sched._reschedule = lambda node: reschedule(node) if node in sched.registered_collections else None
        return sched

    @pytest.hookimpl(optionalhook=True)
    def pytest_handlecrashitem(self, crashitem: str, report: pytest.TestReport, sched: Any) -> None:
        """xdist takes the test that did not begin for the one that crashed: another worker runs it."""
        if report.node.gateway.id not in self.ended:
            return
        report.outcome, report.longrepr, report.when = "passed", None, "teardown"
        try:
            sched.mark_test_pending(crashitem)
        except NotImplementedError:
            pass  # distribution by file or scope has put it back itself
