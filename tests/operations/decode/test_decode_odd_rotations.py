"""RoPE in rows of which nothing is a whole number of 16-byte pieces: every number is read and turned for itself."""

from __future__ import annotations

import numpy as np
import pytest
from cached_calls import assert_right

from cuattn.ops.rotary.rope import Rotary
from cuattn.testing.arrays import Layout
from cuattn.testing.decode_problems import cached_problem

LAYOUTS = Layout(offset=1), Layout(pad=(0, 1, 0, 3), offset=1), Layout(pad=(1, 0, 1, 0), offset=1)
FORMS = {
    "float16": (np.float16, None, (31, 19)),
    "float32": (np.float32, None, (31, 19)),
    "float16 of nvfp4": (np.float16, "nvfp4", (30, 18)),
    "float32 of nvfp4": (np.float32, "nvfp4", (30, 18)),
}


@pytest.mark.parametrize("interleaved", (False, True))
@pytest.mark.parametrize("name", FORMS)
def test_five_pairs(executor, name, interleaved):
    dtype, kv_format, head_dims = FORMS[name]
    problem = cached_problem(
        np.random.default_rng(0), lengths=(70, 3), seqlens_q=2, heads=(4, 2), head_dims=head_dims, dtype=dtype,
        kv_format=kv_format, layouts=LAYOUTS, rope=Rotary(interleaved=interleaved, rotary_dim=10), rotate_keys=True,
    )  # fmt: skip
    assert_right(executor, problem)
