"""The Hopper forward kernel: right in every shape, with every option that it has, at every edge of its tiles.

On the host executor it is forced with ``config=``; on a GPU these tests need compute capability 9.0.
"""

from __future__ import annotations

import numpy as np
import pytest
from attention_calls import assert_same, prepare
from hopper_calls import (
    ALL_ROWS,
    BF16,
    F16,
    ROWS,
    SMALL,
    TURNS,
    assert_right,
    call,
    everything,
    make,
    name_of,
    same_bits,
)
from option_cases import OPTION_CASES

from cuattn import host, reference
from cuattn.ops.attention.forward.hopper_config import BUCKETS
from cuattn.testing import assert_attention_close, kernels
from cuattn.testing.arrays import Layout, place
from cuattn.testing.cases import AttentionCase
from cuattn.testing.executors import ExecutorUnderTest, executor_names
from cuattn.testing.options import make_slopes
from cuattn.testing.strategies import fill

#: Options that the kernel has, by the names of option_cases.
OPTION_NAMES = [
    name for name in OPTION_CASES if not name.startswith(("bias", "mask", "dropout", "everything", "sinks_"))
]


# --- every shape ------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_every_row(executor, row):
    """Two tiles of queries, of which the second has few, and three of keys; tiles with and without a masked part."""
    index = ROWS.index(row)
    seqlens = row.block_m + 9, 2 * row.block_n + 5
    arrays = make(seqlens, (F16, BF16)[index % 2], head_dims=(row.max_head_dim, row.max_head_dim_v), seed=index)
    assert_right(executor, *arrays, config=row, causal=True)


@pytest.mark.parametrize("head_dims", [(96, 64), (64, 96), (128, 64), (64, 128), (192, 128), (8, 128)], ids=str)
def test_head_dims_that_differ(executor, head_dims):
    row = next(row for row in ROWS[3:] if max(head_dims) <= row.max_head_dim)
    assert_right(executor, *make((70, 200), BF16, head_dims=head_dims), config=row)


@pytest.mark.parametrize("head_dims", [(8, 8), (40, 56), (33, 7), (1, 1), (63, 64)], ids=str)
def test_head_dims_within_a_bucket(executor, head_dims):
    """What copies read beyond a row is poison, or the next head; what they fill in is 0."""
    shapes = (1, 70, 2, head_dims[0]), (1, 140, 2, head_dims[0]), (1, 140, 2, head_dims[1])
    rng = np.random.default_rng(0)
    arrays = [place(fill(shape, F16, "normal", rng), Layout(pad=(0, 1, 0, -shape[3] % 8))).array for shape in shapes]
    out, _ = assert_right(executor, *arrays)
    target = executor.guarded(out.shape, F16)
    moved, _ = prepare(executor, arrays, {})
    assert kernels.attention(*moved, config=SMALL, out=target.array) is target.array
    target.check()
    assert same_bits([executor.numpy(target.array)], [out])


@pytest.mark.parametrize("seqlens", [(1, 1), (64, 128), (65, 129), (63, 127), (130, 1), (1, 300), (129, 256)], ids=str)
def test_lengths_about_a_tile(executor, seqlens):
    for causal in (False, True):
        assert_right(executor, *make(seqlens, heads=(2, 2)), causal=causal)


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTION_NAMES)
def test_options(executor, name):
    batch, heads, seqlens = 2, (4, 2), (70, 150)
    options = OPTION_CASES[name](np.random.default_rng(0), batch, heads[0], *seqlens)
    assert_right(executor, *make(seqlens, heads=heads, batch=batch), **options)


@pytest.mark.parametrize("row", [SMALL, TURNS], ids=["one", "turns"])
@pytest.mark.parametrize("seqlens", [(70, 300), (300, 70)], ids=str)
def test_everything(executor, row, seqlens):
    options = everything(np.random.default_rng(3), 2, 4, *seqlens)
    assert_right(executor, *make(seqlens, heads=(4, 2), batch=2), config=row, **options)


@pytest.mark.parametrize("window", [(0, 0), (3, 17), (128, 128), (None, 0), (1000, 1000), (0, None)], ids=str)
def test_windows(executor, window):
    for seqlens in ((70, 300), (200, 140)):
        assert_right(executor, *make(seqlens), window=window)


def test_queries_without_keys(executor):
    """Zeros and -inf where there are more queries than keys, in whole tiles and within one; or the sink."""
    arrays = make((200, 50), heads=(2, 1))
    out, lse = assert_right(executor, *arrays, causal=True)
    assert not out[:, :150].any() and np.isneginf(lse[..., :150]).all() and not np.isneginf(lse[..., 150:]).any()
    sinks = np.float32([0.5, -np.inf])
    out, lse = assert_right(executor, *arrays, causal=True, sinks=sinks)
    assert not out[:, :150].any() and np.array_equal(lse[0, :, 0], sinks)


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ("huge_logit", "constant_rows", "denormal", "wide"))
def test_values(executor, kind):
    for dtype in (F16, BF16):
        assert_right(executor, *make((70, 200), dtype, kind=kind), causal=True)


@pytest.mark.parametrize("scale", (60.0, -60.0, 0.0))
def test_scales(executor, scale):
    assert_right(executor, *make((70, 200)), scale=scale)


