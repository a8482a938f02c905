"""deterministic=False: dq of 16-bit floats is summed in no order. Everything else is as it is in order."""

from __future__ import annotations

import numpy as np
import pytest
from backward_calls import (
    after_forward,
    after_reference,
    assert_gradients_right,
    assert_right,
    assert_same,
    bounds,
    call_backward,
    of_problem,
    same_bits,
)
from backward_formats import BF16, DIM, F16, F32, F64
from hypothesis import given
from hypothesis import strategies as st
from test_attention_backward import EVEN, ODD, form, normal
from test_attention_backward_kernels import every_option, seqlens_for
from test_attention_backward_varlen import LENGTHS, after_packed, lengths_of

import cuattn
from cuattn.ops.attention.backward.config import FLASH_BWD_CONFIGS
from cuattn.runtime.executor import executor_for
from cuattn.testing.arrays import Layout
from cuattn.testing.options import make_bias, make_mask, make_slopes
from cuattn.testing.strategies import aligned_layouts, examples

KEY_ROWS = [row for row in FLASH_BWD_CONFIGS if row.itemsize == 2 and row.own == "keys"]

FORMS = {
    "float16": form(F16, EVEN, "scale", "causal", layout=aligned_layouts()),
    "bfloat16_odd": form(BF16, ODD, "scale"),
}


def everything(heads, seqlens, seed=1):
    """All options at once, for a batch of one."""
    rng = np.random.default_rng(seed)
    return {
        "bias": make_bias(rng, (heads, *seqlens), F32, "infinities"),
        "mask": make_mask(rng, (1, heads, *seqlens), "blocks", 64),
        "alibi_slopes": make_slopes(rng, (heads,)),
        "sinks": np.linspace(0, 3, heads, dtype=F32),
        "softcap": 5.0,
        "window": (50, 50),
        "dropout_p": 0.2,
    }


@pytest.mark.parametrize("name", FORMS)
@examples(6)
@given(data=st.data())
def test_agrees_with_the_reference(executor, name, data):
    assert_right(executor, of_problem(executor, data.draw(FORMS[name])), deterministic=False)


@pytest.mark.parametrize("row", KEY_ROWS, ids=[str(i) for i in range(len(KEY_ROWS))])
def test_every_row(executor, row):
    limit = executor_for(q=executor.array(np.zeros(1, F16))).smem_limit_bytes
    head_dim = row.max_head_dim
    if not row.is_legal(head_dim, head_dim, limit, add_dq=True):
        pytest.skip("needs more shared memory than there is")
    arrays = normal(F16, 1, seqlens_for(row, row), (2, 1), (head_dim, head_dim))
    saved = after_reference(*arrays)
    assert_right(executor, saved, configs=(row,), deterministic=False)


def test_all_options(executor):
    for seqlens in ((70, 135), (135, 70)):
        saved = after_forward(executor, *normal(F16, 1, seqlens, (4, 2)), dlse=True, **everything(4, seqlens))
        grads = assert_right(executor, saved, deterministic=False, return_dbias=True)
        in_order = call_backward(executor, saved, return_dbias=True)
        assert same_bits([grads.dbias, grads.dsinks], [in_order.dbias, in_order.dsinks])


def test_any_order_is_within_the_bound_and_dk_and_dv_are_in_order(executor):
    saved = after_forward(executor, *normal(F16, 1, (70, 300), (4, 2)), dlse=True)
    expected, bound = bounds(saved)
    results = []
    for asynchrony, seed in (("late", 1), ("random", 2), ("random", 3), ("eager", 4)):
        with executor.active(asynchrony=asynchrony, seed=seed):
            results.append(call_backward(executor, saved, deterministic=False))
    for grads in results:
        assert same_bits(grads[1:3], results[0][1:3])
        assert_same(grads, expected, bound._replace(dq=bound.dq / 2, dk=bound.dk / 2, dv=bound.dv / 2))


@pytest.mark.parametrize("dtype", (F32, F64, "tf32"), ids=str)
def test_other_dtypes_are_summed_in_order(executor, dtype):
    options = {"precision": "tf32"} if dtype == "tf32" else {}
    dtype = F32 if dtype == "tf32" else dtype
    saved = after_forward(executor, *normal(dtype, 1, (40, 70), head_dims=(64, 64)), **options)
    assert same_bits(call_backward(executor, saved, deterministic=False), call_backward(executor, saved))


