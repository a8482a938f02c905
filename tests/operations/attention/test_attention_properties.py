"""What is true of attention whatever the numbers are, and the comparison with the reference over drawn problems."""

from __future__ import annotations

import math

import numpy as np
import pytest
from attention_calls import assert_same, same_kernel
from hypothesis import given
from hypothesis import strategies as st

import cuattn
from cuattn import reference
from cuattn.testing import assert_attention_close, assert_lse_close
from cuattn.testing.arrays import place
from cuattn.testing.pool import pooled
from cuattn.testing.rounding import accumulation_dtype, unit_roundoff
from cuattn.testing.strategies import DTYPES, attention_problems, dtypes, examples, fill, layouts, seqlens
from cuattn.testing.tolerance import assert_within

NORMAL = st.just("normal")
HEAD_DIMS = st.sampled_from([(32, 32), (24, 17), (64, 64), (40, 40)])  # of the fuzzer
#: Properties that need no variety of head dims share two compiled buckets; some have no bounds, or bounds of their own.
FEW = {"variants": pooled(buckets=((32, 32), (64, 64))), "head_dims": HEAD_DIMS}
FREE = {**FEW, "variants": pooled(buckets=((32, 32), (64, 64)), bounded=(False,))}
CAUSAL = st.sampled_from([False, True, "top_left"])


def call(executor, q, k, v, **options):
    """(out, lse) of a call as NumPy arrays, from NumPy arrays in any layout."""
    q, k, v = (executor.array(x) for x in (q, k, v))
    out, lse = cuattn.attention(q, k, v, return_lse=True, **options)
    return executor.numpy(out), executor.numpy(lse)


def normal(rng, dtype, *shapes):
    return [fill(shape, dtype, "normal", rng) for shape in shapes]


@pytest.mark.smoke
@examples(70)
@given(problem=attention_problems(variants=pooled()))
def test_agrees_with_the_reference(executor, problem):
    before = [guarded.root.copy() for guarded in (problem.q, problem.k, problem.v)]
    out, lse = call(executor, problem.q, problem.k, problem.v, **problem.options)
    assert_attention_close(out, *problem.arrays, lse=lse, **problem.options)
    for guarded, content in zip((problem.q, problem.k, problem.v), before, strict=True):
        np.testing.assert_array_equal(guarded.root, content)  # inputs and their surroundings are only read


@examples(25)
@given(problem=attention_problems(**FEW, max_seqlen=70), layout=layouts())
def test_out_is_written_in_place_and_nothing_beside_it(executor, problem, layout):
    q, k, v = problem.arrays
    target = executor.guarded((*q.shape[:3], v.shape[3]), q.dtype, layout)
    arrays = [executor.array(x) for x in (problem.q, problem.k, problem.v)]
    result = cuattn.attention(*arrays, out=target.array, **problem.options)
    assert result is target.array
    target.check()
    assert_attention_close(executor.numpy(result), q, k, v, **problem.options)


@examples(30)
@given(problem=attention_problems(**FEW, kinds=NORMAL))
def test_layouts_do_not_change_a_bit(executor, problem):
    """Transposed, padded and misaligned arrays among NaN give what contiguous ones give."""
    placed, plain = (problem.q, problem.k, problem.v), [np.ascontiguousarray(x) for x in problem.arrays]
    result, expected = (call(executor, *arrays, **problem.options) for arrays in (placed, plain))
    if same_kernel(executor, (placed, problem.options), (plain, problem.options)):
        assert [x.tobytes() for x in result] == [x.tobytes() for x in expected]
    else:
        assert_same(result, expected, *plain, **problem.options)


@examples(25)
@given(problem=attention_problems(**FEW, options=("causal", "scale")))
def test_rows_of_p_sum_to_one(executor, problem):
    q, k, v = problem.arrays
    out, lse = call(executor, q, k, np.ones_like(v), **problem.options)
    seen = ~np.isneginf(lse).swapaxes(1, 2)[..., None]
    # Equal probabilities are all rounded the same way, so nothing cancels: M u, not sqrt(M) u.
    u = 2 * unit_roundoff(q.dtype) + unit_roundoff(accumulation_dtype(q.dtype)) * (4 + k.shape[1])
    assert_within(out, np.broadcast_to(seen, out.shape).astype(np.float64), u, "sum of P")


