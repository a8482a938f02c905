"""The Hopper forward kernel: right in every shape, with every option that it has, at every edge of its tiles.

On the host executor it is forced with ``config=``; on a GPU these tests need compute capability 9.0.
"""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from attention_calls import prepare
from hypothesis import given
from hypothesis import strategies as st
from option_cases import OPTION_CASES
from test_attention_properties import assert_same
from test_attention_varlen import BAD_STARTS, LENGTHS, pack

import cuattn
from cuattn import host, reference
from cuattn.ops.attention import varlen
from cuattn.ops.attention.forward import hopper_launch
from cuattn.ops.attention.forward.hopper_config import BUCKETS, HOPPER_ALTERNATIVES, HOPPER_FWD_CONFIGS, HopperFwdConfig
from cuattn.ops.attention.forward.launch import forward
from cuattn.testing import assert_attention_close, assert_varlen_close, kernels
from cuattn.testing.arrays import Guarded, Layout, place
from cuattn.testing.cases import AttentionCase
from cuattn.testing.executors import ExecutorUnderTest, executor_names
from cuattn.testing.options import make_sinks, make_slopes
from cuattn.testing.strategies import aligned_layouts, attention_problems, examples, fill

F16, BF16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)

#: Rows of 16 bits; those of 8 have tests of their own.
ROWS = [row for row in HOPPER_FWD_CONFIGS if row.itemsize == 2]
ALL_ROWS = [*ROWS, *(row for row in HOPPER_ALTERNATIVES if row.itemsize == 2)]
#: One consumer, whose tiles of 64 by 128 are soon full: the row of most tests. And one with three that take turns.
SMALL = ROWS[0]
TURNS = ROWS[3]
#: Options that the kernel has, by the names of option_cases.
OPTION_NAMES = [
    name for name in OPTION_CASES if not name.startswith(("bias", "mask", "dropout", "everything", "sinks_"))
]


@pytest.fixture(scope="module", params=executor_names())
def executor(request):
    if request.param == "cuda" and ExecutorUnderTest("cuda").xp.cuda.Device().compute_capability != "90":
        pytest.skip("the GPU is no Hopper")
    with ExecutorUnderTest(request.param).active() as active:
        yield active


def make(seqlens, dtype=F16, *, heads=(1, 1), head_dims=(64, 64), batch=1, seed=0, layout=None, kind="normal"):
    """q, k and v in a layout, among poison."""
    rng = np.random.default_rng(seed)
    shapes = (
        (batch, seqlens[0], heads[0], head_dims[0]),
        (batch, seqlens[1], heads[1], head_dims[0]),
        (batch, seqlens[1], heads[1], head_dims[1]),
    )
    return [place(fill(shape, dtype, kind, rng), layout).array for shape in shapes]


def call(executor, *arrays, config=SMALL, **options):
    """(out, lse) of a call as NumPy arrays, from NumPy arrays in any layout."""
    arrays, options = prepare(executor, arrays, options)
    out, lse = kernels.attention(*arrays, config=config, return_lse=True, **options)
    return executor.numpy(out), executor.numpy(lse)


def assert_right(executor, *arrays, config=SMALL, **options):
    out, lse = call(executor, *arrays, config=config, **options)
    arrays = [x.array if isinstance(x, Guarded) else x for x in arrays]
    assert_attention_close(out, *arrays, lse=lse, **options)
    return out, lse


def call_varlen(executor, *arrays, config=SMALL, **options):
    arrays, options = prepare(executor, arrays, options)
    out, lse = kernels.attention_varlen(*arrays, config=config, return_lse=True, **options)
    return executor.numpy(out), executor.numpy(lse)


def assert_varlen_right(executor, arrays, starts, config=SMALL, **options):
    on_device = options.pop("schedule_on_device", False)
    moved, on_executor = prepare(executor, arrays, options)
    results = kernels.attention_varlen(
        *moved, *starts, config=config, return_lse=True, schedule_on_device=on_device, **on_executor
    )
    out, lse = (executor.numpy(x) for x in results)
    assert_varlen_close(out, *arrays, *starts, lse=lse, **options)
    return out, lse


def same_bits(one, other):
    return all(x.tobytes() == y.tobytes() for x, y in zip(one, other, strict=True))


def name_of(row):
    return f"{row.block_m}x{row.block_n}-d{row.max_head_dim}-e{row.max_head_dim_v}{'-turns' * row.ping_pong}"


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


