"""strided_attention and its gradients against the pattern written out by elements, and how much they do."""

from __future__ import annotations

from typing import Any

import idle_executor
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cuattn
from cuattn import host, reference
from cuattn.errors import ArgumentError, DTypeError, OverlapError, ShapeError
from cuattn.testing import assert_attention_close, assert_gradients_close
from cuattn.testing.arrays import Layout
from cuattn.testing.pool import Blessed
from cuattn.testing.problems import AttentionProblem
from cuattn.testing.strategies import DTYPES, attention_problems, examples

HEADS = st.sampled_from(((1, 1), (2, 1), (3, 1), (4, 2), (5, 5)))
PATTERNS = st.fixed_dictionaries(
    {
        "stride": st.one_of(st.integers(1, 9), st.sampled_from((16, 63, 200, 2**31 - 1))),
        "local": st.sampled_from((None, 0, 1, 2, 7, 8, 33, 500)),
        "causal": st.sampled_from((True, False, "bottom_right", "top_left")),
    }
)


def problems(dtype: Any, *, aligned: bool = True, max_seqlen: int = 100) -> st.SearchStrategy[AttentionProblem]:
    """Of the smallest head dims, in any layout that is aligned or not."""
    variant = st.just(Blessed(np.dtype(dtype), (32, 32), aligned, True))
    return attention_problems(
        variants=variant, heads=HEADS, options=("scale",), max_seqlen=max_seqlen, allow_empty=True
    ).map(without_bounds)


def without_bounds(problem: AttentionProblem) -> AttentionProblem:
    """The pattern says what is seen."""
    scale = problem.options.get("scale")
    return AttentionProblem(problem.q, problem.k, problem.v, {"scale": scale}, problem.kind)


def mask_of(problem: AttentionProblem, pattern: dict[str, Any]) -> Any:
    q, k, _ = problem.arrays
    return reference.strided_visible(q.shape[1], k.shape[1], **pattern)


def run(
    executor: Any, problem: AttentionProblem, pattern: dict[str, Any], **options: Any
) -> tuple[Any, Any, list[Any]]:
    arrays = [executor.array(x) for x in (problem.q, problem.k, problem.v)]
    out, lse = cuattn.strided_attention(*arrays, **pattern, **problem.options, return_lse=True, **options)
    return out, lse, arrays


@pytest.mark.parametrize(
    ("dtype", "aligned"), [*((dtype, True) for dtype in DTYPES), (np.dtype(np.float16), False)], ids=str
)
def test_against_float64(executor: Any, dtype: Any, aligned: bool) -> None:
    @examples(12)
    @given(problem=problems(dtype, aligned=aligned), pattern=PATTERNS)
    def check(problem: AttentionProblem, pattern: dict[str, Any]) -> None:
        out, lse, arrays = run(executor, problem, pattern)
        assert_attention_close(
            out, *map(executor.numpy, arrays), lse=lse, mask=mask_of(problem, pattern), **problem.options
        )

    check()


