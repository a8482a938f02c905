"""cuattn.standard_attention, the unfused baseline: the options of attention, and the probabilities themselves."""

from __future__ import annotations

import numpy as np
import pytest
from attention_calls import prepare
from hypothesis import given
from option_cases import BF16, E4M3, F16, F32, F64, OPTION_CASES, formats_of, option_case

import cuattn
from cuattn import reference
from cuattn.errors import ArgumentError, OverlapError
from cuattn.runtime import executor as executors
from cuattn.testing import assert_attention_close
from cuattn.testing.arrays import Layout, place
from cuattn.testing.rounding import ulp, unit_roundoff
from cuattn.testing.strategies import attention_problems, examples
from cuattn.testing.tolerance import assert_within, lse_bound

SHAPES = ((2, 7, 33, 4, 2, 40, 24), (2, 20, 3, 2, 2, 256, 1))
OPTIONS_OF_ATTENTION = ("scale", "causal", "window", "softcap", "bias", "mask", "alibi_slopes", "sinks", "dropout")


def make(shape, dtype, seed=0):
    """q [B, N, H, D], k [B, M, G, D], v [B, M, G, E] for shape (B, N, M, H, G, D, E)."""
    batch, seqlen_q, seqlen_k, heads, kv_heads, head_dim, head_dim_v = shape
    rng = np.random.default_rng(seed)
    of_k = (batch, seqlen_k, kv_heads)
    shapes = (batch, seqlen_q, heads, head_dim), (*of_k, head_dim), (*of_k, head_dim_v)
    return [rng.standard_normal(s).astype(dtype) for s in shapes]


def call(executor, q, k, v, **options):
    """(out, lse, probabilities) as NumPy arrays, from NumPy arrays in any layout."""
    arrays, options = prepare(executor, (q, k, v), options)
    results = cuattn.standard_attention(*arrays, return_lse=True, return_probabilities=True, **options)
    return [executor.numpy(x) for x in results]


def assert_probabilities_close(p, q, k, **options):
    """The softmax before dropout, rounded once: a probability is off by what its logit and its lse may be."""
    of_softmax = {name: x for name, x in options.items() if not name.startswith(("dropout", "v_descale"))}
    expected = reference.probabilities(q, k, **of_softmax)
    relative = 2 * lse_bound(q, k, **of_softmax)[..., None] + unit_roundoff(p.dtype)
    assert_within(p, expected, np.nan_to_num(relative * expected) + ulp(expected, p.dtype), "probabilities")


@pytest.mark.parametrize("case", OPTION_CASES)
def test_options(executor, case):
    for dtype in formats_of(case):
        for shape in SHAPES:
            q, k, v = make(shape, dtype)
            options = option_case(case, shape, dtype)
            out, lse, p = call(executor, q, k, v, **options)
            assert_attention_close(out, q, k, v, lse=lse, **options)
            assert p.dtype == (F16 if dtype.itemsize == 1 else dtype) and p.shape == (*lse.shape, k.shape[1])
            assert_probabilities_close(p, q, k, **options)


@examples(30)
@given(problem=attention_problems(options=OPTIONS_OF_ATTENTION, max_seqlen=50))
def test_agrees_with_the_reference(executor, problem):
    out, lse, _ = call(executor, problem.q, problem.k, problem.v, **problem.options)
    assert_attention_close(out, *problem.arrays, lse=lse, **problem.options)


@pytest.mark.parametrize("shape", ((1, 3, 0, 2, 1, 1, 20), (1, 0, 3, 2, 1, 1, 20), (0, 3, 3, 2, 1, 1, 20)), ids=str)
@pytest.mark.parametrize("case", ("none", "sinks"))
def test_zero_lengths(executor, shape, case):
    q, k, v = make(shape, F32)
    options = option_case(case, shape, F32)
    out, lse, p = call(executor, q, k, v, **options)
    assert_attention_close(out, q, k, v, lse=lse, **options)
    assert p.shape == (*lse.shape, k.shape[1])


