"""Attention to the blocks that a mask keeps, against the reference with the mask written out by elements."""

from __future__ import annotations

import numpy as np
import pytest
from block_sparse_problems import BOUNDS, OPTIONS, Problem, assert_right, call, make, problems
from hypothesis import given
from hypothesis import strategies as st

import cuattn
from cuattn import BlockMask
from cuattn.dtypes import BFLOAT16
from cuattn.testing.arrays import Layout, place
from cuattn.testing.strategies import examples

F16, F32, F64 = np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64)
#: Queries of these blocks are tiled by 64, by 128, and by as few as a kernel takes.
LARGE = ((64, 64), (64, 24), (64, 16), (64, 128), (320, 7))
SMALL = ((16, 16), (24, 24), (16, 64), (32, 8), (5, 13), (1, 1), (100, 3))


@given(data=st.data())
@examples(12)
def test_large_blocks(executor, data):
    assert_right(executor, data.draw(problems(F16, block_sizes=LARGE, options=("scale", "sinks"))))


@given(data=st.data())
@examples(12)
def test_small_blocks(executor, data):
    assert_right(executor, data.draw(problems(F16, block_sizes=SMALL, options=("scale", "sinks"))))


@given(data=st.data())
@examples(8)
def test_blocks_of_128(executor, data):
    sizes = (128, 128), (256, 64), (128, 40)
    assert_right(executor, data.draw(problems(BFLOAT16, block_sizes=sizes, options=("scale",), max_seqlen=300)))


@pytest.mark.parametrize("block_sizes", [LARGE, SMALL], ids=["large", "small"])
@given(data=st.data())
@examples(14)
def test_bounds_by_position(executor, block_sizes, data):
    bounds = st.sampled_from([{"causal": True}, {"window": (40, 3)}, {"causal": "top_left", "chunk": 30}])
    fixed = data.draw(bounds)
    sizes = [size for size in block_sizes if size[0] != 32]  # a kernel of its own
    assert_right(executor, data.draw(problems(F16, block_sizes=sizes, options=BOUNDS, **fixed)))


@pytest.mark.parametrize("block_sizes", [LARGE, SMALL], ids=["large", "small"])
@given(data=st.data())
@examples(16)
def test_options(executor, block_sizes, data):
    """The kernel with every option; the bias in float32, so that it is one."""
    problem = data.draw(problems(F16, block_sizes=block_sizes, options=OPTIONS, most=5))
    if problem.options.get("bias") is not None:
        problem.options["bias"] = problem.options["bias"].astype(np.float32)
    if not {"softcap", "bias", "mask", "alibi_slopes", "dropout_p"} & problem.options.keys():
        problem.options["softcap"] = 15.0
    assert_right(executor, problem)


@pytest.mark.parametrize(
    ("dtype", "precision"), [(F32, None), (F32, "tf32"), (F64, None)], ids=["float32", "tf32", "float64"]
)
@given(data=st.data())
@examples(8)
def test_other_dtypes(executor, dtype, precision, data):
    sizes = LARGE if precision is not None or dtype == F64 else (*LARGE, *SMALL)
    problem = data.draw(problems(dtype, block_sizes=sizes, options=OPTIONS, most=4, precision=precision))
    problem.options.setdefault("softcap", 20.0)
    if problem.options.get("bias") is not None:
        problem.options["bias"] = problem.options["bias"].astype(np.float32)
    assert_right(executor, problem)


