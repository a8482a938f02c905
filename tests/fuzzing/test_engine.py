"""Rounds: what fails is found, shrunk, reported once; coverage grows; time is kept."""

from __future__ import annotations

import random
import time
from typing import Any

import numpy as np
import pytest

from cuattn.testing import ToleranceError
from cuattn.testing.fuzzing import OPERATIONS, Array, Case, Fuzzer, How, run
from cuattn.testing.fuzzing.engine import signature
from cuattn.testing.fuzzing.operation import Drawing, Operation, Problem, Results

SOFTMAX = OPERATIONS["softmax"]
ONLINE = {"dtype": "float32", "algorithm": "online", "options": []}


def operation(wrong: Any, *, seconds: float = 0.0) -> Operation:
    """Doubling of numbers, which is wrong where `wrong` says so of (rows, columns); registered while a test runs."""

    def draw(draw: Any, skeleton: Any) -> dict[str, Any]:
        of = Drawing(draw)
        return {"x": of.array((of.length(20), of.length(20)), "float32", "normal", "wide")}

    def call(problem: Problem) -> Results:
        time.sleep(seconds)
        return {"out": 2 * problem["x"]}

    def check(problem: Problem, results: Results) -> None:
        rows, columns = problem["x"].shape
        if wrong(rows, columns):
            raise ToleranceError(f"out[{rows}, 3] is 1.5, expected 2")

    return Operation("doubling", ("doubling",), (), lambda rng: {"dtype": "float32", "options": []}, draw, call, check)


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Any:
    def known(one: Operation) -> Operation:
        monkeypatch.setitem(OPERATIONS, one.name, one)
        return one

    return known


def test_a_round_of_right_calls_covers_lines_and_kernels() -> None:
    fuzzer = Fuzzer([SOFTMAX], seed=1, examples=8)
    assert fuzzer.attempts(SOFTMAX, ONLINE) is None
    coverage = fuzzer.coverage
    assert coverage.cases == {"softmax": 8} and coverage.dtypes == {("softmax", "float32"): 8}
    assert 0 < coverage.margins["softmax"] <= 1
    assert any(line.startswith("softmax") for line in coverage.lines)
    assert coverage.lines.keys() <= coverage.lines_of_code
    assert any("softmax" in kernel for kernel in coverage.kernels)


def test_the_same_seed_draws_the_same_calls() -> None:
    drawn: list[list[str]] = []
    for _ in range(2):
        cases: list[str] = []
        fuzzer = Fuzzer([SOFTMAX], seed=3, examples=5, before=lambda case, cases=cases: cases.append(case.to_json()))
        fuzzer.attempts(SOFTMAX, ONLINE)
        drawn.append(cases)
    assert drawn[0] == drawn[1] and len(set(drawn[0])) > 1


def test_a_failure_is_shrunk(register: Any) -> None:
    one = register(operation(lambda rows, columns: rows >= 5 and columns >= 3))
    failure = Fuzzer([one], seed=0, examples=200).round()
    assert failure is not None and failure.whole
    assert failure.case.arguments == {"x": Array((5, 3), "float32")}
    assert failure.error == "ToleranceError: out[5, 3] is 1.5, expected 2"
    with pytest.raises(ToleranceError):
        run(failure.case)


def test_the_same_failure_is_reported_once(register: Any) -> None:
    one = register(operation(lambda rows, columns: columns > 2))
    fuzzer = Fuzzer([one], seed=0, examples=60)
    assert fuzzer.round() is not None
    assert fuzzer.round() is None


def test_failures_that_differ_in_numbers_are_one() -> None:
    assert signature("a", "RaceError: 5 bytes at 1e-3") == signature("a", "RaceError: 17 bytes at 2.5")
    assert signature("a", "RaceError: x") != signature("b", "RaceError: x") != signature("b", "FaultError: x")


def test_shrinking_is_cut_off(register: Any) -> None:
    one = register(operation(lambda rows, columns: rows * columns > 4, seconds=0.02))
    failure = Fuzzer([one], seed=0, examples=60).attempts(one, one.skeleton(random.Random(0)), shrinking_s=0.1)
    assert failure is not None and not failure.whole
    with pytest.raises(ToleranceError):
        run(failure.case)


def test_a_round_ends_in_time(register: Any) -> None:
    one = register(operation(lambda rows, columns: False, seconds=0.05))
    fuzzer, began = Fuzzer([one], seed=0, examples=1000), time.monotonic()
    assert fuzzer.round(deadline=began + 0.2) is None
    assert 1 <= fuzzer.coverage.cases["doubling"] < 10


def test_operations_take_turns(register: Any) -> None:
    one = register(operation(lambda rows, columns: False))
    fuzzer = Fuzzer([SOFTMAX, one], seed=0, examples=3)
    fuzzer.coverage.cases["softmax"] = 1000
    fuzzer.round()
    assert fuzzer.coverage.cases["doubling"] >= 3


def test_inputs_that_a_call_changes_are_a_failure(register: Any) -> None:
    one = operation(lambda rows, columns: False)

    def call(problem: Problem) -> Results:
        problem["x"][...] = 0
        return {"out": np.zeros(1)}

    register(Operation(one.name, one.functions, (), one.skeleton, one.draw, call, one.check))
    with pytest.raises(AssertionError, match="changed its input x"):
        run(Case("doubling", {"x": Array((2, 2), "float32")}))


def test_orders_that_give_other_bits_are_a_failure(register: Any) -> None:
    one, calls = operation(lambda rows, columns: False), []

    def call(problem: Problem) -> Results:
        calls.append(1)
        return {"out": np.float32(len(calls) > 3)[None]}

    register(Operation(one.name, one.functions, (), one.skeleton, one.draw, call, one.check))
    case = Case("doubling", {"x": Array((2, 2), "float32")})
    run(case, How(schedules=1))
    with pytest.raises(AssertionError, match="out has other bits"):
        run(case, How(schedules=1))
