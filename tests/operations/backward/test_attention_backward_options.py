"""Gradients with each option that moves or hides logits, alone and at its edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
from backward_calls import after_forward, assert_right, assert_same, bounds, call_backward, same_bits
from backward_formats import BF16, F16, F32, F64
from hypothesis import given
from hypothesis import strategies as st
from test_attention_backward import normal as make
from test_attention_backward import of_problem

from cuattn import reference
from cuattn.testing.backward_problems import gradient_problems
from cuattn.testing.options import make_bias, make_mask
from cuattn.testing.strategies import OPTIONS, aligned_layouts, examples

#: (N, M): several tiles each way, more queries than keys, one query, one key.
SEQLENS = ((70, 135), (135, 70), (1, 65), (65, 1))


def right(executor, arrays, extra=None, **options):
    """The gradients of a call, compared with the reference; `extra` are options of the backward call alone."""
    saved = after_forward(executor, *arrays, dlse=True, **options)
    return saved, assert_right(executor, saved, **(extra or {}))


# --- window and diagonal ----------------------------------------------------------------------------------------------

WINDOWS = ((0, 0), (0, None), (None, 0), (3, 17), (64, 64), (130, 0), (1000, 1000), (None, 2**31 - 2))


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("seqlens", SEQLENS[:2], ids=str)
def test_windows(executor, seqlens, window):
    right(executor, make(F16, 1, seqlens), window=window)


@pytest.mark.parametrize("causal", (True, "top_left"))
def test_a_window_and_a_causal_mask(executor, causal):
    for seqlens in SEQLENS:
        right(executor, make(F16, 1, seqlens), window=(9, 5), causal=causal)


def test_a_window_without_bounds_is_none(executor):
    saved = after_forward(executor, *make(F16))
    grads = call_backward(executor, saved)
    assert same_bits(call_backward(executor, saved.but(options={"window": (None, None)})), grads)


@pytest.mark.parametrize("offset", (0, -40, 40, -135, 70, -(2**31) + 1, 2**31 - 1), ids=str)
@pytest.mark.parametrize("options", ({"causal": True}, {"window": (20, 3)}, {"window": (0, None)}), ids=str)
def test_diagonal_offsets(executor, options, offset):
    """Rows and keys outside of the band have gradients of 0, whole tiles of them too."""
    _, grads = right(executor, make(F16, 1, (135, 70)), diagonal_offset=offset, **options)
    seen = reference.visible(135, 70, diagonal_offset=offset, **options)[0, 0]
    assert not grads.dq[:, ~seen.any(axis=1)].any()
    assert not grads.dk[:, ~seen.any(axis=0)].any() and not grads.dv[:, ~seen.any(axis=0)].any()


def test_a_diagonal_for_each_batch_entry(executor):
    arrays, offsets = make(F16, 3, (70, 100)), np.int32([35, -30, 200])
    saved, grads = right(executor, arrays, causal=True, diagonal_offset=offsets)
    for b, offset in enumerate(offsets.tolist()):
        one = saved.but(
            **{name: x[b : b + 1] for name, x in zip(("dout", "q", "k", "v", "out", "lse"), saved.arrays, strict=True)},
            dlse=saved.dlse[b : b + 1],
            options={"causal": True, "diagonal_offset": offset},
        )
        assert same_bits(call_backward(executor, one)[:3], [x[b : b + 1] for x in grads[:3]])


def test_what_a_window_hides_is_never_felt(executor):
    """Huge keys and values outside of the window, in tiles that are skipped and in tiles that are not."""
    q, k, v = make(F16, 1, (70, 200))
    saved = after_forward(executor, q, k, v, window=(20, 3))
    expected = call_backward(executor, saved)
    seen = reference.visible(70, 200, window=(20, 3)).any(axis=2).ravel()
    assert not seen[:100].all()
    k[:, ~seen], v[:, ~seen] = 6e4, -6e4
    assert same_bits(call_backward(executor, saved), expected)
    assert not expected.dk[:, ~seen].any() and not expected.dv[:, ~seen].any()


# --- softcap ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", (0.5, 15.0, 1e4))
def test_softcap(executor, softcap):
    q, k, v = make(F16)
    for factor in (1, 30):
        right(executor, ((q * F16.type(factor)), k, v), softcap=softcap)


def test_a_softcap_far_above_the_logits_is_none(executor):
    plain = after_forward(executor, *make(F32))
    capped = after_forward(executor, *make(F32), softcap=1e4, alibi_slopes=[0.0, 0.0])
    expected, bound = bounds(plain)
    grads = call_backward(executor, capped)
    for name in ("dq", "dk", "dv"):
        np.testing.assert_allclose(getattr(grads, name), getattr(expected, name), rtol=1e-3, atol=1e-4)
    assert_same(call_backward(executor, plain), expected, bound)


def test_a_softcap_that_is_reached_leaves_nothing_to_learn(executor):
    """Logits far beyond the cap: tanh is flat there, so dq and dk are 0 while dv is not."""
    q, k, v = make(F16)
    saved = after_forward(executor, np.abs(q) + 30, np.abs(k) + 30, v, softcap=2.0)
    grads = assert_right(executor, saved)
    assert not grads.dq.any() and not grads.dk.any() and grads.dv.all()


# --- ALiBi ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slopes", ([0.5, 0.02], [-0.05, 0.25], [[0.1, 0.2], [0.3, 0.0]], [20.0, 1e-4]), ids=str)
def test_slopes(executor, slopes):
    """Usual, negative (far keys weigh more), one for each batch entry, steep."""
    right(executor, make(F16), alibi_slopes=np.float32(slopes))


def test_alibi_is_a_bias(executor):
    arrays = make(F16)
    distance = np.abs(np.arange(70)[:, None] + 65 - np.arange(135))
    bias = -np.float32([0.5, 0.02]).reshape(1, 2, 1, 1) * distance.astype(np.float32)
    saved = after_forward(executor, *arrays, alibi_slopes=[0.5, 0.02])
    assert same_bits(call_backward(executor, saved), call_backward(executor, saved.but(options={"bias": bias})))


# --- bias and mask ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ((2, 2, 70, 135), (70, 135), (2, 1, 1, 135), (2, 70, 1), ()), ids=str)
@pytest.mark.parametrize("kind", ("infinities", "lowest"))
def test_bias(executor, shape, kind):
    """Also rows of -inf, whose gradients are 0, and elements of +inf, whose rows are NaN."""
    if not shape and kind == "infinities":
        kind = "normal"
    bias = make_bias(np.random.default_rng(0), shape, np.float32, kind)
    right(executor, make(F16), bias=bias)


@pytest.mark.parametrize("dtype", (F16, F32), ids=str)
def test_a_nan_stays_in_its_row(executor, dtype):
    """A row with a logit of +inf: NaN in its dq and in the keys of its head, and in nothing else."""
    q, k, v = make(dtype, heads=(2, 2))
    bias = np.zeros((2, 2, 70, 135), np.float32)
    bias[:, :, :, 40] = -np.inf
    more = {} if dtype == F16 else {"softcap": 50.0}
    saved = after_forward(executor, q, k, v, bias=bias, **more)
    expected = call_backward(executor, saved)
    hit = bias.copy()
    hit[0, 1, 3, 7] = np.inf
    lost = after_forward(executor, q, k, v, bias=hit, **more)
    grads = assert_right(executor, lost)
    assert np.isnan(grads.dq[0, 3, 1]).all() and np.isnan(grads.dq).sum() == 32
    keys = np.arange(135) != 40  # what is hidden is nothing, NaN or not
    for x in (grads.dk, grads.dv):
        assert np.isnan(x[0, keys, 1]).all() and np.isnan(x).sum() == 134 * 32
        assert not x[:, 40].any()
    for got, before in zip(grads[:3], expected[:3], strict=True):
        assert same_bits([got[1], got[0, :, 0]], [before[1], before[0, :, 0]])
    others = np.arange(70) != 3
    assert same_bits([grads.dq[0, others, 1]], [expected.dq[0, others, 1]])


@pytest.mark.parametrize("kind", ("random", "sparse", "blocks", "lengths", "nothing", "everything"))
def test_mask(executor, kind):
    shape = (2, 1, 1, 135) if kind == "lengths" else (2, 2, 70, 135)
    mask = make_mask(np.random.default_rng(0), shape, kind, 64)
    _, grads = right(executor, make(F16), mask=mask)
    seen = np.broadcast_to(mask, (2, 2, 70, 135))
    assert not grads.dq.swapaxes(1, 2)[~seen.any(axis=3)].any()
    unseen = ~seen.any(axis=(1, 2))
    assert not grads.dk[unseen].any() and not grads.dv[unseen].any()


def test_a_mask_is_a_bias_of_minus_infinity(executor):
    mask = make_mask(np.random.default_rng(1), (70, 135), "random")
    bias = np.where(mask, 0, -np.inf).astype(np.float32)
    saved = after_forward(executor, *make(F16), mask=mask, alibi_slopes=[0.0, 0.1])
    as_bias = saved.but(options={"bias": bias, "alibi_slopes": [0.0, 0.1]})
    assert same_bits(assert_right(executor, saved), call_backward(executor, as_bias))


def test_huge_values_behind_a_mask_are_never_felt(executor):
    q, k, v = make(F16)
    mask = np.random.default_rng(0).random(135) < 0.5
    saved = after_forward(executor, q, k, v, mask=mask)
    expected = call_backward(executor, saved)
    k[:, ~mask], v[:, ~mask] = 6e4, -6e4
    assert same_bits(call_backward(executor, saved), expected)


# --- sinks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (F16, F32, F64), ids=str)
def test_sinks(executor, dtype):
    for sinks in ([0.5, -2.0], [8.0, -math.inf], [1000.0, -math.inf]):
        _, grads = right(executor, make(dtype, 2, (40, 70)), sinks=np.float32(sinks))
        assert grads.dsinks.shape == (2,) and grads.dsinks.dtype == (F64 if dtype == F64 else F32)


def test_a_sink_of_minus_infinity_is_none(executor):
    saved = after_forward(executor, *make(F16), dlse=True)
    grads = call_backward(executor, saved.but(options={"sinks": [-math.inf] * 2}))
    assert not grads.dsinks.any()
    assert same_bits(grads[:3], call_backward(executor, saved)[:3])


def test_rows_with_a_sink_and_no_key(executor):
    """All of lse is the sink there, and so is all of dlse; the keys have none of it."""
    for options in ({"causal": True, "diagonal_offset": -100}, {"mask": np.zeros((1, 1, 1, 135), bool)}):
        saved, grads = right(executor, make(F16), sinks=np.float32([1.25, -7.5]), **options)
        assert not any(x.any() for x in grads[:3])
        np.testing.assert_allclose(grads.dsinks, saved.dlse.sum(axis=(0, 2)), rtol=1e-4, atol=1e-5)


def test_no_keys_at_all(executor):
    q, k, v = make(F16, 2, (70, 0))
    options = {"softcap": 3.0, "alibi_slopes": [0.1, 0.2], "dropout_p": 0.5, "sinks": np.float32([3.0, -4.0])}
    saved = after_forward(executor, q, k, v, dlse=True, bias=np.zeros((2, 2, 70, 0), np.float32), **options)
    grads = call_backward(executor, saved)
    assert not grads.dq.any() and grads.dk.shape == k.shape and grads.dv.shape == v.shape
    np.testing.assert_allclose(grads.dsinks, saved.dlse.sum(axis=(0, 2)), rtol=1e-4, atol=1e-5)


# --- everything -------------------------------------------------------------------------------------------------------


@examples(1)
@given(
    problem=gradient_problems(
        dtype=st.sampled_from((F16, BF16, F32, F64)),
        head_dims=st.sampled_from([(32, 32), (24, 16)]),
        layout=aligned_layouts(),
        options=OPTIONS,
    )
)
def test_drawn_options(executor, problem):
    """One here, as each may be a kernel of its own; thousands with the profile for fuzzing."""
    saved = of_problem(executor, problem)
    assert_right(executor, saved, return_dbias="bias" in saved.options)