@given(data=st.data())
@examples(5)
def test_any_strides(executor, data):
    """Views whose rows begin anywhere, of poisoned memory."""
    of_one_kernel = {"block_sizes": ((16, 16), (16, 24)), "densities": (0.1, 0.3)}
    problem = data.draw(problems(F16, head_dims=((31, 17),), softcap=9.0, **of_one_kernel))
    odd = Layout(offset=2, pad=(0, 1, 0, 3))
    arrays = [place(x, odd) for x in (problem.q, problem.k, problem.v)]
    moved = Problem(*arrays, problem.mask, problem.visible, problem.options)
    out, lse = call(executor, moved)
    for got, want in zip((out, lse), assert_right(executor, problem), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("head_dims", [(256, 256), (40, 512)], ids=str)
def test_wide_heads(executor, head_dims):
    rng = np.random.default_rng(3)
    for block_size in ((16, 16), (24, 40)):
        assert_right(executor, make(rng, F16, seqlens=(40, 70), head_dims=head_dims, block_size=block_size))


def test_a_full_mask_is_attention(executor):
    """Bit for bit where the tiles are the same: a mask that keeps everything hides nothing."""
    rng = np.random.default_rng(0)
    problem = make(rng, F16, seqlens=(300, 200), block_size=(128, 64), density=1)
    arrays = [executor.array(x) for x in (problem.q, problem.k, problem.v)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUATTN_HOPPER", "off")
        out, lse = call(executor, problem)
        dense, dense_lse = cuattn.attention(*arrays, return_lse=True)
    np.testing.assert_array_equal(out, executor.numpy(dense))
    np.testing.assert_array_equal(lse, executor.numpy(dense_lse))


def test_rows_that_see_nothing(executor):
    """0 and -inf, or the sink; whole blocks of them are written too."""
    rng = np.random.default_rng(1)
    problem = make(rng, F16, seqlens=(200, 64), block_size=(64, 64), density=0)
    out, lse = call(executor, problem)
    assert not out.any() and np.isneginf(lse).all()
    with_sinks = Problem(problem.q, problem.k, problem.v, problem.mask, problem.visible, {"sinks": np.ones(2, "f4")})
    out, lse = call(executor, with_sinks)
    assert not out.any() and (lse == 1).all()


@pytest.mark.parametrize("seqlens", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_nothing_to_do(executor, seqlens):
    problem = make(np.random.default_rng(0), F16, seqlens=seqlens, block_size=(16, 16))
    out, lse = call(executor, problem)
    assert out.shape == (1, seqlens[0], 2, 64) and not out.any() and np.isneginf(lse).all()


def test_keys_that_no_query_sees_are_never_felt(executor):
    """NaN in blocks of keys that nobody keeps."""
    rng = np.random.default_rng(2)
    problem = make(rng, F16, seqlens=(128, 192), block_size=(16, 16))
    mask = problem.mask & BlockMask.from_blocks(np.arange(12) % 3 == np.zeros((8, 1)), 128, 192, 16)
    hidden = np.arange(192) // 16 % 3 != 0
    k, v = problem.k.copy(), problem.v.copy()
    k[:, hidden], v[:, hidden] = np.nan, np.nan
    clean = Problem(problem.q, problem.k, problem.v, mask, mask.todense())
    poisoned = Problem(problem.q, k, v, mask, mask.todense())
    np.testing.assert_array_equal(call(executor, clean)[0], call(executor, poisoned)[0])


def test_one_mask_serves_other_calls(executor):
    """Other batches, heads and dtypes, again and again: the lists are made once for each shape of tiles."""
    rng = np.random.default_rng(4)
    first = make(rng, F16, seqlens=(100, 150), block_size=(64, 64))
    for batch, heads in ((1, (2, 1)), (3, (4, 2)), (1, (2, 1))):
        other = make(rng, F16, batch=batch, seqlens=(100, 150), heads=heads)
        assert_right(executor, Problem(other.q, other.k, other.v, first.mask, first.visible))


def test_out_is_written_where_it_lies(executor):
    problem = make(np.random.default_rng(5), F16)
    out = executor.guarded((1, 100, 2, 64), F16)
    result = cuattn.block_sparse_attention(
        *(executor.array(x) for x in (problem.q, problem.k, problem.v)), problem.mask, out=out.array
    )
    assert result is out.array
    out.check()
    np.testing.assert_array_equal(executor.numpy(result), call(executor, problem)[0])
