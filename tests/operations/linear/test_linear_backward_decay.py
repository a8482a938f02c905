"""Gradients under strong, infinite and no decay; they follow differences of the forward, and are the same bits."""

from __future__ import annotations

import numpy as np
import pytest
from linear_calls import BF16, DTYPES, F16, F32, F64, decay_like, on, qkv, state_like
from test_linear_backward import check, dout_like, gradients, states_like

import cuattn
from cuattn import host
from cuattn.testing.arrays import Layout, place
from cuattn.testing.linear_gradients import assert_linear_gradients_close

DECAYED = ("token", "channel")


@pytest.mark.parametrize("kind", ("head", *DECAYED))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sixty_a_token(executor, dtype, kind):
    """Nothing but the token itself is left, to 1e-26; sums of 64 of them are -3840, beyond every exponent."""
    rng = np.random.default_rng(1)
    q, k, v = qkv(rng, dtype, 70, (2, 1, 1), (32, 32), batch=1)
    shape = {"head": (1,), "token": (1, 70, 1), "channel": (1, 70, 1, 32)}[kind]
    check(executor, rng, q, k, v, decay=np.full(shape, -60.0), **states_like(rng, k, v))


@pytest.mark.parametrize("kind", DECAYED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_resets(executor, dtype, kind):
    """A decay of -inf gets exactly 0, and tokens behind it have the gradients of a sequence that begins there."""
    rng = np.random.default_rng(2)
    q, k, v = qkv(rng, dtype, 70, (2, 1, 1), (32, 32), batch=1)
    decay = decay_like(rng, k, v, kind)
    resets = np.array([0, 20, 33, 64])
    decay[:, resets] = -np.inf
    states = states_like(rng, k, v)
    dout = dout_like(rng, q, k, v)
    grads = gradients(executor, dout, q, k, v, decay=decay, **states)
    assert_linear_gradients_close(grads, dout, q, k, v, decay=decay, **states)
    assert not executor.numpy(grads.ddecay)[:, resets].any()
    assert not any(executor.numpy(x).any() for x in grads.dinitial_state)
    tail = slice(64, None)
    own = gradients(executor, *(x[:, tail] for x in (dout, q, k, v)), decay=decay[:, tail], dstate=states["dstate"])
    for name in ("dq", "dk", "dv", "ddecay"):
        np.testing.assert_array_equal(
            executor.numpy(getattr(grads, name))[:, tail], executor.numpy(getattr(own, name)), name
        )


@pytest.mark.parametrize("kind", DECAYED)
@pytest.mark.parametrize("dtype", (BF16, F32), ids=str)
def test_nothing_is_left_of_an_infinite_state(executor, dtype, kind):
    """Behind a reset a state is not felt, whatever it holds."""
    rng = np.random.default_rng(10)
    q, k, v = qkv(rng, dtype, 70, (2, 1, 1), (32, 32), batch=1)
    decay, dout = decay_like(rng, k, v, kind), dout_like(rng, q, k, v)
    decay[:, 0] = -np.inf
    state = cuattn.LinearState(*(np.full_like(x, np.inf) for x in state_like(rng, k, v)))
    grads = gradients(executor, dout, q, k, v, decay=decay, initial_state=state)
    plain = gradients(executor, dout, q, k, v, decay=decay)
    for name in ("dq", "dk", "dv", "ddecay"):
        np.testing.assert_array_equal(executor.numpy(getattr(grads, name)), executor.numpy(getattr(plain, name)), name)
    assert not any(executor.numpy(x).any() for x in grads.dinitial_state)


@pytest.mark.parametrize("kind", DECAYED)
@pytest.mark.parametrize("dtype", (BF16, F32, F64), ids=str)
def test_an_infinite_gradient_of_a_state_ends_at_a_reset(executor, dtype, kind):
    """What comes before a reset does not feel the gradient of the state behind it, whatever it is."""
    rng = np.random.default_rng(11)
    q, k, v = qkv(rng, dtype, 70, (2, 1, 1), (40, 32), batch=1)
    decay, dout = decay_like(rng, k, v, kind), dout_like(rng, q, k, v)
    decay[:, 69] = -np.inf
    gradient = cuattn.LinearState(*(np.full_like(x, np.inf) for x in state_like(rng, k, v)))
    grads = gradients(executor, dout, q, k, v, decay=decay, dstate=gradient)
    plain = gradients(executor, dout, q, k, v, decay=decay)
    for name in ("dq", "dk", "dv", "ddecay"):
        got, want = (executor.numpy(getattr(x, name))[:, :69] for x in (grads, plain))
        np.testing.assert_array_equal(got, want, name)


@pytest.mark.parametrize("kind", DECAYED)
@pytest.mark.parametrize("dtype", (F16, F32), ids=str)
def test_a_huge_decay_harms_nothing_beside_it(executor, dtype, kind):
    """After a token that decays by 1e6 or 1e30, mild decays are as exact as before: sums of both are never taken."""
    rng = np.random.default_rng(3)
    q, k, v = qkv(rng, dtype, 66, (1, 1, 1), (32, 32), batch=1)
    decay = decay_like(rng, k, v, kind, 0.01)
    decay[:, 5], decay[:, 40] = -1e6, -1e30
    check(executor, rng, q, k, v, decay=decay)


@pytest.mark.parametrize("dtype", (BF16, F64), ids=str)
def test_a_decay_of_nothing_is_none(executor, dtype):
    rng = np.random.default_rng(4)
    q, k, v = qkv(rng, dtype, 66, (2, 2, 2), (32, 32), batch=1)
    dout = dout_like(rng, q, k, v)
    plain = gradients(executor, dout, q, k, v)
    assert plain.ddecay is None and plain.dinitial_state is None and plain.dbeta is None
    of_zeros = gradients(executor, dout, q, k, v, decay=np.zeros((1, 66, 2)))
    for name in ("dq", "dk", "dv"):
        np.testing.assert_array_equal(executor.numpy(getattr(plain, name)), executor.numpy(getattr(of_zeros, name)))


def test_equal_channels_are_a_head(executor):
    """A decay that is the same for all channels has, summed over them, the gradient of the decay of the head."""
    rng = np.random.default_rng(5)
    q, k, v = qkv(rng, F64, 70, (2, 1, 2), (32, 32), batch=1)
    dout, decay = dout_like(rng, q, k, v), decay_like(rng, k, v, "token")
    whole = gradients(executor, dout, q, k, v, decay=decay)
    apart = gradients(executor, dout, q, k, v, decay=np.repeat(decay[..., None], 32, axis=-1))
    sums = executor.numpy(apart.ddecay).sum(axis=-1)
    np.testing.assert_allclose(sums, executor.numpy(whole.ddecay), rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(executor.numpy(apart.dk), executor.numpy(whole.dk), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(("kind", "normalize"), (("head", True), ("token", False), ("channel", True)))
def test_differences_of_the_forward(executor, kind, normalize):
    """Along a random direction of all inputs at once, the forward kernel changes by what the gradients say."""
    rng = np.random.default_rng(6)
    q, k, v = qkv(rng, F64, 40, (4, 1, 2), (32, 32), batch=1)
    inputs = {"q": q, "k": k, "v": v, "decay": decay_like(rng, k, v, kind)}
    initial = state_like(rng, k, v, normalize=normalize)
    inputs |= {"s": initial.s} | ({"z": initial.z} if normalize else {})
    dout, last = dout_like(rng, q, k, v), states_like(rng, k, v, normalize=normalize)["dstate"]

    def scalar(step):
        moved = {name: x + step * directions[name] for name, x in inputs.items()}
        out, state = cuattn.linear_attention(
            *(on(executor, moved[name]) for name in "qkv"),
            decay=on(executor, moved["decay"]),
            initial_state=on(executor, (moved["s"], moved.get("z"))),
            normalize=normalize,
            return_state=True,
        )
        pairs = [(out, dout), *zip(state, last, strict=True)]
        return sum((executor.numpy(x) * y).sum() for x, y in pairs if x is not None)

    directions = {name: rng.standard_normal(x.shape) for name, x in inputs.items()}
    grads = gradients(
        executor, dout, q, k, v, decay=inputs["decay"], initial_state=initial, dstate=last, normalize=normalize
    )
    parts = {"q": grads.dq, "k": grads.dk, "v": grads.dv, "decay": grads.ddecay, "s": grads.dinitial_state.s}
    parts |= {"z": grads.dinitial_state.z} if normalize else {}
    slope = sum((executor.numpy(x) * directions[name]).sum() for name, x in parts.items())
    step = 1e-4
    difference = (8 * (scalar(step) - scalar(-step)) - scalar(2 * step) + scalar(-2 * step)) / (12 * step)
    assert difference == pytest.approx(slope, rel=1e-8)


@pytest.mark.parametrize("kind", DECAYED)
@pytest.mark.parametrize("dtype", (BF16, F32), ids=str)
def test_the_same_bits_whenever_copies_and_warps_run(executor, dtype, kind):
    rng = np.random.default_rng(7)
    q, k, v = qkv(rng, dtype, 70, (2, 1, 2), (32, 32), batch=1)
    dout = dout_like(rng, q, k, v)
    options = {"decay": decay_like(rng, k, v, kind), **states_like(rng, k, v)}

    def bits():
        grads = gradients(executor, dout, q, k, v, **options)
        arrays = (grads.dq, grads.dk, grads.dv, grads.ddecay, *grads.dinitial_state)
        return [executor.numpy(x).tobytes() for x in arrays]

    first = bits()
    for asynchrony, seed in (("eager", 1), ("random", 2)):
        with host.schedule(asynchrony, seed):
            assert bits() == first


LAYOUTS = (
    Layout(order=(0, 2, 1, 3)),
    Layout(pad=(1, 2, 1, 8), offset=8),
    Layout(pad=(1, 1, 1, 3), offset=1),
    Layout(order=(3, 1, 2, 0)),
)


@pytest.mark.parametrize("dtype", (BF16, F32), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=range(len(LAYOUTS)))
def test_strides(executor, dtype, layout):
    """Padding and surroundings hold NaN, which nothing feels."""
    rng = np.random.default_rng(8)
    q, k, v = qkv(rng, dtype, 66, (2, 1, 2), (32, 32))
    dout, decay = dout_like(rng, q, k, v), decay_like(rng, k, v, "token").astype(np.float32)
    placed = [executor.array(place(x, layout)) for x in (dout, q, k, v)]
    turned = executor.array(place(decay, Layout(order=(2, 1, 0), pad=(0, 1, 1))))
    states = states_like(rng, k, v)
    given = {
        name: cuattn.LinearState(*(executor.array(place(x, Layout(pad=(1,) * x.ndim))) for x in state))
        for name, state in states.items()
    }
    grads = cuattn.linear_attention_backward(*placed, decay=turned, **given)
    assert_linear_gradients_close(grads, dout, q, k, v, decay=decay, **states)


def test_decays_of_other_dtypes_and_places(executor):
    rng = np.random.default_rng(9)
    q, k, v = qkv(rng, F32, 33, (2, 2, 2), (32, 32), batch=1)
    dout = dout_like(rng, q, k, v)
    exact = np.array([-0.5, -0.25])
    want = gradients(executor, dout, q, k, v, decay=exact)
    for decay in ([-0.5, -0.25], exact.astype(F16), exact.astype(np.float32)):
        grads = gradients(executor, dout, q, k, v, decay=decay)
        assert grads.ddecay.dtype == np.float32 and grads.ddecay.shape == (2,)
        np.testing.assert_array_equal(executor.numpy(grads.ddecay), executor.numpy(want.ddecay))
