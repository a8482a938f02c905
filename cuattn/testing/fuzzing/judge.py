"""Making a call and saying whether it was right: by its results, by its inputs, in any order of warps."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from cuattn.testing.executors import ExecutorUnderTest
from cuattn.testing.fuzzing.case import Case
from cuattn.testing.fuzzing.catalogue import choose
from cuattn.testing.fuzzing.operation import Problem, Results
from cuattn.testing.margins import margins

__all__ = ["CHECKERS", "How", "Outcome", "checked", "run"]

CHECKERS = ("mem", "init", "race")


@dataclass(frozen=True)
class How:
    """How calls are made: the executor; on the host its checkers, and how many random orders beside the late one."""

    executor: str = "host"
    checkers: tuple[str, ...] = CHECKERS
    schedules: int = 0
    seed: int = 0


@dataclass
class Outcome:
    """What a right call did."""

    margin: float = 0.0
    margins: dict[str, float] = field(default_factory=dict)
    lines: Counter[str] = field(default_factory=Counter)
    lines_of_code: set[str] = field(default_factory=set)
    kernels: Counter[str] = field(default_factory=Counter)


def run(case: Case, how: How | None = None) -> Outcome:
    """Make the call of a case and check it.

    On the host executor the checkers are on, and asynchronous copies land as late as they may; then the call is made
    again, `how.schedules` times, with copies that land at random and warps in random order: the bits have to be the
    same.

    Raises
    ------
    AssertionError
        A result is out of bound (:class:`cuattn.testing.ToleranceError`), an input or what is around it was written, or
        two orders gave different bits.
    cuattn.errors.KernelFault, and everything else that the call raises
        What the checkers found, a refusal, a crash of Python code.
    """
    how = how or How()
    (operation,) = choose([case.operation])
    executor = ExecutorUnderTest(how.executor)
    problem = Problem(case.arguments, executor)
    outcome = Outcome()
    with checked(how, "late", 0), _profiled(how) as profile:
        results = operation.call(problem)
    if profile is not None:
        outcome.lines, outcome.kernels = profile.lines, profile.kernels
        outcome.lines_of_code = profile.lines_of_code
    if how.executor == "host":
        problem.check_inputs()
    with margins() as found:
        operation.check(problem, results)
    outcome.margin, outcome.margins = found.worst, found.largest
    for index in range(how.schedules if how.executor == "host" and case.arguments.get("deterministic", True) else 0):
        with checked(how, "random", how.seed + index):
            again = operation.call(problem)
        _assert_same(results, again, how.seed + index)
    return outcome


@contextmanager
def checked(how: How, asynchrony: str, seed: int) -> Iterator[None]:
    """Switch the checkers on, and let copies and warps come as is said; on a GPU nothing of that."""
    if how.executor != "host":
        yield
        return
    host = importlib.import_module("cuattn.host")
    with host.check(*how.checkers), host.schedule(asynchrony, seed):
        yield


def _profiled(how: How) -> Any:
    return importlib.import_module("cuattn.host").profile() if how.executor == "host" else nullcontext()


def _assert_same(results: Results, again: Results, seed: int) -> None:
    differ: Sequence[str] = [name for name, x in results.items() if x.tobytes() != again[name].tobytes()]
    if differ:
        raise AssertionError(f"{differ[0]} has other bits when copies and warps come in the random order {seed}")