@examples(25)
@given(problem=attention_problems(**FREE, options=("scale",)), seed=st.integers(0, 999))
def test_order_of_keys_does_not_matter(executor, problem, seed):
    q, k, v = problem.arrays
    order = np.random.default_rng(seed).permutation(k.shape[1])
    permuted = call(executor, q, k[:, order], v[:, order], **problem.options)
    assert_same(permuted, call(executor, q, k, v, **problem.options), q, k, v, **problem.options)


@examples(20)
@given(dtype=dtypes(), seqlen_q=seqlens(70), seqlen_k=seqlens(), causal=CAUSAL, shift=st.sampled_from([-8, 3, 30]))
def test_a_shift_of_a_row_of_logits_moves_only_lse(executor, dtype, seqlen_q, seqlen_k, causal, shift):
    """One more component, 1 in every key and t in query i, adds scale * t to every logit of row i."""
    rng = np.random.default_rng(seqlen_q * 131 + seqlen_k)
    q, k, v = normal(rng, dtype, (1, seqlen_q, 2, 32), (1, seqlen_k, 1, 32), (1, seqlen_k, 1, 32))
    k[..., 31], q[..., 31] = 1, 0
    shifted = q.copy()
    shifted[..., 31] = shift * np.arange(seqlen_q).reshape(1, -1, 1) % 64
    out, lse = call(executor, q, k, v, causal=causal, scale=0.25)
    moved_out, moved_lse = call(executor, shifted, k, v, causal=causal, scale=0.25)
    moved_lse = moved_lse - 0.25 * shifted[..., 31].astype(moved_lse.dtype).swapaxes(1, 2)
    assert_same((moved_out, moved_lse), (out, lse), shifted, k, v, causal=causal, scale=0.25)


@examples(20)
@given(problem=attention_problems(**FEW, heads=st.sampled_from([(4, 2), (6, 3), (3, 1), (8, 2)])))
def test_grouped_heads_equal_repeated_ones(executor, problem):
    q, k, v = problem.arrays
    repeated = [np.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v)]
    expected = call(executor, q, *repeated, **problem.options)
    assert_same(call(executor, q, k, v, **problem.options), expected, q, k, v, **problem.options)


@examples(20)
@given(problem=attention_problems(**FEW, kinds=NORMAL, options=("causal",), max_seqlen=40))
def test_batch_entries_and_heads_do_not_see_each_other(executor, problem):
    q, k, v = problem.arrays
    out, lse = call(executor, problem.q, problem.k, problem.v, **problem.options)
    b, h = q.shape[0] - 1, q.shape[2] - 1
    alone = [q[b:, :, h:], k[b:, :, -1:], v[b:, :, -1:]]
    assert_same((out[b:, :, h:], lse[b:, h:]), call(executor, *alone, **problem.options), *alone, **problem.options)


@examples(10)
@given(dtype=dtypes(), seqlen=st.sampled_from([1, 2, 7, 17, 33]), seed=st.integers(0, 999))
def test_causal_step_by_step_equals_one_call(executor, dtype, seqlen, seed):
    rng = np.random.default_rng(seed)
    q, k, v = normal(rng, dtype, (2, seqlen, 2, 32), (2, seqlen, 1, 32), (2, seqlen, 1, 32))
    out, lse = call(executor, q, k, v, causal=True)
    for i in range(seqlen):
        step = [q[:, i : i + 1], k[:, : i + 1], v[:, : i + 1]]
        one = (out[:, i : i + 1], lse[:, :, i : i + 1])
        assert_same(call(executor, *step, causal=True), one, *step, causal=True)


