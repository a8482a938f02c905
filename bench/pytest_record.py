"""A pytest plugin: runs the tests of one executor, writes each result as soon as it is there, stops when time is up.

What it needs to know stands in the environment: BENCH_TEST_EXECUTOR is the executor, BENCH_TEST_RECORD the file, whose
tests are not run again, BENCH_TEST_SECONDS the time.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

import pytest

from cuattn.benchmark.results import scrub

from .gpu_run import end_with_parent

MAX_MESSAGE = 600


class Recorder:
    """Writes the results that the controlling process sees, so all of them under xdist too."""

    def __init__(self, path: str, seconds: float, session: pytest.Session) -> None:
        self.path = path
        self.until = time.monotonic() + seconds
        self.session = session

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A test has three reports; the one of its call counts, and any other that did not pass.
        if report.when == "call" or not report.passed:
            row: dict[str, Any] = {
                "test": report.nodeid,
                "outcome": report.outcome,
                "seconds": round(report.duration, 2),
            }
            if report.failed:
                row["message"] = scrub(report.longreprtext[-MAX_MESSAGE:])
            self.write(row)
        if time.monotonic() > self.until and not self.session.shouldstop:
            self.session.shouldstop = "the time is up"
            self.write({"stopped": True})

    def write(self, row: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def concerns(item: pytest.Item, executor: str) -> bool:
    """Whether a test runs on that executor: the fixture `executor` says so, or, for a GPU, the mark."""
    parameters: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
    marked = executor == "cuda" and item.get_closest_marker("cuda") is not None
    return parameters.get("executor") == executor or marked


def results_in(path: str) -> frozenset[str]:
    """The tests that a file of results knows."""
    if not os.path.exists(path):
        return frozenset()
    with open(path, encoding="utf-8") as file:
        return frozenset(json.loads(line).get("test", "") for line in file)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    executor = os.environ.get("BENCH_TEST_EXECUTOR")
    if executor:
        done = results_in(os.environ.get("BENCH_TEST_RECORD", ""))
        chosen = [item for item in items if concerns(item, executor) and item.nodeid not in done]
        kept = set(map(id, chosen))
        config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
        items[:] = chosen


def pytest_sessionstart(session: pytest.Session) -> None:
    path = os.environ.get("BENCH_TEST_RECORD")
    if path and not hasattr(session.config, "workerinput"):
        seconds = float(os.environ.get("BENCH_TEST_SECONDS", "inf"))
        end_with_parent()
        session.config.pluginmanager.register(Recorder(path, seconds, session), "cuattn-recorder")
