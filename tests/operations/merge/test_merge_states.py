"""merge_states against float64: parts of every shape and layout, empty ones, infinities, any order and grouping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from merge_parts import BF16, F16, F32, F64, lses_of, outs_of

import cuattn
from cuattn.errors import NonFiniteError
from cuattn.testing import assert_attention_close
from cuattn.testing.arrays import Guarded, Layout, place
from cuattn.testing.merging import assert_merge_close
from cuattn.testing.strategies import examples

# (of the parts, of the result): every pair that a kernel is compiled for.
DTYPE_PAIRS = ((F16, F16), (BF16, BF16), (F32, F32), (F64, F64), (F32, F16), (F32, BF16))


@dataclass(frozen=True)
class Parts:
    """outs [S, ..., N, H, E] and lses [S, ..., H, N], where they lie, and sinks [H] or None."""

    outs: Guarded
    lses: Guarded
    sinks: Any
    out_layout: Layout
    lse_layout: Layout

    def __repr__(self) -> str:
        return f"Parts({self.outs}, {self.lses}, sinks={self.sinks}, {self.out_layout}, {self.lse_layout})"


@st.composite
def parts_of(draw: st.DrawFn, dtype: np.dtype) -> Parts:
    num_parts = draw(st.sampled_from((2, 1, 3, 8, 12, 33)))
    batch = draw(st.sampled_from(((), (1,), (3,))))
    seqlen, num_heads = draw(st.sampled_from(((1, 1), (1, 3), (5, 2), (17, 3), (40, 1))))
    head_dim = draw(st.sampled_from((1, 7, 8, 33, 40, 64, 100, 128, 200, 256, 300)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lse_dtype = F64 if dtype == F64 else F32
    spread = draw(st.sampled_from((1.0, 0.0, 30.0, 1e4)))
    lses = lses_of(rng, (num_parts, *batch, num_heads, seqlen), lse_dtype, spread)
    outs = outs_of(rng, lses, head_dim, dtype)
    sinks = (rng.standard_normal(num_heads) * spread).astype(lse_dtype) if draw(st.booleans()) else None
    layouts = [draw(_layouts(x.ndim)) for x in (outs, lses, outs[0], lses[0])]
    return Parts(place(outs, layouts[0]), place(lses, layouts[1]), sinks, *layouts[2:])


def _layouts(ndim: int) -> st.SearchStrategy[Layout]:
    """Contiguous; padded rows at multiples of 16 bytes; anything; and other orders of the axes."""
    swapped = (1, 0) if ndim == 2 else (*range(ndim - 3), ndim - 2, ndim - 3, ndim - 1)
    return st.sampled_from(
        (
            Layout(),
            Layout(pad=(0,) * (ndim - 1) + (8,), offset=8),
            Layout(pad=(1,) * (ndim - 1) + (3,), offset=1),
            Layout(order=swapped, pad=(0, *(2,) * (ndim - 1))),
        )
    )


@pytest.mark.parametrize(("dtype", "result_dtype"), DTYPE_PAIRS, ids=lambda dtype: dtype.name)
def test_against_float64(executor, dtype, result_dtype):
    @examples(25)
    @given(parts=parts_of(dtype))
    def check(parts):
        outs, lses = executor.array(parts.outs), executor.array(parts.lses)
        sinks = None if parts.sinks is None else executor.array(parts.sinks)
        out = executor.guarded(outs.shape[1:], result_dtype, parts.out_layout)
        lse = executor.guarded(lses.shape[1:], lses.dtype, parts.lse_layout)
        result = cuattn.merge_states(outs, lses, sinks=sinks, out=(out.array, lse.array))
        assert result[0] is out.array and result[1] is lse.array
        out.check()
        lse.check()
        assert_merge_close(result, parts.outs.array, parts.lses.array, sinks=parts.sinks)
        if dtype == result_dtype:  # what is allocated is the same
            again = cuattn.merge_states(outs, lses, sinks=sinks)
            assert again[0].dtype == dtype
            for x, y in zip(again, result, strict=True):
                np.testing.assert_array_equal(executor.numpy(x), executor.numpy(y))

    check()


@pytest.mark.parametrize("dtype", (F16, F32, F64), ids=str)
def test_two_parts(executor, dtype):
    """The same bits as with a leading axis, in either order, from arrays that lie in different ways."""

    @examples(12)
    @given(data=st.data())
    def check(data):
        parts = data.draw(parts_of(dtype).filter(lambda parts: len(parts.lses.array) > 1))
        outs, lses = parts.outs.array[:2], parts.lses.array[:2]
        (out_a, out_b), (lse_a, lse_b) = (
            [executor.array(place(part, data.draw(_layouts(part.ndim)))) for part in x] for x in (outs, lses)
        )
        sinks = None if parts.sinks is None else executor.array(parts.sinks)
        result = cuattn.merge_states(out_a, lse_a, out_b, lse_b, sinks=sinks)
        assert_merge_close(result, outs, lses, sinks=parts.sinks)
        turned = cuattn.merge_states(out_b, lse_b, out_a, lse_a, sinks=sinks)
        stacked = cuattn.merge_states(*(executor.array(np.ascontiguousarray(x)) for x in (outs, lses)), sinks=sinks)
        for other in (turned, stacked):
            for x, y in zip(result, other, strict=True):
                np.testing.assert_array_equal(executor.numpy(x), executor.numpy(y))

    check()


@examples(12)
@given(data=st.data())
def test_any_order_and_grouping(executor, data):
    """A random tree of merges of two."""
    num_parts = data.draw(st.integers(2, 7))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    lses = lses_of(rng, (num_parts, 2, 3, 5), F32, 4.0)
    outs = outs_of(rng, lses, 40, F32)
    sinks = rng.standard_normal(3).astype(F32)
    states = [(executor.array(out), executor.array(lse), 1) for out, lse in zip(outs, lses, strict=True)]
    while len(states) > 1:
        left, right = (states.pop(data.draw(st.integers(0, len(states) - 1))) for _ in "ab")
        last = {} if states else {"sinks": executor.array(sinks)}
        states.append((*cuattn.merge_states(*left[:2], *right[:2], **last), max(left[2], right[2]) + 1))
    ((out, lse, levels),) = states
    assert_merge_close((out, lse), outs, lses, sinks=sinks, levels=levels)


@pytest.mark.parametrize("dtype", (F16, F32), ids=str)
def test_splits_of_the_keys_make_the_whole_attention(executor, dtype):
    @examples(8)
    @given(data=st.data())
    def check(data):
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
        num_keys = data.draw(st.sampled_from((1, 5, 64, 100)))
        q = rng.standard_normal((2, 9, 4, 32)).astype(dtype)
        k, v = (rng.standard_normal((2, num_keys, 2, 32)).astype(dtype) for _ in "kv")
        cuts = sorted(data.draw(st.lists(st.integers(0, num_keys), min_size=1, max_size=4)))
        pieces = list(zip([0, *cuts], [*cuts, num_keys], strict=True))  # some of them empty
        order = data.draw(st.permutations(pieces))
        sinks = rng.standard_normal(4).astype(F32) if data.draw(st.booleans()) else None
        states = [
            cuattn.attention(*(executor.array(x) for x in (q, k[:, i:j], v[:, i:j])), return_lse=True) for i, j in order
        ]
        outs, lses = (executor.xp.stack(x) for x in zip(*states, strict=True))
        out, lse = cuattn.merge_states(outs, lses, sinks=None if sinks is None else executor.array(sinks))
        options = {} if sinks is None else {"sinks": sinks}
        assert_attention_close(executor.numpy(out), q, k, v, lse=executor.numpy(lse), **options)

    check()


# --- values that are not numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_parts", (2, 16))  # 16: several groups share the parts of a row
def test_empty_parts_are_neutral(executor, num_parts):
    """Whatever their out holds, and wherever they stand: the same bits as the one part alone."""
    rng = np.random.default_rng(0)
    out, lse = rng.standard_normal((3, 2, 40)).astype(F32), rng.standard_normal((2, 3)).astype(F32)
    for position in range(num_parts):
        outs = np.full((num_parts, *out.shape), np.nan, F32)
        lses = np.full((num_parts, *lse.shape), -np.inf, F32)
        outs[position], lses[position] = out, lse
        merged = cuattn.merge_states(executor.array(outs), executor.array(lses))
        np.testing.assert_array_equal(executor.numpy(merged[0]), out)
        np.testing.assert_array_equal(executor.numpy(merged[1]), lse)


@pytest.mark.parametrize("num_parts", (0, 1, 2, 16))
@pytest.mark.parametrize("shape", ((3, 2, 40), (2, 3, 2, 40)))
def test_nothing_but_empty_parts(executor, num_parts, shape):
    *batch, seqlen, num_heads, _ = shape
    lse_shape = (*batch, num_heads, seqlen)
    outs = executor.array(np.full((num_parts, *shape), np.nan, F16))
    lses = executor.array(np.full((num_parts, *lse_shape), -np.inf, F32))
    out, lse = cuattn.merge_states(outs, lses)
    np.testing.assert_array_equal(executor.numpy(out), np.zeros(shape, F16))
    np.testing.assert_array_equal(executor.numpy(lse), np.full(lse_shape, -np.inf))
    sinks = np.array([-3.5, 100], F32)
    out, lse = cuattn.merge_states(outs, lses, sinks=executor.array(sinks))
    np.testing.assert_array_equal(executor.numpy(out), np.zeros(shape, F16))
    np.testing.assert_array_equal(executor.numpy(lse), np.broadcast_to(sinks[:, None], lse_shape))


@pytest.mark.parametrize("value", (np.inf, np.nan))
@pytest.mark.parametrize("num_parts", (2, 16))
def test_infinite_and_nan_lse(executor, num_parts, value):
    """One such part makes its own row NaN, and no other; so does such a sink, where nobody looks at it before."""
    rng = np.random.default_rng(1)
    lses = rng.standard_normal((num_parts, 2, 5)).astype(F32)
    outs = outs_of(rng, lses, 24, F32)
    for position in (0, num_parts - 1):
        broken = lses.copy()
        broken[position, 1, 3] = value
        result = cuattn.merge_states(executor.array(outs), executor.array(broken))
        assert_merge_close(result, outs, broken)
        assert np.isnan(executor.numpy(result[0])).any(axis=-1).sum() == 1
        assert np.isnan(executor.numpy(result[1])).sum() == 1
    sinks = np.array([0, value], F32)
    if executor.name == "host":
        with pytest.raises(NonFiniteError, match="sinks holds"):
            cuattn.merge_states(outs, lses, sinks=sinks)
    else:
        result = cuattn.merge_states(executor.array(outs), executor.array(lses), sinks=executor.array(sinks))
        assert_merge_close(result, outs, lses, sinks=sinks)
        assert np.isnan(executor.numpy(result[1])).sum() == 5
    none = executor.array(np.full(2, -np.inf, F32))  # a sink of -inf is none
    assert_merge_close(cuattn.merge_states(executor.array(outs), executor.array(lses), sinks=none), outs, lses)


def test_nan_in_a_part_that_saw_keys_is_kept(executor):
    outs, lses = np.zeros((2, 1, 2, 8), F32), np.zeros((2, 2, 1), F32)
    outs[1, 0, 1, 5] = np.nan
    out, lse = (executor.numpy(x) for x in cuattn.merge_states(executor.array(outs), executor.array(lses)))
    np.testing.assert_array_equal(np.argwhere(np.isnan(out)), [[0, 1, 5]])
    assert np.isfinite(lse).all()


def test_lse_is_natural(executor):
    """Defect 7: e to the lse, not 2 to it."""
    lses = executor.array(np.log(np.array([1, 3], F32)).reshape(2, 1, 1))
    outs = executor.array(np.array([0, 1], F32).reshape(2, 1, 1, 1))
    out, lse = (executor.numpy(x).item() for x in cuattn.merge_states(outs, lses))
    assert abs(out - 0.75) < 1e-6 and abs(lse - np.log(4)) < 1e-6
