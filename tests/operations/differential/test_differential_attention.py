"""cuattn.differential_attention against the float64 reference: shapes, layouts, lambda, norms, options."""

from __future__ import annotations

import numpy as np
import pytest
from differential_calls import BF16, F16, F32, F64, assert_right, make

import cuattn
from cuattn import reference
from cuattn.testing.arrays import Layout, place
from cuattn.testing.differential_tolerance import assert_differential_close


@pytest.mark.parametrize(
    ("dtype", "shared"), ((F16, False), (F16, True), (BF16, False), (F32, False), (F64, True)), ids=str
)
@pytest.mark.parametrize(
    "shape",
    (
        *((2, 70, 90, 2, 1, 32, 32), (1, 17, 129, 6, 2, 32, 32), (1, 130, 33, 5, 1, 32, 32)),
        *((1, 1, 65, 2, 2, 32, 32), (1, 64, 1, 3, 1, 32, 32)),
    ),
    ids=str,
)
def test_shapes(executor, shape, dtype, shared):
    """Edges of tiles, few queries and many, groups of 1, 2, 3 and 5."""
    q, k, v = make(shape, dtype, shared=shared)
    lam = np.linspace(-0.5, 1.5, shape[3])
    assert_right(executor, q, k, v, lam, causal=True)


@pytest.mark.parametrize("shared", (False, True), ids=("v1", "v2"))
def test_values_of_twice_the_width(executor, shared):
    """The usual layer, in the row whose work is counted."""
    q, k, v = make((1, 130, 140, 2, 1, 64, 128), F16, shared=shared)
    assert_right(executor, q, k, v, 0.6, causal=True, norm=True)


@pytest.mark.parametrize(("dtype", "head_dims"), ((F16, (1, 3)), (F64, (31, 31))), ids=str)
def test_head_dims(executor, dtype, head_dims):
    """Rows of no multiple of 16 bytes take the element-wise load path; a norm is that of the columns there are."""
    q, k, v = make((1, 19, 37, 2, 1, *head_dims), dtype)
    assert_right(executor, q, k, v, 0.7, norm=True)


@pytest.mark.parametrize("dtype", (F16, F64), ids=str)
def test_the_largest_head_dims(executor, dtype):
    q, k, v = make((1, 19, 37, 1, 1, 256, 256), dtype)
    assert_right(executor, q, k, v, 0.7, causal=True)


@pytest.mark.parametrize("dtype", (F16, F32), ids=str)
def test_lambda(executor, dtype):
    """A number, an array of rank 0, one for each head, one for each query of each head; of any float dtype."""
    shape = 2, 21, 40, 3, 1, 32, 32
    q, k, v = make(shape, dtype)
    rng = np.random.default_rng(1)
    of_rows = rng.random((2, 21, 3))
    for lam in (0, -1.5, np.float16(0.25), np.array(0.3), [0.1, 0.2, 0.3], of_rows, of_rows.astype(BF16)):
        out = executor.numpy(cuattn.differential_attention(*map(executor.array, (q, k, v)), lam, causal=True))
        assert_differential_close(out, q, k, v, np.asarray(lam), causal=True)


@pytest.mark.parametrize("dtype", (F16, BF16, F32), ids=str)
@pytest.mark.parametrize("magnitude", (1.0, 2.0**-70, 2.0**70))
def test_norm(executor, dtype, magnitude):
    """With and without a weight, an eps, a factor; of rows whose squares are beyond the range of the sums."""
    if dtype == F16 and magnitude != 1:
        pytest.skip("float16 has no such numbers")
    q, k, v = make((1, 21, 40, 2, 1, 32, 32), dtype)
    v = (v.astype(np.float64) * magnitude).astype(dtype)
    weight = np.random.default_rng(2).standard_normal(32).astype(np.float32)
    for options in ({"norm": True, "eps": 0.0}, {"norm": True, "norm_weight": weight, "output_scale": -0.2}):
        assert_right(executor, q, k, v, 0.6, causal=True, **options)


def test_the_factor_needs_no_norm(executor):
    q, k, v = make((1, 21, 40, 2, 1, 32, 32), F16)
    assert_right(executor, q, k, v, 0.6, output_scale=0.25, causal=True)


