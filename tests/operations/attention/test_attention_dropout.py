"""Dropout in the kernels: exactly the mask of cuattn.dropout_mask, whatever computes it."""

from __future__ import annotations

import numpy as np
import pytest
from attention_calls import assert_right, call
from dropout_calls import ARGUMENTS, NAMES, probabilities
from test_attention_options import BF16, F16, F32, F64, make, same_bits

import cuattn
from cuattn import reference
from cuattn.ops.attention.forward.config import FLASH_FWD_CONFIGS, PlainFwdConfig
from cuattn.reference.dropout import philox4x32_10
from cuattn.testing import kernels


@pytest.mark.smoke
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize("dtype", (F16, F32), ids=str)
def test_what_is_kept(executor, dtype, arguments):
    """Exactly the mask, in every head and batch entry; and what is kept is divided by 1 - p."""
    options = dict(zip(NAMES, arguments, strict=True))
    p, q, k = probabilities(lambda *x, **given: call(executor, *x, **given), (70, 135), dtype, **options)
    mask = cuattn.dropout_mask(2, 2, 70, 135, **options)
    np.testing.assert_array_equal(p > 0, mask)
    expected = reference.probabilities(q, k, **options)
    # 10 bits of P, which are fewer than 10 for a small P in float16
    np.testing.assert_allclose(p, expected, rtol=2e-3, atol=1e-5 if dtype == F16 else 1e-9)


