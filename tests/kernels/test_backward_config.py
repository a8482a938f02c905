"""The table of backward kernel shapes: selection, legality, and what the compiler makes of every row."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from resource_cases import left_out, sampled

from cuattn import compile
from cuattn.errors import LaunchError
from cuattn.head_dims import HEAD_DIM_BUCKETS, MAX_GRADIENT_HEAD_DIM
from cuattn.ops.attention.backward.config import FLASH_BWD_CONFIGS, SIDES, FlashBwdConfig, Launch, select
from cuattn.ops.attention.variants import EVERYTHING, PLAIN, ForwardOptions

KIB = 1024
SIZES = tuple(size for size in HEAD_DIM_BUCKETS if size <= MAX_GRADIENT_HEAD_DIM)
LIMITS = (99 * KIB, 163 * KIB, 227 * KIB)  # sm_86, sm_80, sm_90
CAUSAL = ForwardOptions(bound_right=True)
WINDOW = ForwardOptions(bound_left=True, bound_right=True)
#: The kinds of rows: (dtype, whether its products are in tf32).
KINDS = (
    (np.dtype(np.float16), False),
    (np.dtype(np.float32), True),
    (np.dtype(np.float32), False),
    (np.dtype(np.float64), False),
)
FLOAT16 = KINDS[0][0]


def kind_of(row: FlashBwdConfig) -> np.dtype:
    return next(dtype for dtype, _ in KINDS if dtype.itemsize == row.itemsize)


def largest_head_dim(row: FlashBwdConfig) -> int:
    return max(d for d in SIZES if d <= row.max_head_dim and row.is_legal(d, d, LIMITS[-1]))


def launches_of(row: FlashBwdConfig) -> list[Launch]:
    """Every launch of a row, in a fixed order and without."""
    free = row.launches(add_dq=True) if row.is_legal(32, 32, LIMITS[-1], add_dq=True) else ()
    return list(dict.fromkeys((*row.launches(), *free)))


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("own", SIDES)
@pytest.mark.parametrize(("dtype", "tf32"), [*KINDS, (np.dtype(ml_dtypes.bfloat16), False)], ids=str)
def test_every_problem_has_a_legal_row(dtype, tf32, own, limit):
    for head_dim in SIZES:
        for head_dim_v in SIZES:
            for options in (PLAIN, EVERYTHING):
                for add_dq in (False, True) if own == "keys" and dtype.itemsize == 2 else (False,):
                    row = select(
                        dtype,
                        head_dim,
                        head_dim_v,
                        own=own,
                        smem_limit_bytes=limit,
                        options=options,
                        tf32=tf32,
                        add_dq=add_dq,
                    )
                    assert row.score_options or options == PLAIN
                    assert (row.own, row.itemsize) == (own, dtype.itemsize)
                    assert (row.products == "mma") == (tf32 or dtype.itemsize == 2)
                    assert row.is_legal(head_dim, head_dim_v, limit, add_dq=add_dq)


def test_every_row_is_selected_somewhere():
    selected = {
        select(dtype, size, size, own=own, smem_limit_bytes=limit, options=options, tf32=tf32)
        for dtype, tf32 in KINDS
        for size in SIZES
        for own in SIDES
        for limit in LIMITS
        for options in (PLAIN, EVERYTHING)
    }
    assert [row for row in FLASH_BWD_CONFIGS if row not in selected] == []


def test_illegal_rows():
    good = dict(
        products="mma", own="keys", itemsize=2, max_head_dim=64, block_own=64, block_other=64, num_warps=4, num_stages=2
    )
    assert FlashBwdConfig(**good).is_legal(64, 64, 99 * KIB)
    for change in (
        *({"block_own": 96}, {"num_stages": 1}, {"block_other": 24}, {"num_warps": 64, "block_own": 1024}),
        {"block_own": 16, "num_warps": 1},  # a thread for each query of a tile
    ):
        assert not FlashBwdConfig(**(good | change)).is_legal(64, 64, 227 * KIB), change
    assert not FlashBwdConfig(**good).is_legal(64, 64, FlashBwdConfig(**good).smem_bytes(64, 64) - 1)
    assert not FlashBwdConfig(**(good | {"products": "fma"})).is_legal(64, 64, 227 * KIB)
    assert FlashBwdConfig(**good).is_legal(64, 64, 99 * KIB, add_dq=True)
    for change in ({"own": "queries"}, {"itemsize": 4}):
        assert not FlashBwdConfig(**(good | change)).is_legal(64, 64, 227 * KIB, add_dq=True), change
    with pytest.raises(LaunchError, match="needs more shared memory than the 1024 bytes"):
        select(FLOAT16, 64, 64, own="keys", smem_limit_bytes=1024)


@pytest.mark.parametrize("row", FLASH_BWD_CONFIGS, ids=str)
def test_the_launches_of_a_row_give_every_gradient_once(row):
    for add_dq in (False, True):
        launches = row.launches(add_dq=add_dq)
        assert sum(launch.grad_qk for launch in launches) == 1
        assert sum(launch.grad_v for launch in launches) == (row.own == "keys")
        assert sum(launch.add_dq for launch in launches) == (add_dq and row.own == "keys")
        assert all(launch.grad_qk for launch in launches if launch.add_dq)  # where dS is


def assert_no_spills(row, launch, arch, options, aligned=True):
    head_dim = largest_head_dim(row)
    constants = row.constants(kind_of(row).name, head_dim, head_dim, options, launch=launch, aligned=aligned)
    resources = compile.build(row.source, constants, arch=arch, kind="cubin").resources[row.entry]
    spilled = resources.spill_stores, resources.spill_loads, resources.stack_bytes
    assert spilled == (0, 0, 0), (launch, options, aligned, resources)


def most_of(row):
    """Every option that the row is meant for."""
    return EVERYTHING if row.score_options else WINDOW


def rows_at_their_largest():
    """(row, launch, arch, options, aligned) that the suite always looks at: of each row the launch with most to do."""
    for row in FLASH_BWD_CONFIGS:
        for options in (PLAIN, most_of(row)):
            yield row, largest_launch(row), "sm_90a", options, True


def largest_launch(row: FlashBwdConfig) -> Launch:
    return max(launches_of(row), key=lambda launch: launch.grad_qk + launch.grad_v + launch.add_dq)


def rows_on_sm_80():
    return [(row, launch, "sm_80", most_of(row), True) for row in FLASH_BWD_CONFIGS for launch in launches_of(row)]


def other_rows():
    """By element-wise loads, causal, and the other launches."""
    for row in FLASH_BWD_CONFIGS:
        yield row, launches_of(row)[0], "sm_90a", most_of(row), False
        for launch in launches_of(row):
            yield row, launch, "sm_90a", CAUSAL, True
            if launch != largest_launch(row):
                yield from ((row, launch, "sm_90a", options, True) for options in (PLAIN, most_of(row)))


@pytest.mark.parametrize(
    ("row", "launch", "arch", "options", "aligned"),
    [*rows_at_their_largest(), *sampled(rows_on_sm_80(), one_in=6), *left_out(other_rows())],
    ids=str,
)
def test_no_row_spills(row, launch, arch, options, aligned):
    """ptxas keeps everything in registers at the largest head dim."""
    assert_no_spills(row, launch, arch, options, aligned)
