"""Bias and mask: every dtype, shape and place in memory, and the tiles that they hide or leave alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
from attention_calls import assert_right, call, same_kernel
from test_attention_options import BF16, F16, F32, F64, make, same_bits, seqlens

import cuattn
from cuattn import reference
from cuattn.testing import assert_attention_close
from cuattn.testing.arrays import Layout, place
from cuattn.testing.options import (
    BIAS_DTYPES,
    BIAS_KINDS,
    BLOCK_SIZES,
    MASK_KINDS,
    broadcast_shapes,
    make_bias,
    make_mask,
)
from cuattn.testing.tolerance import assert_within, attention_bound

FULL = 2, 2, 70, 135
shapes = pytest.mark.parametrize("shape", broadcast_shapes(FULL), ids=str)


def random(seed=5):
    return np.random.default_rng(seed)


# --- shapes, dtypes, places -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias_dtype", BIAS_DTYPES, ids=str)
@pytest.mark.parametrize("kind", BIAS_KINDS)
def test_bias_dtypes(executor, bias_dtype, kind):
    for dtype in (F16, F32) if bias_dtype in (F16, F32) else (F16,):
        assert_right(executor, *make(FULL[2:], dtype), bias=make_bias(random(), FULL, bias_dtype, kind))


@pytest.mark.parametrize("dtype", (BF16, F64), ids=str)
def test_bias_of_other_kernels(executor, dtype):
    for kind in BIAS_KINDS:
        assert_right(executor, *make(FULL[2:], dtype), bias=make_bias(random(), FULL, np.float32, kind), causal=True)


@seqlens
def test_bias_at_the_edges_of_tiles(executor, seqlens):
    for dtype in (F16, F32):
        bias = make_bias(random(), (2, 2, *seqlens), np.float32, "infinities")
        assert_right(executor, *make(seqlens, dtype), bias=bias)


@seqlens
@pytest.mark.parametrize("kind", MASK_KINDS)
def test_masks_at_the_edges_of_tiles(executor, seqlens, kind):
    for dtype in (F16, F32):
        out, lse = assert_right(executor, *make(seqlens, dtype), mask=make_mask(random(), (2, 2, *seqlens), kind))
        assert kind != "nothing" or (not out.any() and np.isneginf(lse).all())


@shapes
def test_broadcast_bias(executor, shape):
    """What is broadcast gives what the whole array gives, and so does a view with stride 0."""
    arrays = make(FULL[2:])
    bias = make_bias(random(), shape, np.float32, "infinities")
    result = assert_right(executor, *arrays, bias=bias)
    assert same_bits(call(executor, *arrays, bias=np.broadcast_to(bias, FULL)), result)
    assert same_bits(call(executor, *arrays, bias=np.broadcast_to(bias, FULL).copy()), result)


@shapes
@pytest.mark.parametrize("kind", ("random", "blocks"))
def test_broadcast_masks(executor, shape, kind):
    arrays = make(FULL[2:])
    mask = make_mask(random(), shape, kind, 64)
    result = assert_right(executor, *arrays, mask=mask)
    assert same_bits(call(executor, *arrays, mask=np.broadcast_to(mask, FULL)), result)
    assert same_bits(call(executor, *arrays, mask=np.broadcast_to(mask, FULL).copy()), result)


@shapes
def test_bias_and_mask_broadcast_along_other_axes(executor, shape):
    """Each is the whole array where the other is broadcast."""
    arrays = make(FULL[2:])
    bias, mask = make_bias(random(), shape, np.float32, "infinities"), make_mask(random(), FULL, "blocks", 64)
    assert_right(executor, *arrays, bias=bias, mask=mask)
    bias, mask = make_bias(random(), FULL, np.float32, "infinities"), make_mask(random(2), shape, "blocks", 64)
    assert_right(executor, *arrays, bias=bias, mask=mask)


LAYOUTS = {
    "keys_slowest": Layout(order=(3, 0, 1, 2)),
    "queries_fastest": Layout(order=(0, 1, 3, 2)),
    "padded": Layout(pad=(1, 2, 0, 3)),
    "odd_base": Layout(offset=1),
    "odd_rows": Layout(pad=(0, 0, 0, 1), offset=3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias_dtype", (F16, F32), ids=str)
def test_where_a_bias_and_a_mask_lie(executor, layout, bias_dtype):
    """Views of buffers of NaN and of True: one element beside the array, and the result is another."""
    arrays = make(FULL[2:])
    bias, mask = make_bias(random(), FULL, bias_dtype, "infinities"), make_mask(random(), FULL, "random")
    placed = {"bias": place(bias, LAYOUTS[layout]).array, "mask": place(mask, LAYOUTS[layout]).array}
    for name, plain in (("bias", bias), ("mask", mask)):
        assert same_bits(call(executor, *arrays, **{name: placed[name]}), call(executor, *arrays, **{name: plain}))
    assert_right(executor, *arrays, **placed)


def test_reversed_views(executor):
    arrays = make(FULL[2:])
    bias, mask = make_bias(random(), FULL, np.float32, "infinities"), make_mask(random(), FULL, "random")
    for turned in (np.s_[..., ::-1], np.s_[:, :, ::-1], np.s_[::-1, ::-1]):
        assert_right(executor, *arrays, bias=bias[turned])
        assert_right(executor, *arrays, mask=mask[turned])


def test_elements_between_their_multiples(executor):
    if executor.name != "host":
        pytest.skip("an array of a device is always aligned to its elements")
    bias = make_bias(random(), FULL, np.float32, "normal")
    odd = np.frombuffer(b"\0" + bias.tobytes(), np.float32, offset=1).reshape(FULL)
    assert not odd.flags.aligned
    arrays = make(FULL[2:])
    assert same_bits(call(executor, *arrays, bias=odd), call(executor, *arrays, bias=bias))


def test_every_other_element(executor):
    wide = make_bias(random(), (2, 2, 140, 270), np.float32, "infinities")
    arrays = make(FULL[2:])
    assert same_bits(
        call(executor, *arrays, bias=wide[:, :, ::2, ::2]), call(executor, *arrays, bias=wide[:, :, ::2, ::2].copy())
    )


# --- huge but finite --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bias_dtype"), [(F16, F32), (F16, BF16), (BF16, BF16), (F32, F32)], ids=str)
def test_the_lowest_number_in_a_whole_row_is_its_mean(executor, dtype, bias_dtype):
    """finfo.min is no -inf: where all keys have it, their logits vanish beside it, and all of them weigh the same."""
    q, k, v = make((70, 135), dtype)
    lowest = float(np.finfo(np.float32).min if bias_dtype == F32 else -3.3895313892515355e38)
    bias = np.zeros((1, 1, 70, 135), np.float64)
    bias[:, :, ::3] = lowest
    for options in ({}, {"causal": "top_left"})[: 1 + (dtype == F16)]:
        out, lse = call(executor, q, k, v, bias=bias.astype(bias_dtype), **options)
        assert np.isfinite(lse).all() and (lse[:, :, ::3] < -3e38).all() and (np.abs(lse[:, :, 1::3]) < 100).all()
        seen = np.broadcast_to(reference.visible(70, 135, **options), (1, 1, 70, 135))[0, 0].astype(float)
        mean = np.einsum("ij,bjge->bige", seen / seen.sum(axis=1, keepdims=True), v.astype(np.float64))
        atol = {F16: 2e-3, BF16: 2e-2, F32: 1e-6}[dtype]
        np.testing.assert_allclose(out[:, ::3].astype(float), np.repeat(mean, 2, axis=2)[:, ::3], atol=atol)
        assert_attention_close(out[:, 1::3], q[:, 1::3], k, v, mask=seen.astype(bool)[1::3])


def test_the_lowest_number_of_float64(executor):
    q, k, v = make((20, 70), F64)
    bias = np.zeros((20, 70))
    bias[::2] = np.finfo(np.float64).min
    bias[1::2, ::2] = np.finfo(np.float64).min
    out, lse = call(executor, q, k, v, bias=bias)
    np.testing.assert_allclose(
        out[:, ::2], np.broadcast_to(v.mean(axis=1, keepdims=True), out[:, ::2].shape), atol=1e-14
    )
    assert (lse[:, :, ::2] < -1e308).all() and np.isfinite(lse).all()
    assert_attention_close(out[:, 1::2], q[:, 1::2], k[:, 1::2], v[:, 1::2], lse=lse[:, :, 1::2])
    # Every key of every query, so that whole tiles hold nothing else: in float32 this number would be -inf.
    out, lse = call(executor, q, k, v, bias=np.full((20, 70), np.finfo(np.float64).min))
    np.testing.assert_allclose(out, np.broadcast_to(v.mean(axis=1, keepdims=True), out.shape), atol=1e-14)
    assert (lse < -1e308).all() and np.isfinite(lse).all()


@pytest.mark.parametrize("dtype", (F16, F32), ids=str)
@pytest.mark.parametrize("function", (cuattn.attention, cuattn.standard_attention))
def test_a_finite_float64_hides_nothing_in_float32(executor, function, dtype):
    """A bias beyond the range of the sums becomes the end of that range: the mean, or all of the weight; -inf hides."""
    q, k, v = make((20, 70), dtype)
    q, k, v = (executor.array(x) for x in (q, k, v))
    atol = 1e-3 if dtype == F16 else 1e-6
    values = np.repeat(executor.numpy(v).astype(float), 2, axis=2)
    bias = np.full((20, 70), -1e300)
    out = executor.numpy(function(q, k, v, bias=executor.array(bias))).astype(float)
    np.testing.assert_allclose(out, np.broadcast_to(values.mean(axis=1, keepdims=True), out.shape), atol=atol)
    bias[:, 7] = 1e300
    out = executor.numpy(function(q, k, v, bias=executor.array(bias))).astype(float)
    np.testing.assert_allclose(out, np.broadcast_to(values[:, 7:8], out.shape), atol=atol)
    bias[:] = -np.inf
    assert not executor.numpy(function(q, k, v, bias=executor.array(bias))).any()
    bias[:, 3] = np.nan
    assert np.isnan(executor.numpy(function(q, k, v, bias=executor.array(bias)))).all()


def test_a_large_common_bias_changes_little(executor):
    """-1e4 on every key, as some models write it for none: the digits that are left must be right."""
    q, k, v = make((70, 135), F32)
    assert_right(executor, q, k, v, bias=np.full((1, 1, 1, 135), -1e4, np.float32))
    assert_right(executor, q, k, v, bias=np.full((1, 1, 1, 135), 1e4, np.float32))


def test_infinite_biases(executor):
    """+inf makes a row NaN; -inf in every column makes it empty; both only where they stand."""
    q, k, v = make((70, 135))
    bias = make_bias(random(), (1, 1, 70, 135), np.float32, "normal")
    bias[0, 0, 7, 100], bias[0, 0, 8], bias[0, 0, 9, :130] = math.inf, -math.inf, -math.inf
    out, lse = assert_right(executor, q, k, v, bias=bias)
    assert np.isnan(out[:, 7]).all() and np.isnan(lse[:, :, 7]).all()
    assert not out[:, 8].any() and np.isneginf(lse[:, :, 8]).all()
    assert np.isfinite(np.delete(out, 7, axis=1).astype(float)).all()


@pytest.mark.parametrize("value", (math.nan, math.inf, 6e4))
@pytest.mark.parametrize("dtype", (F16, F32), ids=str)
def test_a_bias_of_hidden_keys_is_never_felt(executor, dtype, value):
    """Masks come after the bias: whatever stands in it where a mask, a window or the diagonal hides a key."""
    q, k, v = make((70, 135), dtype)
    bias = make_bias(random(), (70, 135), np.float32, "normal")
    mask = make_mask(random(), (70, 135), "blocks", 32)
    for options in ({"causal": True}, {"mask": mask}, {"mask": mask, "window": (None, 20)}):
        seen = np.broadcast_to(reference.visible(70, 135, **options), (1, 1, 70, 135))[0, 0]
        expected = call(executor, q, k, v, bias=bias, **options)
        assert same_bits(call(executor, q, k, v, bias=np.where(seen, bias, np.float32(value)), **options), expected)


def test_a_nan_in_a_bias_stays_in_its_row(executor):
    q, k, v = make((70, 135))
    bias = make_bias(random(), (1, 2, 70, 135), np.float32, "normal")
    bias[0, 1, 33, 134] = math.nan
    out, lse = assert_right(executor, q, k, v, bias=bias)
    assert np.isnan(lse).sum() == 2 and np.isnan(lse[:, 1, 33]).all() and np.isnan(out).sum() == 2 * 32


# --- tiles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", (F16, F32), ids=str)
def test_masks_of_blocks(executor, dtype, block_size):
    """Tiles that are wholly hidden, wholly visible, and neither; with and without a window; as a mask and as a bias."""
    q, k, v = make((200, 260), dtype, batch=1)
    for seed, options in enumerate(({}, {"window": (100, 60)})[: 1 + (dtype == F16)]):
        mask = make_mask(random(seed), (1, 2, 200, 260), "blocks", block_size)
        out, lse = assert_right(executor, q, k, v, mask=mask, **options)
        bias = np.where(mask, np.float32(0), np.float32(-np.inf))
        as_bias = assert_right(executor, q, k, v, bias=bias, **options)
        _, bound, _, bound_lse = attention_bound(q, k, v, mask=mask, **options)
        assert_within(as_bias[0], out.astype(np.float64), 2 * bound)
        assert_within(as_bias[1], lse.astype(np.float64), 2 * bound_lse, "lse")


@pytest.mark.parametrize("block_size", (32, 64, 128))
@pytest.mark.parametrize("dtype", (F16, F32), ids=str)
def test_a_mask_is_a_bias_of_minus_infinity(executor, dtype, block_size):
    """In bits, where both are served by one kernel: one that has every option."""
    q, k, v = make((200, 260), dtype, batch=1)
    mask = make_mask(random(), (1, 2, 200, 260), "blocks", block_size)
    bias = np.where(mask, np.float32(0), np.float32(-np.inf))
    options = {"softcap": 30.0, "alibi_slopes": [0.1, 0.0]}
    assert same_bits(call(executor, q, k, v, mask=mask, **options), call(executor, q, k, v, bias=bias, **options))


#: First and last rows and columns of every tile shape, and of the last, incomplete tile of each.
EDGES_Q = (0, 31, 63, 64, 127, 128, 149)
EDGES_K = (0, 15, 16, 31, 32, 63, 64, 127, 128, 139)


@pytest.mark.parametrize("dtype", (F16, F32), ids=str)
@pytest.mark.parametrize("name", ("mask", "bias"))
def test_one_visible_key_in_a_tile(executor, dtype, name):
    """One query sees one key, at each corner of a tile: the answer is that key's value."""
    places = [(i, j) for i in EDGES_Q for j in EDGES_K]
    q, k, v = make((150, 140), dtype, batch=1, heads=(1, 1), head_dims=(8, 8))
    q, k, v = (np.broadcast_to(x, (len(places), *x.shape[1:])) for x in (q, k, v))
    mask = np.zeros((len(places), 1, 150, 140), bool)
    for b, (i, j) in enumerate(places):
        mask[b, 0, i, j] = True
    option = mask if name == "mask" else np.where(mask, np.float32(0), np.float32(-np.inf))
    out, lse = call(executor, q, k, v, **{name: option})
    expected = np.zeros_like(out)
    for b, (i, j) in enumerate(places):
        expected[b, i] = v[b, j]
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(np.isfinite(lse[:, 0]), mask[:, 0].any(axis=-1))


