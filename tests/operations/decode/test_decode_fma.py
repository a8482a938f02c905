"""The CUDA-core form of decode: float32, float64, and other formats in float, against the float64 reference."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from cached_calls import OF_ANY_SHAPE, assert_equal, assert_right, assert_same, call, check, prepare

import cuattn
from cuattn.formats import KV_FORMATS
from cuattn.ops.decode import arguments
from cuattn.ops.decode.config import FLASH_DECODE_CONFIGS, compiled_dims, select
from cuattn.ops.decode.launch import decode
from cuattn.ops.rotary.rope import Rotary
from cuattn.testing.arrays import Layout
from cuattn.testing.decode_problems import cached_problem
from cuattn.testing.options import make_sinks, make_slopes

F16, BF16, F32, F64 = map(np.dtype, (np.float16, ml_dtypes.bfloat16, np.float32, np.float64))
FMA_ROWS = [row for row in FLASH_DECODE_CONFIGS if row.products == "fma"]


def make(lengths=(75, 33), seqlens_q=1, heads=(4, 2), head_dims=(64, 64), dtype=F32, seed=0, **more):
    rng = np.random.default_rng(seed)
    return cached_problem(
        rng, lengths=lengths, seqlens_q=seqlens_q, heads=heads, head_dims=head_dims, dtype=dtype, **more
    )


def fma_row(num_rows, head_dims, itemsize=4):
    """The row that a problem of so many query rows takes in this form."""
    wide = max(compiled_dims(*head_dims)[:2])
    fits = (row for row in FMA_ROWS if row.itemsize == itemsize and wide <= row.max_head_dim)
    return next(row for row in fits if row.max_rows == 0 or num_rows <= row.max_rows)


HEAD_DIMS = (1, 31, 32, 33, 96, 127, 128, 192, 255)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(executor, head_dim):
    """Every bucket, at its edges, and head dims that are no whole number of 16-byte pieces."""
    assert_right(executor, make(lengths=(37, 0, 130), seqlens_q=2, head_dims=(head_dim, head_dim)))


@pytest.mark.parametrize("head_dim", (1, 40, 128, 255))
def test_head_dims_of_float64(executor, head_dim):
    assert_right(executor, make(lengths=(37, 70), seqlens_q=2, head_dims=(head_dim, head_dim), dtype=F64))


@pytest.mark.parametrize("head_dims", ((192, 128), (256, 1), (1, 256), (40, 96)), ids=str)
def test_value_head_dim_differs(executor, head_dims):
    assert_right(executor, make(lengths=(37, 70), head_dims=head_dims))


# (query tokens, (heads, key/value heads)): one row, groups that fill a block of rows or do not, several blocks of heads
# or of tokens, and the rows of a prompt.
ROWS = (
    (1, (3, 3)),
    (1, (3, 1)),
    (2, (4, 2)),
    (1, (5, 1)),
    (5, (2, 1)),
    (1, (17, 1)),
    (7, (6, 2)),
    (40, (1, 1)),
    (1, (71, 1)),
)


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("dtype", (F32, F64), ids=str)
def test_rows(executor, dtype, rows):
    problem = make(lengths=(50, 3), seqlens_q=rows[0], heads=rows[1], dtype=dtype, window=(20, 0))
    assert_right(executor, problem)


LENGTHS = (0, 1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 511, 513)


@pytest.mark.parametrize(
    "row", [row for row in FMA_ROWS if row.max_head_dim == 64], ids=lambda r: f"{r.itemsize}_{r.block_m}"
)
def test_lengths(executor, row):
    """One more and one less than the steps of a warp and of a CTA; sequences shorter than their queries."""
    dtype = F32 if row.itemsize == 4 else F64
    assert_right(executor, make(lengths=LENGTHS, seqlens_q=3, heads=(2, 1), dtype=dtype), config=row)


OPTIONS = {
    "plain": {"causal": False},
    "scale": {"causal": False, "scale": -0.3},
    "zero_scale": {"scale": 0.0},
    "window": {"window": (9, None)},
    "both_sides": {"causal": False, "window": (30, 2)},
    "top_left": {"causal": "top_left"},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi_slopes": make_slopes(np.random.default_rng(1), (2, 4))},
    "sinks": {"sinks": make_sinks(np.random.default_rng(2), 4)},
    "everything": {
        "window": (25, 3),
        "softcap": 5.0,
        "alibi_slopes": make_slopes(np.random.default_rng(3), (4,)),
        "sinks": make_sinks(np.random.default_rng(4), 4),
        "scale": 0.4,
    },
}


OPTION_CASES = [*((F32, name) for name in OPTIONS), (F64, "both_sides"), (F64, "everything")]


@pytest.mark.parametrize("case", OPTION_CASES, ids=lambda case: "-".join(map(str, case)))
def test_options(executor, case):
    dtype, name = case
    for num_splits in (1, 3):
        assert_right(executor, make(seqlens_q=3, dtype=dtype, num_splits=num_splits, **OPTIONS[name]))


@pytest.mark.parametrize(("dtype", "num_rows"), [(F16, 1), (BF16, 4), (F16, 8)], ids=str)
def test_sixteen_bits(executor, dtype, num_rows):
    """Rows of float32 serve 16-bit arrays too."""
    problem = make(lengths=(75, 300), heads=(num_rows, 1), dtype=dtype, **OPTIONS["window"])
    assert_right(executor, problem, config=fma_row(num_rows, (64, 64)))


def test_options_in_sixteen_bits(executor):
    """With the fast exp2 and tanh."""
    assert_right(executor, make(seqlens_q=2, dtype=BF16, **OPTIONS["everything"]), config=fma_row(4, (64, 64)))


@pytest.mark.parametrize("dtype", (F32, F64), ids=str)
def test_splits(executor, dtype):
    """More splits than tiles leave some of them empty; none changes the result beyond the rounding of the merge."""
    problem = make(lengths=(257, 1, 0, 40), dtype=dtype)
    whole = assert_right(executor, problem, num_splits=1)
    for num_splits in (2, 7, 64):
        assert_same(problem, call(executor, problem, num_splits=num_splits), whole)
        assert_right(executor, problem, num_splits=num_splits)


@pytest.mark.parametrize("page_size", (1, 3, 16, 100))
def test_pages(executor, page_size):
    """Keys are the same wherever their pages are."""
    problem = make(lengths=(130, 17, 0), seqlens_q=2)
    paged = problem.in_pages(np.random.default_rng(page_size), page_size)
    assert_equal(assert_right(executor, paged, num_splits=2), call(executor, problem, num_splits=2))


def test_packed(executor):
    """Prefill, decode and a sequence without queries in one batch."""
    problem = make(lengths=(40, 90, 12, 5), seqlens_q=[40, 1, 0, 3], page_size=16)
    for num_splits in (1, 3):
        assert_right(executor, problem, num_splits=num_splits)


@pytest.mark.parametrize("layout", (Layout(pad=(0, 0, 0, 8)), Layout(order=(0, 2, 1, 3)), Layout(offset=1)), ids=str)
def test_layouts(executor, layout):
    """Gaps between rows that end within 16 bytes, head-major caches, bases that are no multiple of 16 bytes."""
    problem = make(head_dims=(38, 38), layouts=(None, layout, layout))
    assert_right(executor, problem)


FORMAT_CASES = (
    *(("e4m3fn", F32, "tensor", 72), ("e4m3fn", F32, "head", 64), ("e4m3fn", F32, "slot", 72)),
    *(("e5m2", F32, "slot", 64), ("int8", F32, "slot", 72), ("mxfp4", F16, "tensor", 72)),
    *((name, F32, "tensor", head_dim) for name in ("nvfp4", "mxfp4") for head_dim in (64, 72)),
)


@pytest.mark.parametrize("case", FORMAT_CASES, ids=lambda case: "-".join(map(str, case)))
def test_formats(executor, case):
    """Cached numbers in 8 and 4 bits; 72 numbers of 4 bits are no whole number of 16-byte pieces, nor of blocks."""
    kv_format, dtype, scales, head_dim = case
    problem = make(seqlens_q=2, dtype=dtype, kv_format=kv_format, scales=scales, head_dims=(head_dim, head_dim))
    assert_right(executor, problem.in_pages(np.random.default_rng(0), 16), num_splits=2)


def test_scales_of_keys_alone(executor):
    """A scale for each slot of the keys and none for the values, and the other way round."""
    problem = make(kv_format="int8", scales="slot")
    for name in ("k_scale", "v_scale"):
        assert_right(executor, problem.with_options(**{name: None}))


def test_scales_that_float16_does_not_reach(executor):
    """Block scales of mxfp4 are powers of 2 from 2^-127 to 2^127."""
    problem = make(dtype=F16, kv_format="mxfp4")
    shape = problem.options["k_block_scales"].shape
    k_scales = np.full(shape, 2.0**-40).astype(ml_dtypes.float8_e8m0fnu)
    problem = problem.with_options(k_block_scales=k_scales, scale=2.0**37)
    assert_right(executor, problem)


ROTARY = {
    "half": (64, Rotary()),
    "half_of_a_head": (96, Rotary(rotary_dim=32)),
    "pairs_that_end_within_16_bytes": (64, Rotary(rotary_dim=20)),
    "interleaved": (64, Rotary(interleaved=True, rotary_dim=48)),
    "odd": (33, Rotary(interleaved=True, rotary_dim=30)),
    "tables": (64, Rotary(**dict(zip(("cos", "sin"), cuattn.rope_frequencies(64, 200), strict=True)))),
}


@pytest.mark.parametrize("rotate_keys", (False, True))
@pytest.mark.parametrize("name", ROTARY)
def test_rotary(executor, name, rotate_keys):
    """Queries are turned by their position in the sequence, and keys by theirs on request."""
    head_dim, rope = ROTARY[name]
    problem = make(lengths=(75, 2), seqlens_q=3, head_dims=(head_dim, 32), rope=rope, rotate_keys=rotate_keys)
    assert_right(executor, problem)


@pytest.mark.parametrize("dtype", (BF16, F64), ids=str)
def test_rotary_of_other_types(executor, dtype):
    problem = make(seqlens_q=2, dtype=dtype, rope=Rotary(), rotate_keys=True)
    assert_right(executor, problem, config=fma_row(4, (64, 64), 8 if dtype == F64 else 4))


def test_turned_codes(executor):
    """Keys of 4 bits are turned after their scales."""
    problem = make(head_dims=(128, 64), kv_format="nvfp4", rope=Rotary(), rotate_keys=True)
    assert_right(executor, problem)


def test_pages_that_do_not_exist(executor):
    """A table on a device may be nonsense that nobody has looked at: such keys and values are zeros."""
    problem = make(lengths=(40,), page_size=8)
    (q, k, v, tables, lengths), options = prepare(executor, problem)
    checked = arguments.check_paged(q, k, v, tables, lengths, **options)
    wrong = np.array(problem.block_tables)
    wrong[0, 1], wrong[0, 3] = -5, k.shape[0]
    checked.block_tables = checked.executor.put(wrong, np.int32)
    out, lse = (executor.numpy(x) for x in decode(checked, return_lse=True))
    check(replace(problem, block_tables=wrong), out, lse)


def test_values_beyond_a_length_are_not_felt_by_any_row(executor):
    """Every row of the table, with poison in every slot that no key has: a step reaches beyond the end of the keys."""
    for row in FMA_ROWS:
        if row.itemsize == 4 and row.max_head_dim == 64:
            problem = make(lengths=(1, row.block_n + 1), heads=(2, 1), head_dims=(32, 32))
            assert_right(executor, problem, config=row)


def test_weights_sum_to_one(executor):
    """Values of ones give ones: no key is lost between lanes, groups, warps and splits."""
    problem = make(lengths=(333, 64), heads=(8, 1))
    _, _, v, lengths = problem.arrays
    for num_splits in (1, 5):
        out = OF_ANY_SHAPE["decode"](
            executor.array(problem.q), executor.array(problem.k), executor.array(np.ones(v.shape, F32)), lengths,
            num_splits=num_splits,
        )  # fmt: skip
        assert np.abs(executor.numpy(out) - 1).max() < 1e-6


@pytest.mark.parametrize("head_dims", ((32, 32), (64, 256), (96, 96), (192, 32), (256, 256)), ids=str)
def test_every_problem_has_a_row(head_dims):
    """With the least shared memory of any device, in each format that goes to CUDA cores."""
    for dtype, name in ((F32, "float32"), (F64, "float64"), (F16, "mxfp4"), (F32, "int8")):
        for num_rows in (1, 2, 9, 1000):
            row = select(dtype, KV_FORMATS[name], *head_dims, rows_per_kv_head=num_rows, smem_limit_bytes=99 * 1024)
            assert row.products == "fma"
            assert not replace(row, block_n=0).is_legal(*head_dims, KV_FORMATS[name], 99 * 1024)
