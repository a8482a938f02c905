"""The table of forward kernel shapes: selection, legality, and what the compiler makes of every row."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from cuattn import compile
from cuattn.config import BUCKETS, FEW_QUERIES, FLASH_FWD_CONFIGS, HEAD_DIM_BUCKETS, FlashFwdConfig, select
from cuattn.errors import LaunchError

KIB = 1024
LIMITS = (99 * KIB, 163 * KIB, 227 * KIB)  # sm_86, sm_80, sm_90
DTYPES = {2: np.dtype(np.float16), 4: np.dtype(np.float32), 8: np.dtype(np.float64)}


def selected(limits=LIMITS):
    """Every (row, bucket) that selection gives for equal head dims."""
    pairs = {
        (select(dtype, size, size, seqlen_q=seqlen_q, smem_limit_bytes=limit), size)
        for dtype in DTYPES.values()
        for size in HEAD_DIM_BUCKETS
        for seqlen_q in (FEW_QUERIES, FEW_QUERIES + 1)
        for limit in limits
    }
    return sorted(pairs, key=lambda pair: (FLASH_FWD_CONFIGS.index(pair[0]), pair[1]))


def test_buckets():
    assert [BUCKETS[d] for d in (1, 32, 33, 64, 65, 96, 97, 128, 129, 192, 193, 256)] == [
        *(32, 32, 64, 64, 96, 96, 128, 128, 192, 192, 256, 256)
    ]


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("dtype", [*DTYPES.values(), np.dtype(ml_dtypes.bfloat16)], ids=str)
def test_every_problem_has_a_legal_row(dtype, limit):
    for head_dim in HEAD_DIM_BUCKETS:
        for head_dim_v in HEAD_DIM_BUCKETS:
            for seqlen_q in (0, 1, FEW_QUERIES, FEW_QUERIES + 1, 10**6):
                row = select(dtype, head_dim, head_dim_v, seqlen_q=seqlen_q, smem_limit_bytes=limit)
                assert row.itemsize == dtype.itemsize
                assert row.is_legal(head_dim, head_dim_v, limit)
                assert row.max_seqlen_q == 0 or seqlen_q <= row.max_seqlen_q


def test_every_row_is_selected_somewhere():
    assert [row for row in FLASH_FWD_CONFIGS if row not in {row for row, _ in selected()}] == []


def test_illegal_rows():
    good = dict(itemsize=2, max_head_dim=64, block_m=64, block_n=64, num_warps=4, num_stages=2)
    assert FlashFwdConfig(**good).is_legal(64, 64, 99 * KIB)
    for change in ({"block_m": 96}, {"num_stages": 1}, {"block_n": 24}, {"num_warps": 64, "block_m": 1024}):
        assert not FlashFwdConfig(**(good | change)).is_legal(64, 64, 227 * KIB), change
    assert not FlashFwdConfig(**good).is_legal(64, 64, 46079)
    assert not FlashFwdConfig(**(good | {"itemsize": 4})).is_legal(64, 64, 227 * KIB)
    with pytest.raises(LaunchError, match="needs more shared memory than the 1024 bytes"):
        select(DTYPES[2], 64, 64, seqlen_q=1, smem_limit_bytes=1024)


def assert_no_spills(row, head_dim, head_dim_v, arch, **flags):
    constants = row.constants(DTYPES[row.itemsize].name, head_dim, head_dim_v, **flags)
    resources = compile.build(row.source, constants, arch=arch, kind="cubin").resources[row.entry]
    spilled = resources.spill_stores, resources.spill_loads, resources.stack_bytes
    assert spilled == (0, 0, 0), (flags, resources)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ("sm_80", "sm_90a"))
@pytest.mark.parametrize(
    ("row", "head_dim"), [pair for pair in selected() if pair[0].itemsize == 2 or pair[1] in (64, 128, 256)], ids=str
)
def test_no_row_spills(row, head_dim, arch):
    """ptxas accepts every row on both architectures, and keeps everything in registers. Without a mask and with the
    causal one; the element-wise load path on one of the architectures."""
    assert_no_spills(row, head_dim, head_dim, arch, CAUSAL=False, ALIGNED=True)
    assert_no_spills(row, head_dim, head_dim, arch, CAUSAL=True, ALIGNED=True)
    if arch == "sm_90a":
        assert_no_spills(row, head_dim, head_dim, arch, CAUSAL=True, ALIGNED=False)


@pytest.mark.parametrize("arch", ("sm_86", "sm_89", "sm_100a", "sm_120a"))
def test_compiles_for_the_other_architectures(arch):
    limit = compile.smem_limit_bytes(arch)
    row = select(DTYPES[2], 128, 128, seqlen_q=1024, smem_limit_bytes=limit)
    constants = row.constants("bfloat16", 128, 128, CAUSAL=True, ALIGNED=True)
    assert compile.build(row.source, constants, arch=arch, kind="cubin").resources[row.entry].registers <= 255
