"""The strategies draw what they claim, and draw the awkward things often enough to be worth their names."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st

from cuattn import reference
from cuattn.testing import cases, strategies
from cuattn.testing.strategies import AttentionProblem, attention_options, attention_problems, examples

ALL_OPTIONS = ("scale", "causal", "window", "softcap", "bias", "mask", "alibi_slopes", "sinks", "diagonal_offset")


def draws(strategy, number=300):
    """`number` examples of a strategy, always the same ones."""
    drawn = []

    @settings(
        max_examples=number,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(x):
        drawn.append(x)

    collect()
    return drawn


@examples(100)
@given(attention_problems(options=ALL_OPTIONS, max_seqlen=40, allow_empty=True))
def test_problems_are_valid(problem):
    q, k, v = problem.arrays
    (batch, seqlen_q, heads, head_dim), (_, seqlen_k, kv_heads, _) = q.shape, k.shape
    assert k.shape == (batch, seqlen_k, kv_heads, head_dim) and v.shape[:3] == k.shape[:3]
    assert heads % kv_heads == 0
    assert seqlen_q <= 40 and seqlen_k <= 40
    assert q.dtype == k.dtype == v.dtype and q.dtype in strategies.DTYPES
    for array in problem.arrays:
        assert np.isfinite(array.astype(np.float64)).all()
        assert array.strides[-1] == array.itemsize
    for guarded in (problem.q, problem.k, problem.v):
        guarded.check()
    for name in ("bias", "mask"):
        if name in problem.options:
            np.broadcast_shapes(np.shape(problem.options[name]), (batch, heads, seqlen_q, seqlen_k))
    out, lse = reference.attention(q, k, v, **problem.options)
    assert out.shape == (batch, seqlen_q, heads, v.shape[3]) and lse.shape == (batch, heads, seqlen_q)


def test_problems_are_awkward():
    problems = draws(attention_problems(options=("causal",)))
    shapes = [(p.q.array.shape, p.k.array.shape) for p in problems]
    share = {
        "N > M": sum(q[1] > k[1] for q, k in shapes),
        "M > N": sum(q[1] < k[1] for q, k in shapes),
        "N or M is 1": sum(1 in (q[1], k[1]) for q, k in shapes),
        "beside a tile": sum(q[1] in (63, 65, 127, 129) or k[1] in (63, 65, 127, 129) for q, k in shapes),
        "grouped heads": sum(q[2] > k[2] > 1 for q, k in shapes),
        "D != E": sum(p.q.array.shape[3] != p.v.array.shape[3] for p in problems),
        "causal": sum("causal" in p.options for p in problems),
        "transposed": sum(p.q.array.strides[2] > p.q.array.strides[1] for p in problems),
        "misaligned": sum(p.q.array.ctypes.data % 16 != 0 for p in problems),
        "gaps": sum(p.k.array.strides[2] > p.k.array.shape[3] * p.k.array.itemsize for p in problems),
        **{kind: sum(p.kind == kind for p in problems) for kind in strategies.VALUE_KINDS},
        **{str(dtype): sum(p.q.array.dtype == dtype for p in problems) for dtype in strategies.DTYPES},
    }
    assert {what: count for what, count in share.items() if count < 15} == {}
    empty = draws(attention_problems(options=(), allow_empty=True, max_seqlen=5), 100)
    assert all(any(p.q.array.shape[axis] == 0 for p in empty) for axis in (0, 1))
    assert any(p.k.array.shape[1] == 0 for p in empty)


def test_problems_compile_few_variants():
    """D and E are runtime values inside a bucket: the suite's budget is about 40 variants of a kernel."""
    buckets = (32, 64, 96, 128, 192, 256)

    def bucket(n):
        return min(b for b in buckets if b >= n)

    pairs = {(bucket(d), bucket(e)) for d, e in strategies.HEAD_DIM_PAIRS}
    assert pairs == {(32, 32), (64, 64), (64, 32), (128, 128)}
    assert len(pairs) * len(strategies.DTYPES) * 2 <= 40


def test_problems_shrink_to_the_smallest():
    small = find(attention_problems(options=()), lambda problem: True, settings=settings(database=None))
    assert small.q.array.shape[:3] == (1, 1, 1) and small.k.array.shape[1] == 1
    assert small.q.array.flags.c_contiguous


def test_a_problem_says_what_it_is():
    problem = find(attention_problems(options=()), lambda p: True, settings=settings(database=None))
    assert isinstance(problem, AttentionProblem)
    assert repr(problem).startswith(
        "AttentionProblem(float16 q (1, 1, 1, 32), k (1, 1, 1, 32), v (1, 1, 1, 32), normal"
    )


@pytest.mark.parametrize("dtype", strategies.DTYPES, ids=str)
def test_values_are_of_their_kind(dtype):
    def fill(kind):
        return strategies.fill((6, 50), dtype, kind, np.random.default_rng(0)).astype(np.float64)

    assert abs(fill("normal").std() - 1) < 0.2
    assert sorted(np.abs(fill("huge_logit")).max(axis=1) > 20)[-2:] == [False, True]
    constant = fill("constant_rows")
    assert (constant == constant[:, :1]).all() and len(np.unique(constant[:, 0])) == 6
    tiny = fill("denormal")
    assert 0 < np.abs(tiny).max() <= float(ml_dtypes.finfo(dtype).smallest_normal)
    assert len(np.unique(tiny)) > 50
    wide = np.abs(fill("wide"))
    assert wide.max() / np.median(wide) > 20


