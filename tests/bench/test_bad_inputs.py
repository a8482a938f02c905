"""Some hundred of the cases of `bench.stress.bad_inputs`, and whether its judge sees a fault."""

from __future__ import annotations

import numpy as np
import pytest

import cuattn
from bench.stress.bad_inputs import judge
from bench.stress.bad_inputs.__main__ import report, run
from bench.stress.bad_inputs.call import Call
from bench.stress.bad_inputs.judge import Verdict, bounded_memory, case
from bench.stress.bad_inputs.values import MISSING, Value
from cuattn.errors import ArgumentError


@pytest.mark.parametrize("seed", [1, 2])
def test_bad_inputs(seed):
    """Every one gives what plain arrays give, or a typed error that names it, and nothing is written then."""
    with bounded_memory():
        verdicts = [case(seed, index) for index in range(300)]
    assert [verdict for verdict in verdicts if verdict.fault] == []
    assert sum(verdict.refused for verdict in verdicts) > 150
    assert sum(not verdict.refused for verdict in verdicts) > 30


def test_every_public_function_is_called():
    functions = {
        name
        for name in cuattn.__all__
        if callable(getattr(cuattn, name)) and not isinstance(getattr(cuattn, name), type)
    }
    flash = {name for name in dir(cuattn.compat.flash_attn) if name.startswith("flash_attn")}
    called = {make().function for make in judge.TARGETS.values()}
    names = {getattr(function, "__name__", "") for function in called} | {*judge.TARGETS}
    assert functions - names == set()
    assert len(flash & names) >= 8


def judged(function, given, **replaced):
    target = Call(function, given)
    return judge._judge("softmax", target, replaced)[0]


def number(x):
    if isinstance(x, str):
        raise KeyError(x)
    if x is None:
        raise ArgumentError("something is None")
    return float(x) + (type(x) is not float)


def test_the_judge_sees_faults(monkeypatch):
    monkeypatch.setitem(judge.TARGETS, "softmax", lambda: Call(number, {"x": 1.0}))
    given = {"x": 1.0}
    assert judged(number, given, x=Value("text", "1")).startswith("untyped KeyError")
    assert judged(number, given, x=Value("None", None)).startswith("no argument named")
    assert judged(number, given, x=Value("bool", True, never=True)) == "x (bool) was taken"
    assert judged(number, given, x=Value("int", 2, 2.0)) == "another result than with plain arrays"
    assert judged(number, given, x=Value("float", 2.0, 2.0)) == ""
    assert judged(number, given, x=Value("float", 2.0, MISSING)) == ""

    def writes(x):
        x[...] = 7
        raise ArgumentError("x is wrong")

    assert judged(writes, {}, x=Value("array", np.zeros(3))).startswith("written before it raised")


def test_cases_that_hang_or_die_are_faults(monkeypatch, capsys):
    def function(seed, index):
        if index == 1:
            raise SystemExit(3)
        while index == 2:
            pass
        return Verdict("", ("kind",), f"#{index}", True)

    monkeypatch.setattr("bench.stress.bad_inputs.__main__.case", function)
    verdicts = run(seed=1, count=5, workers=2, limit=0.5)
    assert sorted(verdict.fault for verdict in verdicts) == ["", "", "", "hangs", "killed"]
    assert report(verdicts) == 1
    assert report([verdict for verdict in verdicts if not verdict.fault]) == 0
    assert "3 cases, 0 faults" in capsys.readouterr().out
