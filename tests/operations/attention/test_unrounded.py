"""``out`` of float32 for inputs of 16 and 8 bits: the result as it was accumulated."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
from attention_calls import call, prepare
from packed_sequences import LENGTHS, pack
from test_attention_options import BF16, F16, F32, F64, make
from unrounded import LAYOUTS, assert_rounds_to, into_float32

import cuattn
from cuattn.errors import DTypeError, OverlapError
from cuattn.testing import assert_attention_close, kernels
from cuattn.testing.tolerance import attention_bound

F8 = np.dtype(ml_dtypes.float8_e4m3fn)


def unrounded(executor, q, k, v, layout=None, function=cuattn.attention, **options):
    """(out, lse) of a call that writes float32."""
    arrays, options = prepare(executor, (q, k, v), options)
    lse = []

    def write(out):
        result = function(*arrays, out=out, return_lse=True, **options)
        lse.append(executor.numpy(result[1]))
        return result

    return into_float32(executor, write, (*q.shape[:-1], v.shape[-1]), layout), lse[0]


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", (F16, BF16, F8), ids=str)
def test_it_is_what_is_rounded_otherwise(executor, dtype):
    """The rounding of it is the ordinary result, bit for bit, with the same lse; and it is closer to the reference."""
    arrays = make((70, 135), dtype)
    out, lse = call(executor, *arrays, causal=True)
    exact, same_lse = unrounded(executor, *arrays, causal=True)
    assert_rounds_to(exact, out)
    np.testing.assert_array_equal(same_lse, lse)
    assert_attention_close(exact, *arrays, lse=same_lse, causal=True, unrounded=True)


def test_the_bound_is_tighter():
    """By more than what rounding may take."""
    arrays = make((70, 135), BF16)
    expected, bound, _, _ = attention_bound(*arrays, unrounded=True)
    _, wide, _, _ = attention_bound(*arrays)
    assert (wide - bound > 2.0**-8 * np.abs(expected)).all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("head_dim_v", (32, 31, 17, 1))
def test_any_layout(executor, layout, head_dim_v):
    """Whole pairs of columns or one at a time, and nothing beside them."""
    q, k, v = make((70, 135), F16)
    v = np.ascontiguousarray(v[..., :head_dim_v])
    out, _ = call(executor, q, k, v, causal=True)
    exact, _ = unrounded(executor, q, k, v, layout, causal=True)
    np.testing.assert_array_equal(exact.astype(F16), out)


def test_a_last_axis_that_is_not_contiguous_is_copied_to(executor):
    q, k, v = make((70, 135), F16)
    whole = executor.array(np.zeros((2, 70, 2, 64), np.float32))
    arrays = [executor.array(x) for x in (q, k, v)]
    result = cuattn.attention(*arrays, causal=True, out=whole[..., ::2])
    written = executor.numpy(whole)
    assert not written[..., 1::2].any()
    np.testing.assert_array_equal(written[..., ::2], executor.numpy(result))
    np.testing.assert_array_equal(written[..., ::2].astype(F16), call(executor, q, k, v, causal=True)[0])


@pytest.mark.parametrize("name", LENGTHS)
def test_packed_sequences(executor, name):
    """Where neighbouring tiles are of other sequences: no row of them is written."""
    (q, k, v), starts = pack(LENGTHS[name], F16)
    arrays = [executor.array(x) for x in (q, k, v)]
    options = {"causal": True}
    out = executor.numpy(cuattn.attention_varlen(*arrays, *starts, **options))
    for on_device in (False, True):
        exact = into_float32(
            executor,
            lambda x, on_device=on_device: kernels.attention_varlen(
                *arrays, *starts, out=x, schedule_on_device=on_device, **options
            ),
            out.shape,
        )
        np.testing.assert_array_equal(exact.astype(F16), out)


def test_rows_that_see_nothing(executor):
    q, k, v = make((70, 20), F16)
    exact, lse = unrounded(executor, q, k, v, causal=True)
    assert not exact[:, :50].any() and np.isneginf(lse[:, :, :50]).all() and np.isfinite(exact).all()
    nothing, _ = unrounded(executor, q, k[:, :0], v[:, :0], causal=True)
    assert not nothing.any()
    assert unrounded(executor, q[:, :0], k, v)[0].size == 0


def test_parts_of_it_merge_to_the_whole(executor):
    """The error of a call in eight parts is that of one: rounded parts would add theirs."""
    q, k, v = make((70, 135), BF16)
    bounds = np.linspace(0, 135, 9).astype(int)
    outs, lses = zip(
        *(unrounded(executor, q, k[:, a:b], v[:, a:b]) for a, b in itertools.pairwise(bounds)), strict=True
    )
    merged, lse = cuattn.merge_states(np.stack(outs), np.stack(lses))
    assert_attention_close(merged, q, k, v, lse=lse, unrounded=True)


@pytest.mark.parametrize("dtype", (F16, F8), ids=str)
def test_unfused(executor, dtype):
    arrays = make((40, 70), dtype)
    moved, options = prepare(executor, arrays, {})
    rounded = executor.numpy(cuattn.standard_attention(*moved, causal=True, **options))
    exact, _ = unrounded(executor, *arrays, function=cuattn.standard_attention, causal=True)
    assert_rounds_to(exact, rounded)


def test_which_dtypes_are_refused():
    """float32 is for 16 and 8 bits; other inputs have results of their own dtype alone."""
    for dtype, wrong, allowed in (
        (F16, F64, "float16, or float32 where it is not to be rounded"),
        (F16, BF16, "float16, or float32 where it is not to be rounded"),
        (F8, F16, "bfloat16, or float32 where it is not to be rounded"),
        (F32, F64, "float32$"),
        (F64, F32, "float64$"),
    ):
        q, k, v = make((5, 7), dtype)
        for function in (cuattn.attention, cuattn.standard_attention):
            with pytest.raises(DTypeError, match=f"out has dtype {wrong}; the result has dtype {allowed}"):
                function(q, k, v, out=np.empty((2, 5, 2, 32), wrong))
        (q, k, v), starts = pack([(5, 7)], dtype)
        with pytest.raises(DTypeError, match=f"out has dtype {wrong}; the result has dtype {allowed}"):
            cuattn.attention_varlen(q, k, v, *starts, out=np.empty((*q.shape[:2], v.shape[-1]), wrong))


def test_it_must_not_overlap_an_input():
    memory = np.zeros(2 * 70 * 2 * 32, np.float32)
    q = memory.view(F16)[: 2 * 70 * 2 * 32].reshape(2, 70, 2, 32)
    k = np.zeros((2, 70, 2, 32), F16)
    with pytest.raises(OverlapError, match="out lies in the memory range of q"):
        cuattn.attention(q, k, k, out=memory.reshape(2, 70, 2, 32))


def test_where_no_kernel_has_it():
    """Functions with kernels of their own say so."""
    q = np.zeros((1, 64, 2, 32), F16)
    out = np.empty((1, 64, 2, 32), np.float32)
    mask = cuattn.BlockMask.from_blocks(np.eye(4, dtype=bool), 64, 64, block_size=16)
    for call_of in (
        lambda: cuattn.block_sparse_attention(q, q, q, mask, out=out),
        lambda: cuattn.strided_attention(q, q, q, 4, out=out),
        lambda: cuattn.dual_chunk_attention(q, q, q, chunk_size=32, local_size=8, out=out),
    ):
        with pytest.raises(DTypeError, match=r"out has dtype float32; the result has dtype float16$"):
            call_of()
