"""The tolerance rule for gradients passes every correct low-precision computation and no planted error."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from backward_emulation import FAULTS, tiled_backward

from cuattn import reference
from cuattn.testing import ToleranceError, assert_gradients_close, assert_varlen_gradients_close
from cuattn.testing.gradient_tolerance import gradient_bound
from cuattn.testing.options import (
    BIAS_DTYPES,
    BIAS_KINDS,
    broadcast_shapes,
    make_bias,
    make_mask,
    make_sinks,
    make_slopes,
)
from cuattn.testing.rounding import accumulation_dtype
from cuattn.testing.strategies import DTYPES, HEAD_PAIRS, VALUE_KINDS, fill

#: What inputs are, and how they are computed with: a dtype, and the precision option.
FORMATS = {
    **{str(dtype): (dtype, {}) for dtype in DTYPES},
    "tf32": (np.dtype(np.float32), {"precision": "tf32"}),
}
formats = pytest.mark.parametrize("form", FORMATS)


def random_options(rng, batch, heads, seqlen_q, seqlen_k):
    """A few of the options; a third of the problems have none."""
    if rng.random() < 0.33:
        return {}
    full = (batch, heads, seqlen_q, seqlen_k)
    shapes = broadcast_shapes(full)
    bias_shape, mask_shape = (shapes[rng.integers(len(shapes))] for _ in range(2))
    bias_dtype = BIAS_DTYPES[rng.integers(len(BIAS_DTYPES))]
    values = {
        "scale": float(rng.choice([1.0, 0.3, -0.1, 0.0])),
        "causal": rng.choice([True, False]).item() or "top_left",
        "window": (int(rng.integers(0, seqlen_k + 1)), None),
        "softcap": float(rng.choice([1.0, 20.0])),
        "bias": make_bias(rng, bias_shape, bias_dtype, str(rng.choice(BIAS_KINDS))),
        "mask": make_mask(rng, mask_shape, str(rng.choice(["random", "sparse", "lengths"]))),
        "alibi_slopes": make_slopes(rng, (batch, heads) if rng.random() < 0.5 else (heads,)),
        "sinks": make_sinks(rng, heads),
        "diagonal_offset": int(rng.integers(-3, 4)),
        "dropout_p": float(rng.choice([0.1, 0.5, 0.9])),
    }
    return {name: value for name, value in values.items() if rng.random() < 0.3}


def random_problem(rng, form, kind, *, seqlens, head_dims, heads, options):
    """(dout, q, k, v, out, lse), options with dlse in half of the problems; out and lse as a kernel saves them."""
    dtype, precision = FORMATS[form]
    (seqlen_q, seqlen_k), (head_dim, head_dim_v), (num_heads, num_kv_heads) = seqlens, head_dims, heads
    q = fill((2, seqlen_q, num_heads, head_dim), dtype, kind, rng)
    k = fill((2, seqlen_k, num_kv_heads, head_dim), dtype, kind, rng)
    v = fill((2, seqlen_k, num_kv_heads, head_dim_v), dtype, kind, rng)
    dout = fill((2, seqlen_q, num_heads, head_dim_v), dtype, kind if rng.random() < 0.5 else "normal", rng)
    options = options | precision
    out, lse = reference.attention_naive(q, k, v, **options)
    return (dout, q, k, v, out, lse), options


def random_dlse(rng, lse):
    return rng.standard_normal(lse.shape).astype(lse.dtype)


def random_case(rng, form, number):
    seqlens = [int(rng.choice([1, 2, rng.integers(1, 40)])) for _ in range(2)]
    if number % 40 == 0:
        seqlens = [int(n) for n in rng.integers(100, 200, 2)]
    heads = HEAD_PAIRS[rng.integers(len(HEAD_PAIRS))]
    drawn = random_options(rng, 2, heads[0], *seqlens)
    kind = VALUE_KINDS[number % len(VALUE_KINDS)]
    arrays, options = random_problem(
        rng, form, kind, seqlens=seqlens, head_dims=rng.integers(1, 72, 2), heads=heads, options=drawn
    )
    if rng.random() < 0.5:
        options["dlse"] = random_dlse(rng, arrays[5])
    blocks = {name: int(rng.choice([16, 32, 64])) for name in ("block_m", "block_n")}
    if number % 40 == 0:
        blocks = {"block_m": 64, "block_n": 64}
    with np.errstate(all="ignore"):
        grads = tiled_backward(*arrays, sequential=number % 3 == 0, **blocks, **options)
    told = (
        f"problem {number}: {kind}, q {arrays[1].shape}, k {arrays[2].shape}, v {arrays[3].shape}, {blocks}, {options}"
    )
    return grads, arrays, options, told


@pytest.mark.parametrize("seed", range(2))
@formats
def test_correct_emulations_pass(form, seed):
    rng = np.random.default_rng(seed)
    for number in range(60):
        grads, arrays, options, told = random_case(rng, form, number)
        try:
            assert_gradients_close(grads, *arrays, **options)
        except AssertionError as error:
            raise AssertionError(told) from error


BIAS_SHAPES = {
    "full": lambda h, n, m: (2, h, n, m),
    "one_batch": lambda h, n, m: (h, n, m),
    "one_head": lambda h, n, m: (2, 1, n, m),
    "one_row": lambda h, n, m: (m,),
}


def with_what_the_fault_needs(rng, form, needs, seqlen_q=24, seqlen_k=40):
    """A problem of 2 batch entries and several tiles, with the options in which a fault shows."""
    heads = needs.get("heads", (2, 1))
    drawn = {
        "mask": lambda: rng.random((2, 1, seqlen_q, seqlen_k)) < 0.6,
        "alibi_slopes": lambda: np.float32(rng.uniform(0.1, 1, heads[0])),
        "sinks": lambda: np.float32(2 + np.arange(heads[0]) + rng.random(heads[0])),
        "bias": lambda: fill(BIAS_SHAPES[needs["bias"]](heads[0], seqlen_q, seqlen_k), np.float32, "normal", rng),
    }
    options = {name: drawn[name]() if name in drawn else value for name, value in needs.items()}
    options = {name: value for name, value in options.items() if name not in ("heads", "dlse")}
    arrays, options = random_problem(
        rng, form, "normal", seqlens=(seqlen_q, seqlen_k), head_dims=(32, 32), heads=heads, options=options
    )
    return arrays, options | ({"dlse": random_dlse(rng, arrays[5])} if needs.get("dlse") else {})


@pytest.mark.parametrize("fault", FAULTS)
@formats
def test_planted_faults_fail(form, fault):
    rng = np.random.default_rng(7)
    for number in range(2):
        arrays, options = with_what_the_fault_needs(rng, form, FAULTS[fault])
        blocks = {"block_m": 8, "block_n": 16}
        with np.errstate(all="ignore"):
            right = tiled_backward(*arrays, **blocks, **options)
            wrong = tiled_backward(*arrays, fault=fault, **blocks, **options)
        assert_gradients_close(right, *arrays, **options)
        with pytest.raises(ToleranceError, match=r"d\w+\[\d"):
            assert_gradients_close(wrong, *arrays, **options)
            pytest.fail(f"{fault} passed as problem {number}", pytrace=False)


def test_operands_of_fewer_bits_fail():
    """float16 problems with P and dS rounded to bfloat16, float32 ones in tf32."""
    rng = np.random.default_rng(3)
    for form in ("float16", "float32"):
        arrays, _ = with_what_the_fault_needs(rng, form, {})
        precision = {"precision": "tf32"} if form == "float32" else {"operand_dtype": ml_dtypes.bfloat16}
        wrong = tiled_backward(*arrays, block_m=8, block_n=16, **precision)
        for name in ("dq", "dk", "dv"):
            right = tiled_backward(*arrays, block_m=8, block_n=16)
            assert_gradients_close(right, *arrays)
            with pytest.raises(ToleranceError, match=rf"{name}\[\d"):
                assert_gradients_close(right._replace(**{name: getattr(wrong, name)}), *arrays)


def test_saved_out_and_lse_are_taken_as_they_are():
    """Of a forward pass that was wrong, the gradients are those of its out and lse; of others they are not."""
    rng = np.random.default_rng(4)
    for form in FORMATS:
        (dout, q, k, v, out, lse), options = with_what_the_fault_needs(rng, form, {"sinks": True})
        other = (out * 1.25).astype(out.dtype), lse + lse.dtype.type(0.25)
        grads = tiled_backward(dout, q, k, v, *other, block_m=8, block_n=16, **options)
        assert_gradients_close(grads, dout, q, k, v, *other, **options)
        for saved in ((out, other[1]), (other[0], lse)):
            with pytest.raises(ToleranceError, match=r"d\w+\[\d"):
                assert_gradients_close(grads, dout, q, k, v, *saved, **options)


@formats
def test_rows_and_keys_without_a_partner_are_exactly_0(form):
    rng = np.random.default_rng(5)
    mask = np.ones((2, 1, 24, 40), bool)
    mask[:, :, 7], mask[..., 11] = False, False
    arrays, options = with_what_the_fault_needs(rng, form, {"dlse": True})
    dout, q, k, v, *_ = arrays
    options |= {"mask": mask, "sinks": np.float32([0.5, -np.inf]), "bias": np.zeros((24, 40), np.float16)}
    of_forward = {name: value for name, value in options.items() if name != "dlse"}
    arrays = (dout, q, k, v, *reference.attention_naive(q, k, v, **of_forward))
    grads = tiled_backward(*arrays, block_m=8, block_n=16, **options)
    assert_gradients_close(grads, *arrays, **options)
    assert not grads.dq[:, 7].any() and not grads.dk[:, 11].any() and not grads.dv[:, 11].any()
    for name, at in {
        "dq": (0, 7, 1, 0),
        "dk": (0, 11, 0, 3),
        "dv": (1, 11, 0, 3),
        "dbias": (7, 2),
        "dsinks": 1,
    }.items():
        for value in (1e-7, np.nan):
            wrong = getattr(grads, name).copy()
            wrong[at] = value
            with pytest.raises(ToleranceError, match=name):
                assert_gradients_close(grads._replace(**{name: wrong}), *arrays, **options)


@formats
def test_nan_stays_where_it_belongs(form):
    """A row with a +inf logit: NaN in its dq and in dk and dv of the keys that it sees (and keeps), nowhere else."""
    rng = np.random.default_rng(6)
    arrays, options = with_what_the_fault_needs(rng, form, {})
    options |= {"causal": "top_left", "bias": np.zeros((24, 40), np.float32), "dropout_p": 0.5}
    options["bias"][9, 4] = np.inf
    dout, q, k, v, *_ = arrays
    out, lse = reference.attention_naive(q, k, v, **options)
    assert np.isnan(lse[:, :, 9]).all() and np.isfinite(lse[:, :, :9]).all()
    with np.errstate(all="ignore"):
        grads = tiled_backward(dout, q, k, v, out, lse, block_m=8, block_n=16, **options)
    assert_gradients_close(grads, dout, q, k, v, out, lse, **options)
    assert np.isnan(grads.dq[:, 9].astype(float)).all() and np.isnan(grads.dk[:, :10].astype(float)).all()
    assert np.isfinite(grads.dk[:, 10:].astype(float)).all()
    wrong = {"dq": grads.dq.copy(), "dv": grads.dv.copy(), "dk": grads.dk.copy()}
    wrong["dq"][0, 9, 0, 0], wrong["dv"][0, 10, 0, 0], wrong["dk"][1, 3, 0, 1] = 0, np.nan, 0
    for name, value in wrong.items():
        with pytest.raises(ToleranceError, match=f"NaN in the wrong places: {name}"):
            assert_gradients_close(grads._replace(**{name: value}), dout, q, k, v, out, lse, **options)


def test_float16_may_overflow_where_the_naive_computation_does():
    """dv is a sum of 100 numbers, dS a product with 32: both can be beyond 65504."""
    rng = np.random.default_rng(8)
    (_, *others), _ = with_what_the_fault_needs(rng, "float16", {}, seqlen_q=100, seqlen_k=8)
    dout = (1000 * rng.random(others[0].shape)).astype(np.float16)
    dout[..., :7] *= 4
    dout[0, 3, 1] = 60000 * np.sign(others[2][0, 0, 0])
    with np.errstate(all="ignore"):
        grads = tiled_backward(dout, *others, block_m=8, block_n=16)
    assert np.isposinf(grads.dv).any() and np.isfinite(grads.dv).any() and not np.isfinite(grads.dq).all()
    assert_gradients_close(grads, dout, *others)
    for at, value in ((np.isfinite(grads.dv), np.inf), (np.isposinf(grads.dv), 1.0)):
        wrong = grads.dv.copy()
        wrong[tuple(np.argwhere(at)[0])] = value
        with pytest.raises(ToleranceError, match="dv"):
            assert_gradients_close(grads._replace(dv=wrong), dout, *others)


def test_every_gradient_is_asked_for():
    rng = np.random.default_rng(9)
    arrays, options = with_what_the_fault_needs(rng, "float16", {"bias": "full", "sinks": True})
    grads = tiled_backward(*arrays, block_m=8, block_n=16, **options)
    assert_gradients_close(grads._replace(dbias=None), *arrays, **options)
    without = {name: options[name] for name in options if name != "bias"}
    for wrong, of_call, message in (
        (grads._replace(dsinks=None), options, "dsinks is None, but there are sinks"),
        (grads, without, "dbias is given, but there is no bias"),
        (grads, {"bias": options["bias"]}, "dsinks is given, but there is no sinks"),
        (grads._replace(dq=grads.dq.astype(np.float32)), options, "dq has dtype float32, expected float16"),
        (grads._replace(dbias=grads.dbias.astype(np.float16)), options, "dbias has dtype float16, expected float32"),
        (grads._replace(dsinks=grads.dsinks.astype(float)), options, "dsinks has dtype float64, expected float32"),
        (grads._replace(dk=grads.dk[:, 1:]), options, "dk has shape"),
    ):
        with pytest.raises(ToleranceError, match=message):
            assert_gradients_close(wrong, *arrays, **of_call)


def packed_problem(rng, form):
    """Packed arrays, (dout, q, k, v, out, lse, starts_q, starts_k), options, and the gradients by a loop."""
    dtype, precision = FORMATS[form]
    lengths = (5, 7), (0, 2), (7, 0), (1, 11)
    starts = [np.cumsum((0, *column), dtype=np.int32) for column in zip(*lengths, strict=True)]
    tokens_q, tokens_k = (int(each[-1]) for each in starts)
    q, dout = (fill((tokens_q, 4, dim), dtype, "normal", rng) for dim in (16, 24))
    k, v = (fill((tokens_k, 2, dim), dtype, "normal", rng) for dim in (16, 24))
    options = {
        "causal": True,
        "bias": rng.standard_normal((1, 4, 1, 11)).astype(np.float16),
        "mask": rng.random((4, 1, 7, 11)) < 0.8,
        "alibi_slopes": rng.random((4, 4)).astype(np.float32),
        "sinks": np.float32([0, 1, 2, -np.inf]),
        "diagonal_offset": np.int32([1, 0, -2, 3]),
    } | precision
    accumulation = accumulation_dtype(dtype)
    out, lse = np.zeros((tokens_q, 4, 24), dtype), np.zeros((4, tokens_q), accumulation)
    dlse = rng.standard_normal((4, tokens_q)).astype(accumulation)
    dq, dk, dv = (np.zeros_like(x) for x in (q, k, v))
    dbias, dsinks = np.zeros((1, 4, 1, 11), accumulation), np.zeros(4, accumulation)
    for b, (rows, *of_sequence, own) in enumerate(reference.varlen.sequences(q, k, v, *starts, **options)):
        columns = slice(starts[1][b], starts[1][b + 1])
        saved, of_lse = reference.attention_naive(*of_sequence, **own)
        out[rows], lse[:, rows] = saved[0], of_lse[0]
        own["bias"] = own["bias"].astype(accumulation)
        grads = tiled_backward(dout[None, rows], *of_sequence, saved, of_lse, block_m=4, block_n=4,
                               dlse=dlse[None, :, rows], **own)  # fmt: skip
        dq[rows], dk[columns], dv[columns] = grads.dq[0], grads.dk[0], grads.dv[0]
        dbias[..., : columns.stop - columns.start] += grads.dbias
        dsinks += grads.dsinks
    grads = reference.Gradients(dq, dk, dv, dbias.astype(np.float16), dsinks)
    return grads, (dout, q, k, v, out, lse, *starts), options | {"dlse": dlse}


@formats
def test_packed_sequences(form):
    grads, arrays, options = packed_problem(np.random.default_rng(10), form)
    assert_varlen_gradients_close(grads, *arrays, **options)
    for name, at, message in (
        ("dq", (12, 3, 2), "sequence 3, tokens 12 to 13: dq"),
        ("dk", (8, 1, 2), r"sequence 1, tokens 7 to 9: dk\[0, 1, 1, 2\]"),
        ("dv", (0, 1, 2), "sequence 0, tokens 0 to 7: dv"),
        ("dbias", (0, 3, 0, 10), r"dbias\[0, 3, 0, 10\]"),
        ("dsinks", (2,), r"dsinks\[2\]"),
    ):
        wrong = getattr(grads, name).copy()
        wrong[at] += np.asarray(0.125, wrong.dtype)
        with pytest.raises(ToleranceError, match=message):
            assert_varlen_gradients_close(grads._replace(**{name: wrong}), *arrays, **options)


def test_packed_calls_without_a_sequence():
    nothing, starts = np.zeros((0, 2, 8), np.float16), np.zeros(1, np.int32)
    bias, sinks = np.zeros((1, 2, 0, 0), np.float16), np.float32([1, 2])
    arrays = (*[nothing] * 5, np.zeros((2, 0), np.float32), starts, starts)
    right = reference.Gradients(nothing, nothing, nothing, bias, np.float32([0, 0]))
    assert_varlen_gradients_close(right, *arrays, bias=bias, sinks=sinks)
    with pytest.raises(ToleranceError, match="dsinks"):
        assert_varlen_gradients_close(right._replace(dsinks=np.float32([0, 1])), *arrays, bias=bias, sinks=sinks)


def test_the_bound_is_what_is_asserted():
    rng = np.random.default_rng(11)
    arrays, options = with_what_the_fault_needs(rng, "float32", {"bias": "one_row", "sinks": True, "dlse": True})
    expected, bound = gradient_bound(*arrays, **options)
    assert_gradients_close(reference.Gradients(*(x.astype(np.float32) for x in expected)), *arrays, **options)
    for name in expected._fields:
        assert (getattr(bound, name) > 0).all() and getattr(bound, name).max() < 5e-4
        for factor in (0.9, 1.1):
            moved = getattr(expected, name) + factor * getattr(bound, name)
            grads = reference.Gradients(*(x.astype(np.float32) for x in expected._replace(**{name: moved})))
            if factor < 1:
                assert_gradients_close(grads, *arrays, **options)
            else:
                with pytest.raises(ToleranceError, match=name):
                    assert_gradients_close(grads, *arrays, **options)
    without, _ = gradient_bound(*arrays)
    assert without.dbias is None and without.dsinks is None
