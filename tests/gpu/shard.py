"""A process of ``on_gpu.py``, which runs pytest on its share of the tests and sends each result."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import pytest


class Collected(NamedTuple):
    """The tests of the share, sent before the first of them runs."""

    tests: list[str]


class Started(NamedTuple):
    """A test has started."""

    test: str


class Finished(NamedTuple):
    """A test has run, or a module can't be collected.

    Args:
        test: node id of the test or module.
        outcome: "passed", "failed" or "skipped".
        seconds: its duration, including fixtures.
        message: why it failed or was skipped.
    """

    test: str
    outcome: str
    seconds: float
    message: str


@dataclass(frozen=True)
class Share:
    """The tests that one process runs: every ``count``-th test, starting with test ``number``.

    Args:
        paths: files and folders with tests.
        marks: a pytest mark expression that selects some of them.
        number, count: index of this share, and number of shares.
        passed: tests that no share runs, because they have already passed.
        settled: tests of this share that an earlier process has already run.
    """

    paths: tuple[str, ...]
    marks: str
    number: int = 0
    count: int = 1
    passed: frozenset[str] = frozenset()
    settled: frozenset[str] = frozenset()


def run_share(share: Share, connection: Connection, log: Path) -> None:
    """Run ``share`` in this process, append pytest's output to ``log``, and exit."""
    os.setsid()  # so that it can be killed as a group with the processes that tests start
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    options = ["-q", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    sys.exit(pytest.main([*options, "-m", share.marks, *share.paths], plugins=[Sender(share, connection)]))


class Sender:
    """A pytest plugin that selects the tests of ``share`` and sends their results."""

    def __init__(self, share: Share, connection: Connection) -> None:
        self.share = share
        self.send = connection.send
        self.reports: list[pytest.TestReport] = []  # reports of the running test

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        todo = [item for item in items if item.nodeid not in self.share.passed]
        todo = todo[self.share.number :: self.share.count]
        items[:] = [item for item in todo if item.nodeid not in self.share.settled]
        self.send(Collected([item.nodeid for item in items]))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if not report.passed and self.share.number == 0:  # the other shares have the same error
            self.send(Finished(report.nodeid, report.outcome, 0.0, _message(report)))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.reports = []
        self.send(Started(nodeid))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.append(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        shown = next((report for report in self.reports if report.failed), None)
        shown = shown or next((report for report in self.reports if report.skipped), self.reports[0])
        seconds = sum(report.duration for report in self.reports)
        self.send(Finished(nodeid, shown.outcome, round(seconds, 2), _message(shown)))
        if shown.failed and _gpu_is_lost():
            os._exit(1)  # all later tests would fail, and PyTorch can't even shut down


def _message(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Return why a test failed or was skipped."""
    if report.skipped and isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    return report.longreprtext


def _gpu_is_lost() -> bool:
    """Return whether CUDA is unusable in this process, as after an out-of-bounds access."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
