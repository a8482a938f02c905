"""The suite of linear attention on the host executor, in small, and what its cases say about themselves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cuattn.benchmark import Options, linear, operations, run_suite
from cuattn.testing.cases import AttentionCase
from cuattn.testing.linear_cases import LinearCase
from cuattn.testing.tolerance import ToleranceError

TINY = Options(executor="host", dtypes=("float16",), seqlens=(48,), head_dims=(32,), budget_s=0.01)
CASE = LinearCase(1, 150, 2, 32, num_k_heads=1, num_v_heads=1, decay="token")


def test_suite() -> None:
    report = run_suite(["linear"], options=TINY)
    assert report.failures == ()
    names = [record.case for record in report.records]
    assert len(names) == len(set(names)) == 8
    for record in report.records:
        assert record.metrics["num_bytes"] > 0 and record.metrics["flops"] > 0


@pytest.mark.parametrize("executor", ["host", "cuda"])
def test_cases(executor: str) -> None:
    cases = linear.cases(Options(), executor)
    names = [case.name for case in cases]
    assert len(names) == len(set(names))
    own = [case for case in cases if isinstance(case, LinearCase)]
    assert [case.backward for case in own] == [False, True] * (len(own) // 2)
    assert any(isinstance(case, AttentionCase) for case in cases) == (executor == "cuda")


def test_bytes_are_those_of_arrays() -> None:
    for case in (CASE, replace(CASE, backward=True), replace(CASE, decay="channel"), replace(CASE, decay=None)):
        arrays = case.make_inputs()
        result = case.run(arrays)
        written = [x for x in result if x is not None] if case.backward else [result]
        assert case.num_bytes == sum(x.nbytes for x in (*arrays.values(), *written))


def test_operations() -> None:
    """At D = E = 128, one head: what the contract of the kernels counts a token, and the gradients' share."""
    plain = LinearCase(1, 1, 1, 128)
    assert plain.flops == 4 * 128 * 128 + 4 * 64 * 128
    assert replace(plain, backward=True).flops == 10 * 128 * 128 + 2 * 64 * 5 * 128


@pytest.mark.parametrize("backward", [False, True])
def test_a_wrong_result_is_found(backward: bool) -> None:
    case = replace(CASE, backward=backward)
    arrays = case.make_inputs()
    result = case.run(arrays)
    operations.check(case, arrays, result)
    wrong = (result.dk if backward else result).copy()
    wrong[0, -1, 0] = np.flip(wrong[0, -1, 0])
    with pytest.raises(ToleranceError):
        case.check(arrays, result._replace(dk=wrong) if backward else wrong)
