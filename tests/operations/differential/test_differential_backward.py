"""cuattn.differential_attention_backward: against the float64 reference, which is held against finite differences."""

from __future__ import annotations

import numpy as np
import pytest
from differential_calls import BF16, F16, F32, F64, make
from hypothesis import given, settings
from hypothesis import strategies as st

import cuattn
from cuattn import reference
from cuattn.errors import ArgumentError, DTypeError, ShapeError
from cuattn.runtime.executor import HostExecutor
from cuattn.testing.differential_gradient_tolerance import assert_differential_gradients_close

shared = pytest.mark.parametrize("shared", (False, True), ids=("v1", "v2"))
RNG = np.random.default_rng(7)
WEIGHT = RNG.standard_normal(32).astype(np.float32)
NORM = {"norm": True, "norm_weight": WEIGHT, "output_scale": 0.8}


def gradients(executor, q, k, v, lambda_, **options):
    """(dout, state, gradients) of a call, as NumPy arrays."""

    def there(x):
        return executor.array(x) if isinstance(x, np.ndarray) else x

    given_options = {name: there(x) for name, x in options.items()}
    arrays = [there(x) for x in (q, k, v, lambda_)]
    out, state = cuattn.differential_attention(*arrays, return_state=True, **given_options)
    dout = np.random.default_rng(5).standard_normal(out.shape).astype(q.dtype)
    grads = cuattn.differential_attention_backward(there(dout), *arrays, state, **given_options)
    saved = type(state)(*map(executor.numpy, state))
    return dout, saved, type(grads)(*(None if x is None else executor.numpy(x) for x in grads))


def assert_right(executor, q, k, v, lambda_, **options):
    dout, state, grads = gradients(executor, q, k, v, lambda_, **options)
    assert grads.dlam.shape == np.shape(lambda_)
    assert_differential_gradients_close(grads, dout, q, k, v, lambda_, state, **options)


@pytest.mark.parametrize("lambda_", (np.array(0.7), RNG.random(2), RNG.random((1, 3, 2))), ids=("one", "heads", "rows"))
@shared
def test_the_reference_is_the_derivative(shared, lambda_):
    """Against central differences, through norm, weight, cap, dropout and everything that is broadcast."""
    q, k, v = (x.astype(np.float64) for x in make((1, 3, 5, 2, 1, 4, 3), F64, shared=shared))
    inputs = [q, k, v, lambda_, RNG.standard_normal(3)]
    dout = RNG.standard_normal((1, 3, 2, 3))
    options = {"eps": 0.1, "output_scale": 0.7, "causal": True, "softcap": 2.0, "dropout_p": 0.3}
    options |= {"bias": RNG.standard_normal((2, 3, 5)), "alibi_slopes": RNG.random(4), "norm": True}

    def value(q, k, v, lam, weight):
        return (reference.differential_attention(q, k, v, lam, norm_weight=weight, **options).out * dout).sum()

    grads = reference.differential_attention_backward(dout, *inputs[:4], norm_weight=inputs[4], **options)
    for i, gradient in enumerate(grads):
        step = 1e-6 * RNG.standard_normal(np.shape(inputs[i]))
        ahead, behind = ([*inputs[:i], inputs[i] + sign * step, *inputs[i + 1 :]] for sign in (1, -1))
        assert gradient.shape == np.shape(inputs[i])
        difference = (value(*ahead) - value(*behind)) / 2
        np.testing.assert_allclose((gradient * step).sum(), difference, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "shared"), ((F16, False), (F16, True), (BF16, False), (F32, True), (F64, False)), ids=str
)
@pytest.mark.parametrize(
    "shape", ((2, 40, 50, 2, 1, 32, 32), (1, 17, 70, 3, 1, 32, 32), (1, 1, 1, 4, 2, 32, 32)), ids=str
)
def test_shapes(executor, shape, dtype, shared):
    q, k, v = make(shape, dtype, shared=shared)
    assert_right(executor, q, k, v, 0.7, causal=True)
    assert_right(executor, q, k, v, np.linspace(-0.5, 1.5, shape[3]), causal=True, **NORM)