@pytest.mark.parametrize("dtype", (F16, F32), ids=str)
@pytest.mark.parametrize("name", ("mask", "bias"))
def test_one_hidden_key_in_a_tile(executor, dtype, name):
    """One query does not see one key, at each edge of a tile; its value is huge."""
    q, k, v = make((150, 140), dtype, batch=len(EDGES_Q), heads=(1, 1), head_dims=(8, 8))
    mask = np.ones((len(EDGES_Q), 1, 150, 140), bool)
    for b, (i, j) in enumerate(zip(EDGES_Q, EDGES_K, strict=False)):
        mask[b, 0, i, j] = False
        v[b, j] = 1e4
    option = mask if name == "mask" else np.where(mask, np.float32(0), np.float32(-np.inf))
    out, _ = assert_right(executor, q, k, v, **{name: option})
    for b, i in enumerate(EDGES_Q):
        assert np.abs(out[b, i]).max() < 10 and np.abs(np.delete(out[b], i, axis=0)).max() > 10


@pytest.mark.parametrize("dtype", (F16, F32), ids=str)
def test_a_mask_that_hides_nothing_is_none(executor, dtype):
    arrays, open_mask = make((70, 135), dtype), {"mask": np.ones((70, 135), bool)}
    result = assert_right(executor, *arrays, **open_mask)
    if same_kernel(executor, (arrays, open_mask), (arrays, {})):
        assert same_bits(result, call(executor, *arrays))


