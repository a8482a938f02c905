"""The table of forward kernel shapes: selection, legality, and what the compiler makes of every row."""

from __future__ import annotations

import itertools
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from resource_cases import left_out, sampled

from cuattn import compile
from cuattn.errors import LaunchError
from cuattn.head_dims import BUCKETS, COLUMNS, HEAD_DIM_BUCKETS, MAX_COLUMNS, MAX_HEAD_DIM
from cuattn.ops.attention.forward.config import FEW_QUERIES, FLASH_FWD_CONFIGS, FlashFwdConfig, select
from cuattn.ops.attention.variants import EVERYTHING, PLAIN, ForwardOptions, compiled_options

KIB = 1024
LIMITS = (99 * KIB, 163 * KIB, 227 * KIB)  # sm_86, sm_80, sm_90
CAUSAL = ForwardOptions(bound_right=True)
#: The kinds of rows: (dtype, whether its products are in tf32).
KINDS = (
    (np.dtype(np.float16), False),
    (np.dtype(np.float32), True),
    (np.dtype(np.float32), False),
    (np.dtype(np.float64), False),
)
FLOAT16 = KINDS[0][0]


def dtype_of(row):
    return next(dtype for dtype, _ in KINDS if dtype.itemsize == row.itemsize)


def selected(limits=LIMITS):
    """Every (row, bucket) that selection gives for equal head dims."""
    pairs = {
        (
            select(
                dtype, size, COLUMNS[size][0], seqlen_q=seqlen_q, smem_limit_bytes=limit, options=options, tf32=tf32
            ),
            size,
        )
        for options in (PLAIN, EVERYTHING)
        for dtype, tf32 in KINDS
        for size in HEAD_DIM_BUCKETS
        for seqlen_q in (FEW_QUERIES, FEW_QUERIES + 1)
        for limit in limits
    }
    return sorted(pairs, key=lambda pair: (FLASH_FWD_CONFIGS.index(pair[0]), pair[1]))


def test_buckets():
    assert [BUCKETS[d] for d in (1, 32, 33, 64, 65, 96, 97, 128, 129, 192, 193, 256, 257, 512)] == [
        *(32, 32, 64, 64, 96, 96, 128, 128, 192, 192, 256, 256, 512, 512)
    ]
    assert len(BUCKETS) == len(COLUMNS) == MAX_HEAD_DIM + 1


def test_columns_of_a_row_are_shared_out_once():
    for head_dim_v in range(1, MAX_HEAD_DIM + 1):
        columns, blocks = COLUMNS[head_dim_v]
        assert columns in HEAD_DIM_BUCKETS and columns <= MAX_COLUMNS
        assert (blocks - 1) * columns < head_dim_v <= blocks * columns  # none of the CTAs is without work
        assert (columns, blocks) == (BUCKETS[head_dim_v], 1) or head_dim_v > MAX_COLUMNS


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize(
    ("dtype", "tf32"),
    [*KINDS, (np.dtype(ml_dtypes.bfloat16), False), (np.dtype(ml_dtypes.float8_e5m2), False)],
    ids=str,
)
def test_every_problem_has_a_legal_row(dtype, tf32, limit):
    for head_dim in HEAD_DIM_BUCKETS:
        for head_dim_v in (size for size in HEAD_DIM_BUCKETS if size <= MAX_COLUMNS):
            for seqlen_q in (0, 1, FEW_QUERIES, FEW_QUERIES + 1, 10**6):
                for options in (PLAIN, EVERYTHING):
                    row = select(
                        dtype,
                        head_dim,
                        head_dim_v,
                        seqlen_q=seqlen_q,
                        smem_limit_bytes=limit,
                        options=options,
                        tf32=tf32,
                    )
                    assert row.score_options or options == PLAIN
                    assert row.itemsize == max(dtype.itemsize, 2)
                    assert (row.products == "mma") == (tf32 or dtype.itemsize <= 2)
                    assert row.is_legal(head_dim, head_dim_v, limit)
                    assert row.max_seqlen_q == 0 or seqlen_q <= row.max_seqlen_q


def test_every_row_is_selected_somewhere():
    assert [row for row in FLASH_FWD_CONFIGS if row not in {row for row, _ in selected()}] == []


def test_illegal_rows():
    good = dict(products="mma", itemsize=2, max_head_dim=64, block_m=64, block_n=64, num_warps=4, num_stages=2)
    assert FlashFwdConfig(**good).is_legal(64, 64, 99 * KIB)
    for change in ({"block_m": 96}, {"num_stages": 0}, {"block_n": 24}, {"num_warps": 64, "block_m": 1024}):
        assert not FlashFwdConfig(**(good | change)).is_legal(64, 64, 227 * KIB), change
    assert not FlashFwdConfig(**good).is_legal(64, 64, 46079)
    assert not FlashFwdConfig(**(good | {"max_head_dim": 512})).is_legal(64, 512, 227 * KIB)
    assert not FlashFwdConfig(**(good | {"products": "fma"})).is_legal(64, 64, 227 * KIB)
    with pytest.raises(LaunchError, match="needs more shared memory than the 1024 bytes"):
        select(FLOAT16, 64, 64, seqlen_q=1, smem_limit_bytes=1024)


