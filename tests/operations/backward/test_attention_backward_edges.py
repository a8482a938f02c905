"""Gradients of rows and keys that are not there or see nothing, and of what a caller saved in place of forward."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from backward_calls import after_forward, assert_right, call_backward, same_bits
from backward_formats import BF16, DIM, F16, F32, F64
from test_attention_backward import normal

from cuattn.testing.strategies import DTYPES, fill


@pytest.mark.parametrize(("dtype", "options"), [(BF16, {}), (F32, {"precision": "tf32"}), (F32, {})], ids=str)
def test_a_row_whose_logits_all_overflow_sees_nothing(executor, dtype, options):
    """Its lse is -inf, though no key is hidden."""
    q, k, v = normal(dtype, 1, (40, 50), (2, 1), DIM)
    q[...], k[...] = 1e30, -1e30
    saved = after_forward(executor, q, k, v, **options)
    assert np.isneginf(saved.lse).all()
    grads = call_backward(executor, saved)
    assert not (grads.dq.any() or grads.dk.any() or grads.dv.any())


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4), (2, 5, 0), (2, 0, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_empty_axes(executor, dtype, shape, causal):
    batch, *seqlens = shape
    q, k, v = (x * 0 + 1 for x in normal(dtype, batch, seqlens, (4, 2), (32, 24)))
    saved = after_forward(executor, q, k, v, causal=causal, dlse=True)
    grads = call_backward(executor, saved)
    for got, like in zip(grads[:3], (q, k, v), strict=True):
        assert got.shape == like.shape and got.dtype == dtype and not got.any()


@pytest.mark.parametrize("dtype", (F16, F32, F64), ids=str)
@pytest.mark.parametrize("causal", [True, "top_left"])
def test_rows_without_keys_and_keys_without_rows(executor, dtype, causal):
    """Their gradients are 0, and the largest dout in such a row is nothing to the others."""
    seqlens, head_dims = (70, 40) if causal is True else (40, 70), {F16: (32, 32), F32: (31, 17), F64: (24, 16)}[dtype]
    saved = after_forward(executor, *normal(dtype, 2, seqlens, head_dims=head_dims), causal=causal)
    grads = assert_right(executor, saved)
    empty = np.isneginf(saved.lse).swapaxes(1, 2)
    assert empty[:, :30].all() == (causal is True)
    assert not grads.dq[empty].any() and all(np.isfinite(x).all() for x in grads[:3])
    if causal == "top_left":
        assert not grads.dk[:, 40:].any() and not grads.dv[:, 40:].any() and grads.dv[:, :40].all()
    saved.dout.array[empty] = ml_dtypes.finfo(dtype).max
    assert same_bits(call_backward(executor, saved), grads)


def test_saved_out_and_lse_are_what_counts(executor):
    """Not what forward would give: with other ones, the gradients are those of the formulas with them."""
    rng = np.random.default_rng(0)
    saved = after_forward(executor, *normal(F32, seqlens=(40, 70)))
    other = saved.but(
        out=fill(saved.out.shape, F32, "normal", rng), lse=saved.lse + fill(saved.lse.shape, F32, "normal", rng)
    )
    grads = assert_right(executor, other)
    assert not np.allclose(grads.dv, call_backward(executor, saved).dv, rtol=0.1)


@pytest.mark.parametrize("dtype", (F16, F32, F64), ids=str)
def test_a_row_whose_saved_lse_is_minus_infinity_saw_nothing(executor, dtype):
    """Whatever its logits are now: it gives nothing and gets nothing."""
    saved = after_forward(executor, *normal(dtype, 1, (40, 70)), dlse=True)
    saved.lse[:, :, ::7] = -np.inf
    grads = assert_right(executor, saved)
    assert not grads.dq[:, ::7].any() and grads.dq[:, 1::7].any()
