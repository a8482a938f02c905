"""The backward kernel of float32 and float64 (fused multiply-adds): each option alone, odd shapes, last digits."""

from __future__ import annotations

import numpy as np
import pytest
from backward_calls import after_forward, assert_right, call_backward
from option_cases import OPTION_CASES, option_case

from cuattn.testing.arrays import Layout, place
from cuattn.testing.options import make_mask

F32, F64 = map(np.dtype, (np.float32, np.float64))
DTYPES = (F32, F64)


def make(dtype, batch, seqlens, heads, head_dims, seed=0):
    """q [B, N, H, D], k [B, M, G, D], v [B, M, G, E]."""
    rng = np.random.default_rng(seed)
    (seqlen_q, seqlen_k), (num_heads, num_kv_heads), (head_dim, head_dim_v) = seqlens, heads, head_dims
    shapes = (
        (batch, seqlen_q, num_heads, head_dim),
        (batch, seqlen_k, num_kv_heads, head_dim),
        (batch, seqlen_k, num_kv_heads, head_dim_v),
    )
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def right(executor, arrays, **options):
    return assert_right(executor, after_forward(executor, *map(place, arrays), dlse=True, **options))


@pytest.mark.parametrize("case", OPTION_CASES)
def test_option(executor, case):
    """Two query heads a key head, several tiles on both sides, D != E."""
    shape = 2, 70, 135, 4, 2, 24, 32
    options = option_case(case, shape, F32)
    if "bias" in options and options["bias"].dtype != F32:  # the types of a bias are tested in 16 bits
        options["bias"] = options["bias"].astype(F32)
    right(executor, make(F32, 2, (70, 135), (4, 2), (24, 32)), **options)


@pytest.mark.parametrize("case", ("causal", "everything"))
def test_option_in_double(executor, case):
    options = option_case(case, (2, 70, 45, 2, 1, 24, 32), F64)
    right(executor, make(F64, 2, (70, 45), (2, 1), (24, 32)), **options)


@pytest.mark.parametrize("head_dims", ((1, 32), (31, 32), (32, 7)), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_dims_that_are_no_multiples_of_a_vector(executor, dtype, head_dims):
    right(executor, make(dtype, 1, (33, 65), (2, 1), head_dims))


@pytest.mark.parametrize(("dtype", "head_dims"), [(F32, (24, 256)), (F64, (190, 30))], ids=str)
def test_head_dims_that_differ(executor, dtype, head_dims):
    right(executor, make(dtype, 1, (40, 50), (1, 1), head_dims))


SEQLENS = ((1, 1), (1, 65), (64, 1), (31, 32), (32, 33), (63, 64), (65, 129), (128, 31))


@pytest.mark.parametrize("causal", (False, True))
def test_sequence_lengths(executor, causal):
    """One more and one less than every tile, on both sides."""
    for seqlens in SEQLENS:
        right(executor, make(F32, 1, seqlens, (2, 1), (24, 32)), causal=causal)


@pytest.mark.parametrize(("dtype", "options"), [(F32, {}), (F32, {"causal": True}), (F64, {"causal": True})], ids=str)
def test_packed_sequences(executor, dtype, options):
    """Every key/value head visits two query heads of its own sequence; some sequences have no queries or no keys."""
    starts_q, starts_k = np.int32([0, 33, 33, 34, 134]), np.int32([0, 1, 41, 41, 171])
    q, k, v = (x[0] for x in make(dtype, 1, (134, 171), (4, 2), (24, 32)))
    saved = after_forward(executor, *map(place, (q, k, v)), starts_q, starts_k, dlse=True, **options)
    grads = assert_right(executor, saved)
    assert not grads.dk[1:41].any() and not grads.dv[1:41].any()  # nobody asks for these keys
    assert not grads.dq[33:34].any()  # and this query has none


def test_classes_of_tiles(executor):
    """Hidden, open and mixed tiles side by side, others for each head: each side finds the class of its own tiles."""
    mask = make_mask(np.random.default_rng(0), (2, 4, 200, 135), "blocks", 64)
    right(executor, make(F32, 2, (200, 135), (4, 2), (24, 32)), mask=mask)


@pytest.mark.parametrize("pad", ((0, 0, 0, 8), (0, 2, 1, 3)), ids=("aligned", "elements"))
def test_gradients_have_strides_of_their_own(executor, pad):
    """Written in vectors or element by element, where the caller wants them and nowhere else."""
    q, k, v = make(F32, 2, (33, 40), (2, 2), (24, 32))
    saved = after_forward(executor, *map(place, (q, k, v)))
    expected = assert_right(executor, saved)
    layout = Layout((2, 0, 1, 3), pad)
    targets = {name: executor.guarded(x.shape, F32, layout) for name, x in (("dq", q), ("dk", k), ("dv", v))}
    grads = call_backward(executor, saved, **{name: target.array for name, target in targets.items()})
    for name, target in targets.items():
        target.check()
        np.testing.assert_array_equal(getattr(grads, name), getattr(expected, name))


@pytest.mark.parametrize(("dtype", "x"), [(F32, (10.0, 10.5)), (F64, (20.0, 20.5))], ids=("float32", "float64"))
def test_slope_of_a_softcap_near_its_cap(executor, dtype, x):
    """Where tanh is 1 to the last digit, its derivative still has its digits."""
    cap = 2.0
    x = np.array(x, np.longdouble)
    assert (np.tanh(x).astype(dtype) == 1).all()
    q, k, dout, v = (np.zeros((1, n, 1, 4), dtype) for n in (1, 2, 1, 2))
    q[..., 0] = dout[..., 0] = 1
    k[0, :, 0, 0], v[0, :, 0, 0] = cap * x, (1, -1)
    saved = after_forward(executor, q, k, v, dout=dout, softcap=cap, scale=1.0)
    grads = assert_right(executor, saved)
    # Both probabilities are 1/2, dP is v and delta 0.
    expected = np.array([0.5, -0.5]) / np.cosh(x) ** 2
    np.testing.assert_allclose(grads.dk[0, :, 0, 0], expected.astype(np.float64), rtol=20 * np.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_nan_is_felt_where_it_looks(executor, dtype):
    """A logit of +inf makes a query NaN, and the keys that it sees; not those that are hidden from it."""
    q, k, v = make(dtype, 1, (40, 70), (1, 1), (24, 32))
    bias, mask = np.zeros((40, 70), np.float32), np.ones((40, 70), bool)
    bias[3, 5] = np.inf
    mask[3, 60:], mask[7] = False, False
    saved = after_forward(executor, q, k, v, bias=bias, mask=mask)
    assert np.isnan(saved.lse[0, 0, 3]) and saved.lse[0, 0, 7] == -np.inf
    grads = call_backward(executor, saved)
    for of_keys in (grads.dk, grads.dv):
        assert np.isnan(of_keys[0, :60]).all() and np.isfinite(of_keys[0, 60:]).all()
    assert np.isnan(grads.dq[0, 3]).all() and np.isfinite(np.delete(grads.dq[0], 3, axis=0)).all()
    assert not grads.dq[0, 7].any()
