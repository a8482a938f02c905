"""The tolerance rule passes every correct low-precision computation and no planted error."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from emulation import FAULTS, OPTION_FAULTS, tiled_attention

import cuattn
from cuattn import reference
from cuattn.testing import (
    ToleranceError,
    assert_attention_close,
    assert_lse_close,
    assert_softmax_close,
    assert_varlen_close,
)
from cuattn.testing.rounding import ulp, unit_roundoff
from cuattn.testing.strategies import DTYPES, HEAD_PAIRS, VALUE_KINDS, fill
from cuattn.testing.tolerance import assert_within

OPTIONS = (
    *("scale", "causal", "window", "softcap", "bias", "mask", "alibi_slopes", "sinks", "diagonal_offset"),
    *("dropout_p", "dropout_seed"),
)

#: What inputs are, and how they are computed with: a dtype, and the precision option.
FORMATS = {
    **{str(dtype): (dtype, {}) for dtype in DTYPES},
    "tf32": (np.dtype(np.float32), {"precision": "tf32"}),
    "float8_e4m3fn": (np.dtype(ml_dtypes.float8_e4m3fn), {}),
    "float8_e5m2": (np.dtype(ml_dtypes.float8_e5m2), {}),
    "fp8": (np.dtype(ml_dtypes.float8_e4m3fn), {"precision": "fp8"}),
}
formats = pytest.mark.parametrize("form", FORMATS)


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
        "dropout_p": float(rng.choice([0.1, 0.5, 0.9])),
        "dropout_seed": int(rng.integers(2**63)),
    }
    return {name: values[name] for name in OPTIONS if rng.random() < 0.3}


def random_descales(rng, batch, kv_heads):
    """Factors of float8 inputs, [B, G]; some calls leave some of them out."""
    names = [name for name in ("q_descale", "k_descale", "v_descale") if rng.random() < 0.7]
    return {name: np.exp2(rng.uniform(-3, 1, (batch, kv_heads))).astype(np.float32) for name in names}


def random_inputs(rng, dtype, kind, largest, heads=None):
    head_dim, head_dim_v = rng.integers(1, 80, 2)
    seqlen_q, seqlen_k = (int(rng.choice([1, 2, rng.integers(1, largest + 1)])) for _ in range(2))
    num_heads, num_kv_heads = heads or HEAD_PAIRS[rng.integers(len(HEAD_PAIRS))]
    q = fill((2, seqlen_q, num_heads, head_dim), dtype, kind, rng)
    k = fill((2, seqlen_k, num_kv_heads, head_dim), dtype, kind, rng)
    return q, k, fill((2, seqlen_k, num_kv_heads, head_dim_v), dtype, kind, rng)


@pytest.mark.parametrize("seed", range(3))
@formats
def test_correct_emulations_pass(form, seed):
    rng = np.random.default_rng(seed)
    dtype, precision = FORMATS[form]
    for number in range(60):
        kind = VALUE_KINDS[number % len(VALUE_KINDS)]
        q, k, v = random_inputs(rng, dtype, kind, 60 if number % 10 else 300)
        options = {**random_options(rng, q.shape[0], q.shape[2], q.shape[1], k.shape[1]), **precision}
        if dtype.itemsize == 1:
            options |= random_descales(rng, q.shape[0], k.shape[2])
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
@formats
def test_planted_faults_fail(form, fault):
    rng = np.random.default_rng(7)
    dtype, precision = FORMATS[form]
    for number in range(40):
        seqlen_q, seqlen_k = rng.integers(2, 65, 2)
        heads = (4, 2) if fault == "wrong_head_map" else (2, 1)
        q = fill((2, seqlen_q, heads[0], 32), dtype, "normal", rng)
        k = fill((2, seqlen_k, heads[1], 32), dtype, "normal", rng)
        v = fill((2, seqlen_k, heads[1], 32), dtype, "normal", rng)
        options = {"causal": "top_left", **precision} if fault == "causal_shifted" else dict(precision)
        block_n = max(1, int(seqlen_k) // 3)  # several tiles, or a forgotten rescale would have nothing to forget
        out, lse = tiled_attention(q, k, v, block_n=block_n, fault=fault, rng=rng, **options)
        with pytest.raises(ToleranceError, match=r"(out|lse)\[\d"):
            assert_attention_close(out, q, k, v, lse=lse, **options)
            pytest.fail(f"{fault} passed as problem {number}: q {q.shape}, k {k.shape}", pytrace=False)


@pytest.mark.parametrize("fault", OPTION_FAULTS)
@formats
def test_faults_in_an_option_fail(form, fault):
    """By out alone: out is what a fault in a kernel's tail could leave wrong while lse is right."""
    rng = np.random.default_rng(17)
    dtype, precision = FORMATS[form]
    for number in range(30):
        seqlen_q, seqlen_k = (int(n) for n in rng.integers(8, 65, 2))
        q, k, v = (fill((2, n, 2, 32), dtype, "normal", rng) for n in (seqlen_q, seqlen_k, seqlen_k))
        drawn = {
            ("bias", "normal"): rng.standard_normal((2, 1, seqlen_q, seqlen_k)).astype(np.float32),
            ("sinks", "normal"): np.float32([4, 2]) + rng.random(2).astype(np.float32),
            ("alibi_slopes", "causal"): rng.uniform(0.1, 1, 2).astype(np.float32),
            ("alibi_slopes", "batch"): np.float32([[0.1, 0.2], [0.4, 0.7]]),
        }
        options = {name: value if not isinstance(value, str) else drawn[name, value]
                   for name, value in OPTION_FAULTS[fault].items()}  # fmt: skip
        options |= precision
        if form == "fp8" and fault == "dropout_not_rescaled":
            options["dropout_p"] = 0.5  # a tenth is less than e4m3 may lose
        if fault == "dropout_in_row_sum":
            options["dropout_seed"] = number
        with np.errstate(all="ignore"):
            right, _ = tiled_attention(q, k, v, block_n=16, rng=rng, **options)
            out, _ = tiled_attention(q, k, v, block_n=16, fault=fault, rng=rng, **options)
        assert_attention_close(right, q, k, v, **options)
        with pytest.raises(ToleranceError, match=r"out\[\d"):
            assert_attention_close(out, q, k, v, **options)
            pytest.fail(f"{fault} passed as problem {number}: q {q.shape}, k {k.shape}", pytrace=False)