@shared
def test_lambda(executor, shared):
    q, k, v = make((2, 21, 40, 3, 1, 32, 32), F16, shared=shared)
    for lambda_ in (0, np.array(0.3), RNG.random(3), RNG.random((2, 21, 3)), RNG.random((2, 21, 3)).astype(BF16)):
        assert_right(executor, q, k, v, lambda_, causal=True, norm=True)


def test_odd_head_dims(executor):
    q, k, v = make((1, 19, 37, 2, 1, 7, 40), F32)
    assert_right(executor, q, k, v, 0.7, norm=True, causal=True)


@settings(max_examples=20)
@given(data=st.data())
def test_any_options(executor, data):
    """Options together, of each stream or of both, in one variant of the kernels for each dtype."""
    dtype, shared = data.draw(st.sampled_from((F16, F64))), data.draw(st.booleans())
    heads, kv_heads = data.draw(st.sampled_from(((3, 1), (2, 2), (1, 1))))
    seqlen_q, seqlen_k = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 60))
    seed = data.draw(st.integers(0, 2**32 - 1))
    q, k, v = make((1, seqlen_q, seqlen_k, heads, kv_heads, 32, 32), dtype, shared=shared, seed=seed)
    rng = np.random.default_rng(seed)

    def logits(name):
        axis = data.draw(st.sampled_from((1, heads, 2 * heads)), name)
        return axis, data.draw(st.sampled_from((1, seqlen_q))), seqlen_k

    options = {
        "softcap": data.draw(st.sampled_from((None, 2.0))),
        "alibi_slopes": rng.random(data.draw(st.sampled_from((heads, 2 * heads)))),
        "bias": rng.standard_normal(logits("heads of the bias")).astype(np.float32),
        "mask": rng.random(logits("heads of the mask")) < 0.8,
        "causal": data.draw(st.sampled_from((False, True))),
        "dropout_p": data.draw(st.sampled_from((0.0, 0.3))),
        "norm": data.draw(st.booleans()),
    }
    lambda_ = data.draw(st.sampled_from((0.5, rng.random(heads), rng.random((1, seqlen_q, heads)))))
    assert_right(executor, q, k, v, lambda_, **options)


def test_many_rows_are_summed_in_parts(executor):
    """More tokens than a CTA takes at once, and heads of which each has parts of its own."""
    q, k, v = make((3, 50, 4, 5, 1, 32, 32), F16, shared=True)
    assert_right(executor, q, k, v, RNG.random(5), causal=True, **NORM)
    assert_right(executor, q, k, v, 0.4, causal=True, **NORM)


@shared
def test_rows_without_keys(executor, shared):
    q, k, v = make((1, 40, 20, 2, 1, 32, 32), F16, shared=shared)
    for eps in (1e-5, 0.0):  # without it they have no norm
        options = {"causal": True, "norm": True, "eps": eps}
        dout, state, grads = gradients(executor, q, k, v, 0.6, **options)
        assert_differential_gradients_close(grads, dout, q, k, v, 0.6, state, **options)
        assert not grads.dq[:, :20].any()