def test_options_have_the_awkward_values():
    options = draws(attention_options((2, 4, 5, 7), ALL_OPTIONS))
    for name in ALL_OPTIONS:
        assert 60 < sum(name in drawn for drawn in options) < 240, name
    biases = [drawn["bias"] for drawn in options if "bias" in drawn]
    assert any(np.isneginf(bias).any() for bias in biases) and any(np.isposinf(bias).any() for bias in biases)
    assert any(np.isneginf(bias).all(axis=-1).any() for bias in biases)
    assert len({np.shape(bias) for bias in biases}) == 4
    assert {drawn["causal"] for drawn in options if "causal" in drawn} == {True, "bottom_right", "top_left"}
    assert draws(attention_options((1, 1, 3, 3), ()), 3) == [{}] * len(draws(attention_options((1, 1, 3, 3), ()), 3))


def test_softmax_inputs():
    arrays = [guarded.array.astype(np.float64) for guarded in draws(strategies.softmax_inputs())]
    assert all(x.ndim == 2 and 1 <= x.shape[1] <= 3000 for x in arrays)
    assert sum(np.isneginf(x).all(axis=1).any() for x in arrays) >= 15
    assert sum(np.isposinf(x).any() for x in arrays) >= 5
    assert sum(np.isfinite(x).all() for x in arrays) >= 60
    finite = draws(strategies.softmax_inputs(infinities=False), 50)
    assert all(np.isfinite(guarded.array.astype(np.float64)).all() for guarded in finite)


def test_examples_is_a_floor():
    assert examples(7).max_examples == max(7, settings().max_examples)


@examples(50)
@given(strategies.seqlens(20, allow_empty=True), strategies.layouts(2))
def test_bounds_are_kept(seqlen, layout):
    assert 0 <= seqlen <= 20
    assert len(layout.strides((3, 4))) == 2


def test_attention_case():
    case = cases.AttentionCase(
        2, 10, 6, 8, seqlen_k=12, num_kv_heads=3, head_dim_v=16, dtype="bfloat16", causal="top_left", scale=0.5
    )
    assert case.name == "attention_b2_n10_m12_h6_g3_d8_e16_bfloat16_causal_top_left_scale_0p5"
    assert case.flops == 2 * 2 * 6 * 10 * 12 * (8 + 16) // 2
    elements = 2 * 10 * 6 * 8 + 2 * 12 * 3 * 8 + 2 * 12 * 3 * 16 + 2 * 10 * 6 * 16
    assert case.num_bytes == 2 * elements + 4 * 2 * 6 * 10
    inputs, again, other = case.make_inputs(1), case.make_inputs(1), case.make_inputs(2)
    assert all(inputs[name].tobytes() == again[name].tobytes() != other[name].tobytes() for name in "qkv")
    assert inputs["v"].dtype == ml_dtypes.bfloat16 and inputs["v"].shape == (2, 12, 3, 16)


@pytest.mark.parametrize("causal", [False, True, "top_left"])
def test_big_attention_cases_are_checked_by_samples(monkeypatch, causal):
    monkeypatch.setattr(cases, "_MAX_LOGITS", 200)
    case = cases.AttentionCase(2, 30, 4, 8, seqlen_k=40, num_kv_heads=2, dtype="float32", causal=causal)
    inputs = case.make_inputs()
    result = reference.attention_naive(*inputs.values(), **case.options)
    case.check(inputs, result)
    for b, h, i in ((0, 0, 0), (1, 3, 29), (1, 0, 15)):
        out = result[0].copy()
        out[b, i, h] *= 1.01
        with pytest.raises(AssertionError, match="^out"):  # noqa: RUF043
            case.check(inputs, (out, result[1]))


@pytest.mark.parametrize("kind", ["softmax", "log_softmax", "logsumexp"])
def test_softmax_case(kind):
    case = cases.SoftmaxCase(3, 50, "float32", kind)
    assert case.name == f"{kind}_3x50_float32_online"
    assert case.num_bytes == 4 * (150 + (3 if kind == "logsumexp" else 150))
    inputs = case.make_inputs()
    result = getattr(reference, kind)(inputs["x"]).astype(np.float32)
    case.check(inputs, result)
    with pytest.raises(AssertionError, match=kind):
        case.check(inputs, result + np.float32(math.log(2)))


def test_strategies_of_pairs_are_the_tables():
    assert set(draws(strategies.head_dim_pairs())) == set(strategies.HEAD_DIM_PAIRS)
    assert set(draws(strategies.dtypes(), 60)) == set(strategies.DTYPES)
    assert set(draws(strategies.value_kinds(), 60)) == set(strategies.VALUE_KINDS)
    assert set(draws(st.sampled_from(strategies.HEAD_PAIRS), 100)) == set(strategies.HEAD_PAIRS)
