"""The oracle of the gradients: against differences of the reference, and complex steps of another forward pass."""

from __future__ import annotations

import itertools
import math

import ml_dtypes
import numpy as np
import pytest
from complex_attention import complex_attention
from differences import by_differences

import cuattn
from cuattn import reference
from cuattn.testing.options import broadcast_shapes

BATCH, SEQLEN_Q, SEQLEN_K, HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM_V = 2, 3, 4, 2, 1, 2, 3
FULL = BATCH, HEADS, SEQLEN_Q, SEQLEN_K


def _arrays(rng, heads=(HEADS, KV_HEADS)):
    """q, k, v, dout and dlse of a small problem."""
    q = rng.standard_normal((BATCH, SEQLEN_Q, heads[0], HEAD_DIM))
    k = rng.standard_normal((BATCH, SEQLEN_K, heads[1], HEAD_DIM))
    v = rng.standard_normal((BATCH, SEQLEN_K, heads[1], HEAD_DIM_V))
    dout = rng.standard_normal((BATCH, SEQLEN_Q, heads[0], HEAD_DIM_V))
    return q, k, v, dout, rng.standard_normal((BATCH, heads[0], SEQLEN_Q))


def _option_sets():
    """Each option alone, pairs of those that change the formulas, and all of them; as functions of a generator."""
    options = {
        "scale": lambda rng: {"scale": -0.7},
        "causal": lambda rng: {"causal": True},
        "top_left": lambda rng: {"causal": "top_left"},
        "window": lambda rng: {"window": (1, 0)},
        "softcap": lambda rng: {"softcap": 1.5},
        "bias": lambda rng: {"bias": rng.standard_normal((HEADS, 1, SEQLEN_K))},
        "mask": lambda rng: {"mask": rng.random(FULL) < 0.6},
        "alibi": lambda rng: {"alibi_slopes": rng.random((BATCH, HEADS))},
        "sinks": lambda rng: {"sinks": rng.standard_normal(HEADS)},
        "dropout": lambda rng: {"dropout_p": 0.4, "dropout_seed": 5, "dropout_offset": 2},
        "offsets": lambda rng: {"causal": True, "diagonal_offset": [1, -1]},
    }
    names = [(), *((name,) for name in options)]
    names += itertools.combinations(("causal", "softcap", "bias", "mask", "sinks", "dropout"), 2)
    names.append(("scale", "window", "softcap", "bias", "mask", "alibi", "sinks", "dropout", "offsets"))
    return [pytest.param([options[name] for name in chosen], id="-".join(chosen) or "none") for chosen in names]


OPTION_SETS = _option_sets()


def _draw(rng, makers):
    return {name: value for make in makers for name, value in make(rng).items()}


@pytest.mark.parametrize("makers", OPTION_SETS)
def test_central_differences_of_the_reference(makers):
    rng = np.random.default_rng(1)
    *arrays, dout, dlse = _arrays(rng)
    options = _draw(rng, makers)
    varied = [name for name in ("bias", "sinks") if name in options]
    arrays += [options[name] for name in varied]

    def scalar(q, k, v, *others):
        own = options | dict(zip(varied, others, strict=True))
        out, lse = reference.attention(q, k, v, dtype=np.longdouble, **own)
        return (out * dout).sum() + (np.where(np.isneginf(lse), 0, lse) * dlse).sum()

    grads = reference.attention_backward(dout, *arrays[:3], dlse=dlse, **options)
    expected = by_differences(scalar, arrays)
    for name, want in zip(["dq", "dk", "dv", *(f"d{name}" for name in varied)], expected, strict=True):
        np.testing.assert_allclose(getattr(grads, name), want, rtol=0, atol=1e-13, err_msg=name)
    assert (grads.dbias is None) == ("bias" not in options) and (grads.dsinks is None) == ("sinks" not in options)


