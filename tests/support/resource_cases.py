"""Which of the compiler's figures the suite looks at: a fixed sample. ``make resources`` looks at all of them.

A CUBIN takes the compiler half a second, no test of behaviour needs it, and what it shows changes only with a kernel or
a row of its table. So the suite takes, for each row and at the largest head dim that it serves, the kernels without
options and with everything on sm_90a, of the forward the causal ones too, and on sm_80 every third row. Of the Hopper
kernel beside d128, of lists of tiles and of the variants of attention it takes fewer; each test says how many. What is
left (element-wise loads, smaller head dims, narrow formats, single options, other architectures) it leaves out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def sampled(cases: Iterable[tuple[Any, ...]], *, one_in: int) -> list[Any]:
    """Arguments of a test, most of them marked `resources`: of the first `one_in` cases the first is not, of the next
    as many the second, and so on, so that neighbouring rows of a table are looked at in different ways."""
    return [
        pytest.param(*case, marks=() if number % one_in == number // one_in % one_in else pytest.mark.resources)
        for number, case in enumerate(cases)
    ]


def left_out(cases: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Arguments of a test, all of them marked `resources`."""
    return [pytest.param(*case, marks=pytest.mark.resources) for case in cases]
