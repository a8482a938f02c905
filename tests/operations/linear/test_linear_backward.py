"""linear_attention_backward against the recurrence in float64: dtypes, decays, maps, heads, head dims, lengths."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from linear_calls import BF16, DTYPES, F16, F32, F64, decay_like, on, qkv, state_like

import cuattn
from cuattn.testing.linear_gradients import assert_linear_gradients_close, linear_gradients_naive
from cuattn.testing.tolerance import ToleranceError

KINDS = (None, "head", "token", "channel")
#: (heads of q, k, v): as many; grouped, multi-query, more values than keys, more keys, fewer queries than states.
HEADS = ((2, 2, 2), (6, 2, 2), (5, 1, 1), (2, 2, 6), (12, 4, 1), (1, 3, 1))


def gradients(executor, dout, q, k, v, **options):
    arrays = {"decay", "initial_state", "dstate"}
    given = {name: on(executor, x) if name in arrays else x for name, x in options.items()}
    return cuattn.linear_attention_backward(*(on(executor, x) for x in (dout, q, k, v)), **given)


def dout_like(rng, q, k, v):
    heads = max(q.shape[-2], k.shape[-2], v.shape[-2])
    return rng.standard_normal((*q.shape[:-2], heads, v.shape[-1])).astype(q.dtype)


def check(executor, rng, q, k, v, **options):
    dout = dout_like(rng, q, k, v)
    grads = gradients(executor, dout, q, k, v, **options)
    assert_linear_gradients_close(grads, dout, q, k, v, **options)
    return grads


def states_like(rng, k, v, *, normalize=True):
    """An initial state and a gradient of the last one."""
    gradient = state_like(rng, k, v, normalize=normalize)
    return {"initial_state": state_like(rng, k, v, normalize=normalize), "dstate": gradient}


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_decays_and_states(executor, dtype, kind, normalize):
    rng = np.random.default_rng(1)
    q, k, v = qkv(rng, dtype, 83, (4, 1, 2), dims=(32, 32))
    options = {"decay": decay_like(rng, k, v, kind), "normalize": normalize}
    check(executor, rng, q, k, v, **options, **states_like(rng, k, v, normalize=normalize))


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize(("dtype", "kind"), ((F32, "token"), (BF16, "channel")), ids=str)
def test_heads(executor, dtype, kind, heads):
    """Gradients of a head that several states or outputs read are sums over them."""
    rng = np.random.default_rng(2)
    q, k, v = qkv(rng, dtype, 67, heads, (32, 32), batch=1)
    check(executor, rng, q, k, v, decay=decay_like(rng, k, v, kind))


@pytest.mark.parametrize("seqlen", (1, 31, 32, 33, 63, 64, 65, 129))
@pytest.mark.parametrize(("dtype", "kind"), ((F16, "token"), (BF16, "channel"), (F64, "token")), ids=str)
def test_lengths(executor, dtype, kind, seqlen):
    rng = np.random.default_rng(seqlen)
    q, k, v = qkv(rng, dtype, seqlen, (2, 1, 1), (32, 32), batch=1)
    check(executor, rng, q, k, v, decay=decay_like(rng, k, v, kind), **states_like(rng, k, v))


@pytest.mark.parametrize(
    ("dtype", "kind", "dims"),
    (
        *((dtype, "token", dims) for dtype in (BF16, F32) for dims in ((1, 1), (65, 130), (8, 72))),
        *((BF16, "channel", dims) for dims in ((72, 8), (256, 136))),
        (F32, "token", (256, 256)),
    ),
    ids=str,
)
def test_head_dims(executor, dtype, kind, dims):
    rng = np.random.default_rng(3)
    q, k, v = qkv(rng, dtype, 35, (2, 1, 1), dims, batch=1)
    check(executor, rng, q, k, v, decay=decay_like(rng, k, v, kind), **states_like(rng, k, v))


@pytest.mark.parametrize("feature_map", ("elu1", "relu", "square", None))
@pytest.mark.parametrize("normalize", (True, False))
def test_maps_scale_and_eps(executor, feature_map, normalize):
    rng = np.random.default_rng(4)
    q, k, v = qkv(rng, F16, 70, (2, 2, 2), (64, 64), batch=1)
    if normalize and feature_map is None:
        q, k = np.abs(q), np.abs(k)
    options = {"feature_map": feature_map, "normalize": normalize, "scale": 0.25, "eps": 0.5}
    check(executor, rng, q, k, v, **options, decay=decay_like(rng, k, v, "token"))


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), ((5, 70), (70, 5), (0, 9), (9, 0), (1, 1)))
@pytest.mark.parametrize("dtype", (F16, F32, F64), ids=str)
def test_every_query_reads_the_last_state(executor, dtype, seqlen_q, seqlen_k):
    rng = np.random.default_rng(5)
    heads = (1, 1, 2) if seqlen_q == 70 else (4, 2, 1)  # outputs of a query head, states of a key head or value head
    q, k, v = qkv(rng, dtype, seqlen_q, heads, (32, 32), batch=2, seqlen_k=seqlen_k)
    check(executor, rng, q, k, v, causal=False, **states_like(rng, k, v))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_no_tokens(executor, kind):
    """The gradient of the state goes through to that of the initial one."""
    rng = np.random.default_rng(6)
    q, k, v = qkv(rng, BF16, 0)
    decay = None if kind is None else np.full({"head": 2, "token": (2, 0, 2)}.get(kind, (2, 0, 2, 32)), -1.0)
    states = states_like(rng, k, v)
    grads = check(executor, rng, q, k, v, decay=decay, **states)
    np.testing.assert_array_equal(executor.numpy(grads.dinitial_state.s), states["dstate"].s)


def test_a_denominator_of_zero_has_no_gradient(executor):
    rng = np.random.default_rng(7)
    q, k, v = qkv(rng, F16, 66, (2, 1, 1), (32, 32), batch=1)
    q[:, ::7] = -1
    k[:, :3] = -1  # the first three queries see no key either
    grads = check(executor, rng, q, k, v, feature_map="relu", decay=decay_like(rng, k, v, "token"))
    dq = executor.numpy(grads.dq)
    assert np.isfinite(dq.astype(np.float64)).all() and not dq[:, ::7].any() and not dq[:, :3].any()


def test_small_gradients_of_long_sequences_survive_in_half_precision(executor):
    """Denominators of 1e5 and an output gradient of 1e-3 make terms far below what float16 holds."""
    rng = np.random.default_rng(8)
    q, k, v = qkv(rng, F16, 130, (1, 1, 1), (32, 32), batch=1)
    initial = cuattn.LinearState(*(np.float32(3e3) * (1 + np.abs(x)) for x in state_like(rng, k, v)))
    dout = (1e-3 * dout_like(rng, q, k, v).astype(np.float32)).astype(F16)
    options = {"initial_state": initial, "decay": np.full((1, 130, 1), -1e-3, np.float32)}
    grads = gradients(executor, dout, q, k, v, **options)
    assert_linear_gradients_close(grads, dout, q, k, v, **options)
    assert executor.numpy(grads.dinitial_state.s).any()


def test_blocks_of_a_state_of_different_magnitudes_in_half_precision(executor):
    """Some are 1e10 times as large as others: those of a product are divided by the largest before they are rounded."""
    rng = np.random.default_rng(10)
    q, k, v = (x.astype(np.float64) for x in qkv(rng, F16, 66, (1, 1, 1), (72, 72), batch=1))
    dout = dout_like(rng, q, k, v)
    for x, factor in ((q, 0.1), (k, 1), (v, 1), (dout, 0.1)):
        x[..., :64] *= 1e-3 * factor
        x[..., 64:] *= 1e2 * factor
    dout, q, k, v = (x.astype(F16) for x in (dout, q, k, v))
    options = {"feature_map": None, "normalize": False, "scale": 1e-3, "decay": decay_like(rng, k, v, "token", 0.02)}
    grads = gradients(executor, dout, q, k, v, **options)
    expected = cuattn.reference.linear_attention_backward(dout, q, k, v, **options)
    for name, columns in itertools.product(("dq", "dk", "dv"), (slice(64), slice(64, None))):
        want = getattr(expected, name)[..., columns]
        got = executor.numpy(getattr(grads, name))[..., columns]
        np.testing.assert_allclose(got, want, rtol=0, atol=4e-3 * np.abs(want).max(), err_msg=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fault", ("a key", "a decay", "a scale"))
def test_the_tolerance_sees_small_faults(dtype, fault):
    """Of the gradients in the kernel's precision: one dropped key, a decay of the next token, one row's scale."""
    rng = np.random.default_rng(9)
    q, k, v = qkv(rng, dtype, 90, (2, 1, 1), (32, 32), batch=1)
    dout, decay = dout_like(rng, q, k, v), decay_like(rng, k, v, "token", 0.5)
    options = {"decay": decay, "normalize": False}
    grads = linear_gradients_naive(dout, q, k, v, **options)
    assert_linear_gradients_close(grads, dout, q, k, v, **options)
    if fault == "a key":
        grads = linear_gradients_naive(dout, q, k, np.where(np.arange(90)[:, None, None] == 40, 0, v), **options)
    elif fault == "a decay":
        grads = linear_gradients_naive(dout, q, k, v, **options | {"decay": np.roll(decay, 1, axis=1)})
    else:
        grads = linear_gradients_naive(
            np.where(np.arange(90)[:, None, None] == 40, dout * 1.25, dout), q, k, v, **options
        )
    with pytest.raises(ToleranceError, match=r"d[qkv]|ddecay"):
        assert_linear_gradients_close(grads, dout, q, k, v, **options)