def random_options(rng, heads):
    full = BATCH, heads, SEQLEN_Q, SEQLEN_K
    shapes = broadcast_shapes(full)
    bias = np.asarray(rng.standard_normal(shapes[rng.integers(len(shapes))]))
    hidden = rng.random(bias.shape) < 0.15
    values = {
        "scale": float(rng.choice([1.0, 0.3, -0.1])),
        "causal": [True, "top_left", "bottom_right"][rng.integers(3)],
        "window": [(0, 0), (1, None), (None, 1), (2, 1)][rng.integers(4)],
        "softcap": float(rng.choice([0.5, 3.0])),
        "bias": np.where(hidden, -np.inf, bias),
        "mask": rng.random(shapes[rng.integers(len(shapes))]) < 0.7,
        "alibi_slopes": rng.random((BATCH, heads) if rng.random() < 0.5 else heads),
        "sinks": rng.standard_normal(heads),
        "diagonal_offset": int(rng.integers(-2, 3)) if rng.random() < 0.5 else rng.integers(-2, 3, BATCH),
        "dropout_p": float(rng.choice([0.2, 0.6])),
        "dropout_seed": int(rng.integers(2**63)),
    }
    return {name: value for name, value in values.items() if rng.random() < 0.4}


@pytest.mark.parametrize("seed", range(25))
def test_complex_steps_of_another_forward(seed):
    """f(x + ih) = f(x) + ih f'(x) up to h^2, and without a difference, hence to the last digits at h = 1e-30."""
    rng = np.random.default_rng(seed)
    heads = [(1, 1), (2, 2), (2, 1), (3, 1), (4, 2)][rng.integers(5)]
    q, k, v, dout, dlse = _arrays(rng, heads)
    options = random_options(rng, heads[0])
    bias, sinks = options.get("bias", np.zeros(())), options.get("sinks")
    arrays = [q, k, v, bias] + ([] if sinks is None else [sinks])

    grads = reference.attention_backward(dout, q, k, v, dlse=dlse, **options)
    for number, array in enumerate(arrays):
        moved = [x.astype(complex) for x in arrays] + ([None] if sinks is None else [])
        want = np.zeros(array.shape)
        for at in np.ndindex(array.shape):
            moved[number][at] += 1e-30j
            out, lse = complex_attention(*moved, options=options)
            want[at] = ((dout * out).sum() + (dlse * lse).sum()).imag / 1e-30
            moved[number][at] = array[at]
        if grads[number] is not None:
            np.testing.assert_allclose(grads[number], want, rtol=0, atol=1e-13, err_msg=grads._fields[number])


def test_by_hand():
    """Two keys with P = 1/4 and 3/4, dout = 1, v = 8 and 4: out 5, Delta 5, dS = P (v - 5) = (3/4, -3/4)."""
    q, dout = np.full((1, 1, 1, 1), 2.0), np.ones((1, 1, 1, 1))
    k = np.array([0.0, math.log(3.0)]).reshape(1, 2, 1, 1)
    v = np.array([8.0, 4.0]).reshape(1, 2, 1, 1)
    grads = reference.attention_backward(dout, q, k, v, scale=0.5, bias=np.zeros(2))
    np.testing.assert_allclose(grads.dv.ravel(), [0.25, 0.75], rtol=1e-15)
    np.testing.assert_allclose(grads.dbias, [0.75, -0.75], rtol=1e-15)
    np.testing.assert_allclose(grads.dk.ravel(), [0.75, -0.75], rtol=1e-15)
    np.testing.assert_allclose(grads.dq.ravel(), [-0.375 * math.log(3.0)], rtol=1e-15)
    # A sink of log 4 halves P and out: Delta = 2.5, and the sink has P = 1/2 and dS = -1.25.
    grads = reference.attention_backward(dout, q, k, v, scale=0.5, sinks=[math.log(4.0)])
    np.testing.assert_allclose(grads.dsinks, [-1.25], rtol=1e-15)
    np.testing.assert_allclose(grads.dv.ravel(), [0.125, 0.375], rtol=1e-15)
    # dlse = 1 adds P to dS; the rest of it goes to the sink.
    more = reference.attention_backward(dout, q, k, v, scale=0.5, sinks=[math.log(4.0)], dlse=np.ones((1, 1, 1)))
    np.testing.assert_allclose((more.dk - grads.dk).ravel(), [0.125, 0.375], rtol=1e-14)
    np.testing.assert_allclose(more.dsinks - grads.dsinks, [0.5], rtol=1e-15)


