"""Precisions and 8-bit inputs of attention."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from attention_calls import assert_right, call
from test_attention_options import F16, F32, F64, make, same_bits

import cuattn
from cuattn import reference
from cuattn.errors import ArgumentError, DTypeError
from cuattn.testing import ToleranceError, assert_attention_close
from cuattn.testing.options import make_descale
from cuattn.testing.strategies import FLOAT8_DTYPES, VALUE_KINDS, fill

float8s = pytest.mark.parametrize("dtype", FLOAT8_DTYPES, ids=str)
SEQLENS = ((70, 135), (129, 129), (135, 70), (1, 65), (65, 1))


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seqlens", SEQLENS, ids=str)
def test_tf32(executor, seqlens):
    assert_right(executor, *make(seqlens, F32), precision="tf32", causal=True)


@pytest.mark.parametrize("head_dims", ((31, 17), (128, 100)), ids=str)
def test_tf32_head_dims(executor, head_dims):
    assert_right(executor, *make((70, 135), F32, head_dims=head_dims), precision="tf32", causal=True)


@pytest.mark.parametrize("kind", VALUE_KINDS)
def test_tf32_of_awkward_values(executor, kind):
    rng = np.random.default_rng(2)
    arrays = [fill((2, n, 2, 32), F32, kind, rng) for n in (70, 135, 135)]
    assert_right(executor, *arrays, precision="tf32")


def test_tf32_is_coarser_than_ieee(executor):
    """Each is what it is called: one rounds to 10 bits, the other does not."""
    q, k, v = make((70, 135), F32)
    out, lse = call(executor, q, k, v, precision="tf32")
    with pytest.raises(ToleranceError):
        assert_attention_close(out, q, k, v, lse=lse)
    exact = call(executor, q, k, v, precision="ieee")
    assert same_bits(exact, call(executor, q, k, v))
    error = [np.abs(x.astype(float) - reference.attention(q, k, v)[0]).max() for x in (out, exact[0])]
    assert error[1] < 1e-6 < 1e-5 < error[0] < 1e-3


def test_tf32_of_numbers_with_ten_bits(executor):
    """Products of such numbers are exact in float32: the logits, and with them lse, are as good as those of ieee."""
    q, k, v = (reference.round_to_tf32(x) for x in make((70, 135), F32))
    out, lse = call(executor, q, k, v, precision="tf32")
    assert_attention_close(out, q, k, v, lse=lse, precision="tf32")
    np.testing.assert_allclose(lse, reference.attention(q, k, v)[1], rtol=2e-6)


@pytest.mark.parametrize("dtype", (F16, F64), ids=str)
def test_tf32_is_for_float32(executor, dtype):
    q, k, v = make((2, 3), dtype)
    with pytest.raises(DTypeError, match="precision='tf32' is for float32"):
        call(executor, q, k, v, precision="tf32")
    assert same_bits(call(executor, q, k, v, precision="ieee"), call(executor, q, k, v))


# --- 8 bits -----------------------------------------------------------------------------------------------------------


@float8s
@pytest.mark.parametrize("seqlens", SEQLENS, ids=str)
def test_float8(executor, dtype, seqlens):
    out, lse = assert_right(executor, *make(seqlens, dtype), causal=True)
    assert out.dtype == ml_dtypes.bfloat16 and lse.dtype == np.float32


@float8s
@pytest.mark.parametrize("head_dims", ((31, 17), (128, 128)), ids=str)
def test_float8_head_dims(executor, dtype, head_dims):
    assert_right(executor, *make((70, 135), dtype, head_dims=head_dims), causal=True)


@float8s
@pytest.mark.parametrize("names", ("q", "k", "v", "qk", "qkv"))
def test_descales(executor, dtype, names):
    """One factor for each sequence and key/value head, of q too: head h of q takes that of h // (H / G)."""
    rng = np.random.default_rng(9)
    q, k, v = make((70, 135), dtype, heads=(4, 2))
    descales = {f"{name}_descale": make_descale(rng, (2, 2)) for name in names}
    result = assert_right(executor, q, k, v, **descales)
    assert same_bits(call(executor, q, k, v, **{name: x.tolist() for name, x in descales.items()}), result)
    assert same_bits(call(executor, q, k, v, **{name: x.astype(np.float64) for name, x in descales.items()}), result)


