"""Fixtures of the tests of the Hopper kernels."""

from __future__ import annotations

import pytest

from cuattn.testing.executors import ExecutorUnderTest, executor_names


@pytest.fixture(scope="module", params=executor_names())
def executor(request):
    """Each executor that is here and has these kernels."""
    if request.param == "cuda" and ExecutorUnderTest("cuda").xp.cuda.Device().compute_capability != "90":
        pytest.skip("the GPU is no Hopper")
    with ExecutorUnderTest(request.param).active() as active:
        yield active
