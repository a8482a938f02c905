"""Fixtures and Hypothesis profiles of every test.

pytest                                             the suite: fixed examples, so that a failure is everyone's failure
pytest --hypothesis-profile=fuzz --max-examples=N  free examples, N of them in each property
pytest --all-resources                             registers and results of every row, of which the suite takes a sample
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

# Under xdist the processes share the cores already. The executor reads its number at call time; OpenBLAS reads its own
# when NumPy is first imported, below, and each idle thread of it would wait in a loop on a core of another process.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("CUATTN_HOST_THREADS", "1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import hypothesis
import pytest
from compile_budget import BUDGET, CompileBudget

from cuattn.testing.executors import ExecutorUnderTest, executor_names

# No deadlines: the first example of a kernel variant compiles it. One example in the profile is the floor that
# `cuattn.testing.strategies.examples` raises; properties without it say their own number.
_COMMON = dict(
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.register_profile("suite", max_examples=1, derandomize=True, **_COMMON)
hypothesis.settings.register_profile("fuzz", max_examples=1000, print_blob=True, **_COMMON)
hypothesis.settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--max-examples", type=int, help="examples of each property, with --hypothesis-profile=fuzz")
    parser.addoption("--all-resources", action="store_true", help="also the tests that are marked `resources`")


def pytest_configure(config: pytest.Config) -> None:
    wanted = config.getoption("--max-examples")
    if wanted is not None:  # registered under the same name, because Hypothesis loads the profile after this hook
        hypothesis.settings.register_profile("fuzz", max_examples=wanted, print_blob=True, **_COMMON)
    more = config.getoption("--hypothesis-profile", None) or config.getoption("--all-resources")
    config.pluginmanager.register(CompileBudget(None if more or executor_names() != ["host"] else BUDGET))


def pytest_collection_finish() -> None:
    """Modules and tests live as long as the process: without them, each collection of garbage takes a fraction."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if named := [item.nodeid for item in items if " at 0x" in item.nodeid]:
        raise pytest.UsageError(f"an address in the name of a test differs from process to process: {named[0]}")
    if config.getoption("--all-resources"):
        return
    left_out = [item for item in items if item.get_closest_marker("resources")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("resources")]


@pytest.fixture(scope="module", params=executor_names())
def executor(request: pytest.FixtureRequest) -> Iterator[ExecutorUnderTest]:
    """Each executor that is here: the host always, with its checkers on; cuda when a device answers."""
    with ExecutorUnderTest(request.param).active() as active:
        yield active