@examples(20)
@given(problem=attention_problems(**FREE, options=("scale",)), share=st.floats(0, 1))
def test_parts_merge_by_their_lse(executor, problem, share):
    q, k, v = problem.arrays
    cut = int(share * k.shape[1])
    parts = [call(executor, q, k[:, part], v[:, part], **problem.options) for part in (slice(cut), slice(cut, None))]
    merged = reference.merge_states([out for out, _ in parts], [lse for _, lse in parts])
    assert_same(call(executor, q, k, v, **problem.options), merged, q, k, v, **problem.options)


@examples(20)
@given(problem=attention_problems(**FREE, options=("scale",), max_seqlen=70))
def test_keys_twice_add_log_two_to_lse(executor, problem):
    q, k, v = problem.arrays
    doubled = [q, np.concatenate([k, k], axis=1), np.concatenate([v, v], axis=1)]
    out, lse = call(executor, q, k, v, **problem.options)
    assert_same(call(executor, *doubled, **problem.options), (out, lse + math.log(2)), *doubled, **problem.options)


@examples(20)
@given(problem=attention_problems(**FREE, options=("scale",)))
def test_lse_is_the_natural_logarithm_of_the_sum(executor, problem):
    q, k, _ = problem.arrays
    _, lse = call(executor, problem.q, problem.k, problem.v, **problem.options)
    assert_lse_close(lse, q, k, **problem.options)


@examples(25)
@given(problem=attention_problems(**FREE, kinds=NORMAL, options=("scale",)))
def test_top_left_and_bottom_right(executor, problem):
    """They differ only in which of the longer side they leave out."""
    q, k, v = problem.arrays
    shorter = min(q.shape[1], k.shape[1])
    top_left = call(executor, q, k, v, causal="top_left", **problem.options)
    bottom_right = call(executor, q, k, v, causal="bottom_right", **problem.options)
    true = call(executor, q, k, v, causal=True, **problem.options)
    assert [x.tobytes() for x in bottom_right] == [x.tobytes() for x in true]
    if q.shape[1] <= k.shape[1]:  # keys beyond the last query are seen by none
        square = [q, k[:, :shorter], v[:, :shorter]]
        same = top_left
    else:  # the first N - M queries see nothing
        hidden = q.shape[1] - k.shape[1]
        assert not bottom_right[0][:, :hidden].any() and np.isneginf(bottom_right[1][:, :, :hidden]).all()
        square = [q[:, hidden:], k, v]
        same = (bottom_right[0][:, hidden:], bottom_right[1][:, :, hidden:])
    assert_same(call(executor, *square, causal=True, **problem.options), same, *square, causal=True, **problem.options)
    if q.shape[1] == k.shape[1]:
        assert [x.tobytes() for x in top_left] == [x.tobytes() for x in true]


@examples(15)
@given(problem=attention_problems(**FEW, options=("causal",)))
def test_negative_scale_equals_negated_queries(executor, problem):
    q, k, v = problem.arrays
    options = {**problem.options, "scale": -0.3}
    expected = call(executor, -q, k, v, **{**options, "scale": 0.3})
    assert_same(call(executor, q, k, v, **options), expected, q, k, v, **options)