def test_heads_of_a_mask_are_counted_modulo_a_word(executor):
    """The first stream has the last head before 2^32, and the second has head 0."""
    q, k, v = make((2, 21, 40, 2, 1, 32, 32), F16)
    options = {"softcap": 15.0, "alibi_slopes": np.full(4, 0.1, np.float32), "dropout_p": 0.3}
    origin = cuattn.DropoutOrigin(batch=(2**32 - 1) // 5, num_heads=5)
    assert_right(executor, q, k, v, 0.6, dropout_origin=origin, **options)


def test_a_nan_stays_in_its_row(executor):
    """A logit of +inf in one stream: NaN in the gradients of its query and of the keys that this sees, of no others."""
    q, k, v = make((1, 21, 40, 2, 1, 32, 32), F16)
    bias = np.zeros((1, 4, 21, 40), np.float32)
    bias[..., 7] = -np.inf
    options = {"softcap": 15.0, "alibi_slopes": np.full(4, 0.1, np.float32)}
    expected = gradients(executor, q, k, v, 0.6, bias=bias, **options)[2]
    bias[0, 2, 3, 5] = np.inf
    grads = gradients(executor, q, k, v, 0.6, bias=bias, **options)[2]
    lost = np.zeros(q.shape, bool)
    lost[0, 3, 2] = True
    assert np.isnan(grads.dq[lost]).all() and np.array_equal(grads.dq[~lost], expected.dq[~lost])
    seen = np.arange(40) != 7
    for x in (grads.dk[:, :, :1], grads.dv):
        assert np.isnan(x[:, seen]).all() and not x[:, 7].any()
    assert np.array_equal(grads.dk[:, :, 1], expected.dk[:, :, 1])


def test_empty(executor):
    for shape in ((0, 3, 4, 2, 1, 32, 32), (1, 0, 4, 2, 1, 32, 32), (1, 3, 0, 2, 1, 32, 32), (1, 3, 4, 0, 1, 32, 32)):
        for of_v2 in (False, True):
            q, k, v = make(shape, F16, shared=of_v2)
            _, _, grads = gradients(executor, q, k, v, np.ones(shape[3]), causal=True, **NORM)
            for got, x in zip(grads[:3], (q, k, v), strict=True):
                assert got.shape == x.shape and not got.any()
            assert grads.dlam.shape == (shape[3],) and grads.dnorm_weight.shape == (32,)


def test_the_same_bits(executor):
    q, k, v = make((1, 40, 40, 2, 1, 32, 32), F16)
    first, second = (gradients(executor, q, k, v, 0.5, causal=True, **NORM)[2] for _ in range(2))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True))


def test_shared_keys_are_one_call(monkeypatch):
    """Rows, and dq, and dk with dv: nothing is rounded and added afterwards."""
    q, k, v = make((1, 40, 40, 2, 1, 32, 32), F16, shared=True)
    out, state = cuattn.differential_attention(q, k, v, 0.5, causal=True, return_state=True)
    launches = []
    start = HostExecutor._start

    def counted(self, kernel, *launch):
        launches.append(kernel.entry.removeprefix("cuattn_"))
        start(self, kernel, *launch)

    monkeypatch.setattr(HostExecutor, "_start", counted)
    cuattn.differential_attention_backward(out, q, k, v, 0.5, state, causal=True)
    rows = ["differential_backward_rows", "differential_backward_sums"]
    assert launches == [*rows, "attention_backward", "attention_backward"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    (
        ({"state": None}, ArgumentError, r"state is None; a DifferentialState\(lse, out1, out2\) is needed"),
        ({"state": (1, 2)}, ArgumentError, "state is"),
        ({"dout": np.ones((1, 5, 2, 31), np.float16)}, ShapeError, "dout has shape"),
        ({"dout": np.ones((1, 5, 2, 32), np.float32)}, DTypeError, "dout has dtype float32"),
        ({"lse": np.ones((1, 2, 5, 2), np.float32)}, ShapeError, "state.lse has shape"),
        ({"lse": np.ones((1, 2, 2, 5), np.float64)}, DTypeError, "state.lse has dtype float64"),
        ({"out2": np.ones((1, 5, 4, 32), np.float16)}, ShapeError, "state.out2 has shape"),
    ),
)
def test_refused(change, error, message):
    q, k, v = make((1, 5, 7, 2, 1, 32, 32), F16)
    outs = {name: np.ones((1, 5, 2, 32), np.float16) for name in ("dout", "out1", "out2")}
    given = outs | {"lse": np.ones((1, 2, 2, 5), np.float32)} | change
    state = given.get("state", (given["lse"], given["out1"], given["out2"]))
    with pytest.raises(error, match=message):
        cuattn.differential_attention_backward(given["dout"], q, k, v, 0.5, state)
