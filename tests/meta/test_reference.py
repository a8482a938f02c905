"""The reference against SciPy, against numbers worked out by hand, and against a second way of writing the formulas."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import scipy.special
from hypothesis import given
from hypothesis import strategies as st

import cuattn
from cuattn import reference
from cuattn.errors import ArgumentError
from cuattn.reference.narrow import decode
from cuattn.testing.strategies import DTYPES, FLOAT8_DTYPES, OPTIONS, attention_problems, examples, softmax_inputs


def by_loops(q, k, v, *, scale=None, causal=False, window=None, chunk=None, softcap=None, bias=None, mask=None,
             alibi_slopes=None, sinks=None, diagonal_offset=None, dropout_p=0.0, dropout_seed=0, dropout_offset=0,
             dropout_origin=None, precision=None, q_descale=None, k_descale=None, v_descale=None,
             fp8_format=None):  # fmt: skip
    """Attention one number at a time, from the contract, sharing nothing with the reference but the dropout mask."""
    if fp8_format is not None:
        q, k, v = (x.view(f"float8_{fp8_format}") for x in (q, k, v))
    (batch, n, heads, d), (m, groups, e) = q.shape, v.shape[1:]
    out, lse = np.zeros((batch, n, heads, e)), np.full((batch, heads, n), -np.inf)
    bias = None if bias is None else np.broadcast_to(bias, (batch, heads, n, m))
    mask = None if mask is None else np.broadcast_to(mask, (batch, heads, n, m))
    slopes = None if alibi_slopes is None else np.broadcast_to(alibi_slopes, (batch, heads))
    qd, kd, vd = (np.ones((batch, groups)) if x is None else x.astype(float) for x in (q_descale, k_descale, v_descale))
    keep = cuattn.dropout_mask(batch, heads, n, m, dropout_p=dropout_p, dropout_seed=dropout_seed,
                               dropout_offset=dropout_offset, dropout_origin=dropout_origin)  # fmt: skip
    offsets = np.broadcast_to((0 if causal == "top_left" else m - n) if diagonal_offset is None else diagonal_offset,
                              batch)  # fmt: skip
    for b in range(batch):
        for h in range(heads):
            for i in range(n):
                at, g = i + int(offsets[b]), h * groups // heads
                weights, keys = [], []
                for j in range(m):
                    s = float(np.dot(q[b, i, h].astype(float), k[b, j, g].astype(float))) * qd[b, g] * kd[b, g]
                    s *= 1 / math.sqrt(d) if scale is None else scale
                    s = s if softcap is None else softcap * math.tanh(s / softcap)
                    s -= 0 if slopes is None else float(slopes[b, h]) * abs(at - j)
                    s += 0 if bias is None else float(bias[b, h, i, j])
                    left, right = window or (None, None)
                    hidden = (
                        (causal and j > at)
                        or (left is not None and j < at - left)
                        or (right is not None and j > at + right)
                        or (chunk is not None and at // chunk != j // chunk)
                        or (mask is not None and not mask[b, h, i, j])
                    )
                    if not hidden:
                        weights.append(s)
                        keys.append(v[b, j, g].astype(float) * vd[b, g] * keep[b, h, i, j] / (1 - dropout_p))
                if sinks is not None:
                    weights.append(float(sinks[h]))
                    keys.append(np.zeros(e))
                largest = max(weights, default=-math.inf)
                if largest == math.inf:
                    out[b, i, h], lse[b, h, i] = np.nan, np.nan
                elif largest > -math.inf:
                    p = [math.exp(w - largest) for w in weights]
                    lse[b, h, i] = largest + math.log(math.fsum(p))
                    out[b, i, h] = sum(x * y for x, y in zip(p, keys, strict=True)) / math.fsum(p)
    return out, lse


@examples(200)
@given(
    attention_problems(
        options=OPTIONS, max_seqlen=7, allow_empty=True, dtype=st.sampled_from((*DTYPES, *FLOAT8_DTYPES))
    )
)
def test_attention_agrees_with_loops(problem):
    out, lse = reference.attention(*problem.arrays, **problem.options)
    expected_out, expected_lse = by_loops(*problem.arrays, **problem.options)
    fp8_format = problem.options.get("fp8_format")
    largest = max(float(np.abs(decode(x, fp8_format).astype(float)).max(initial=0)) for x in problem.arrays)
    np.testing.assert_allclose(out, expected_out, rtol=1e-10, atol=1e-12 * (1 + largest**3))
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-10, atol=1e-12 * (1 + largest**2))


@examples(60)
@given(softmax_inputs(infinities=False))
def test_softmax_agrees_with_scipy(guarded):
    x = guarded.array.astype(np.float64)
    np.testing.assert_allclose(reference.softmax(x), scipy.special.softmax(x, axis=-1), rtol=1e-12)
    np.testing.assert_allclose(reference.log_softmax(x), scipy.special.log_softmax(x, axis=-1), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(reference.logsumexp(x), scipy.special.logsumexp(x, axis=-1), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(reference.softmax(x, 0), scipy.special.softmax(x, axis=0), rtol=1e-12)


def test_softmax_of_infinities():
    inf = np.inf
    x = np.array([[-inf, -inf], [-inf, 0.0], [inf, 0.0], [np.nan, 0.0]])
    nan = np.nan
    np.testing.assert_array_equal(reference.softmax(x), [[0, 0], [0, 1], [nan, nan], [nan, nan]])
    np.testing.assert_array_equal(reference.log_softmax(x), [[-inf, -inf], [-inf, 0], [nan, nan], [nan, nan]])
    np.testing.assert_array_equal(reference.logsumexp(x), [-inf, 0, nan, nan])
    np.testing.assert_array_equal(reference.logsumexp(np.zeros((2, 0))), [-inf, -inf])


def test_by_hand():
    """Two keys whose logits differ by log 3, so that the probabilities are 1/4 and 3/4."""
    q = np.ones((1, 1, 1, 1))
    k = np.array([0.0, math.log(3.0)]).reshape(1, 2, 1, 1)
    v = np.array([[8.0, 0.0], [4.0, 1.0]]).reshape(1, 2, 1, 2)
    out, lse = reference.attention(q, k, v)
    np.testing.assert_allclose(out.ravel(), [5.0, 0.75], rtol=1e-15)
    np.testing.assert_allclose(lse.ravel(), [math.log(4.0)], rtol=1e-15)
    # A sink of log 4 doubles the denominator and appears nowhere else.
    out, lse = reference.attention(q, k, v, sinks=[math.log(4.0)])
    np.testing.assert_allclose(out.ravel(), [2.5, 0.375], rtol=1e-15)
    np.testing.assert_allclose(lse.ravel(), [math.log(8.0)], rtol=1e-15)


def test_order_of_logits():
    """scale, softcap, ALiBi, bias, mask: every other order of these five gives another number."""
    q, k = np.full((1, 1, 1, 1), 2.0), np.full((1, 2, 1, 1), 3.0)
    s = reference.logits(
        q, k, scale=0.5, softcap=2.0, alibi_slopes=[0.25], bias=np.array([1.0, np.inf]), mask=np.array([True, False])
    )
    # o = M - N = 1: the only query stands at key 1, at distance 1 from key 0.
    np.testing.assert_allclose(s.ravel(), [2 * math.tanh(1.5) - 0.25 + 1.0, -np.inf], rtol=1e-15)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["111", "111"]),
        ({"causal": True}, ["110", "111"]),
        ({"causal": "bottom_right"}, ["110", "111"]),
        ({"causal": "top_left"}, ["100", "110"]),
        ({"causal": True, "diagonal_offset": -1}, ["000", "100"]),
        ({"window": (0, 0)}, ["010", "001"]),
        ({"window": (1, None)}, ["111", "011"]),
        ({"window": (None, 0), "diagonal_offset": 0}, ["100", "110"]),
        ({"causal": True, "window": (0, 5)}, ["010", "001"]),
        ({"causal": "top_left", "mask": np.array([False, True, True])}, ["000", "010"]),
    ],
)
def test_visible_by_hand(options, expected):
    seen = reference.visible(2, 3, **options)
    assert ["".join("01"[int(x)] for x in row) for row in np.broadcast_to(seen, (1, 1, 2, 3))[0, 0]] == expected


def test_diagonal_offset_may_differ_by_batch_entry():
    seen = reference.visible(1, 3, causal=True, diagonal_offset=[0, 2])
    np.testing.assert_array_equal(seen[:, 0, 0], [[True, False, False], [True, True, True]])


def test_head_map():
    """Query head h reads key/value head h // (H // G)."""
    v = np.array([5.0, 7.0]).reshape(1, 1, 2, 1)
    out, _ = reference.attention(np.zeros((1, 1, 6, 1)), np.zeros((1, 1, 2, 1)), v)
    np.testing.assert_array_equal(out.ravel(), [5, 5, 5, 7, 7, 7])


