"""The strategies draw what they claim, and draw the awkward things often enough to be worth their names."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st

from cuattn import reference
from cuattn.errors import ArgumentError
from cuattn.reference.narrow import decode
from cuattn.testing import attention_cases, cases, strategies
from cuattn.testing import options as option_values
from cuattn.testing.problems import AttentionProblem
from cuattn.testing.strategies import (
    DTYPES,
    FLOAT8_DTYPES,
    OPTIONS,
    attention_options,
    attention_problems,
    examples,
    varlen_problems,
)

#: A name in the drawn dictionary for each option; those that only float32 or float8 calls have, apart.
NAMES = {"dropout": "dropout_p"}
DESCALES = ("q_descale", "k_descale", "v_descale")
ALL_DTYPES = st.sampled_from((*DTYPES, *FLOAT8_DTYPES))


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
@given(attention_problems(options=OPTIONS, max_seqlen=40, allow_empty=True, dtype=ALL_DTYPES))
def test_problems_are_valid(problem):
    q, k, v = problem.arrays
    (batch, seqlen_q, heads, head_dim), (_, seqlen_k, kv_heads, _) = q.shape, k.shape
    assert k.shape == (batch, seqlen_k, kv_heads, head_dim) and v.shape[:3] == k.shape[:3]
    assert heads % kv_heads == 0
    assert seqlen_q <= 40 and seqlen_k <= 40
    assert q.dtype == k.dtype == v.dtype
    assert q.dtype == np.uint8 if "fp8_format" in problem.options else q.dtype in (*DTYPES, *FLOAT8_DTYPES)
    for array in problem.arrays:
        assert np.isfinite(decode(array, problem.options.get("fp8_format")).astype(np.float64)).all()
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
    shape = 2, 4, 5, 7
    options = draws(attention_options(shape, OPTIONS), 400)
    for name in set(OPTIONS) - set(DESCALES):
        assert 80 < sum(NAMES.get(name, name) in drawn for drawn in options) < 320, name
    biases = [drawn["bias"] for drawn in options if "bias" in drawn]
    wide = [bias.astype(np.float64) for bias in biases]
    assert any(np.isneginf(bias).any() for bias in wide) and any(np.isposinf(bias).any() for bias in wide)
    assert any(bias.ndim and np.isneginf(bias).all(axis=-1).any() for bias in wide)
    assert any(bias.ndim and np.isfinite(bias).all() and (bias < -6e4).all(axis=-1).any() for bias in wide)
    assert {bias.dtype for bias in biases} == set(option_values.BIAS_DTYPES)
    assert {bias.shape for bias in biases} == set(option_values.broadcast_shapes(shape))
    assert any(not bias.flags.c_contiguous for bias in biases) and any(bias.ctypes.data % 16 for bias in biases)
    masks = [drawn["mask"] for drawn in options if "mask" in drawn]
    assert any(mask.all() for mask in masks) and any(not mask.any() for mask in masks)
    assert any(mask.ndim and mask.any() and not mask.any(axis=-1).all() for mask in masks)
    assert {drawn["causal"] for drawn in options if "causal" in drawn} == {True, "bottom_right", "top_left"}
    windows = [drawn["window"] for drawn in options if "window" in drawn]
    assert {(left is None, right is None) for left, right in windows} == {(a, b) for a in (0, 1) for b in (0, 1)}
    assert any(0 in window for window in windows) and any((left or 0) > 7 for left, _ in windows)
    offsets = [np.asarray(drawn["diagonal_offset"]) for drawn in options if "diagonal_offset" in drawn]
    assert {offset.shape for offset in offsets} == {(), (2,)} and all(
        np.abs(offset).max() <= 1000 for offset in offsets
    )
    assert {drawn["precision"] for drawn in options if "precision" in drawn} == {"ieee", "tf32"}
    assert any(np.isneginf(drawn["sinks"]).any() for drawn in options if "sinks" in drawn)
    assert not any(name in drawn for drawn in options for name in DESCALES)
    assert draws(attention_options((1, 1, 3, 3), ()), 3) == [{}] * len(draws(attention_options((1, 1, 3, 3), ()), 3))


def test_options_of_one_dtype_are_drawn_for_no_other():
    narrow = draws(attention_options((2, 4, 5, 7), OPTIONS, num_kv_heads=2, dtype=FLOAT8_DTYPES[0]), 60)
    assert not any("precision" in drawn for drawn in narrow)
    for name in DESCALES:
        assert {drawn[name].shape for drawn in narrow if name in drawn} == {(2, 2)}
    half = draws(attention_options((2, 4, 5, 7), OPTIONS, dtype=np.float16), 60)
    assert not any(name in drawn for drawn in half for name in (*DESCALES, "precision"))


@pytest.mark.parametrize("dtype", option_values.BIAS_DTYPES, ids=str)
@pytest.mark.parametrize("kind", option_values.BIAS_KINDS)
def test_biases_are_of_their_kind(dtype, kind):
    bias = option_values.make_bias(np.random.default_rng(0), (2, 3, 40, 50), dtype, kind).astype(np.float64)
    assert np.isneginf(bias).any() == np.isposinf(bias).any() == (kind == "infinities")
    low = -np.inf if kind == "infinities" else float(bias.min())
    assert (low < -6e4) == (kind != "normal")
    assert (bias == low).all(axis=-1).any() == (kind != "normal")
    assert 0.7 < (np.abs(bias) < 10).mean() <= 1


@pytest.mark.parametrize("kind", option_values.MASK_KINDS)
def test_masks_are_of_their_kind(kind):
    rng = np.random.default_rng(0)
    mask = option_values.make_mask(rng, (2, 3, 100, 90), kind, block_size=32)
    assert mask.dtype == np.bool_ and mask.shape == (2, 3, 100, 90)
    assert mask.all() == (kind == "everything") and (not mask.any()) == (kind == "nothing")
    if kind == "sparse":
        assert (~mask.any(axis=-1)).any()
    if kind == "lengths":
        assert (np.diff(mask.astype(int), axis=-1) <= 0).all() and (mask == mask[:, :1, :1]).all()
    if kind == "blocks":
        squares = mask[:, :, :96, :64].reshape(2, 3, 3, 32, 2, 32).mean(axis=(3, 5))
        assert {share for share in np.unique(squares) if share in (0, 1)} == {0, 1} and ((squares % 1) != 0).any()
    for shape in ((), (9,), (5, 9), (3, 5, 9)):
        assert option_values.make_mask(rng, shape, kind).shape == shape


@pytest.mark.parametrize("make", [option_values.make_bias, option_values.make_mask])
def test_kinds_must_be_known(make):
    with pytest.raises(ArgumentError, match="kind is 'none'; allowed are"):
        make(np.random.default_rng(0), (2, 2), *[np.float32] * (make is option_values.make_bias), "none")


def test_packed_problems():
    problems = draws(varlen_problems(options=OPTIONS, dtype=ALL_DTYPES, max_seqlen=40), 150)
    lengths = [np.stack([np.diff(p.cu_seqlens_q), np.diff(p.cu_seqlens_k)], axis=1) for p in problems]
    for problem, pairs in zip(problems, lengths, strict=True):
        q, k, v, starts_q, starts_k = problem.arrays
        assert q.shape[0] == starts_q[-1] and k.shape[0] == v.shape[0] == starts_k[-1]
        assert starts_q[0] == starts_k[0] == 0 and (pairs >= 0).all() and pairs.max() <= 40
        for name in ("bias", "mask"):
            if name in problem.options:
                np.broadcast_shapes(problem.options[name].shape, (len(pairs), q.shape[1], *pairs.max(axis=0)))
        out, lse = reference.attention_varlen(*problem.arrays, **problem.options)
        assert out.shape == (*q.shape[:2], v.shape[2]) and lse.shape == (q.shape[1], q.shape[0])
    share = {
        "no queries": sum((pairs[:, 0] == 0).any() for pairs in lengths),
        "no keys": sum(((pairs[:, 1] == 0) & (pairs[:, 0] > 0)).any() for pairs in lengths),
        "neither": sum((pairs == 0).all(axis=1).any() for pairs in lengths),
        "N > M": sum((pairs[:, 0] > pairs[:, 1]).any() for pairs in lengths),
        "one among many": sum(len(pairs) > 5 and np.median(pairs) <= 3 and pairs.max() > 10 for pairs in lengths),
        "one": sum(len(pairs) == 1 for pairs in lengths),
    }
    # Of 150. Hypothesis draws from the constants that it finds in the sources, so that counts differ between checkouts.
    assert {what: count for what, count in share.items() if count < 3} == {}
    assert repr(problems[0]).startswith("VarlenProblem(")


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
    monkeypatch.setattr(attention_cases, "_MAX_LOGITS", 200)
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
