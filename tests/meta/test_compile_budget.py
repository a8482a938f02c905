"""What the budget of compilations counts, and that a session above it fails."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from compile_budget import BUDGET, CompileBudget


def build_source(text, *, name, kind):
    return SimpleNamespace(key=f"{name}-{text}", kind=kind)


def counting(**budget):
    counter = CompileBudget(budget)
    return counter, counter.watch(build_source)


def test_each_variant_of_a_kernel_counts_once():
    counter, build = counting(ptx=1, cubin=1)
    for _ in range(2):
        assert build("a", name="/cuattn/kernels/softmax.cu", kind="ptx").kind == "ptx"
    build("a", name="/cuattn/kernels/softmax.cu", kind="cubin")
    build("b", name="a test's own.cu", kind="ptx")
    assert counter.excess() == ""
    build("b", name="/cuattn/kernels/softmax.cu", kind="ptx")
    assert counter.excess() == "2 ptx variants, 1 are allowed"


def test_processes_are_added_up_without_counting_twice():
    workers = [counting() for _ in "ab"]
    for index, (_, build) in enumerate(workers):
        for text in ("both", f"of {index}"):
            build(text, name="/cuattn/kernels/rope.cu", kind="ptx")
    control = CompileBudget({"ptx": 2})
    for worker, _ in workers:
        session = SimpleNamespace(config=SimpleNamespace(workeroutput={}))
        worker.pytest_sessionfinish(session)
        control.pytest_testnodedown(SimpleNamespace(workeroutput=session.config.workeroutput))
    control.pytest_testnodedown(SimpleNamespace())  # one that has crashed
    assert control.excess() == "3 ptx variants, 2 are allowed"


@pytest.mark.parametrize(("allowed", "expected"), [(0, pytest.ExitCode.TESTS_FAILED), (1, pytest.ExitCode.OK)])
def test_a_session_above_it_fails(allowed, expected):
    counter, build = counting(ptx=allowed)
    build("a", name="/cuattn/kernels/rope.cu", kind="ptx")
    session = SimpleNamespace(config=SimpleNamespace(), exitstatus=pytest.ExitCode.OK)
    counter.pytest_sessionfinish(session)
    assert session.exitstatus == expected


def test_this_session_is_counted(request):
    """The plugin is there, with the budget of the suite or, where more is run than that, with none."""
    (found,) = (plugin for plugin in request.config.pluginmanager.get_plugins() if isinstance(plugin, CompileBudget))
    assert found.budget in (None, BUDGET)