@pytest.mark.parametrize("dtype", (F16, F32), ids=str)
@pytest.mark.parametrize("place", ((0, 0), (3, 9), (30, 5), (27, 31)), ids=str)
def test_the_last_word_that_is_kept(executor, dtype, place):
    """An element is kept when its word is below the threshold: not when they are equal, and when it is one less."""
    i, j = place
    words = philox4x32_10((8 * (j // 16) + j % 8, 8 * (i // 16) + i % 8, 0, 0), (7, 0))
    word = int(words[2 * ((i // 8) % 2) + (j // 8) % 2])
    q, k, v = make((70, 32), dtype, batch=1, heads=(1, 1))
    v[0, :, 0] = np.eye(32, dtype=dtype)
    for threshold in (word, word + 1):
        out, _ = call(executor, q, k, v, dropout_p=1 - threshold / 2**32, dropout_seed=7)
        assert (out[0, i, 0, j] > 0) == (threshold > word)


@pytest.mark.parametrize("dtype", (BF16, F64), ids=str)
def test_what_other_kernels_keep(executor, dtype):
    options = {"dropout_p": 0.4, "dropout_seed": 2**50 + 1, "dropout_offset": 3}
    p, _, _ = probabilities(lambda *x, **given: call(executor, *x, **given), (40, 70), dtype, **options)
    np.testing.assert_array_equal(p > 0, cuattn.dropout_mask(2, 2, 40, 70, **options))


@pytest.mark.parametrize("other", ({"softcap": 9.0}, {"precision": "tf32"}, {"mask": "even"}), ids=str)
def test_what_kernels_with_other_options_keep(executor, other):
    options = {"dropout_p": 0.4, "dropout_seed": 99}
    seen = np.ones((1, 1, 1, 135), bool)
    if "mask" in other:
        seen[..., ::2] = False
        other = {"mask": seen}
    p, _, _ = probabilities(lambda *x, **given: call(executor, *x, **given), (70, 135), F32, **options, **other)
    np.testing.assert_array_equal(p > 0, cuattn.dropout_mask(2, 2, 70, 135, **options) & seen)


@pytest.mark.parametrize("row", [*FLASH_FWD_CONFIGS[::5], PlainFwdConfig()], ids=str)
def test_no_tile_shape_changes_the_mask(executor, row):
    dtype, precision = F16, {}
    if isinstance(row, PlainFwdConfig) or row.itemsize == 4:
        dtype = F32
        precision = {"precision": "tf32"} if getattr(row, "products", "") == "mma" else {}
    elif row.itemsize == 8:
        dtype = F64
    options = {"dropout_p": 0.3, "dropout_seed": 4, "dropout_offset": 2}

    def call_on(*arrays, **given):
        return [executor.numpy(kernels.attention(*(executor.array(x) for x in arrays), config=row, **given))]

    p, _, _ = probabilities(call_on, (150, 70), dtype, batch=1, **options, **precision)
    np.testing.assert_array_equal(p > 0, cuattn.dropout_mask(1, 2, 150, 70, **options))


def test_the_mask_does_not_depend_on_the_lengths(executor):
    """The first queries of a long call, alone: another tile shape, another grid, the same result."""
    q, k, v = make((135, 135))
    options = {"dropout_p": 0.5, "dropout_seed": 11}
    out, _ = call(executor, q, k, v, **options)
    short, _ = call(executor, q[:, :40], k, v, **options)
    np.testing.assert_allclose(short.astype(float), out[:, :40].astype(float), atol=5e-3)


@pytest.mark.parametrize("dtype", (F16, F32, F64), ids=str)
@pytest.mark.parametrize("p", (0.1, 0.9))
def test_against_the_reference(executor, dtype, p):
    for options in ({}, {"sinks": [0.0, 3.0]}):
        assert_right(executor, *make((70, 135), dtype), dropout_p=p, dropout_seed=8, **options)


@pytest.mark.parametrize("options", ({"causal": True}, {"window": (30, 9)}), ids=str)
def test_dropout_in_a_band(executor, options):
    assert_right(executor, *make((70, 135)), dropout_p=0.3, dropout_seed=8, **options)


def test_lse_is_that_without_dropout(executor):
    arrays = make((70, 135))
    _, lse = call(executor, *arrays)
    for p in (0.1, 0.9):
        np.testing.assert_array_equal(call(executor, *arrays, dropout_p=p, dropout_seed=4)[1], lse)


def test_no_dropout_is_none(executor):
    arrays = make((70, 135))
    assert same_bits(call(executor, *arrays, dropout_p=0.0, dropout_seed=9, dropout_offset=2), call(executor, *arrays))
    assert same_bits(call(executor, *arrays, dropout_p=0), call(executor, *arrays))


def test_heads_and_layers_differ(executor):
    """One row of keys: what is kept of it differs by head, batch entry, seed and offset, and by nothing else."""
    q, k = np.ones((2, 3, 2, 32), F16), np.ones((2, 64, 1, 32), F16)
    v = np.tile(np.eye(32, dtype=F16), (2, 2, 1)).reshape(2, 64, 1, 32)
    options = {"dropout_p": 0.5, "dropout_seed": 1, "dropout_offset": 1}
    out, _ = call(executor, q, k, v, **options)
    assert same_bits(call(executor, q, k, v, **options)[:1], [out])
    rows = {out[b, i, h].tobytes() for b in range(2) for i in range(3) for h in range(2)}
    assert len(rows) == 12
    for other in ({"dropout_seed": 2}, {"dropout_offset": 2}, {"dropout_seed": 1 + 2**32}):
        assert not same_bits(call(executor, q, k, v, **options | other)[:1], [out])


def test_the_mean_over_seeds_is_no_dropout(executor):
    """Dropping is unbiased: averaged over many masks, out is what it is without."""
    q, k, v = make((16, 64), F32, batch=1, heads=(1, 1))
    plain, _ = call(executor, q, k, v)
    total = sum(call(executor, q, k, v, dropout_p=0.5, dropout_seed=seed)[0].astype(float) for seed in range(200))
    p = reference.probabilities(q, k)[0, 0]
    deviation = np.sqrt((p**2) @ v[0, :, 0].astype(float) ** 2 / 200)  # Z has variance p / (1 - p) = 1
    assert np.abs((total / 200 - plain)[0, :, 0] / deviation).max() < 5


@pytest.mark.parametrize("dtype", [np.float16, np.float32], ids=["tensor_cores", "fma"])
def test_dropout_where_a_random_word_is_the_threshold(executor, dtype):
    """A probability is kept when its word is below the threshold, not when it is equal."""

    def keeps(threshold):
        return bool(cuattn.dropout_mask(1, 1, 1, 1, dropout_p=1 - threshold / 2**32, dropout_seed=7).item())

    low, high = 0, 2**32  # the word is in [low, high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if keeps(middle) else (middle, high)
    one = executor.array(np.ones((1, 1, 1, 1), dtype))
    for threshold, kept in ((low, False), (low + 1, True)):
        p = 1 - threshold / 2**32
        out = executor.numpy(cuattn.attention(one, one, one, dropout_p=p, dropout_seed=7))
        assert keeps(threshold) == kept == (out.item() != 0)