def test_saved_out_and_lse_are_used_as_they_are():
    """lse larger by log 2 halves P; an out of 0 leaves dS = P dP."""
    rng = np.random.default_rng(2)
    q, k, v, dout, _ = _arrays(rng)
    out, lse = reference.attention(q, k, v)
    right = reference.attention_backward(dout, q, k, v)
    for given in ({}, {"out": out}, {"lse": lse}, {"out": out, "lse": lse}):
        for got, want in zip(reference.attention_backward(dout, q, k, v, **given)[:3], right[:3], strict=True):
            np.testing.assert_array_equal(got, want)
    halved = reference.attention_backward(dout, q, k, v, out, lse + math.log(2))
    for got, want in zip(halved[:3], right[:3], strict=True):
        np.testing.assert_allclose(got, want / 2, rtol=1e-13)
    p = reference.probabilities(q, k)
    dp = dout.transpose(0, 2, 1, 3) @ np.repeat(v, 2, axis=2).transpose(0, 2, 3, 1)
    without_delta = reference.attention_backward(dout, q, k, v, 0 * out, lse, bias=np.zeros(FULL))
    np.testing.assert_allclose(without_delta.dbias, p * dp, rtol=1e-13)


def test_rows_that_see_nothing():
    rng = np.random.default_rng(3)
    q, k, v, dout, dlse = _arrays(rng)
    mask = np.ones((BATCH, 1, SEQLEN_Q, SEQLEN_K), bool)
    mask[:, :, 0] = False
    bias, sinks = np.zeros((1, 1, SEQLEN_Q, SEQLEN_K)), np.array([0.5, -np.inf])
    for own in ({"mask": mask}, {"bias": np.where(mask[:1], bias, -np.inf)}):
        options = {"bias": bias} | own
        grads = reference.attention_backward(dout, q, k, v, dlse=dlse, sinks=sinks, **options)
        assert not grads.dq[:, 0].any() and not grads.dbias[:, :, 0].any()
        assert all(np.isfinite(x).all() for x in grads)
        # lse of an empty row is the sink: its dlse is all that the sink gets from it. A sink of -inf gets nothing.
        visible = reference.attention_backward(
            dout[:, 1:], q[:, 1:], k, v, dlse=dlse[..., 1:], sinks=sinks, bias=bias[:, :, 1:]
        )
        np.testing.assert_allclose(grads.dsinks, [visible.dsinks[0] + dlse[:, 0, 0].sum(), 0], rtol=1e-13)
        np.testing.assert_allclose(grads.dv, visible.dv, rtol=1e-13)