def test_an_infinite_value_is_where_it_is_seen(executor):
    """Under a causal mask the queries before it do not see it, whatever else is in its tile."""
    q, k, v = make((130, 130))
    v[0, 100, 0, 3] = np.inf
    out, _ = call(executor, q, k, v, causal=True)
    assert np.isinf(out[0, 100:, 0, 3]).all()
    v[0, 100, 0, 3] = 1.0
    finite, _ = call(executor, q, k, v, causal=True)
    assert same_bits([np.delete(out, 3, axis=3)], [np.delete(finite, 3, axis=3)])


def test_nan_beyond_the_arrays_is_never_felt(executor):
    """Rows that a copy reads beyond the last key, and beyond the last query, are of the next batch entry: NaN here."""
    arrays = make((70, 150), batch=2, heads=(2, 1))
    expected = call(executor, *arrays)
    for x in arrays:
        x[1] = np.nan
    found = call(executor, *arrays)
    assert same_bits([found[0][0], found[1][0]], [expected[0][0], expected[1][0]])
    assert np.isnan(found[0][1]).all()


# --- heads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seqlens", "heads", "row"),
    [
        ((1, 200), (8, 1), SMALL),
        ((9, 130), (8, 2), SMALL),  # two tiles of eight heads, the second nearly empty
        ((40, 300), (12, 4), TURNS),  # 192 rows are 64 queries of three heads
        ((5, 130), (7, 1), SMALL),  # seven do not divide a tile
        ((200, 130), (4, 2), SMALL),
    ],
    ids=["one_query", "two_tiles", "three_heads", "seven_heads", "many_queries"],
)
def test_heads_share_tiles(executor, seqlens, heads, row):
    options = {
        "alibi_slopes": make_slopes(np.random.default_rng(1), (2, heads[0])),
        "sinks": np.linspace(-1, 1, heads[0]),
    }
    arrays = make(seqlens, BF16, heads=heads, batch=2)
    for causal in (False, True):
        assert_right(executor, *arrays, config=row, causal=causal, **options)


def test_grouped_heads_equal_repeated_ones(executor):
    q, k, v = make((20, 200), heads=(8, 2))
    repeated = [np.repeat(x, 4, axis=2) for x in (k, v)]
    assert_same(call(executor, q, k, v), call(executor, q, *repeated), q, k, v)


# --- work -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"window": (0, 0)}, {"window": (64, 0), "diagonal_offset": 0}, {"window": (None, 90)}],
    ids=str,
)
def test_tiles_without_a_visible_key_cost_nothing(options):
    """Tiles of 64 queries and 128 keys, counted by the products that the host executor executes."""
    seqlen_q, seqlen_k = 192, 400
    visible = np.broadcast_to(reference.visible(seqlen_q, seqlen_k, **options), (1, 1, seqlen_q, seqlen_k))[0, 0]
    num_tiles = 0
    for rows in visible.reshape(-1, 64, seqlen_k):
        keys = np.flatnonzero(rows.any(axis=0))
        num_tiles += int(keys.max() // 128 - keys.min() // 128 + 1)
    with host.profile() as profile:
        kernels.attention(*make((seqlen_q, seqlen_k)), config=SMALL, **options)
    warps, products = 4, 64 // 16 + 128 // 16
    executed = sum(number for opcode, number in profile.opcodes.items() if opcode.startswith("wgmma.mma_async"))
    assert executed == num_tiles * warps * products


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.skipif("cuda" not in executor_names(), reason="no GPU answers")
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("row", ALL_ROWS, ids=name_of)
def test_every_row_on_a_large_problem(row, causal):
    """Thousands of tiles, every multiprocessor at work, samples of the result against the reference."""
    if executor_names() == ["host"] or ExecutorUnderTest("cuda").xp.cuda.Device().compute_capability != "90":
        pytest.skip("the GPU is no Hopper")
    case = AttentionCase(2, 4000, 16, row.max_head_dim, 4100, 4, row.max_head_dim_v, "bfloat16", causal)
    inputs = case.make_inputs(xp=ExecutorUnderTest("cuda").xp)
    out, lse = kernels.attention(*(inputs[name] for name in "qkv"), config=row, return_lse=True, **case.options)
    assert BUCKETS[case.head_dim] == row.max_head_dim
    case.check({name: x.get() for name, x in inputs.items()}, (out.get(), lse.get()))


def test_strides_of_axes_with_one_place_may_be_anything(executor):
    q, k, v = (
        np.lib.stride_tricks.as_strided(x, x.shape, (6, x.strides[1], 10, x.strides[3]))
        for x in make((70, 140), seed=11)
    )
    assert_right(executor, q, k, v)


@pytest.mark.parametrize("head_dim_v", [12, 24, 8])
def test_rows_of_out_end_where_they_end(executor, head_dim_v):
    """Rows begin at multiples of 16 bytes and have gaps between them, which keep their poison."""
    arrays = make((70, 140), head_dims=(64, head_dim_v), seed=head_dim_v)
    arrays[2] = place(arrays[2], Layout(pad=(0, 1, 0, -head_dim_v % 8))).array
    target = executor.guarded((1, 70, 1, head_dim_v), F16, Layout(pad=(0, 1, 0, 16 - head_dim_v % 8)))
    moved, _ = prepare(executor, arrays, {})
    kernels.attention(*moved, config=SMALL, out=target.array)
    target.check()
    assert_attention_close(executor.numpy(target.array), *arrays)