def everything(rng, batch, heads, seqlen_q, seqlen_k):
    return {
        "scale": -0.6,
        "causal": True,
        "window": (60, None),
        "diagonal_offset": np.int32([2, seqlen_k - 1])[:batch],
        "softcap": 3.0,
        "alibi_slopes": make_slopes(rng, (batch, heads)),
        "sinks": make_sinks(rng, heads),
    }


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


# --- packed sequences -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("mixed", "empty_ones", "one_long_among_many", "more_queries_than_keys"))
def test_sequences(executor, name):
    for heads, causal in (((2, 2), False), ((8, 2), True)):
        arrays, starts = pack(LENGTHS[name], heads=heads, head_dims=(64, 40))
        assert_varlen_right(executor, arrays, starts, causal=causal)


def test_sequences_with_everything(executor):
    arrays, starts = pack(LENGTHS["mixed"], BF16, heads=(4, 2), head_dims=(64, 64))
    options = everything(np.random.default_rng(2), 5, 4, 130, 130) | {"diagonal_offset": np.int32([0, 3, -5, 60, 200])}
    results = [
        assert_varlen_right(executor, arrays, starts, config=TURNS, schedule_on_device=on_device, **options)
        for on_device in (False, True)
    ]
    assert same_bits(*results)


def test_other_sequences_are_never_felt(executor):
    """NaN and infinities in the sequences before and after: queries, keys and values."""
    (q, k, v), starts = pack([(30, 40), (70, 65), (20, 90)], head_dims=(64, 64))
    out, lse = call_varlen(executor, q, k, v, *starts)
    rows, columns = (slice(own[1], own[2]) for own in starts)
    for poison in (np.nan, np.inf):
        alone = []
        for x, own in ((q, rows), (k, columns), (v, columns)):
            poisoned = np.full_like(x, poison)
            poisoned[own] = x[own]
            alone.append(poisoned)
        again, lse_again = call_varlen(executor, *alone, *starts)
        assert same_bits((again[rows], lse_again[:, rows]), (out[rows], lse[:, rows]))


@pytest.mark.parametrize("starts", BAD_STARTS)
def test_unchecked_lengths_touch_nothing_foreign(executor, starts):
    """Lengths that only the device knows may be nonsense; sequences that overlap are written several times."""
    arrays, good = pack([(20, 20), (30, 30), (20, 20)], head_dims=(64, 64))
    moved, _ = prepare(executor, arrays, {})
    target = executor.guarded((70, 2, 64), F16)
    target.array[...] = 0
    problem, packed = varlen.check(*moved, *good, out=target.array)
    packed.host = packed.max_seqlen_q = packed.max_seqlen_k = None
    packed.cu_seqlens_q = packed.cu_seqlens_k = executor.array(np.array(BAD_STARTS[starts], np.int32))
    with host.check("mem", "init"):
        forward(problem, return_lse=False, packed=packed, config=SMALL)
    target.check()


# --- properties -------------------------------------------------------------------------------------------------------

ALIGNED = st.sampled_from([(64, 64), (40, 16), (8, 64)])
DRAWN = ("scale", "causal", "window", "softcap", "alibi_slopes", "sinks", "diagonal_offset")


def problems(**strategies):
    """Drawn problems that tensor maps can hold."""
    given = {"head_dims": ALIGNED, "max_seqlen": 200, **strategies}
    return attention_problems(dtype=st.sampled_from([F16, BF16]), layout=aligned_layouts(), **given)


@examples(12)
@given(problem=problems(options=DRAWN))
def test_agrees_with_the_reference(executor, problem):
    before = [guarded.root.copy() for guarded in (problem.q, problem.k, problem.v)]
    assert_right(executor, problem.q, problem.k, problem.v, **problem.options)
    for guarded, content in zip((problem.q, problem.k, problem.v), before, strict=True):
        np.testing.assert_array_equal(guarded.root, content)  # inputs and their surroundings are only read


@examples(4)
@given(problem=problems(options=("scale",)), seed=st.integers(0, 999))
def test_order_of_keys_does_not_matter(executor, problem, seed):
    q, k, v = problem.arrays
    order = np.random.default_rng(seed).permutation(k.shape[1])
    permuted = call(executor, q, k[:, order], v[:, order], **problem.options)
    assert_same(permuted, call(executor, q, k, v, **problem.options), q, k, v, **problem.options)


@examples(4)
@given(problem=problems(options=("scale",)), share=st.floats(0, 1))
def test_parts_merge_by_their_lse(executor, problem, share):
    q, k, v = problem.arrays
    cut = min(max(1, int(share * k.shape[1])), k.shape[1] - 1)
    if cut == 0:
        return
    parts = [call(executor, q, k[:, part], v[:, part], **problem.options) for part in (slice(cut), slice(cut, None))]
    merged = reference.merge_states([out for out, _ in parts], [lse for _, lse in parts])
    assert_same(call(executor, q, k, v, **problem.options), merged, q, k, v, **problem.options)