def test_descales_with_other_options(executor):
    """They multiply the product, before the cap; a bias and slopes are added as they are."""
    rng = np.random.default_rng(9)
    q, k, v = make((70, 135), FLOAT8_DTYPES[0], heads=(4, 2))
    descales = {f"{name}_descale": make_descale(rng, (2, 2)) for name in "qkv"}
    for options in (
        {"softcap": 2.0},
        {"alibi_slopes": [0.1, 0.2, 0.3, 0.4]},
        {"bias": rng.standard_normal((70, 135)).astype(np.float32)},
        {"scale": 0.7, "sinks": [0.0, 1.0, 2.0, 3.0]},
    ):
        assert_right(executor, q, k, v, **descales, **options)


@float8s
def test_negative_descales(executor, dtype):
    """They turn the order of the logits around; the largest product is then the smallest logit."""
    q, k, v = make((70, 135), dtype)
    for name in ("q_descale", "k_descale", "v_descale"):
        assert_right(executor, q, k, v, **{name: np.float32([[-1.5], [0.5]])})
    assert_right(
        executor, q, k, v, q_descale=np.float32([[-1.5], [0]]), k_descale=np.float32([[-0.5], [1]]), scale=-0.2
    )


@float8s
def test_bytes_with_a_format(executor, dtype):
    q, k, v = make((70, 135), dtype)
    fp8_format = dtype.name.removeprefix("float8_")
    result = call(executor, q, k, v)
    assert same_bits(call(executor, *(x.view(np.uint8) for x in (q, k, v)), fp8_format=fp8_format), result)
    if executor.name == "host":
        assert same_bits(call(executor, q, k, v, fp8_format=fp8_format), result)


@float8s
def test_every_code(executor, dtype):
    """A query that sees one key returns its value: each of the 256 codes, NaN and infinities included."""
    codes = np.arange(256, dtype=np.uint8).view(dtype).reshape(8, 1, 1, 32)
    q = np.ones((8, 1, 1, 32), dtype)
    for v in (codes, codes[..., ::-1].copy()):  # two at a time are widened: each code in either place
        out, lse = call(executor, q, q, v)
        np.testing.assert_array_equal(out.astype(np.float32), v.astype(np.float32))
        np.testing.assert_allclose(lse, np.sqrt(32), rtol=1e-6)
    # the same codes as keys: the logit of a one-hot query is the code
    finite = np.arange(256, dtype=np.uint8)[np.isfinite(codes.astype(np.float32).ravel())]
    k = np.zeros((1, finite.size, 1, 32), np.uint8)
    k[0, :, 0, 3] = finite
    q = np.zeros((finite.size, 1, 1, 32), dtype)
    q[:, 0, 0, 3] = 1
    each_key = k.view(dtype).reshape(finite.size, 1, 1, 32)
    _, lse = call(executor, q, each_key, each_key, scale=1.0)
    # a probability is 2^15 times as large, and its exponent is rounded there: to 2^-21
    np.testing.assert_allclose(lse.ravel(), finite.view(dtype).astype(np.float32), rtol=1e-6, atol=2**-21)


@float8s
def test_out_is_bfloat16(executor, dtype):
    q, k, v = make((70, 135), dtype)
    expected, _ = call(executor, q, k, v)
    target = executor.guarded((2, 70, 2, 32), ml_dtypes.bfloat16)
    call(executor, q, k, v, out=target.array)
    target.check()
    assert same_bits([executor.numpy(target.array)], [expected])
    with pytest.raises(DTypeError, match="out has dtype float16; the result has dtype bfloat16"):
        call(executor, q, k, v, out=executor.guarded((2, 70, 2, 32), np.float16).array)


def test_descales_are_for_float8(executor):
    q, k, v = make((2, 3))
    for name in ("q_descale", "k_descale", "v_descale"):
        with pytest.raises(ArgumentError, match=f"{name} is for 8-bit floats"):
            call(executor, q, k, v, **{name: np.ones((2, 1), np.float32)})


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("excess", [2**-11 + 2**-12, 2**-12], ids=["up", "down"])
def test_tf32_rounds_to_nearest(executor, name, excess):
    """10 bits of mantissa, by rounding: cutting off the rest would be off by twice as much, always to the same side."""
    arrays = {other: np.ones((1, 1, 1, 1), np.float32) for other in "qkv"}
    arrays[name][...] = 1 + excess
    rounded = 1 + (2**-10 if excess > 2**-11 else 0)
    inputs = (executor.array(arrays[other]) for other in "qkv")
    out, lse = cuattn.attention(*inputs, scale=1.0, precision="tf32", return_lse=True)
    result = executor.numpy(out if name == "v" else lse)
    np.testing.assert_allclose(result.item(), rounded, rtol=2e-6)
