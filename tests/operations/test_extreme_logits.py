"""Logits, maxima and log-sum-exps of any size: what is finite in the reference is finite here, and right."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import cuattn
from cuattn.ops.attention.forward.hopper_config import HOPPER_FWD_CONFIGS
from cuattn.testing import (
    ToleranceError,
    assert_attention_close,
    assert_decode_close,
    assert_gradients_close,
    assert_varlen_close,
    assert_varlen_gradients_close,
    kernels,
)

F16, BF16, F32 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
HEAD_DIM = 32
#: Every residue of 16, the rows of a tensor-core tile, and whole tiles.
LENGTHS = (1, 7, 8, 9, 15, 16, 17, 33, 50, 64, 75)


def problem(dtype, level, seqlen_q, seqlen_k, seed=0):
    """q, k, v, dout whose logits are all about `level`, with differences of about 1 where float32 has them."""
    rng = np.random.default_rng(seed)
    q, k, v, dout = (rng.standard_normal((1, n, 2, HEAD_DIM)) for n in (seqlen_q, seqlen_k, seqlen_k, seqlen_q))
    size = np.sqrt(abs(level) * np.sqrt(HEAD_DIM))
    q[..., 0], k[..., 0] = size, np.copysign(size, level)
    return tuple(x.astype(dtype) for x in (q, k, v, dout))


def attend(executor, arrays, **options):
    """out, lse and, with both orders of dq, the gradients."""
    q, k, v, dout = (executor.array(x) for x in arrays)
    out, lse = cuattn.attention(q, k, v, return_lse=True, **options)
    orders = (True,) if arrays[0].dtype == F32 and options.get("precision") is None else (True, False)
    grads = [
        cuattn.attention_backward(dout, q, k, v, out, lse, deterministic=order, **options)
        for order in orders
    ]  # fmt: skip
    return executor.numpy(out), executor.numpy(lse), grads


@pytest.mark.parametrize("level", (-1e4, -60.0))
def test_keys_that_do_not_exist_beside_a_whole_tile_of_queries(executor, level):
    """The tile is seen in whole, and has elements to hide all the same: infinite probabilities of rows of zeros."""
    for seqlen_k in (7, 50):
        q, k, v, dout = problem(F16, level, 150, seqlen_k)
        out, lse, grads = attend(executor, (q, k, v, dout))
        for each in grads:
            assert_gradients_close(each, dout, q, k, v, out, lse)


@pytest.mark.parametrize("dtype", (F16, F32), ids=str)
def test_queries_that_do_not_exist_have_no_part_in_dbias(executor, dtype):
    """With a negative slope their logits are large as well, and of a row of zeros an infinite probability makes NaN."""
    q, k, v, dout = problem(dtype, 1.0, 20, 300)
    options = {"alibi_slopes": np.full(2, -4.0, np.float32), "bias": np.zeros(300, np.float32)}
    out, lse, _ = attend(executor, (q, k, v, dout), **options)
    arrays = (executor.array(x) for x in (dout, q, k, v, out, lse))
    grads = cuattn.attention_backward(*arrays, return_dbias=True, **options)
    assert_gradients_close(grads, dout, q, k, v, out, lse, **options)


@pytest.mark.parametrize("level", (-1e4, -60.0, 60.0, 1e4))
@pytest.mark.parametrize("dtype", (F16, BF16, F32), ids=str)
def test_maxima_of_any_level(executor, dtype, level):
    """Keys and queries beyond the ends are rows of zeros, e^(0 - lse) of them is infinite: they have no part in dq."""
    for seqlen_k in LENGTHS if abs(level) < 100 and level < 0 else LENGTHS[::3]:
        arrays = problem(dtype, level, 20, seqlen_k, seqlen_k)
        for options in ({}, {"causal": True}, {"window": (8, 8)})[: 1 + (seqlen_k == 33) * 2]:
            out, lse, grads = attend(executor, arrays, **options)
            q, k, v, dout = arrays
            assert_attention_close(out, q, k, v, lse=lse, **options)
            for each in grads:
                assert_gradients_close(each, dout, q, k, v, out, lse, **options)


def test_a_very_negative_lse_at_every_end_of_a_tile(executor):
    """Keys that fill any part of the last tile: those that are not there would have e^60 and more."""
    for seqlen_k in range(1, 66):
        q, k, v, dout = problem(F16, -60.0, 3, seqlen_k)
        out, lse, grads = attend(executor, (q, k, v, dout))
        for each in grads:
            assert_gradients_close(each, dout, q, k, v, out, lse)


def test_packed_sequences_with_a_very_negative_lse(executor):
    """Each sequence ends within a block of keys of its own."""
    starts = np.cumsum([0, 17, 1, 40]).astype(np.int32)
    q, k, v, dout = (x[0] for x in problem(F16, -60.0, 58, 58))
    arrays = [executor.array(x) for x in (q, k, v)]
    out, lse = cuattn.attention_varlen(*arrays, starts, starts, return_lse=True)
    saved = executor.numpy(out), executor.numpy(lse)
    assert_varlen_close(saved[0], q, k, v, starts, starts, lse=saved[1])
    for order in (True, False):
        grads = cuattn.attention_varlen_backward(
            executor.array(dout), *arrays, out, lse, starts, starts, deterministic=order
        )
        assert_varlen_gradients_close(grads, dout, q, k, v, *saved, starts, starts)


@pytest.mark.parametrize("deterministic", (True, False))
def test_a_bias_that_hides_all_but_a_little(executor, deterministic):
    """A row that sees everything at -1e4, as an additive mask makes it: its lse is -1e4."""
    q, k, v, dout = problem(BF16, 0.0, 20, 20)
    bias = np.zeros((1, 1, 20, 20), np.float32)
    bias[:, :, 3] = -1e4
    given = {"bias": executor.array(bias)}
    queries, keys, values, cotangents = (executor.array(x) for x in (q, k, v, dout))
    out, lse = cuattn.attention(queries, keys, values, return_lse=True, **given)
    grads = cuattn.attention_backward(
        cotangents, queries, keys, values, out, lse, deterministic=deterministic, **given
    )  # fmt: skip
    out, lse = executor.numpy(out), executor.numpy(lse)
    assert_attention_close(out, q, k, v, lse=lse, bias=bias)
    assert_gradients_close(grads, dout, q, k, v, out, lse, bias=bias)


@pytest.mark.parametrize("dtype, value", ((F16, 8000.0), (BF16, 133120.0), (BF16, 1e16), (F32, 133120.0)), ids=str)
def test_equal_logits_of_any_size_give_the_mean(executor, dtype, value):
    """Forward: the mean of the values. One key: a probability of 1, in every gradient."""
    for seqlen, options in ((1, {}), (40, {"causal": True}), (40, {"bias": np.zeros((1, 1), np.float32)})):
        x = np.full((1, seqlen, 1, HEAD_DIM), value, dtype)
        v, ones = np.full_like(x, 3), np.ones_like(x)
        out, lse, grads = attend(executor, (x, x, v, ones), **options)
        assert_attention_close(out, x, x, v, lse=lse, **options)
        np.testing.assert_allclose(out.astype(np.float64), 3, rtol=1e-6)
        for each in grads:
            dv = executor.numpy(each.dv).astype(np.float64)
            assert np.isfinite(dv).all()
            assert dv.max() <= seqlen  # no probability is above 1
            if seqlen == 1:
                assert (dv == 1).all()


@pytest.mark.parametrize("deterministic", (True, False))
@pytest.mark.parametrize("dtype", (F16, F32), ids=str)
def test_an_lse_that_is_below_its_only_logit(executor, dtype, deterministic):
    """By its last bits, as one that was computed elsewhere may be: e^(logit - lse) would be 7 and more, P is 1."""
    x = np.full((1, 1, 1, HEAD_DIM), 2300, dtype)  # a logit of 3 10^7
    v, dout = np.full_like(x, 3), np.full_like(x, 0.5)
    q, k, v, dout = (executor.array(a) for a in (x, x, v, dout))
    out, lse = cuattn.attention(q, k, v, return_lse=True)
    below = np.nextafter(np.nextafter(executor.numpy(lse), np.float32(0)), np.float32(0))
    grads = cuattn.attention_backward(dout, q, k, v, out, executor.array(below), deterministic=deterministic)
    np.testing.assert_array_equal(executor.numpy(grads.dv).astype(np.float64), 0.5)


@pytest.mark.parametrize("deterministic", (True, False))
def test_one_row_with_a_large_lse_wherever_it_is(executor, deterministic):
    """Every row has one key, and a probability of 1: a tile looks at all of its rows before it takes the short way."""
    # a head dim whose warps own two tiles of rows
    k = np.full((1, 1, 1, 64), 2300, F16)
    for row in (0, 7, 8, 15, 16, 24, 33, 40, 63):
        q = np.full((1, 64, 1, 64), 0.25, F16)
        q[0, row] = 2300
        dout = np.full_like(q, 0.5)
        arrays = [executor.array(x) for x in (q, k, np.full_like(k, 3))]
        out, lse = cuattn.attention(*arrays, return_lse=True)
        options = {"dlse": executor.array(np.full((1, 1, 64), 0.01, np.float32)), "deterministic": deterministic}
        grads = cuattn.attention_backward(executor.array(dout), *arrays, out, lse, **options)
        np.testing.assert_allclose(executor.numpy(grads.dv).astype(np.float64), 32, rtol=1e-3)
        np.testing.assert_allclose(executor.numpy(grads.dq).astype(np.float64), 0.01 * 2300 / 8, rtol=2e-3)


@pytest.mark.parametrize("dtype, size", ((F16, 6e3), (BF16, 3e4), (F32, 3e4)), ids=str)
def test_one_massive_activation(executor, dtype, size):
    """All queries look at one key, at logits of 10^7 and 10^8: it gets all of dout, and the others nothing."""
    rng = np.random.default_rng(3)
    q, k, v, dout = (rng.standard_normal((1, 70, 1, HEAD_DIM)).astype(dtype) for _ in range(4))
    q[..., 0], k[:, 5, :, 0] = size, size
    out, _, grads = attend(executor, (q, k, v, dout))
    np.testing.assert_array_equal(out.astype(np.float64), np.broadcast_to(v[:, 5:6], out.shape).astype(np.float64))
    for each in grads:
        dv = executor.numpy(each.dv).astype(np.float64)
        np.testing.assert_allclose(dv[:, 5], dout.astype(np.float64).sum(axis=1), rtol=0.01, atol=0.1)
        assert not np.delete(dv, 5, axis=1).any()


@pytest.mark.parametrize("dtype", (F16, BF16, F32), ids=str)
def test_a_large_maximum_in_another_row_changes_nothing_much(executor, dtype):
    """Rows of a warp share the path for large logits: beside one of 10^9 the ordinary ones stay right."""
    rng = np.random.default_rng(4)
    q, k, v, dout = (rng.standard_normal((1, 40, 1, HEAD_DIM)).astype(dtype) for _ in range(4))
    q[:, 7] = np.asarray(2e4).astype(dtype)
    k[:, :, :, 0] *= 200
    out, lse, grads = attend(executor, (q, k, v, dout))
    assert_attention_close(out, q, k, v, lse=lse)
    for each in grads:
        assert_gradients_close(each, dout, q, k, v, out, lse)


@pytest.mark.parametrize("dtype", (F16, BF16, F32), ids=str)
def test_maxima_that_tie_over_splits(executor, dtype):
    """Three keys of a tie in the first split and one in the last: 1/4 each, at logits of 10^9."""
    size = 8000 if dtype == F16 else 1e5
    q = np.full((1, 1, 1, HEAD_DIM), size, dtype)
    k = np.full((1, 400, 1, HEAD_DIM), -1, dtype)
    k[0, :3], k[0, 390] = q[0, 0], q[0, 0]
    v = np.zeros_like(k)
    v[0, 390] = 4
    for num_splits in (1, 2, 7):
        out = cuattn.decode_attention(*(executor.array(x) for x in (q, k, v)), [400], num_splits=num_splits)
        np.testing.assert_array_equal(executor.numpy(out).astype(np.float64), 1)


def tiny_problem(logit):
    """One key of logit 0 and value 0, and 1,000 of a lower one and value 1000: only what is tiny is seen."""
    q = np.zeros((1, 1, 1, HEAD_DIM), F16)
    k = np.zeros((1, 1001, 1, HEAD_DIM), F16)
    v = np.full_like(k, 1000)
    q[..., 0], k[0, 1:, 0, 0], v[0, 0] = 1, logit, 0
    return q, k, v


@pytest.mark.parametrize("logit", (-14.0, -19.0, -23.0))
def test_many_tiny_probabilities(executor, logit):
    """float16 alone ends at 2^-24 = e^-16.6; what is left is within the last bits of the smallest."""
    q, k, v = (executor.array(x) for x in tiny_problem(logit))
    exact = 1e6 * np.exp(logit) / (1 + 1000 * np.exp(logit))
    results = [cuattn.attention(q, k, v, scale=1.0), cuattn.standard_attention(q, k, v, scale=1.0)]
    results += [cuattn.decode_attention(q, k, v, [1001], scale=1.0, num_splits=n) for n in (1, 4)]
    for out in results:
        np.testing.assert_allclose(executor.numpy(out).astype(np.float64), exact, rtol=0.02)
        assert_attention_close(executor.numpy(out), *tiny_problem(logit), scale=1.0)


def test_both_on_hopper(executor):
    if executor.name == "cuda" and executor.xp.cuda.Device().compute_capability != "90":
        pytest.skip("the GPU is no Hopper")

    def attend(*arrays, **options):
        given = (executor.array(x) for x in arrays)
        out, lse = kernels.attention(*given, config=HOPPER_FWD_CONFIGS[0], return_lse=True, **options)
        assert_attention_close(executor.numpy(out), *arrays, lse=executor.numpy(lse), **options)
        return executor.numpy(out).astype(np.float64)

    x = np.full((1, 70, 1, HEAD_DIM), 8000, F16)
    assert (attend(x, x, np.full_like(x, 3), causal=True) == 3).all()
    x = np.full((1, 70, 1, HEAD_DIM), 133120, BF16)
    assert (attend(x, x, np.full_like(x, 3), causal=True) == 3).all()
    exact = 1e6 * np.exp(-23) / (1 + 1000 * np.exp(-23))
    np.testing.assert_allclose(attend(*tiny_problem(-23.0), scale=1.0), exact, rtol=0.02)


def test_many_tiny_probabilities_in_dv(executor):
    """dv of a key is the sum over 1,000 queries that hardly see it."""
    k = np.zeros((1, 2, 1, HEAD_DIM), F16)
    q = np.zeros((1, 1000, 1, HEAD_DIM), F16)
    q[..., 0], k[0, 1, 0, 0] = 1, -20
    v, dout = np.ones_like(k), np.full_like(q, 1000)
    out, lse, grads = attend(executor, (q, k, v, dout), scale=1.0)
    for each in grads:
        dv = executor.numpy(each.dv).astype(np.float64)
        np.testing.assert_allclose(dv[0, 1], 1e6 * np.exp(-20), rtol=0.02)
        assert_gradients_close(each, dout, q, k, v, out, lse, scale=1.0)


def test_what_is_hidden_is_ignored(executor):
    """Exactly what docs/numerics.md says: keys that a mask or their position hides, and values behind the last key that
    any query sees."""
    rng = np.random.default_rng(5)
    for dtype in (F16, F32):
        q, k, v = (rng.standard_normal((1, n, 2, HEAD_DIM)).astype(dtype) for n in (5, 40, 40))
        bad_k, bad_v = k.copy(), v.copy()
        bad_k[:, 6:] = np.nan
        bad_v[:, 6:] = np.inf
        for keys, values, options in (
            (bad_k, v, {"mask": np.arange(40) < 6}),
            (bad_k, v, {"causal": True, "diagonal_offset": 1}),
            (bad_k, bad_v, {"causal": True, "diagonal_offset": 1}),
        ):
            out = cuattn.attention(*(executor.array(x) for x in (q, keys, values)), **options)
            assert_attention_close(executor.numpy(out), q, k, v, **options)
        out = cuattn.decode_attention(*(executor.array(x) for x in (q, bad_k, bad_v)), [6])
        assert_decode_close(executor.numpy(out), q, k, v, [6])


@pytest.mark.parametrize("wrong", (0.0, np.nan, np.inf, 4.0))
def test_the_rule_stays_closed_at_any_size(wrong):
    """Logits of 10^10 are known to 1000 in float32: a mean of threes is 3 all the same."""
    x = np.full((1, 5, 1, HEAD_DIM), 60000.0, ml_dtypes.bfloat16)
    v = np.full_like(x, 3)
    out = np.full_like(x, 3)
    assert_attention_close(out, x, x, v)
    out[0, 2, 0, 1] = wrong
    with pytest.raises(ToleranceError):
        assert_attention_close(out, x, x, v)