def test_keys_twice_add_log_two_to_lse(executor):
    q, k, v = make((70, 150))
    out, lse = call(executor, q, k, v)
    doubled = [q, np.concatenate([k, k], axis=1), np.concatenate([v, v], axis=1)]
    assert_same(call(executor, *doubled), (out, lse + math.log(2)), *doubled)


def test_agrees_with_the_portable_kernel(executor):
    """Both are within the bound, so they differ by twice the bound at most."""
    arrays = make((150, 200), heads=(4, 2), batch=2)
    options = {"causal": True, "alibi_slopes": np.float32([0.5, 0.25, 0.125, 1])}
    portable = next(row for row in cuattn.ops.attention.forward.config.FLASH_FWD_CONFIGS if row.itemsize == 2)
    assert_same(
        call(executor, *arrays, **options), call(executor, *arrays, config=portable, **options), *arrays, **options
    )


# --- schedules, layouts, results --------------------------------------------------------------------------------------


def test_the_order_of_tiles_changes_no_bit(executor, monkeypatch):
    """One CTA for everything, or one for each tile; heads one after the other, or all of them side by side."""
    arrays = make((150, 200), heads=(4, 2), batch=2)
    expected = [call(executor, *arrays, causal=causal) for causal in (False, True)]
    for num_ctas, l2_bytes in ((1, 1), (3, 2 * 200 * 128 * 2), (1000, 1 << 30)):
        monkeypatch.setattr(hopper_launch, "HOST_CTAS", num_ctas)
        monkeypatch.setattr(hopper_launch, "L2_BYTES", l2_bytes)
        for causal in (False, True):
            assert same_bits(call(executor, *arrays, causal=causal), expected[causal])


@pytest.mark.parametrize("row", [SMALL, TURNS], ids=["one", "turns"])
def test_asynchrony_and_schedule_change_no_bit(executor, row):
    arrays = make((200, 300), heads=(2, 1))
    expected = call(executor, *arrays, config=row, causal=True)
    for asynchrony, seed in (("late", 1), ("random", 2), ("random", 3), ("eager", 4)):
        with executor.active(asynchrony=asynchrony, seed=seed):
            found = call(executor, *arrays, config=row, causal=True)
            assert same_bits(found, expected), (asynchrony, seed)


LAYOUTS = {
    "heads_first": Layout(order=(0, 2, 1, 3)),
    "padded": Layout(pad=(1, 2, 1, 8)),
    "offset": Layout(offset=8),
    "last_axis_strided": Layout(order=(0, 3, 1, 2)),  # copied
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_change_no_bit(executor, name):
    plain = make((70, 150), heads=(2, 1), batch=2)
    arrays = make((70, 150), heads=(2, 1), batch=2, layout=LAYOUTS[name])
    expected = call(executor, *plain)
    assert same_bits(call(executor, *arrays), expected)
    target = executor.guarded(
        expected[0].shape, F16, Layout(order=LAYOUTS[name].order, pad=LAYOUTS[name].pad, offset=1)
    )
    moved, _ = prepare(executor, plain, {})
    kernels.attention(*moved, config=SMALL, out=target.array)
    target.check()
    assert same_bits([executor.numpy(target.array)], expected[:1])


def test_views_of_one_packed_projection(executor):
    packed = place(fill((2, 70, 6, 64), BF16, "normal", np.random.default_rng(0)), Layout(pad=(0, 1, 1, 0))).array
    assert_right(executor, packed[:, :, :2], packed[:, :, 2:4], packed[:, :, 4:], causal=True)
    assert_right(executor, *[packed[:, :, :2]] * 3)


def test_without_lse(executor):
    arrays = make((70, 150))
    moved, _ = prepare(executor, arrays, {})
    assert same_bits([executor.numpy(kernels.attention(*moved, config=SMALL))], call(executor, *arrays)[:1])


def test_the_public_functions_take_it(executor, monkeypatch):
    """Without a config, where kernels are compiled for sm_90a."""
    monkeypatch.setenv("CUATTN_HOST_ARCH", "sm_90a")
    arrays = make((70, 150), heads=(2, 1))
    moved, _ = prepare(executor, arrays, {})
    path = cuattn.forward_path(*moved, causal=True)
    assert isinstance(path.row, HopperFwdConfig)
    out = executor.numpy(cuattn.attention(*moved, causal=True))
    assert same_bits([out], call(executor, *arrays, config=path.row, causal=True)[:1])


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