@pytest.mark.parametrize(("dtype", "shared"), ((F16, True), (F32, False)), ids=str)
def test_equal_streams(executor, dtype, shared):
    """Where both softmaxes are the same, lambda = 1 leaves exactly 0, also divided by its norm."""
    q, k, v = make((1, 37, 37, 2, 1, 32, 32), dtype, shared=shared)
    q[:, :, 1::2] = q[:, :, ::2]
    if not shared:
        k[:, :, 1::2] = k[:, :, ::2]
    for eps in (0.0, 1e-5):
        out = cuattn.differential_attention(*map(executor.array, (q, k, v)), 1.0, causal=True, norm=True, eps=eps)
        assert not executor.numpy(out).any()


@pytest.mark.parametrize("dtype", (F16,), ids=str)
def test_rows_without_keys(executor, dtype):
    """Queries before the first key give 0; where one stream alone sees nothing, the other is left."""
    q, k, v = make((1, 40, 20, 2, 1, 32, 32), dtype)
    assert_right(executor, q, k, v, 0.6, causal=True, norm=True, eps=0.0)
    mask = np.ones((4, 40, 20), bool)
    mask[1, :7] = mask[2, 30:] = mask[0, 3] = False
    assert_right(executor, q, k, v, 0.6, causal=True, mask=mask)


def test_empty(executor):
    for shape in ((0, 3, 4, 2, 1, 32, 32), (1, 0, 4, 2, 1, 32, 32), (1, 3, 0, 2, 1, 32, 32), (1, 3, 4, 0, 0, 32, 32)):
        q, k, v = map(executor.array, make(shape, F16))
        out, state = cuattn.differential_attention(q, k, v, 0.5, return_state=True)
        batch, seqlen_q, _, heads = shape[:4]
        assert out.shape == state.out1.shape == state.out2.shape == (batch, seqlen_q, heads, 32)
        assert state.lse.shape == (batch, heads, 2, seqlen_q)
        assert not executor.numpy(out).any() and np.isneginf(executor.numpy(state.lse)).all()


@pytest.mark.parametrize("dtype", (F16, F32), ids=str)
def test_layouts(executor, dtype):
    """Transposed views, gaps that hold NaN, odd bases; the result goes into an array of the caller."""
    shape = 2, 21, 40, 2, 1, 32, 32
    q, k, v = make(shape, dtype)
    for layout in (Layout(order=(0, 2, 1, 3), pad=(0, 3, 2, 8)), Layout(pad=(1, 0, 1, 3), offset=1)):
        placed = [place(x, layout) for x in (q, k, v)]
        arrays = [executor.array(x) for x in placed]
        out = executor.guarded((2, 21, 2, 32), dtype, layout)
        result = cuattn.differential_attention(*arrays, 0.6, causal=True, out=out.array)
        assert result is out.array
        out.check()
        assert_differential_close(executor.numpy(result), q, k, v, 0.6, causal=True)


def test_the_pairing_of_grouped_heads(executor):
    """Output head h reads key heads 2g and 2g + 1 of its value head g. Pairing query head x with key head x // r, as is
    done elsewhere, is the same without groups, and something else with them."""
    batch, seqlen, heads, kv_heads = 1, 24, 4, 2
    q, k, v = make((batch, seqlen, seqlen, heads, kv_heads, 32, 32), F32)
    got = executor.numpy(cuattn.differential_attention(*map(executor.array, (q, k, v)), 0.8, causal=True))
    assert_differential_close(got, q, k, v, 0.8, causal=True)

    def paired_otherwise(group):
        outs = []
        for x in range(2 * heads):
            values = v[:, :, x // 2 // (heads // kv_heads)]
            keys = k[:, :, x // group]
            outs.append(
                reference.attention(q[:, :, [x]], keys[:, :, None], values[:, :, None], causal=True)[0][:, :, 0]
            )
        return np.stack([outs[2 * h] - 0.8 * outs[2 * h + 1] for h in range(heads)], axis=2)

    assert np.abs(got - paired_otherwise(heads // kv_heads)).max() > 0.5
    q, k, v = make((batch, seqlen, seqlen, heads, heads, 32, 32), F32)
    kv_heads = heads
    got = executor.numpy(cuattn.differential_attention(*map(executor.array, (q, k, v)), 0.8, causal=True))
    assert np.abs(got - paired_otherwise(1)).max() < 1e-5


@pytest.mark.parametrize("dtype", (F16, F32), ids=str)
def test_the_same_bits(executor, dtype):
    q, k, v = map(executor.array, make((1, 130, 130, 2, 1, 32, 32), dtype))
    first, second = (executor.numpy(cuattn.differential_attention(q, k, v, 0.6, causal=True)) for _ in range(2))
    assert first.tobytes() == second.tobytes()