@pytest.mark.parametrize("name", ["q_descale", "k_descale", "v_descale"])
def test_a_descale_of_the_wrong_head_fails(name):
    rng = np.random.default_rng(2)
    for form in ("float8_e4m3fn", "float8_e5m2"):
        q, k, v = (fill((2, 30, heads, 32), FORMATS[form][0], "normal", rng) for heads in (4, 2, 2))
        descale = np.float32([[1.0, 0.8], [0.9, 1.1]])
        right, lse = tiled_attention(q, k, v, block_n=16, **{name: descale})
        assert_attention_close(right, q, k, v, lse=lse, **{name: descale})
        for wrong in (None, descale[:, ::-1], descale[::-1]):
            out, lse = tiled_attention(q, k, v, block_n=16, **{name: wrong})
            with pytest.raises(ToleranceError, match=r"out\["):
                assert_attention_close(out, q, k, v, lse=lse, **{name: descale})
            if name != "v_descale":
                with pytest.raises(ToleranceError, match=r"lse\["):
                    assert_lse_close(lse, q, k, **{name: descale})


def test_float8_in_bytes():
    """uint8 with fp8_format is the array of that dtype."""
    rng = np.random.default_rng(4)
    for name in ("e4m3fn", "e5m2"):
        arrays = [fill((1, 9, 2, 16), f"float8_{name}", "normal", rng) for _ in "qkv"]
        out, lse = tiled_attention(*arrays, block_n=16)
        assert_attention_close(out, *(x.view(np.uint8) for x in arrays), lse=lse, fp8_format=name)
        with pytest.raises(ToleranceError, match="expected bfloat16"):
            assert_attention_close(out.astype(np.float32), *arrays)
        other = {"e4m3fn": "e5m2", "e5m2": "e4m3fn"}[name]
        with pytest.raises(ToleranceError, match=r"out\["):
            assert_attention_close(out, *(x.view(np.uint8) for x in arrays), fp8_format=other)


def test_ieee_does_not_pass_for_tf32_errors():
    """What tf32 loses is out of bound where it was not asked for."""
    rng = np.random.default_rng(6)
    q, k, v = (fill((1, 40, 2, 32), np.float32, "normal", rng) for _ in "qkv")
    out, lse = tiled_attention(q, k, v, block_n=8, precision="tf32")
    assert_attention_close(out, q, k, v, lse=lse, precision="tf32")
    for precision in (None, "ieee"):
        with pytest.raises(ToleranceError, match=r"out\["):
            assert_attention_close(out, q, k, v, precision=precision)
        with pytest.raises(ToleranceError, match=r"lse\["):
            assert_lse_close(lse, q, k, precision=precision)