@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4), (2, 5, 0)], ids=str)
def test_empty_axes(executor, shape):
    """Also dq of queries that have no key: nothing adds to it, and it is 0."""
    batch, *seqlens = shape
    saved = after_forward(executor, *normal(F16, batch, seqlens, (4, 2), (32, 24)), dlse=True)
    grads = call_backward(executor, saved, deterministic=False)
    for got, like in zip(grads[:3], saved.arrays[1:4], strict=True):
        assert got.shape == like.shape and got.dtype == F16 and not got.any()


def test_rows_that_nothing_adds_to(executor):
    saved = after_forward(executor, *normal(F16, seqlens=(135, 40)), causal=True)
    grads = assert_right(executor, saved, deterministic=False)
    assert not grads.dq[:, :95].any() and grads.dq[:, 96:].any()


@lengths_of
def test_packed(executor, name):
    """Rows of sequences that begin anywhere in a tile of the sums; the schedule made here, and on the device."""
    saved = after_packed(executor, LENGTHS[name], causal=True)
    for on_device in (False, True):
        assert_right(executor, saved, deterministic=False, schedule_on_device=on_device)


def test_other_sequences_are_never_felt(executor):
    saved = after_packed(executor, [(30, 40), (70, 65), (20, 90)])
    rows, columns = (slice(own[1], own[2]) for own in saved.starts)
    _, q, k, v, _, _ = saved.arrays
    poisoned = [np.full_like(x, np.nan) for x in (q, k, v)]
    for x, nan, own in zip((q, k, v), poisoned, (rows, columns, columns), strict=True):
        nan[own] = x[own]
    again = call_backward(executor, saved.but(q=poisoned[0], k=poisoned[1], v=poisoned[2]), deterministic=False)
    grads = assert_right(executor, saved, deterministic=False)
    assert np.isfinite(again.dq[rows]).all() and np.isnan(again.dq[: rows.start]).any()
    assert same_bits([again.dk[columns], again.dv[columns]], [grads.dk[columns], grads.dv[columns]])
    np.testing.assert_allclose(again.dq[rows].astype(F64), grads.dq[rows].astype(F64), rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("packed", (False, True))
def test_a_workspace_and_given_gradients(executor, packed):
    if packed:
        saved = after_packed(executor, LENGTHS["mixed"], head_dims=(24, 16))
        starts = {"cu_seqlens_q": saved.starts[0], "cu_seqlens_k": saved.starts[1]}
    else:
        saved, starts = after_forward(executor, *normal(F16, head_dims=(24, 16))), {}
    inputs = saved.arrays[1:4]
    on_executor = [executor.array(x) for x in inputs]
    size = cuattn.attention_backward_workspace_size(*on_executor, deterministic=False, **starts)
    assert size >= cuattn.attention_backward_workspace_size(*on_executor, **starts) + 4 * inputs[0].size
    workspace = executor.guarded((size,), np.uint8)  # full of NaN
    targets = [executor.guarded(x.shape, x.dtype) for x in inputs]
    given_arrays = dict(zip(("dq", "dk", "dv"), (target.array for target in targets), strict=True))
    for _ in range(2):  # the second time, over what the first has left
        assert_right(executor, saved, deterministic=False, workspace=workspace.array, **given_arrays)
    for one in (workspace, *targets):
        one.check()


@pytest.mark.parametrize(("seqlen_q", "head_dims"), [(75, DIM), (75, (25, 64)), (80, DIM), (75, (96, 70))], ids=str)
@pytest.mark.parametrize("options", [{}, {"window": (20, 30)}], ids=str)
def test_any_order(executor, seqlen_q, head_dims, options):
    """dq as sums that are added to: in the strides of the caller, and nothing beside them."""
    saved = after_forward(executor, *normal(F16, 2, (seqlen_q, 150), (4, 2), head_dims), dlse=True, **options)
    target = executor.guarded(saved.arrays[1].shape, F16, Layout(order=(0, 2, 1, 3), pad=(0, 3, 1, 8)))
    grads = call_backward(executor, saved, deterministic=False, dq=target.array)
    assert_gradients_right(grads, saved)
    target.check()


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_any_order_packed(executor, on_device):
    rng = np.random.default_rng(7)
    q, k, v = (x[0] for x in normal(F16, 1, (103, 159), (4, 2), DIM))
    options = every_option(F16, rng, (3, 4, 70, 90)) | {"max_seqlen_q": 70, "max_seqlen_k": 90}
    if on_device:
        options = {"causal": True}
    starts = np.int32([0, 70, 70, 103]), np.int32([0, 90, 95, 159])
    saved = after_forward(executor, q, k, v, *starts, dlse=True, **options)
    assert_right(executor, saved, deterministic=False, schedule_on_device=on_device)
