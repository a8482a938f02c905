"""The tolerance rule passes every correct low-precision computation and no planted error."""

from __future__ import annotations

import numpy as np
import pytest
from emulation import FAULTS, tiled_attention

from cuattn import reference
from cuattn.testing import (
    ToleranceError,
    assert_attention_close,
    assert_lse_close,
    assert_softmax_close,
)
from cuattn.testing.rounding import ulp, unit_roundoff
from cuattn.testing.strategies import DTYPES, HEAD_PAIRS, VALUE_KINDS, fill
from cuattn.testing.tolerance import assert_within

OPTIONS = ("scale", "causal", "window", "softcap", "bias", "mask", "alibi_slopes", "sinks", "diagonal_offset")


def random_options(rng, batch, heads, seqlen_q, seqlen_k):
    """A few of the forward options; half of the problems have none."""
    if rng.random() < 0.5:
        return {}
    full = (batch, heads, seqlen_q, seqlen_k)
    bias = rng.standard_normal(full).astype(np.float32)
    bias[rng.random(full) < 0.1] = -np.inf
    values = {
        "scale": float(rng.choice([1.0, 0.3, -0.1, 0.0])),
        "causal": rng.choice([True, False]).item() or "top_left",
        "window": (int(rng.integers(0, seqlen_k + 1)), None),
        "softcap": float(rng.choice([1.0, 20.0])),
        "bias": bias,
        "mask": rng.random(full) < 0.7,
        "alibi_slopes": rng.random(heads).astype(np.float32),
        "sinks": rng.standard_normal(heads).astype(np.float32),
        "diagonal_offset": int(rng.integers(-3, 4)),
    }
    return {name: values[name] for name in OPTIONS if rng.random() < 0.3}