def test_tf32_by_hand():
    x = np.float32([1, 1 + 2**-10, 1 + 2**-11, 1 + 2**-11 - 2**-23, -3e38, np.inf, -np.inf, 1e-45])
    expected = np.float32([1, 1 + 2**-10, 1 + 2**-10, 1, np.float32(-3e38), np.inf, -np.inf, 0])
    rounded = reference.round_to_tf32(x)
    np.testing.assert_array_equal(rounded[[0, 1, 2, 3, 5, 6, 7]], expected[[0, 1, 2, 3, 5, 6, 7]])
    assert abs(rounded[4] / -3e38 - 1) <= 2**-11 and np.isnan(reference.round_to_tf32([np.nan])).all()
    assert not (rounded.view(np.uint32) & 0x1FFF).any()
    # the float32 arithmetic of the naive computation sees the rounded numbers
    q, k, v = np.float32([1 + 2**-12]), np.float32([1, 0]), np.float32([1 + 2**-12, 1 + 2**-12])
    naive, lse = reference.attention_naive(
        q.reshape(1, 1, 1, 1), k.reshape(1, 2, 1, 1), v.reshape(1, 2, 1, 1), precision="tf32"
    )
    assert naive.item() == 1 and abs(lse.item() - math.log(math.e + 1)) < 1e-6