def assert_no_spills(row, head_dim, arch, options, aligned=True, dtype_name=None):
    columns, blocks = COLUMNS[head_dim]
    dtype_name = dtype_name or dtype_of(row).name
    constants = row.constants(dtype_name, head_dim, columns, options, aligned=aligned, column_blocks=blocks)
    resources = compile.build(row.source, constants, arch=arch, kind="cubin").resources[row.entry]
    spilled = resources.spill_stores, resources.spill_loads, resources.stack_bytes
    assert spilled == (0, 0, 0), (options, aligned, resources)


def most_of(row):
    """Every option that the row is meant for."""
    return EVERYTHING if row.score_options else ForwardOptions(bound_left=True, bound_right=True)


def rows_at_their_largest():
    """(row, head dim, arch, options, aligned) that the suite always looks at."""
    for row, head_dim in {row: head_dim for row, head_dim in selected()}.items():
        for options in (PLAIN, CAUSAL, most_of(row)):
            yield row, head_dim, "sm_90a", options, True


def rows_on_sm_80():
    return [(row, head_dim, "sm_80", most_of(row), True) for row, head_dim in pairs()]


def other_rows():
    """With everything by element-wise loads, and at the smaller head dims of 16-bit rows."""
    always = set(rows_at_their_largest())
    yield from ((row, head_dim, "sm_90a", most_of(row), False) for row, head_dim in pairs())
    for row, head_dim in pairs():
        cases = [(row, head_dim, "sm_90a", options, True) for options in (most_of(row), PLAIN, CAUSAL)]
        yield from (case for case in cases if case not in always)


def pairs():
    return [pair for pair in selected() if pair[0].itemsize == 2 or pair[1] in (64, 128, 256, 512)]


@pytest.mark.parametrize(
    ("row", "head_dim", "arch", "options", "aligned"),
    [*rows_at_their_largest(), *sampled(rows_on_sm_80(), one_in=6), *left_out(other_rows())],
    ids=str,
)
def test_no_row_spills(row, head_dim, arch, options, aligned):
    """ptxas accepts every row, and keeps everything in registers."""
    assert_no_spills(row, head_dim, arch, options, aligned)


@pytest.mark.parametrize(
    "options",
    left_out((options,) for options in compiled_options(("float32",))),
    ids=lambda options: options.label,
)
def test_no_option_spills(options):
    """Each kernel of the table of options, with bounds, for one type of a bias."""
    row = select(FLOAT16, 128, 128, seqlen_q=1000, smem_limit_bytes=163 * KIB, options=options)
    assert_no_spills(row, 128, "sm_90a", options)


@pytest.mark.parametrize(
    ("dtype_name", "aligned"),
    sampled(itertools.product(("bfloat16", "float8_e4m3fn", "float8_e5m2"), (True, False)), one_in=3),
)
def test_other_types_do_not_spill(dtype_name, aligned):
    row = select(FLOAT16, 128, 128, seqlen_q=1000, smem_limit_bytes=163 * KIB)
    assert_no_spills(row, 128, "sm_80", CAUSAL, aligned, dtype_name)


def test_options_of_kernels():
    """Every call finds its kernel among those that compiled_options lists, and that kernel has what the call needs."""
    compiled = set(compiled_options())
    names = ("bound_left", "bound_right", "softcap", "alibi", "bias", "mask", "dropout")
    for flags in itertools.product((False, True), repeat=len(names)):
        given = dict(zip(names, flags, strict=True))
        wanted = ForwardOptions(**given, bias_dtype="float16" if given["bias"] else "float32")
        kernel = wanted.compiled()
        assert kernel in compiled, wanted
        assert all(getattr(kernel, name) >= getattr(wanted, name) for name in names)
        assert kernel.bias_dtype == wanted.bias_dtype
        assert kernel.compiled() == kernel
    assert PLAIN.compiled() == PLAIN
    assert len({options.label for options in compiled}) == len(compiled) == 31
    assert replace(EVERYTHING, bias_dtype="float64").label == "everything_float64"


@pytest.mark.parametrize("arch", ("sm_86", "sm_89", "sm_100a", "sm_120a"))
def test_compiles_for_the_other_architectures(arch):
    limit = compile.smem_limit_bytes(arch)
    row = select(FLOAT16, 128, 128, seqlen_q=1024, smem_limit_bytes=limit)
    constants = row.constants("bfloat16", 128, 128, CAUSAL)
    assert compile.build(row.source, constants, arch=arch, kind="cubin").resources[row.entry].registers <= 255


@pytest.mark.parametrize(
    ("row", "arch"), left_out(itertools.product(FLASH_FWD_CONFIGS, ("sm_100a", "sm_120a"))), ids=str
)
def test_every_row_compiles_for_blackwell(row, arch):
    """There, the portable kernels serve every call."""
    limit = compile.smem_limit_bytes(arch)
    sizes = (size for size in HEAD_DIM_BUCKETS if size <= row.max_head_dim)
    head_dim = max(size for size in sizes if row.is_legal(size, COLUMNS[size][0], limit))
    assert_no_spills(row, head_dim, arch, PLAIN)