@pytest.mark.parametrize("block_size", (64, 128, 7))
def test_what_a_mask_hides_is_never_felt(executor, block_size):
    """Huge keys and values where no query looks: whole tiles of them, and parts of tiles."""
    for dtype, huge in ((F16, 6e4), (F32, 1e30)):
        q, k, v = make((70, 260), dtype)
        hidden = (np.arange(260) // block_size) % 2 == 1
        for option in ({"mask": ~hidden}, {"bias": np.where(hidden, -np.inf, 0).astype(np.float32)}):
            expected = call(executor, q, k, v, **option)
            k_huge, v_huge = k.copy(), v.copy()
            k_huge[:, hidden], v_huge[:, hidden] = huge, -huge
            assert same_bits(call(executor, q, k_huge, v_huge, **option), expected)


def test_a_mask_and_a_bias_hide_a_tile_together(executor):
    """Neither hides all of it: the mask takes its even keys, the bias its odd ones."""
    q, k, v = make((70, 260))
    bias, mask = np.zeros((70, 260), np.float32), np.ones((70, 260), bool)
    mask[:, 64:192:2] = False
    bias[:, 65:192:2] = -np.inf
    for options in ({}, {"sinks": [0.5, 1.0]}):
        result = assert_right(executor, q, k, v, mask=mask, bias=bias, **options)
        visible = np.r_[0:64, 192:260]
        assert_attention_close(result[0], q, k[:, visible], v[:, visible], lse=result[1], **options)


def test_different_masks_for_each_head_and_batch_entry(executor):
    q, k, v = make((70, 135), heads=(4, 2))
    mask = make_mask(random(), (2, 4, 70, 135), "blocks", 32)
    out, lse = assert_right(executor, q, k, v, mask=mask)
    for b in range(2):
        for h in range(4):
            own = (q[b : b + 1, :, h : h + 1], *(x[b : b + 1, :, h // 2 : h // 2 + 1] for x in (k, v)))
            part = out[b : b + 1, :, h : h + 1], lse[b : b + 1, h : h + 1]
            assert same_bits(call(executor, *own, mask=mask[b, h]), part)