def test_bytes_need_a_format():
    x = np.zeros((1, 1, 1, 1), np.uint8)
    with pytest.raises(ArgumentError, match="fp8_format is None; uint8 arrays need one of 'e4m3fn', 'e5m2'"):
        reference.attention(x, x, x)


def test_float8_by_hand():
    """0x40 is 2 in e4m3fn, and e5m2: 0x40 is 2 as well, 0x38 is 1 and 0.5."""
    q, k = np.full((1, 1, 2, 1), 0x40, np.uint8), np.uint8([0x38, 0]).reshape(1, 2, 1, 1)
    v = np.uint8([0x40, 0x38]).reshape(1, 2, 1, 1)
    factors = {"q_descale": [[0.5]], "k_descale": [[3.0]], "v_descale": [[10.0]], "scale": 1.0}
    for fp8_format, one in (("e4m3fn", 1.0), ("e5m2", 0.5)):
        out, lse = reference.attention(q, k, v, fp8_format=fp8_format, **factors)
        first, second = math.exp(2 * 0.5 * one * 3), 1
        expected = 10 * (2 * first + one * second) / (first + second)
        np.testing.assert_allclose(out.ravel(), [expected] * 2, rtol=1e-14)
        np.testing.assert_allclose(lse.ravel(), [math.log(first + second)] * 2, rtol=1e-14)
        naive, _ = reference.attention_naive(q, k, v, fp8_format=fp8_format, **factors)
        assert naive.dtype == ml_dtypes.bfloat16 and abs(float(naive.ravel()[0]) / expected - 1) < 2**-7


@pytest.mark.parametrize("causal", ["left", 1, None])
def test_causal_takes_bools_and_two_names(causal):
    with pytest.raises(ArgumentError, match="causal"):
        reference.visible(2, 2, causal=causal)