@pytest.mark.parametrize("compute", [reference.attention_backward, reference.attention_backward_naive])
def test_a_positive_infinite_logit_is_nan_for_the_row_and_what_it_sees(compute):
    q, k, v, dout, _ = _arrays(np.random.default_rng(4))
    bias = np.zeros((SEQLEN_Q, SEQLEN_K))
    bias[0, 1], bias[0, 3] = np.inf, -np.inf
    keep = np.ones((1, 1, SEQLEN_Q, SEQLEN_K), bool)
    keep[0, 0, 0, 2] = False
    options = {"bias": bias, "dropout_p": 0.5, "dropout_keep": keep}
    out, lse = reference.attention(q, k, v, **options)
    assert np.isnan(lse[:, :, 0]).all()
    grads = compute(dout, q, k, v, out, lse, **options)
    assert np.isnan(grads.dq[:, 0]).all() and np.isfinite(grads.dq[:, 1:]).all()
    assert np.isnan(grads.dk[:, :3]).all() and np.isfinite(grads.dk[:, 3]).all()
    assert np.isnan(grads.dv[:, :2]).all() and np.isfinite(grads.dv[:, 2:]).all()
    np.testing.assert_array_equal(np.isnan(grads.dbias), [[1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    assert grads.dbias[0, 3] == 0


@pytest.mark.parametrize("shape", broadcast_shapes(FULL))
def test_bias_gradient_has_the_shape_of_the_bias(shape):
    """It is that of the whole bias, summed over what was broadcast."""
    rng = np.random.default_rng(5)
    q, k, v, dout, dlse = _arrays(rng)
    bias = np.asarray(rng.standard_normal(shape))
    got = reference.attention_backward(dout, q, k, v, dlse=dlse, bias=bias).dbias
    whole = reference.attention_backward(dout, q, k, v, dlse=dlse, bias=np.broadcast_to(bias, FULL)).dbias
    assert got.shape == shape and whole.shape == FULL
    places = np.arange(bias.size).reshape(shape)
    sums = np.bincount(np.broadcast_to(places, FULL).ravel(), whole.ravel(), bias.size)
    np.testing.assert_allclose(got.ravel(), sums, atol=1e-13)


def test_a_shift_of_all_logits_is_felt_by_lse_alone():
    rng = np.random.default_rng(6)
    q, k, v, dout, dlse = _arrays(rng)
    options = {"bias": np.zeros(FULL), "dropout_p": 0.3}
    without = reference.attention_backward(dout, q, k, v, **options)
    np.testing.assert_allclose(without.dbias.sum(axis=-1), 0, atol=1e-14)
    grads = reference.attention_backward(dout, q, k, v, dlse=dlse, **options)
    np.testing.assert_allclose(grads.dbias.sum(axis=-1), dlse, atol=1e-14)
    # with a sink, what the keys lack of it
    grads = reference.attention_backward(dout, q, k, v, dlse=dlse, sinks=[0.3, 1.0], **options)
    np.testing.assert_allclose(grads.dsinks + grads.dbias.sum(axis=(0, 2, 3)), dlse.sum(axis=(0, 2)), atol=1e-14)


def test_grouped_heads_are_repeated_heads():
    q, k, v, dout, dlse = _arrays(np.random.default_rng(7), (6, 2))
    grads = reference.attention_backward(dout, q, k, v, dlse=dlse)
    repeated = reference.attention_backward(dout, q, np.repeat(k, 3, axis=2), np.repeat(v, 3, axis=2), dlse=dlse)
    np.testing.assert_allclose(grads.dq, repeated.dq, rtol=1e-13)
    for name in ("dk", "dv"):
        summed = getattr(repeated, name).reshape(BATCH, SEQLEN_K, 2, 3, -1).sum(axis=3)
        np.testing.assert_allclose(getattr(grads, name), summed, rtol=1e-12)


@pytest.mark.parametrize("saved", [False, True])
def test_packed_sequences_are_a_loop(saved):
    rng = np.random.default_rng(8)
    lengths = (3, 2), (0, 4), (5, 0), (1, 6)
    starts_q, starts_k = ([0, 3, 3, 8, 9], [0, 2, 6, 6, 12])
    q, dout, k, v = (rng.standard_normal((n, heads, dim)) for n, heads, dim in
                     ((9, 2, 3), (9, 2, 4), (12, 1, 3), (12, 1, 4)))  # fmt: skip
    bias, dlse = rng.standard_normal((4, 1, 5, 6)), rng.standard_normal((2, 9))
    keep = cuattn.dropout_mask(4, 2, 5, 6, dropout_p=0.25, dropout_seed=3)
    options = {"sinks": rng.standard_normal(2), "softcap": 2.0, "dropout_p": 0.25}
    packed = {"alibi_slopes": rng.random((4, 2)), "diagonal_offset": [0, 1, 0, 2], "causal": True}
    given = {}
    if saved:
        given["out"], given["lse"] = reference.attention_varlen(
            q, k, v, starts_q, starts_k, bias=bias, dropout_seed=3, **options, **packed
        )
        given["out"] = 1.5 * given["out"]
    for of_call in (bias, bias[:1]):
        grads = reference.attention_varlen_backward(
            dout, q, k, v, starts_q, starts_k, dlse=dlse, bias=of_call, dropout_seed=3, **given, **options, **packed
        )
        dbias, dsinks = np.zeros(of_call.shape), np.zeros(2)
        for b, (n, m) in enumerate(lengths):
            rows, columns = slice(starts_q[b], starts_q[b] + n), slice(starts_k[b], starts_k[b] + m)
            own = reference.attention_backward(
                dout[None, rows], q[None, rows], k[None, columns], v[None, columns],
                given["out"][None, rows] if saved else None, given["lse"][None, :, rows] if saved else None,
                dlse=dlse[None, :, rows], bias=of_call[b % len(of_call), :, :n, :m], **options,
                dropout_keep=keep[b, :, :n, :m], causal=True, diagonal_offset=packed["diagonal_offset"][b],
                alibi_slopes=packed["alibi_slopes"][b],
            )  # fmt: skip
            np.testing.assert_array_equal(grads.dq[rows], own.dq[0])
            np.testing.assert_array_equal(grads.dk[columns], own.dk[0])
            np.testing.assert_array_equal(grads.dv[columns], own.dv[0])
            dbias[b % len(of_call), :, :n, :m] += own.dbias
            dsinks += own.dsinks
        np.testing.assert_allclose(grads.dbias, dbias, atol=1e-15)
        np.testing.assert_allclose(grads.dsinks, dsinks, atol=1e-15)


def test_longdouble_is_finer_than_float64():
    q, k, v, dout, dlse = _arrays(np.random.default_rng(9))
    coarse = reference.attention_backward(dout, q, k, v, dlse=dlse, softcap=2.0)
    fine = reference.attention_backward(dout, q, k, v, dlse=dlse, softcap=2.0, dtype=np.longdouble)
    for got, want in zip(coarse[:3], fine[:3], strict=True):
        assert want.dtype == np.longdouble
        np.testing.assert_allclose(got, want.astype(float), rtol=1e-11)
        if np.finfo(np.longdouble).eps < np.finfo(np.float64).eps:
            assert (want != want.astype(np.float64)).any()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, "tf32"])
def test_naive_rounds_where_a_kernel_rounds(dtype):
    """P Z and dS are rounded before the products with them, and nothing else is but the results."""
    rng = np.random.default_rng(10)
    given, precision = (np.float32, "tf32") if dtype == "tf32" else (dtype, None)
    q, k, v, dout = (rng.standard_normal((1, 20, 1, 8)).astype(given) for _ in range(4))
    bias, sinks = rng.standard_normal((20, 20)).astype(np.float16), np.float32([0.5])
    out, lse = reference.attention_naive(q, k, v, bias=bias, sinks=sinks, precision=precision)
    grads = reference.attention_backward_naive(dout, q, k, v, out, lse, bias=bias, sinks=sinks, precision=precision)
    assert [x.dtype for x in grads] == [np.dtype(given)] * 3 + [np.float16, np.float32]

    def operand(x):
        return reference.round_to_tf32(x) if dtype == "tf32" else x.astype(dtype).astype(np.float32)

    queries, keys, values, dy = (operand(x[0, :, 0].astype(np.float32)) for x in (q, k, v, dout))
    scale = np.float32(1 / math.sqrt(8))
    p = np.exp(queries @ keys.T * scale + bias.astype(np.float32) - lse[0, 0][:, None])
    delta = (dout[0, :, 0].astype(np.float32) * out[0, :, 0].astype(np.float32)).sum(axis=1)
    ds = p * (dy @ values.T - delta[:, None])
    for got, want in (
        (grads.dv[0, :, 0], operand(p).T @ dy),
        (grads.dq[0, :, 0], scale * (operand(ds) @ keys)),
        (grads.dk[0, :, 0], scale * (operand(ds).T @ queries)),
        (grads.dbias, ds),
        (grads.dsinks, np.atleast_1d(-(np.exp(sinks - lse[0, 0]) * delta).sum())),
    ):
        unit = {np.dtype(np.float16): 2**-11, np.dtype(np.float32): 2**-20}.get(got.dtype, 2**-8)
        np.testing.assert_allclose(got.astype(np.float32), want, rtol=1.01 * unit, atol=1e-6)


def test_empty_axes():
    full = {"B": 2, "N": 3, "M": 4, "H": 2, "G": 1, "D": 5, "E": 6}
    for axis in ("B", "N", "M"):
        b, n, m, h, g, d, e = (full | {axis: 0}).values()
        q, k, v, dout = (np.ones(shape) for shape in ((b, n, h, d), (b, m, g, d), (b, m, g, e), (b, n, h, e)))
        bias, sinks = np.zeros((h, 1, m)), np.zeros(h)
        grads = reference.attention_backward(dout, q, k, v, bias=bias, sinks=sinks)
        assert [x.shape for x in grads] == [q.shape, k.shape, v.shape, bias.shape, (h,)]
        assert not any(x.any() for x in grads)