def test_rounded_to_8_bits_only_where_asked_for():
    rng = np.random.default_rng(6)
    q, k, v = (fill((1, 40, 2, 32), ml_dtypes.float8_e4m3fn, "normal", rng) for _ in "qkv")
    out, lse = tiled_attention(q, k, v, block_n=8, precision="fp8")
    assert_attention_close(out, q, k, v, lse=lse, precision="fp8")
    with pytest.raises(ToleranceError, match=r"out\["):
        assert_attention_close(out, q, k, v)


def test_packed_sequences_are_checked_one_by_one():
    rng = np.random.default_rng(8)
    starts_q, starts_k = np.int32([0, 5, 5, 12, 13]), np.int32([0, 7, 9, 9, 20])
    q, k, v = (fill((n, heads, 16), np.float16, "normal", rng) for n, heads in ((13, 4), (20, 2), (20, 2)))
    options = {
        "causal": True,
        "bias": rng.standard_normal((4, 1, 7, 11)).astype(np.float32),
        "mask": rng.random((1, 4, 1, 11)) < 0.8,
        "alibi_slopes": rng.random((4, 4)).astype(np.float32),
        "diagonal_offset": np.int32([1, 0, -2, 3]),
        "dropout_p": 0.3,
    }
    kept = cuattn.dropout_mask(4, 4, 7, 11, dropout_p=0.3)
    out, lse = np.zeros((13, 4, 16), np.float16), np.zeros((4, 13), np.float32)
    for b in range(4):
        rows, columns = slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], starts_k[b + 1])
        n, m = rows.stop - rows.start, columns.stop - columns.start
        own = {
            "causal": True,
            "bias": options["bias"][b : b + 1, :, :n, :m],
            "mask": options["mask"][..., :m],
            "alibi_slopes": options["alibi_slopes"][b],
            "diagonal_offset": int(options["diagonal_offset"][b]),
            "dropout_p": 0.3,
            "dropout_keep": kept[b : b + 1, :, :n, :m],
        }
        of_sequence, lse_of_sequence = reference.attention_naive(
            q[None, rows], k[None, columns], v[None, columns], **own
        )
        out[rows], lse[:, rows] = of_sequence[0], lse_of_sequence[0]
    assert_varlen_close(out, q, k, v, starts_q, starts_k, lse=lse, **options)
    expected, expected_lse = reference.attention_varlen(q, k, v, starts_q, starts_k, **options)
    np.testing.assert_allclose(out.astype(np.float64), expected, atol=0.01)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-5)
    wrong = out.copy()
    wrong[7, 1, 3] += np.float16(0.5)
    with pytest.raises(ToleranceError, match=r"^sequence 2, tokens 5 to 12: out\[0, 2, 1, 3\] is"):
        assert_varlen_close(wrong, q, k, v, starts_q, starts_k, **options)
    wrong_lse = lse.copy()
    wrong_lse[3, 12] += 0.1
    with pytest.raises(ToleranceError, match=r"^sequence 3, tokens 12 to 13: lse\[0, 3, 0\] is"):
        assert_varlen_close(out, q, k, v, starts_q, starts_k, lse=wrong_lse, **options)
    with pytest.raises(ToleranceError, match="out has shape"):
        assert_varlen_close(out[:12], q, k, v, starts_q, starts_k, **options)
    with pytest.raises(ToleranceError, match="lse has shape"):
        assert_varlen_close(out, q, k, v, starts_q, starts_k, lse=lse.T, **options)


def test_rows_of_which_dropout_keeps_nothing_are_exactly_zero():
    x = np.ones((1, 3, 1, 4), np.float16)
    keep = np.array([[True, False, True], [False, False, False], [True, True, True]])
    options = {"dropout_p": 0.5, "dropout_keep": keep}
    out, lse = reference.attention_naive(x, x, x, **options)
    assert_attention_close(out, x, x, x, lse=lse, **options)
    out[0, 1, 0, 0] = 6e-8
    with pytest.raises(ToleranceError, match=r"out\[0, 1, 0, 0\]"):
        assert_attention_close(out, x, x, x, **options)


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
