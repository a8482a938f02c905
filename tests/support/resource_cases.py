"""Which of the compiler's figures the suite looks at: a fixed sample. ``make resources`` looks at all of them.

A CUBIN takes the compiler half a second, no test of behaviour needs it, and what it shows changes only with a kernel or
a row of its table. So the suite takes, for each row and at the largest head dim that it serves, the kernels without
options and with everything on sm_90a, of the forward the causal ones too; on sm_80 every third row; and of what is
left (element-wise loads, smaller head dims, narrow formats, other architectures) one in six. Which ones is a fixed rule
that moves along the table, so that neighbouring rows are looked at in different ways.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def sampled(cases: Iterable[tuple[Any, ...]], *, one_in: int) -> list[Any]:
    """Arguments of a test, most of them marked `resources`: of the first `one_in` cases the first is not, of the next
    as many the second, and so on."""
    return [
        pytest.param(*case, marks=() if number % one_in == number // one_in % one_in else pytest.mark.resources)
        for number, case in enumerate(cases)
    ]
