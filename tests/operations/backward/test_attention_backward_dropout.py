"""Dropout in the gradients: exactly the mask of cuattn.dropout_mask, which forward keeps too, in each product."""

from __future__ import annotations

import numpy as np
import pytest
from attention_calls import call
from backward_calls import Saved, after_forward, assert_right, call_backward, same_bits
from backward_formats import BF16, F16, F32, F64
from dropout_calls import ARGUMENTS, NAMES, probabilities
from packed_sequences import pack
from test_attention_backward import normal

import cuattn
from cuattn import DropoutOrigin
from cuattn.reference.dropout import philox4x32_10

WIDTH = 32  # head dim of the probes: so many columns of a mask are read by one call


def one_hot(seqlen, start, dtype, heads=2, batch=2):
    """[B, N, H, 32]: row start + e is the e-th unit vector, all others are 0."""
    x = np.zeros((batch, seqlen, heads, WIDTH), dtype)
    for e in range(min(WIDTH, seqlen - start)):
        x[:, start + e, :, e] = 1
    return x


def stitched(parts, extent):
    """Columns of parts [B, N, H, 32] side by side, [B, H, N, extent]."""
    return np.concatenate(parts, axis=-1)[..., :extent].swapaxes(1, 2)


def kept_by(executor, name, seqlens, dtype, heads=2, batch=2, **options):
    """What the computation of `name` keeps, bool [B, H, N, M], read 32 queries or keys at a time.

    Of dv: P Z, for dout of unit vectors. Of dq and dk: dS, which is P Z where dout V^T is 1 and Delta is 0 (for out is
    0: the saved arrays are inputs like any other), for keys, or queries, of unit vectors.
    """
    seqlen_q, seqlen_k = seqlens
    one = {"q": seqlen_q, "k": seqlen_k, "v": seqlen_k, "dout": seqlen_q}
    ones = {key: np.ones((batch, n, heads, WIDTH), dtype) / dtype.type(WIDTH) for key, n in one.items()}
    probe = {"dv": "dout", "dk": "q", "dq": "k"}[name]
    extent = one[probe]
    parts = []
    for start in range(0, extent, WIDTH):
        arrays = ones | {probe: one_hot(extent, start, dtype, heads, batch)}
        q, k, v = arrays["q"], arrays["k"], arrays["v"]
        out, lse = call(executor, q, k, v, **options)
        saved = Saved(arrays["dout"], q, k, v, np.zeros_like(out), lse, options)
        parts.append(getattr(call_backward(executor, saved), name))
    kept = stitched(parts, extent)
    return kept > 0 if name == "dq" else (kept > 0).swapaxes(2, 3)


@pytest.mark.smoke
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize("name", ("dq", "dk", "dv"))
def test_what_is_kept(executor, name, arguments):
    """Exactly the mask, in every head and batch entry, in P Z and in dS."""
    options = dict(zip(NAMES, arguments, strict=True))
    mask = cuattn.dropout_mask(2, 2, 40, 70, **options)
    np.testing.assert_array_equal(kept_by(executor, name, (40, 70), F16, **options), mask)


@pytest.mark.parametrize("dtype", (BF16, F32, F64, "tf32"), ids=str)
@pytest.mark.parametrize("name", ("dq", "dk", "dv"))
def test_what_other_kernels_keep(executor, name, dtype):
    options = {"dropout_p": 0.4, "dropout_seed": 2**50 + 1, "dropout_offset": 3}
    mask = cuattn.dropout_mask(2, 2, 40, 70, **options)
    more = {"alibi_slopes": [0.0, 0.01]}  # with a second option: the kernel of all of them
    if dtype == "tf32":
        dtype, more = F32, more | {"precision": "tf32"}
    np.testing.assert_array_equal(kept_by(executor, name, (40, 70), dtype, **options, **more), mask)


@pytest.mark.parametrize("dtype", (F16, F32), ids=str)
@pytest.mark.parametrize("name", ("dq", "dk", "dv"))
def test_what_a_part_keeps(executor, name, dtype):
    """What the whole call keeps there: where four elements share a random number, and where each needs its own."""
    options = {"dropout_p": 0.4, "dropout_seed": 2**50 + 1, "dropout_offset": 3}
    for origin in (DropoutOrigin(1, 2, 32, 16, 5), DropoutOrigin(1, 2, 33, 7, 5), DropoutOrigin(0, 1, 8, 16, 4, 3)):
        of_call = options | {"dropout_origin": origin}
        mask = cuattn.dropout_mask(2, 2, 40, 70, **of_call)
        np.testing.assert_array_equal(kept_by(executor, name, (40, 70), dtype, **of_call), mask)


