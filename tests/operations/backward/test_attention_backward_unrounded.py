"""``dq``, ``dk`` and ``dv`` of float32 for 16-bit inputs: gradients as they were summed."""

from __future__ import annotations

import numpy as np
import pytest
from attention_calls import prepare
from backward_calls import after_forward, call_backward
from backward_formats import BF16, F16
from packed_sequences import pack
from test_attention_backward import normal
from unrounded import LAYOUTS, assert_rounds_to

import cuattn
from cuattn.errors import DTypeError
from cuattn.testing.gradient_tolerance import gradient_bound
from cuattn.testing.tolerance import assert_within

NAMES = "dq", "dk", "dv"


def into_float32(executor, saved, names=NAMES, layout=None, **extra):
    """The gradients of a call that is given float32 arrays, among poison, for those of `names`."""
    shapes = dict(zip(NAMES, (saved.q.shape, saved.k.shape, saved.v.shape), strict=True))
    targets = {name: executor.guarded(shapes[name], np.float32, layout) for name in names}
    arrays, options = prepare(executor, (saved.dout, saved.q, saved.k, saved.v, saved.out, saved.lse), saved.options)
    function = cuattn.attention_varlen_backward if saved.starts else cuattn.attention_backward
    given = {name: target.array for name, target in targets.items()}
    grads = function(*arrays, *(saved.starts or ()), **options, **given, **extra)
    for name, target in targets.items():
        assert getattr(grads, name) is target.array
        target.check()
    return {name: executor.numpy(getattr(grads, name)) for name in NAMES}


def assert_unrounded(grads, rounded, names=NAMES):
    for name in NAMES:
        if name in names:
            assert_rounds_to(grads[name], getattr(rounded, name))
        else:
            np.testing.assert_array_equal(grads[name], getattr(rounded, name))


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", (F16, BF16), ids=str)
def test_they_are_what_is_rounded_otherwise(executor, dtype):
    """To the bit, and within the bound of the reference."""
    saved = after_forward(executor, *normal(dtype), causal=True)
    grads = into_float32(executor, saved)
    assert_unrounded(grads, call_backward(executor, saved))
    for name, expected, bound in zip(NAMES, *(x[:3] for x in gradient_bound(*saved.arrays, causal=True)), strict=True):
        assert_within(grads[name], expected, bound, name)


@pytest.mark.parametrize("names", (("dq",), ("dk",), ("dv",), ("dq", "dv")), ids=str)
def test_each_for_itself(executor, names):
    saved = after_forward(executor, *normal(F16), causal=True)
    assert_unrounded(into_float32(executor, saved, names), call_backward(executor, saved), names)


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
def test_any_layout_and_odd_head_dims(executor, layout):
    saved = after_forward(executor, *normal(F16, head_dims=(31, 17)), causal=True)
    assert_unrounded(into_float32(executor, saved, layout=layout), call_backward(executor, saved))


def test_sums_in_no_order(executor):
    """dq of the sums; those of one block of keys have one order."""
    saved = after_forward(executor, *normal(F16, seqlens=(70, 40)), causal=True)
    grads = into_float32(executor, saved, deterministic=False)
    assert_unrounded(grads, call_backward(executor, saved, deterministic=False))


def test_packed_sequences(executor):
    (q, k, v), starts = pack([(20, 9), (0, 5), (32, 40), (17, 70)], heads=(2, 2))
    saved = after_forward(executor, q, k, v, *starts, causal=True)
    assert_unrounded(into_float32(executor, saved), call_backward(executor, saved))


def test_head_dims_whose_gradients_take_a_launch_each(executor):
    """dv and dk apart, each in its own type."""
    saved = after_forward(executor, *normal(F16, batch=1, seqlens=(20, 40), head_dims=(160, 160)))
    for names in (NAMES, ("dv",)):
        assert_unrounded(into_float32(executor, saved, names), call_backward(executor, saved), names)


def test_keys_that_no_query_head_reads():
    q, k = np.zeros((1, 5, 0, 32), F16), np.zeros((1, 7, 0, 32), F16)
    out, lse = cuattn.attention(q, k, k, return_lse=True)
    dk = np.empty(k.shape, np.float32)
    assert cuattn.attention_backward(out, q, k, k, out, lse, dk=dk).dk is dk


def test_which_dtypes_are_refused():
    for dtype, wrong, allowed in (
        (np.float16, np.float64, "float16, or float32 where it is not to be rounded"),
        (np.float32, np.float64, "float32$"),
        (np.float64, np.float32, "float64$"),
    ):
        q = np.zeros((1, 5, 1, 32), dtype)
        out, lse = cuattn.attention(q, q, q, return_lse=True)
        with pytest.raises(DTypeError, match=f"dv has dtype .*; the gradient has dtype {allowed}"):
            cuattn.attention_backward(out, q, q, q, out, lse, dv=np.empty(q.shape, wrong))
