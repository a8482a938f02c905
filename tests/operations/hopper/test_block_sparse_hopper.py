"""Block-sparse attention in the Hopper kernel, against the reference with the mask written out by elements."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from attention_calls import prepare
from block_sparse_problems import Problem, make, problems
from hypothesis import given
from hypothesis import strategies as st

import cuattn
from cuattn import BlockMask
from cuattn.errors import NotSupportedError
from cuattn.ops.attention.forward import hopper_listed
from cuattn.testing import assert_attention_close, kernels
from cuattn.testing.arrays import Layout, place
from cuattn.testing.strategies import examples

F16, BF16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)


def row_of(head_dim, rows, keys):
    (found,) = (
        row
        for row in hopper_listed.HOPPER_LISTED_CONFIGS
        if (row.max_head_dim, row.block_m, row.block_n) == (head_dim, rows, keys)
    )
    return found


ONE = row_of(64, 64, 128)
TURNS = row_of(64, 128, 192)
WIDE = row_of(128, 128, 160)
#: Blocks of which 64 queries are parts, of few keys, of many, and of a number that does not divide a tile.
SIZES = ((64, 64), (128, 8), (64, 24), (192, 128))


def call(executor, problem, config=ONE):
    arrays, options = prepare(executor, (problem.q, problem.k, problem.v), problem.options)
    out, lse = kernels.block_sparse_attention(*arrays, problem.mask, config=config, return_lse=True, **options)
    return executor.numpy(out), executor.numpy(lse)


def assert_right(executor, problem, config=ONE):
    out, lse = call(executor, problem, config)
    assert_attention_close(out, problem.q, problem.k, problem.v, lse=lse, **problem.dense_options)
    return out, lse


def same_bits(one, other):
    return all(x.tobytes() == y.tobytes() for x, y in zip(one, other, strict=True))


@given(data=st.data())
@examples(8)
def test_what_is_kept(executor, data):
    assert_right(executor, data.draw(problems(F16, block_sizes=SIZES, options=("scale", "sinks"), max_seqlen=300)))


BOUNDS = ({"causal": True}, {"window": (40, 3)}, {"window": (None, 20)}, {"causal": "top_left", "chunk": 30})


@given(data=st.data())
@examples(8)
def test_bounds_by_position(executor, data):
    """With two consumers, which take turns."""
    fixed = data.draw(st.sampled_from(BOUNDS))
    sizes = (128, 64), (256, 24), (128, 8)
    drawn = problems(F16, block_sizes=sizes, options=("scale", "sinks", "diagonal_offset"), max_seqlen=400, **fixed)
    assert_right(executor, data.draw(drawn), TURNS)


@pytest.mark.parametrize(
    "options",
    [{"window": (40, 3)}, {"window": (250, None)}, {"causal": True}],
    ids=["narrow", "wide", "causal"],
)
def test_bounds_that_begin_within_a_tile(executor, options):
    """The first row of a CTA sees a tile that its last row does not, and the other way round."""
    problem = make(np.random.default_rng(11), F16, seqlens=(300, 600), block_size=(128, 64), density=1)
    assert_right(executor, replace(problem, options=options), TURNS)


def test_tiles_that_no_query_sees_are_not_read(executor):
    """NaN in the listed tiles before a window, and behind it: it begins and ends where tiles do."""
    problem = make(np.random.default_rng(12), F16, seqlens=(128, 576), block_size=(128, 64), density=1)
    for x in (problem.k, problem.v):
        x[:, :192] = x[:, 384:] = np.nan
    out, _ = call(executor, replace(problem, options={"window": (64, 0), "diagonal_offset": 256}), TURNS)
    assert np.isfinite(out.astype(np.float32)).all()


@given(data=st.data())
@examples(8)
def test_options_of_logits(executor, data):
    options = "scale", "causal", "window", "chunk", "alibi_slopes", "sinks", "diagonal_offset"
    problem = data.draw(problems(BF16, block_sizes=SIZES, options=options, max_seqlen=260, most=4, softcap=9.0))
    assert_right(executor, problem)


@pytest.mark.parametrize("dims", [(128, 128), (104, 120)], ids=str)
def test_wide_heads(executor, dims):
    rng = np.random.default_rng(1)
    for block_size, elements in (((128, 64), False), ((128, 32), True)):
        problem = make(rng, BF16, seqlens=(200, 330), head_dims=dims, block_size=block_size, elements=elements)
        assert_right(executor, problem, WIDE)


@pytest.mark.parametrize("seqlens", [(1, 1), (63, 127), (64, 128), (65, 129), (129, 1), (128, 257)], ids=str)
def test_edges_of_tiles(executor, seqlens):
    rng = np.random.default_rng(2)
    for density in (0.5, 1.0):
        assert_right(executor, make(rng, F16, seqlens=seqlens, heads=(1, 1), block_size=(64, 64), density=density))


def test_heads_share_a_cta_where_blocks_are_small(executor):
    """Sixteen queries of four heads are 64 rows, if all heads see the same."""
    rng = np.random.default_rng(3)
    problem = make(rng, F16, batch=2, seqlens=(100, 200), heads=(8, 2), block_size=(16, 16))
    assert_right(executor, problem)
    per_head = make(rng, F16, seqlens=(100, 200), heads=(8, 2), block_size=(16, 16), leading=(8,))
    with pytest.raises(NotSupportedError, match="64 rows do not lie in one block of 16 queries, whose heads"):
        call(executor, per_head)


GRIDS = {
    "strided": lambda: cuattn.strided_mask(4, 5, 3, 1),
    "global": lambda: cuattn.global_mask(4, 5, [1]),
    "streaming": lambda: cuattn.streaming_mask(4, 5, 1, 2),
    "bigbird": lambda: cuattn.bigbird_mask(4, 5, num_window=1, num_random=1),
}


@pytest.mark.parametrize("builder", ["local", "vertical_slash", *GRIDS])
def test_builders(executor, builder):
    n, m = 250, 300
    if builder == "local":
        blocks = cuattn.local_mask(n, m, 64, 70, 10)
    elif builder == "vertical_slash":
        blocks = cuattn.vertical_slash_mask(n, m, 64, [0, 130], [0, 64])
    else:
        blocks = GRIDS[builder]()
    mask = blocks if isinstance(blocks, BlockMask) else BlockMask.from_blocks(blocks, n, m, 64)
    problem = make(np.random.default_rng(4), F16, seqlens=(n, m))
    assert_right(executor, Problem(problem.q, problem.k, problem.v, mask, mask.todense()))


def test_nan_in_blocks_that_a_row_does_not_keep(executor):
    """Whatever other rows keep, and whoever computed in the same buffers before."""
    rng = np.random.default_rng(5)
    problem = make(rng, F16, seqlens=(256, 320), heads=(2, 2), block_size=(64, 64), density=0.5)
    expected = call(executor, problem)
    blocks = problem.mask.blocks
    for block in range(5):
        k, v = problem.k.copy(), problem.v.copy()
        k[:, 64 * block : 64 * (block + 1)] = v[:, 64 * block : 64 * (block + 1)] = np.nan
        out, lse = call(executor, replace(problem, k=k, v=v))
        hidden = np.repeat(~blocks[:, block], 64)
        np.testing.assert_array_equal(out[:, hidden], expected[0][:, hidden])
        np.testing.assert_array_equal(lse[:, :, hidden], expected[1][:, :, hidden])
        assert np.isnan(out[:, ~hidden]).all()


def test_equal_rows_are_equal(executor):
    """All queries of a block see the same: equal ones have equal results, to the bit."""
    problem = make(np.random.default_rng(6), F16, seqlens=(200, 300), block_size=(64, 16))
    q = np.broadcast_to(problem.q[:, :1], problem.q.shape).copy()
    out, lse = call(executor, replace(problem, q=q))
    for first in range(0, 200, 64):
        assert (out[:, first : first + 64] == out[:, first : first + 1]).all()
        assert (lse[:, :, first : first + 64] == lse[:, :, first : first + 1]).all()


def test_rows_that_see_nothing(executor):
    problem = make(np.random.default_rng(7), F16, seqlens=(200, 64), density=0)
    out, lse = call(executor, problem)
    assert not out.any() and np.isneginf(lse).all()
    out, lse = call(executor, replace(problem, options={"sinks": np.ones(2, "f4")}))
    assert not out.any() and (lse == 1).all()


@pytest.mark.parametrize(("row", "options"), [(ONE, {}), (TURNS, {"causal": True})], ids=["one", "turns"])
def test_asynchrony_and_schedule_change_no_bit(executor, row, options):
    problem = make(np.random.default_rng(8), F16, seqlens=(300, 500), heads=(2, 1), block_size=(128, 24))
    problem = replace(problem, options=options)
    expected = call(executor, problem, row)
    for asynchrony, seed in (("late", 1), ("random", 2), ("random", 3), ("eager", 4)):
        with executor.active(asynchrony=asynchrony, seed=seed):
            assert same_bits(call(executor, problem, row), expected), (asynchrony, seed)


@pytest.mark.parametrize(
    "layout",
    [Layout(order=(0, 2, 1, 3)), Layout(pad=(1, 2, 1, 8)), Layout(offset=8)],
    ids=["heads", "padded", "offset"],
)
def test_layouts_change_no_bit(executor, layout):
    problem = make(np.random.default_rng(9), F16, batch=2, seqlens=(70, 150))
    moved = replace(problem, **{name: place(getattr(problem, name), layout) for name in "qkv"})
    assert same_bits(call(executor, moved), call(executor, problem))


# --- packed sequences -------------------------------------------------------------------------------------------------


@given(data=st.data())
@examples(8)
def test_each_sequence_as_alone(executor, data):
    """What lies behind a sequence is the next one's, and NaN here."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    length = st.sampled_from([0, 1, 17, 63, 64, 65, 100, 130, 200])
    lengths = [*data.draw(st.lists(st.tuples(length, length), max_size=3)), (65, 100)]
    options = {"softcap": 5.0, **data.draw(st.sampled_from([{}, {"causal": True}, {"window": (30, 5)}]))}
    chosen = data.draw(st.integers(0, len(lengths) - 1))
    starts = [np.concatenate([[0], np.cumsum(side)]).astype(np.int32) for side in np.transpose(lengths)]
    parts = [
        make(rng, F16, seqlens=of, heads=(2, 1), block_size=(64, data.draw(st.sampled_from([8, 24, 64]))))
        for of in lengths
    ]
    q, k, v = (np.concatenate([getattr(part, name)[0] for part in parts]) for name in "qkv")
    for rows, arrays in ((starts[0], (q,)), (starts[1], (k, v))):
        for x in arrays:
            x[: rows[chosen]] = x[rows[chosen + 1] :] = np.nan
    arrays = [executor.array(x) for x in (q, k, v)]
    masks = [part.mask for part in parts]
    out, lse = kernels.block_sparse_attention_varlen(*arrays, *starts, masks, config=ONE, return_lse=True, **options)
    out, lse = executor.numpy(out), executor.numpy(lse)
    rows, of = slice(starts[0][chosen], starts[0][chosen + 1]), parts[chosen]
    dense = replace(of, options=options).dense_options
    assert_attention_close(out[None, rows], of.q, of.k, of.v, lse=lse[None, :, rows], **dense)


# --- which calls -----------------------------------------------------------------------------------------------------


def test_the_public_function_does_what_the_path_says(executor, monkeypatch):
    monkeypatch.setenv("CUATTN_HOST_ARCH", "sm_90a")
    problem = make(np.random.default_rng(10), F16, seqlens=(64, 100), block_size=(64, 64), heads=(1, 1), density=1)
    arrays = [executor.array(x) for x in (problem.q, problem.k, problem.v)]
    path = cuattn.forward_path(*arrays, block_mask=problem.mask)
    assert path.kernel == "attention_forward_hopper" and path.row == ONE and "blocks of 64" in path.reason
    out, lse = cuattn.block_sparse_attention(*arrays, problem.mask, return_lse=True)
    assert same_bits([executor.numpy(x) for x in (out, lse)], call(executor, problem))