@pytest.mark.parametrize("origin", (DropoutOrigin(1, 2, 32, 16, 5), DropoutOrigin(0, 1, 3, 9, 4, 3)), ids=str)
def test_gradients_of_a_part(executor, origin):
    """With a bias, whose gradient has kernels of its own."""
    bias = np.random.default_rng(7).standard_normal((2, 70, 135)).astype(F16)
    options = {"dropout_p": 0.4, "dropout_seed": 5, "dropout_origin": origin, "bias": bias}
    saved = after_forward(executor, *normal(F16), **options)
    assert_right(executor, saved, return_dbias=True)


def test_forward_and_backward_keep_the_same(executor):
    options = {"dropout_p": 0.3, "dropout_seed": 77, "dropout_offset": 1}
    forward, _, _ = probabilities(lambda *x, **given: call(executor, *x, **given), (150, 70), F16, batch=1, **options)
    backward = kept_by(executor, "dv", (150, 70), F16, batch=1, **options)
    np.testing.assert_array_equal(backward, forward > 0)


@pytest.mark.parametrize("place", ((0, 0), (30, 5), (27, 31)), ids=str)
def test_the_last_word_that_is_kept(executor, place):
    """An element is kept when its word is below the threshold: not when they are equal, and when it is one less."""
    i, j = place
    words = philox4x32_10((8 * (j // 16) + j % 8, 8 * (i // 16) + i % 8, 0, 0), (7, 0))
    word = int(words[2 * ((i // 8) % 2) + (j // 8) % 2])
    for threshold in (word, word + 1):
        options = {"dropout_p": 1 - threshold / 2**32, "dropout_seed": 7}
        for name in ("dq", "dv"):
            kept = kept_by(executor, name, (32, 32), F16, heads=1, batch=1, **options)
            assert kept[0, 0, i, j] == (threshold > word)


def test_positions_within_a_sequence(executor):
    """Packed sequences: exactly the mask of the batch entry, from its first query and key on."""
    lengths = [(20, 9), (0, 5), (32, 40), (17, 70)]
    (q, k, v), starts = pack(lengths, heads=(2, 2))
    dout = np.zeros((69, 2, WIDTH), F16)
    for (n, _), start in zip(lengths, starts[0], strict=False):
        dout[start : start + n] = np.eye(WIDTH, dtype=F16)[:n, None]
    options = {"dropout_p": 0.4, "dropout_seed": 2**63 + 1, "dropout_offset": 6}
    saved = after_forward(executor, q, k, v, *starts, dout=dout, **options)
    mask = cuattn.dropout_mask(4, 2, 32, 70, **options)
    for on_device in (False, True):
        dv = call_backward(executor, saved, schedule_on_device=on_device).dv
        for b, (n, m) in enumerate(lengths):
            kept = dv[starts[1][b] : starts[1][b + 1], :, :n].transpose(1, 2, 0) > 0
            np.testing.assert_array_equal(kept, mask[b, :, :n, :m])


@pytest.mark.parametrize("p", (0.1, 0.9, 1e-3))
def test_against_the_reference(executor, p):
    for options in ({}, {"sinks": np.float32([0.0, 3.0])}):
        assert_right(executor, after_forward(executor, *normal(F16), dlse=True, dropout_p=p, dropout_seed=8, **options))


@pytest.mark.parametrize("options", ({"causal": True}, {"window": (30, 9)}), ids=str)
def test_dropout_in_a_band(executor, options):
    options = options | {"dropout_p": 0.3, "dropout_seed": 8, "alibi_slopes": [0.1, 0.0]}
    assert_right(executor, after_forward(executor, *normal(F16), **options))


def test_the_gradient_of_lse_is_not_dropped(executor):
    """lse is that without dropout, so what it gives to q and k is that without dropout, in bits."""
    saved = after_forward(executor, *normal(F16), dlse=True, alibi_slopes=[0.0, 0.1])
    saved = saved.but(dout=np.zeros_like(saved.out))
    with_dropout = saved.but(options=saved.options | {"dropout_p": 0.7, "dropout_seed": 3})
    assert same_bits(call_backward(executor, with_dropout)[:2], call_backward(executor, saved)[:2])


def test_no_dropout_is_none(executor):
    saved = after_forward(executor, *normal(F16), dlse=True)
    grads = call_backward(executor, saved)
    none = saved.but(options={"dropout_p": 0.0, "dropout_seed": 9, "dropout_offset": 2})
    assert same_bits(call_backward(executor, none), grads)