def test_empty_axes():
    out, lse = reference.attention(np.ones((2, 3, 4, 5)), np.ones((2, 0, 2, 5)), np.ones((2, 0, 2, 6)))
    assert out.shape == (2, 3, 4, 6) and not out.any() and np.isneginf(lse).all()
    assert reference.attention(np.ones((2, 0, 4, 5)), np.ones((2, 3, 2, 5)), np.ones((2, 3, 2, 6)))[0].shape[1] == 0
    assert reference.attention(*[np.ones((0, 2, 1, 4))] * 3)[0].shape == (0, 2, 1, 4)


@examples(60)
@given(softmax_inputs(max_columns=200), st.data())
def test_online_softmax_does_not_depend_on_the_pieces(guarded, data):
    x = guarded.array.astype(np.float64)
    cuts = sorted(data.draw(st.lists(st.integers(0, x.shape[1]), max_size=4)))
    states = []
    for piece in np.split(x, cuts, axis=1):
        states.append(reference.OnlineSoftmax(x.shape[:1]))
        states[-1].update(piece)
    state = states.pop(data.draw(st.integers(0, len(states) - 1)))
    for other in states:
        state.merge(other)
    scale = 1e-13 * (1 + np.abs(x, where=np.isfinite(x), out=np.zeros_like(x)).max())
    np.testing.assert_allclose(state.logsumexp(), reference.logsumexp(x), rtol=1e-12, atol=scale)
    np.testing.assert_allclose(state.probabilities(x), reference.softmax(x), rtol=1e-12 + scale)


@examples(60)
@given(attention_problems(options=("mask", "sinks"), max_seqlen=20, kinds=st.just("normal")), st.data())
def test_merged_parts_are_the_whole(problem, data):
    q, k, v = problem.arrays
    options = dict(problem.options)
    sinks = options.pop("sinks", None)
    mask = np.broadcast_to(options.pop("mask", True), (q.shape[0], q.shape[2], q.shape[1], k.shape[1]))
    cuts = sorted(data.draw(st.lists(st.integers(0, k.shape[1]), max_size=3)))
    bounds = list(zip([0, *cuts], [*cuts, k.shape[1]], strict=True))
    parts = [reference.attention(q, k[:, a:b], v[:, a:b], mask=mask[..., a:b], **options) for a, b in bounds]
    out, lse = reference.merge_states([out for out, _ in parts], [lse for _, lse in parts], sinks=sinks)
    expected_out, expected_lse = reference.attention(q, k, v, mask=mask, sinks=sinks, **options)
    np.testing.assert_allclose(out, expected_out, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-12, atol=1e-12)


def test_merge_ignores_what_an_empty_part_holds():
    out, lse = reference.merge_states(
        [np.ones((1, 1, 1, 2)), np.full((1, 1, 1, 2), np.nan)], [[[[0.5]]], [[[-np.inf]]]]
    )
    np.testing.assert_array_equal(out.ravel(), [1, 1])
    np.testing.assert_array_equal(lse.ravel(), [0.5])


def test_longdouble_is_finer_than_float64():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 9, 1, 16)) for _ in "qkv")
    coarse, _ = reference.attention(q, k, v)
    fine, lse = reference.attention(q, k, v, dtype=np.longdouble)
    assert fine.dtype == lse.dtype == np.longdouble
    np.testing.assert_allclose(coarse, fine.astype(float), rtol=1e-12)
    if np.finfo(np.longdouble).eps < np.finfo(np.float64).eps:
        assert (fine != fine.astype(np.float64)).any()


def test_naive_rounds_where_a_kernel_rounds():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 50, 1, 8)).astype(np.float16) for _ in "qkv")
    out, lse = reference.attention_naive(q, k, v)
    assert out.dtype == np.float16 and lse.dtype == np.float32
    exact, _ = reference.attention(q, k, v)
    error = np.abs(out - exact).max()
    assert 2**-15 < error < 2**-9
    p = reference.probabilities(q, k, dtype=np.float32).astype(np.float16).astype(np.float32)
    expected = (p[0, 0] @ v[0, :, 0].astype(np.float32)).astype(np.float16)
    np.testing.assert_array_equal(out[0, :, 0], expected)
