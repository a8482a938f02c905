"""The benchmark cases of the padding functions and of merge_states: they run, check, and count what is moved."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cuattn import host
from cuattn.testing.padding_cases import MergeCase, PaddingCase, PaddingPlanCase

CASES = (
    PaddingPlanCase(3, 40),
    PaddingPlanCase(3, 40, fill=0.2, known=True),
    PaddingCase(3, 40, 24),
    PaddingCase(1, 40, 24, fill=0.5, dtype="float32", kind="restore_padding"),
    MergeCase(3, 2, 5, 2, 40),
    MergeCase(2, 2, 5, 2, 40, dtype="float64", sinks=True),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases_run_and_are_right(executor, case):
    inputs = case.make_inputs(seed=1, xp=executor.xp)
    case.check(inputs, case.run(inputs))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bytes_of_cases_are_written_once(case):
    """The bytes of the formula that are written are those that the kernels write, but for the counts of a plan."""
    inputs = case.make_inputs()
    with host.profile() as profile:
        case.run(inputs)
    written = profile.bytes["global"]["write"]
    if isinstance(case, PaddingPlanCase):
        assert written == case.num_bytes - case.batch * case.seqlen + 4
    elif isinstance(case, PaddingCase):
        result = case.run(inputs)
        assert written == result.nbytes
        rows = inputs["x"].nbytes if case.kind == "restore_padding" else result.nbytes
        assert case.num_bytes == rows + written + 4 * len(result.reshape(-1, case.width))
    else:
        assert written == case.num_bytes // (case.num_parts + 1)


@pytest.mark.parametrize("fill", [0.0, 0.1, 0.5, 0.75, 1.0])
def test_masks_are_as_full_as_they_say(fill):
    case = PaddingPlanCase(32, 100, fill)
    mask = case.make_inputs()["mask"]
    assert mask.sum() == case.num_tokens
    assert abs(case.num_tokens - fill * 3200) <= 16
    np.testing.assert_array_equal(mask, np.sort(mask, axis=1)[:, ::-1])


def test_a_wrong_result_fails():
    case = PaddingCase(3, 40, 24)
    inputs = case.make_inputs()
    result = case.run(inputs)
    result[5, 7] += 1
    with pytest.raises(AssertionError):
        case.check(inputs, result)
    plan = PaddingPlanCase(3, 40)
    inputs = plan.make_inputs()
    with pytest.raises(AssertionError):
        plan.check(inputs, replace(plan.run(inputs), max_seqlen=1))