def test_probabilities_are_those_before_dropout(executor):
    """With values of one row a key, out is the weights: the probabilities that the mask keeps, divided by 1 - p."""
    q, k, _ = make((2, 19, 16, 2, 2, 24, 16), F64)
    v = np.broadcast_to(np.eye(16).reshape(1, 16, 1, 16), (2, 16, 2, 16))
    dropout = {"dropout_p": 0.5, "dropout_seed": 11, "dropout_offset": 4}
    out, lse, p = call(executor, q, k, v, causal=True, **dropout)
    _, plain_lse, plain_p = call(executor, q, k, v, causal=True)
    assert p.tobytes() == plain_p.tobytes() and lse.tobytes() == plain_lse.tobytes()
    kept = cuattn.dropout_mask(2, 2, 19, 16, **dropout)
    np.testing.assert_allclose(out.transpose(0, 2, 1, 3), np.where(kept, 2 * p, 0), rtol=1e-12)


@pytest.mark.parametrize("dropout_p", (0.0, 0.5))
@pytest.mark.parametrize("wanted", ((), ("lse",), ("probabilities",), ("lse", "probabilities")), ids=str)
def test_what_is_returned(executor, wanted, dropout_p):
    """One, two or three arrays, and the same bits in each whatever else is asked for."""
    q, k, v = make((1, 5, 9, 2, 1, 16, 16), F16)
    arrays = [executor.array(x) for x in (q, k, v)]
    flags = {f"return_{name}": True for name in wanted}
    result = cuattn.standard_attention(*arrays, dropout_p=dropout_p, **flags)
    result = result if wanted else (result,)
    names = ("out", *(name for name in ("lse", "probabilities") if name in wanted))
    expected = dict(zip(("out", "lse", "probabilities"), call(executor, q, k, v, dropout_p=dropout_p), strict=True))
    assert [executor.numpy(x).tobytes() for x in result] == [expected[name].tobytes() for name in names]


LAYOUTS = {
    "heads_first": Layout(order=(0, 2, 1, 3)),
    "padded_rows_of_odd_length": Layout(pad=(1, 0, 2, 3)),
    "base_off_by_one": Layout(offset=1),
    "last_axis_strided": Layout(order=(0, 1, 3, 2)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(executor, layout):
    """Views of buffers of NaN, and an out that must not be written beside its elements."""
    arrays = [place(x, LAYOUTS[layout]) for x in make((2, 21, 37, 4, 2, 40, 24), F16)]
    out = executor.guarded((2, 21, 4, 24), F16, LAYOUTS[layout])
    result = cuattn.standard_attention(*(executor.array(x) for x in arrays), causal=True, out=out.array)
    assert result is out.array
    out.check()
    assert_attention_close(executor.numpy(result), *(guarded.array for guarded in arrays), causal=True)


def test_tf32_is_allowed_and_changes_nothing(executor):
    q, k, v = make((1, 9, 9, 1, 1, 32, 32), F32)
    assert call(executor, q, k, v, precision="tf32")[0].tobytes() == call(executor, q, k, v)[0].tobytes()


def test_bytes_are_read_as_8_bit_floats(executor):
    q, k, v = make((1, 9, 9, 2, 1, 32, 32), E4M3)
    arrays = [executor.array(x.view(np.uint8)) for x in (q, k, v)]
    out = executor.numpy(cuattn.standard_attention(*arrays, fp8_format="e4m3fn"))
    assert out.dtype == BF16
    assert_attention_close(out, q, k, v)


def test_one_compiled_variant_serves_every_option(executor, monkeypatch):
    """Options are arguments of the three kernels; only the dtypes of q and of the bias are compiled in."""
    loaded = set()
    kernel = executors.Executor.kernel

    def record(self, source_name, constants, entry):
        loaded.add((source_name, entry, tuple(sorted(constants.items()))))
        return kernel(self, source_name, constants, entry)

    monkeypatch.setattr(executors.Executor, "kernel", record)
    shape = (2, 7, 33, 4, 2, 40, 24)
    for case in ("none", "window", "everything", "sinks", "dropout"):
        call(executor, *make(shape, F32), **option_case(case, shape, F32))
    assert len(loaded) == 3


@pytest.mark.parametrize("flag", ("return_lse", "return_probabilities"))
def test_flags_are_bools(flag):
    q, k, v = make((1, 2, 2, 1, 1, 8, 8), F32)
    with pytest.raises(ArgumentError, match=f"{flag} is 1; allowed are False and True"):
        cuattn.standard_attention(q, k, v, **{flag: 1})


def test_out_that_overlaps_a_bias_is_refused():
    q, k, v = make((1, 2, 4, 1, 1, 4, 4), F32)
    bias = np.zeros((2, 4), np.float32)
    with pytest.raises(OverlapError, match="bias"):
        cuattn.standard_attention(q, k, v, bias=bias, out=bias.reshape(1, 2, 1, 4))