def random_inputs(rng, dtype, kind, largest, heads=None):
    head_dim, head_dim_v = rng.integers(1, 80, 2)
    seqlen_q, seqlen_k = (int(rng.choice([1, 2, rng.integers(1, largest + 1)])) for _ in range(2))
    num_heads, num_kv_heads = heads or HEAD_PAIRS[rng.integers(len(HEAD_PAIRS))]
    q = fill((2, seqlen_q, num_heads, head_dim), dtype, kind, rng)
    k = fill((2, seqlen_k, num_kv_heads, head_dim), dtype, kind, rng)
    return q, k, fill((2, seqlen_k, num_kv_heads, head_dim_v), dtype, kind, rng)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_correct_emulations_pass(dtype, seed):
    rng = np.random.default_rng(seed)
    for number in range(200):
        kind = VALUE_KINDS[number % len(VALUE_KINDS)]
        q, k, v = random_inputs(rng, dtype, kind, 60 if number % 10 else 300)
        options = random_options(rng, q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        block_n = int(rng.choice([1, 8, 16, 64]))
        with np.errstate(all="ignore"):
            out, lse = tiled_attention(q, k, v, block_n=block_n, sequential=bool(number % 2), **options)
        try:
            assert_attention_close(out, q, k, v, lse=lse, **options)
            assert_lse_close(lse, q, k, **options)
        except AssertionError as error:
            problem = f"problem {number}: {kind}, q {q.shape}, k {k.shape}, {block_n=}, {options}"
            raise AssertionError(problem) from error


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_planted_faults_fail(dtype, fault):
    rng = np.random.default_rng(7)
    for number in range(40):
        seqlen_q, seqlen_k = rng.integers(2, 65, 2)
        heads = (4, 2) if fault == "wrong_head_map" else (2, 1)
        q = fill((2, seqlen_q, heads[0], 32), dtype, "normal", rng)
        k = fill((2, seqlen_k, heads[1], 32), dtype, "normal", rng)
        v = fill((2, seqlen_k, heads[1], 32), dtype, "normal", rng)
        options = {"causal": "top_left"} if fault == "causal_shifted" else {}
        block_n = max(1, int(seqlen_k) // 3)  # several tiles, or a forgotten rescale would have nothing to forget
        out, lse = tiled_attention(q, k, v, block_n=block_n, fault=fault, rng=rng, **options)
        with pytest.raises(ToleranceError, match=r"(out|lse)\[\d"):
            assert_attention_close(out, q, k, v, lse=lse, **options)
            pytest.fail(f"{fault} passed as problem {number}: q {q.shape}, k {k.shape}", pytrace=False)


def test_faults_that_leave_lse_right_fail_by_out_alone():
    rng = np.random.default_rng(3)
    q, k, v = (fill((1, 40, 2, 32), np.float16, "normal", rng) for _ in "qkv")
    out, lse = tiled_attention(q, k, v, block_n=8, fault="missing_rescale")
    assert_lse_close(lse, q, k)
    with pytest.raises(ToleranceError, match=r"^out\["):
        assert_attention_close(out, q, k, v)


def test_the_message_names_the_worst_element():
    out = np.zeros((2, 3), np.float32)
    out[0, 1], out[1, 2] = 0.5, 3.0
    with pytest.raises(ToleranceError, match=r"out\[1, 2\] is 3, expected 0: error 3 is 30 times .* 2 of 6 elements"):
        assert_within(out, np.zeros((2, 3)), 0.1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_elements_must_stand_in_the_same_places(value):
    expected = np.array([1.0, value, 2.0])
    assert_within(expected.astype(np.float32), expected, 0.0)
    for wrong in ([1.0, 2.0, 2.0], [value, value, 2.0], [1.0, -value if value == value else np.inf, 2.0]):
        with pytest.raises(ToleranceError, match="in the wrong places"):
            assert_within(np.array(wrong, np.float32), expected, np.inf)


def test_shape_and_dtype_are_part_of_the_result():
    x = np.ones((1, 3, 2, 4), np.float16)
    out, lse = reference.attention_naive(x, x, x)
    with pytest.raises(ToleranceError, match="shape"):
        assert_attention_close(out[:, :2], x, x, x)
    with pytest.raises(ToleranceError, match="dtype float32, expected float16"):
        assert_attention_close(out.astype(np.float32), x, x, x)
    with pytest.raises(ToleranceError, match="lse has dtype float64, expected float32"):
        assert_attention_close(out, x, x, x, lse=lse.astype(np.float64))


def test_rows_without_keys_must_be_exactly_zero():
    x = np.ones((1, 3, 1, 4), np.float16)
    out, lse = reference.attention_naive(x, x, x, causal=True, diagonal_offset=-1)
    assert_attention_close(out, x, x, x, lse=lse, causal=True, diagonal_offset=-1)
    out[0, 0, 0, 0] = 6e-8
    with pytest.raises(ToleranceError, match=r"out\[0, 0, 0, 0\]"):
        assert_attention_close(out, x, x, x, causal=True, diagonal_offset=-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["softmax", "log_softmax", "logsumexp"])
def test_softmax_rule(dtype, kind):
    rng = np.random.default_rng(11)
    function = getattr(reference, kind)
    compute = np.float64 if dtype == np.float64 else np.float32
    for values in VALUE_KINDS:
        for columns in (1, 2, 33, 1000):
            x = fill((5, columns), dtype, values, rng)
            x[rng.random(x.shape) < 0.05] = -np.inf
            x[1] = -np.inf
            result_dtype = compute if kind == "logsumexp" else dtype
            out = function(x, dtype=compute).astype(result_dtype)
            assert_softmax_close(out, x, -1, kind)
            assert_softmax_close(out.T, x.T, 0, kind)
            row = x[2].astype(np.float64)
            if not np.isfinite(row).all():
                continue
            wrong = out.copy()
            at = (2,) if kind == "logsumexp" else (2, int(np.argmax(row)))
            wrong[at] += wrong.dtype.type(64 * unit_roundoff(result_dtype) * (1 + np.abs(row).max()))
            with pytest.raises(ToleranceError, match=kind):
                assert_softmax_close(wrong, x, -1, kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ulp_is_the_distance_to_the_next_number(dtype):
    rng = np.random.default_rng(5)
    x = (rng.standard_normal(500) * np.exp2(rng.integers(-30, 12, 500))).astype(dtype)
    x[:3] = 0, 1, np.float16(6e-8)
    above = np.nextafter(np.abs(x), np.array(np.inf, dtype))
    np.testing.assert_array_equal(ulp(x.astype(np.float64), dtype), above.astype(np.float64) - np.abs(x).astype(float))
    assert unit_roundoff(dtype) == ulp(1.0, dtype) / 2
