"""Each option of attention that moves or hides logits, alone and at its edges."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from attention_calls import assert_right, call
from hypothesis import given
from hypothesis import strategies as st

from cuattn import reference
from cuattn.testing import assert_attention_close
from cuattn.testing.strategies import (
    DTYPES,
    FLOAT8_DTYPES,
    OPTIONS,
    attention_problems,
    examples,
    fill,
)

F16, BF16, F32, F64 = map(np.dtype, (np.float16, ml_dtypes.bfloat16, np.float32, np.float64))

#: (N, M): several tiles each way, one more than a tile, more queries than keys, one query, one key.
SEQLENS = ((70, 135), (129, 129), (135, 70), (1, 65), (65, 1))
seqlens = pytest.mark.parametrize("seqlens", SEQLENS, ids=str)


def make(seqlens, dtype=F16, *, heads=(2, 1), head_dims=(32, 32), batch=2, seed=0):
    """q, k and v of standard normal numbers."""
    rng = np.random.default_rng(seed)
    shapes = (
        (batch, seqlens[0], heads[0], head_dims[0]),
        (batch, seqlens[1], heads[1], head_dims[0]),
        (batch, seqlens[1], heads[1], head_dims[1]),
    )
    return [fill(shape, dtype, "normal", rng) for shape in shapes]


def same_bits(one, other):
    return all(x.tobytes() == y.tobytes() for x, y in zip(one, other, strict=True))


# --- window and diagonal ---------------------------------------------------------------------------------------------

WINDOWS = ((0, 0), (0, None), (None, 0), (3, 17), (64, 64), (130, 0), (None, None), (1000, 1000), (None, 2**31 - 2))


@seqlens
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_windows(executor, seqlens, window):
    for dtype in (F16, F32):
        assert_right(executor, *make(seqlens, dtype), window=window)


@pytest.mark.parametrize("causal", (True, "top_left"))
def test_a_window_and_a_causal_mask(executor, causal):
    for seqlens in SEQLENS:
        assert_right(executor, *make(seqlens), window=(9, 5), causal=causal)


def test_a_window_without_bounds_is_none(executor):
    arrays = make((70, 135))
    assert same_bits(call(executor, *arrays, window=(None, None)), call(executor, *arrays))
    assert same_bits(call(executor, *arrays, window=(None, 0)), call(executor, *arrays, causal=True))


@pytest.mark.parametrize("offset", (0, -40, 40, -135, 70, -(2**31) + 1, 2**31 - 1), ids=str)
@pytest.mark.parametrize("options", ({"causal": True}, {"window": (20, 3)}, {"window": (0, None)}), ids=str)
def test_diagonal_offsets(executor, options, offset):
    q, k, v = make((135, 70))
    out, lse = assert_right(executor, q, k, v, diagonal_offset=offset, **options)
    seen = np.broadcast_to(reference.visible(135, 70, diagonal_offset=offset, **options).any(axis=-1), lse.shape)
    assert not out.swapaxes(1, 2)[~seen].any() and np.isneginf(lse[~seen]).all() and np.isfinite(lse[seen]).all()


@pytest.mark.parametrize("make_offsets", (np.int32, list, np.int64), ids=["int32", "list", "int64"])
def test_a_diagonal_for_each_batch_entry(executor, make_offsets):
    arrays = make((70, 135), batch=4)
    offsets = [65, -30, 0, 200]
    for options in ({"causal": True}, {"window": (20, 3)}, {"alibi_slopes": np.float32([0.3, 0.01])}):
        out, lse = assert_right(executor, *arrays, diagonal_offset=make_offsets(offsets), **options)
        for b, offset in enumerate(offsets):
            own = [x[b : b + 1] for x in arrays]
            assert same_bits(call(executor, *own, diagonal_offset=offset, **options), (out[b : b + 1], lse[b : b + 1]))


def test_a_diagonal_alone_changes_nothing(executor):
    arrays = make((70, 135))
    assert same_bits(call(executor, *arrays, diagonal_offset=-50), call(executor, *arrays))


def test_an_offset_takes_the_place_of_top_left(executor):
    arrays = make((70, 135))
    both = [call(executor, *arrays, causal=causal, diagonal_offset=11) for causal in (True, "top_left")]
    assert same_bits(*both)


def test_what_a_window_hides_is_never_felt(executor):
    """Huge keys and values outside of the window, in tiles that are skipped and in tiles that are not."""
    for dtype, huge in ((F16, 6e4), (F32, 1e30)):
        q, k, v = make((70, 200), dtype)
        expected = call(executor, q, k, v, window=(20, 3))
        seen = reference.visible(70, 200, window=(20, 3)).any(axis=2).ravel()
        k[:, ~seen], v[:, ~seen] = huge, -huge
        assert same_bits(call(executor, q, k, v, window=(20, 3)), expected)


# --- softcap ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", (0.5, 15.0, 1e4, 1e-3))
@pytest.mark.parametrize("dtype", (F16, F32, F64), ids=str)
def test_softcap(executor, dtype, softcap):
    q, k, v = make((70, 135), dtype)
    for factor in (1, 30):
        assert_right(executor, (q * factor).astype(dtype), k, v, softcap=softcap)


@pytest.mark.parametrize("dtype", (F16, F32, F64), ids=str)
def test_softcap_of_logits_beyond_every_number(executor, dtype):
    """q.k overflows to +-inf in the accumulation; the cap makes it +-c: a row of two kinds of keys."""
    huge = {F16: 6e4, F32: 3e30, F64: 1e300}[dtype]
    q = np.full((1, 70, 1, 32), huge, dtype)
    k = np.full((1, 70, 1, 32), huge, dtype)
    k[:, 35:] = -huge
    v = np.zeros((1, 70, 1, 32), dtype)
    v[:, :35] = 1
    out, lse = call(executor, q, k, v, softcap=1.0, scale=1.0)
    share = math.e / (math.e + 1 / math.e)
    np.testing.assert_allclose(out.astype(float), share, rtol=1e-3 if dtype == F16 else 1e-6)
    np.testing.assert_allclose(lse, math.log(35 * (math.e + 1 / math.e)), rtol=1e-6)


# --- ALiBi -----------------------------------------------------------------------------------------------------------


@seqlens
@pytest.mark.parametrize("causal", (False, True, "top_left"))
def test_alibi(executor, seqlens, causal):
    slopes = np.float32([0.5, 0.02])
    for dtype in (F16, F32)[: 1 + (causal is True)]:
        assert_right(executor, *make(seqlens, dtype), alibi_slopes=slopes, causal=causal)


@pytest.mark.parametrize("slopes", ([0.0, 0.3], [-0.05, 0.25], [[0.1, 0.2], [0.3, 0.0]], [20.0, 1e-4]), ids=str)
def test_slopes(executor, slopes):
    """Zero, negative (far keys weigh more), one for each batch entry, steep."""
    for dtype in (np.float32, np.float64):
        assert_right(executor, *make((70, 135)), alibi_slopes=np.array(slopes, dtype))


def test_alibi_is_a_bias(executor):
    q, k, v = make((70, 135), F32)
    distance = np.abs(np.arange(70)[:, None] + 65 - np.arange(135))
    bias = -np.float32([0.5, 0.02]).reshape(1, 2, 1, 1) * distance.astype(np.float32)
    assert same_bits(call(executor, q, k, v, alibi_slopes=[0.5, 0.02]), call(executor, q, k, v, bias=bias))


# --- sinks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (F16, F32, F64), ids=str)
def test_sinks(executor, dtype):
    for sinks in ([0.5, -2.0], [8.0, -40.0], [1000.0, -math.inf]):
        out, _ = assert_right(executor, *make((70, 135), dtype), sinks=np.float32(sinks))
        assert sinks[0] < 1000 or not out[:, :, 0].any()


def test_a_sink_of_minus_infinity_is_none(executor):
    arrays = make((70, 135))
    assert same_bits(call(executor, *arrays, sinks=[-math.inf] * 2), call(executor, *arrays))
    out, lse = call(executor, *arrays, sinks=[-math.inf] * 2, causal=True, diagonal_offset=-30)
    assert not out[:, :30].any() and np.isneginf(lse[:, :, :30]).all() and np.isfinite(lse[:, :, 30:]).all()


def test_the_lse_of_a_row_without_keys_is_the_sink(executor):
    sinks = np.float32([1.25, -7.5])
    for options in ({"causal": True, "diagonal_offset": -100}, {"mask": np.zeros((1, 1, 1, 135), bool)}):
        out, lse = assert_right(executor, *make((70, 135)), sinks=sinks, **options)
        assert not out.any()
        np.testing.assert_allclose(lse, np.broadcast_to(sinks.reshape(1, 2, 1), lse.shape), rtol=2e-7)


def test_no_keys_at_all(executor):
    q, k, v = make((70, 0))
    bias, mask = np.zeros((2, 2, 70, 0), np.float32), np.zeros((70, 0), bool)
    options = {"bias": bias, "mask": mask, "softcap": 3.0, "alibi_slopes": [0.1, 0.2], "dropout_p": 0.5}
    out, lse = call(executor, q, k, v, **options)
    assert not out.any() and np.isneginf(lse).all()
    out, lse = call(executor, q, k, v, sinks=[3.0, -4.0], **options)
    assert not out.any() and (lse[:, 0] == 3).all() and (lse[:, 1] == -4).all()


@pytest.mark.parametrize("shape", ((0, 5, 7), (2, 0, 7)), ids=str)
def test_empty_results_with_options(executor, shape):
    batch, *seqlens = shape
    q, k, v = make(seqlens, batch=batch)
    options = {
        "bias": np.zeros((batch, 2, *seqlens), np.float32),
        "mask": np.ones((*seqlens,), bool),
        "alibi_slopes": np.ones((batch, 2), np.float32),
        "diagonal_offset": np.zeros(batch, np.int32),
        "sinks": [0.0, 1.0],
    }
    out, lse = call(executor, q, k, v, **options)
    assert out.shape == (batch, seqlens[0], 2, 32) and lse.shape == (batch, 2, seqlens[0])


# --- everything ------------------------------------------------------------------------------------------------------


@examples(4)
@given(
    problem=attention_problems(
        dtype=st.sampled_from((*DTYPES, *FLOAT8_DTYPES)),
        head_dims=st.sampled_from([(32, 32), (24, 16)]),
        options=OPTIONS,
    )
)
def test_drawn_options(executor, problem):
    """A few here, as each may be a kernel of its own; thousands with the profile for fuzzing."""
    out, lse = call(executor, problem.q, problem.k, problem.v, **problem.options)
    assert_attention_close(out, *problem.arrays, lse=lse, **problem.options)


def test_same_bits_in_any_schedule(executor):
    rng = np.random.default_rng(1)
    q, k, v = make((70, 135), heads=(4, 2))
    options = {
        "bias": rng.standard_normal((2, 4, 70, 135)).astype(np.float32),
        "mask": rng.random((1, 4, 70, 135)) < 0.6,
        "alibi_slopes": [0.1, 0.2, 0.3, 0.4],
        "sinks": [0.0, 1.0, 2.0, 3.0],
        "softcap": 5.0,
        "window": (50, 50),
        "dropout_p": 0.2,
    }
    expected = call(executor, q, k, v, **options)
    for asynchrony, seed in (("late", 1), ("random", 2), ("eager", 4)):
        with executor.active(asynchrony=asynchrony, seed=seed):
            assert same_bits(call(executor, q, k, v, **options), expected), (asynchrony, seed)
