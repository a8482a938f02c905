"""The Hopper kernel writes float32 where ``out`` is of that type: from registers, in pairs of columns or one by one."""

from __future__ import annotations

import numpy as np
import pytest
from attention_calls import prepare
from hopper_calls import BF16, SMALL, call, make
from unrounded import LAYOUTS, assert_rounds_to, into_float32

import cuattn
from cuattn.ops.attention.forward.hopper_config import HOPPER_FWD_CONFIGS
from cuattn.testing import assert_attention_close, kernels

F8 = np.dtype("float8_e4m3fn")


def unrounded(executor, arrays, layout=None, config=SMALL, **options):
    moved, options = prepare(executor, arrays, options)
    shape = *arrays[0].shape[:-1], arrays[2].shape[-1]
    return into_float32(
        executor, lambda out: kernels.attention(*moved, config=config, out=out, **options), shape, layout
    )


@pytest.mark.smoke
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("head_dim_v", (64, 40))
def test_it_is_what_is_rounded_otherwise(executor, layout, head_dim_v):
    arrays = make((70, 135), BF16, heads=(2, 1), head_dims=(64, head_dim_v))
    out, _ = call(executor, *arrays, causal=True)
    exact = unrounded(executor, arrays, layout, causal=True)
    assert_rounds_to(exact, out)
    assert_attention_close(exact, *arrays, causal=True, unrounded=True)


def test_e4m3(executor):
    row = next(row for row in HOPPER_FWD_CONFIGS if row.itemsize == 1)
    arrays = make((70, 135), F8)
    options = {"config": row, "precision": "fp8"}
    assert_rounds_to(unrounded(executor, arrays, **options), call(executor, *arrays, **options)[0])


def test_the_path_is_that_of_other_calls():
    q = np.zeros((1, 64, 2, 64), np.float16)
    path = cuattn.forward_path(q, q, q, out=np.empty(q.shape, np.float32), arch="sm_90a")
    assert path.kernel == "attention_forward_hopper"