#: Of gradients: all patterns with two kinds of kernels, and of the others one that is compiled for few bounds.
CAUSAL = PATTERNS.map(lambda pattern: pattern | {"causal": True})
GRADIENTS = {
    "float16": PATTERNS,
    "float32": PATTERNS,
    "bfloat16": CAUSAL.map(lambda pattern: pattern | {"local": 7}),
    "float64": CAUSAL.map(lambda pattern: pattern | {"local": None}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_against_float64(executor: Any, dtype: Any) -> None:
    @examples(6)
    @given(problem=problems(dtype, max_seqlen=70), pattern=GRADIENTS[dtype.name], seed=st.integers(0, 2**32 - 1))
    def check(problem: AttentionProblem, pattern: dict[str, Any], seed: int) -> None:
        out, lse, arrays = run(executor, problem, pattern)
        rng = np.random.default_rng(seed)
        dout = executor.array(rng.standard_normal(out.shape).astype(dtype))
        dlse = executor.array(rng.standard_normal(lse.shape).astype(lse.dtype)) if seed % 2 else None
        grads = cuattn.strided_attention_backward(dout, *arrays, out, lse, dlse=dlse, **pattern, **problem.options)
        mask = mask_of(problem, pattern)
        assert_gradients_close(grads, dout, *arrays, out, lse, dlse=dlse, mask=mask, **problem.options)

    check()


@examples(12)
@given(problem=problems(np.float32), pattern=PATTERNS, seed=st.integers(0, 2**32 - 1))
def test_results_go_where_they_are_wanted(executor: Any, problem: AttentionProblem, pattern: Any, seed: int) -> None:
    """To arrays of any layout, with the same bits as to new ones, and nowhere else."""
    out, lse, arrays = run(executor, problem, pattern)
    rng = np.random.default_rng(seed)
    layouts = (Layout(), Layout(order=(0, 2, 1, 3)), Layout(pad=(1, 1, 2, 4), offset=4), Layout(pad=(0, 0, 0, 3)))

    def wanted(x: Any) -> Any:
        return executor.guarded(x.shape, x.dtype, layouts[rng.integers(len(layouts))])

    given_out = wanted(out)
    again = cuattn.strided_attention(*arrays, **pattern, **problem.options, out=given_out.array)
    assert again is given_out.array
    given_out.check()
    assert executor.numpy(again).tobytes() == executor.numpy(out).tobytes()
    dout = executor.array(rng.standard_normal(out.shape).astype(np.float32))
    call = dout, *arrays, out, lse
    grads = cuattn.strided_attention_backward(*call, **pattern, **problem.options)
    targets = {name: wanted(x) for name, x in zip(("dq", "dk", "dv"), arrays, strict=True)}
    where = {name: x.array for name, x in targets.items()}
    for name, x in zip(
        targets, cuattn.strided_attention_backward(*call, **pattern, **problem.options, **where)[:3], strict=True
    ):
        assert x is where[name]
        targets[name].check()
        assert executor.numpy(x).tobytes() == executor.numpy(getattr(grads, name)).tobytes()


def test_stride_1_is_causal_attention(executor: Any) -> None:
    q, k, v = (
        executor.array(np.random.default_rng(i).standard_normal((2, 50, 2, 32)).astype(np.float32)) for i in range(3)
    )
    expected = executor.numpy(cuattn.attention(q, k, v, causal=True))
    assert (executor.numpy(cuattn.strided_attention(q, k, v, 1)) == expected).all()


@pytest.mark.parametrize("shape", [(1, 0, 0, 2), (1, 0, 3, 2), (1, 3, 0, 2), (0, 3, 3, 2), (1, 3, 3, 0)], ids=str)
@pytest.mark.parametrize("local", [None, 3])
def test_axes_of_no_length(executor: Any, shape: tuple[int, ...], local: int | None) -> None:
    batch, seqlen_q, seqlen_k, heads = shape
    q, k = (executor.array(np.ones((batch, seqlen, heads, 32), np.float32)) for seqlen in (seqlen_q, seqlen_k))
    out, lse = cuattn.strided_attention(q, k, k, 2, local=local, return_lse=True)
    assert out.shape == q.shape and lse.shape == (batch, heads, seqlen_q)
    assert not executor.numpy(out).any() or seqlen_k
    grads = cuattn.strided_attention_backward(out, q, k, k, out, lse, 2, local=local)
    assert grads.dq.shape == q.shape and grads.dk.shape == k.shape
    assert not executor.numpy(grads.dk).any() or seqlen_q


def test_what_no_query_sees_is_never_felt(executor: Any) -> None:
    """Of three queries, a stride apart from keys that hold NaN; and keys behind a causal diagonal."""
    q, k, v = (
        np.random.default_rng(i).standard_normal((1, n, 1, 32)).astype(np.float32) for i, n in enumerate((3, 40, 40))
    )
    unseen = ~reference.strided_visible(3, 40, 8).any(axis=0)
    clean = [executor.array(x) for x in (q, k, v)]
    out, lse = cuattn.strided_attention(*clean, 8, return_lse=True)
    k[:, unseen], v[:, unseen] = np.nan, np.nan
    dirty = [executor.array(x) for x in (q, k, v)]
    assert (executor.numpy(cuattn.strided_attention(*dirty, 8)) == executor.numpy(out)).all()
    grads = cuattn.strided_attention_backward(out, *dirty, out, lse, 8)
    assert not executor.numpy(grads.dk)[:, unseen].any() and not executor.numpy(grads.dv)[:, unseen].any()


@pytest.mark.parametrize(
    ("seqlen", "options", "mma", "launches"),
    [
        (1024, {}, 12_288, 1),
        (1023, {}, 12_288, 2),  # seven residues of 128 tokens, and one of 127
        (1024, {"causal": False}, 16_384, 1),
        (1024, {"local": 32}, 24_320, 3),  # the window, what is beyond it, and the merge of both
    ],
    ids=str,
)
def test_work_is_that_of_the_keys_that_are_seen(seqlen: int, options: Any, mma: int, launches: int) -> None:
    """Of 69,632 products of the causal call: an eighth of the keys, in tiles of 64."""
    q = np.ones((1, seqlen, 2, 64), np.float16)
    with host.profile() as profile:
        cuattn.strided_attention(q, q, q, 8, **options)
    assert (profile.instructions["mma"], profile.launches) == (mma, launches)
    assert mma < 0.36 * 69_632


def test_the_causal_call_that_it_is_compared_with() -> None:
    q = np.ones((1, 1024, 2, 64), np.float16)
    with host.profile() as profile:
        cuattn.attention(q, q, q, causal=True)
    assert profile.instructions["mma"] == 69_632


def test_the_work_of_the_gradients_is_an_eighth_as_well() -> None:
    q = np.ones((1, 512, 1, 32), np.float16)
    counts = []
    for forward, backward, stride in (
        (cuattn.attention, cuattn.attention_backward, ()),
        (cuattn.strided_attention, cuattn.strided_attention_backward, (8,)),
    ):
        out, lse = forward(q, q, q, *stride, causal=True, return_lse=True)
        with host.profile() as profile:
            backward(q, q, q, q, out, lse, *stride, causal=True)
        counts.append(profile.instructions["mma"])
    assert counts[1] < 0.25 * counts[0]


def test_nothing_of_the_size_of_the_logits_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    idle = idle_executor.install(monkeypatch)
    q = np.zeros((1, 2**13, 8, 64), np.float16)
    cuattn.strided_attention(q, q, q, 8, local=64)
    assert sum(x.nbytes for x in idle.allocated) < 4 * q.nbytes


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"stride": 0}, ArgumentError, "stride is 0"),
        ({"stride": 2.0}, ArgumentError, "stride is 2.0"),
        ({"local": -1}, ArgumentError, "local is -1"),
        ({"causal": "left"}, ArgumentError, "causal"),
        ({"scale": float("nan")}, ArgumentError, "scale"),
        ({"q": np.ones((1, 4, 1, 300), np.float64)}, DTypeError, "float64"),
        ({"k": np.ones((1, 4, 2, 32), np.float32)}, ShapeError, "k"),
        ({"out": np.ones((1, 5, 1, 32), np.float32)}, ShapeError, "out"),
        ({"return_lse": 1.5}, ArgumentError, "return_lse"),
    ],
    ids=str,
)
def test_refusals(change: dict[str, Any], error: type[Exception], says: str) -> None:
    x = np.ones((1, 4, 1, 32), np.float32)
    with pytest.raises(error, match=says):
        cuattn.strided_attention(**{"q": x, "k": x, "v": x, "stride": 2, **change})


def test_refusals_of_overlaps_and_of_8_bit_floats() -> None:
    x = np.ones((1, 4, 1, 32), np.float32)
    with pytest.raises(OverlapError, match="out"):
        cuattn.strided_attention(x, x, x.copy(), 2, out=x)
    narrow = x.astype(ml_dtypes.float8_e4m3fn)
    with pytest.raises(DTypeError, match="strided attention takes"):
        cuattn.strided_attention(narrow, narrow, narrow, 2)
    lse = np.zeros((1, 1, 4), np.float32)
    with pytest.raises(ArgumentError, match="stride is -3"):
        cuattn.strided_attention_backward(x, x, x, x, x, lse, -3)
    with pytest.raises(OverlapError, match="dq"):
        cuattn.strided_attention_backward(x, x.copy(), x, x, x, lse, 2, dq=x)