@examples(10)
@given(problem=attention_problems(**FEW, options=("causal",), max_seqlen=70))
def test_scale_zero_is_the_mean(executor, problem):
    q, k, v = problem.arrays
    out, lse = call(executor, q, k, v, scale=0.0, **problem.options)
    assert_attention_close(out, q, k, v, lse=lse, scale=0.0, **problem.options)
    seen = np.broadcast_to(
        reference.visible(q.shape[1], k.shape[1], **problem.options), (1, 1, *lse.shape[2:], k.shape[1])
    )
    with np.errstate(divide="ignore"):
        expected = np.broadcast_to(np.log(seen.sum(axis=-1)), lse.shape)
    np.testing.assert_allclose(lse, expected, rtol=4 * unit_roundoff(lse.dtype), atol=4 * unit_roundoff(lse.dtype))


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4), (2, 5, 0), (2, 0, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_empty_axes(executor, dtype, shape, causal):
    batch, seqlen_q, seqlen_k = shape
    q = np.ones((batch, seqlen_q, 4, 32), dtype)
    k, v = np.ones((batch, seqlen_k, 2, 32), dtype), np.ones((batch, seqlen_k, 2, 24), dtype)
    out, lse = call(executor, q, k, v, causal=causal)
    assert out.shape == (batch, seqlen_q, 4, 24) and out.dtype == dtype
    assert lse.shape == (batch, 4, seqlen_q) and lse.dtype == accumulation_dtype(dtype)
    if seqlen_k == 0:
        assert not out.any() and np.isneginf(lse).all()


@examples(20)
@given(dtype=dtypes(), seqlen_q=seqlens(70), seqlen_k=seqlens(), causal=CAUSAL, data=st.data())
def test_a_nan_stays_in_its_row(executor, dtype, seqlen_q, seqlen_k, causal, data):
    rng = np.random.default_rng(seqlen_q * 131 + seqlen_k)
    q, k, v = normal(rng, dtype, (1, seqlen_q, 2, 32), (1, seqlen_k, 2, 32), (1, seqlen_k, 2, 32))
    row = data.draw(st.integers(0, seqlen_q - 1))
    q[0, row, 1, data.draw(st.integers(0, 31))] = np.nan
    out, lse = call(executor, q, k, v, causal=causal)
    assert_attention_close(out, q, k, v, lse=lse, causal=causal)
    last = row if causal == "top_left" else row + seqlen_k - seqlen_q
    assert np.isnan(out[0, row, 1]).all() == (not causal or last >= 0)
    assert np.isnan(out).sum() in (0, 32)


@pytest.mark.parametrize("value", [np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinite_logits(executor, dtype, value):
    """An infinite component of key 3: rows in which its logit is +inf are NaN, in the others it does not exist."""
    q = np.ones((1, 20, 1, 32), dtype)
    q[:, ::2] = -1
    k, v = normal(np.random.default_rng(0), dtype, (1, 40, 1, 32), (1, 40, 1, 32))
    k[0, 3, 0, 5] = value
    out, lse = call(executor, q, k, v)
    without = [np.delete(x, 3, axis=1) for x in (k, v)]
    lost, kept = (slice(0, None, 2), slice(1, None, 2)) if value < 0 else (slice(1, None, 2), slice(0, None, 2))
    assert np.isnan(out[:, lost]).all() and np.isnan(lse[:, :, lost]).all()
    assert_attention_close(out[:, kept], q[:, kept], *without, lse=lse[:, :, kept])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_in_any_schedule(executor, dtype):
    rng = np.random.default_rng(0)
    q, k, v = normal(rng, dtype, (2, 70, 4, 40), (2, 133, 2, 40), (2, 133, 2, 40))
    expected = [x.tobytes() for x in call(executor, q, k, v, causal=True)]
    for asynchrony, seed in (("late", 1), ("random", 2), ("random", 3), ("eager", 4)):
        with executor.active(asynchrony=asynchrony, seed=seed):
            assert [x.tobytes() for x in call(executor, q, k, v, causal=True)] == expected, (asynchrony, seed)


@examples(10)
@given(dtype=dtypes(), data=st.data())
def test_an_array_may_be_passed_twice(executor, dtype, data):
    """q, k and v may be one array, or views of one packed projection."""
    seqlen = data.draw(seqlens(70))
    packed = place(fill((2, seqlen, 6, 32), dtype, "normal", np.random.default_rng(seqlen)), data.draw(layouts()))
    q, k, v = packed.array[:, :, :2], packed.array[:, :, 2:4], packed.array[:, :, 4:]
    out, lse = call(executor, q, k, v)
    assert_attention_close(out, q, k, v, lse=lse)
    out, lse = call(executor, q, q, q)
    assert_attention_close(out, q, q, q, lse=lse)
