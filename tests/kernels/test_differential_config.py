"""The table of shapes of differential attention: selection, legality, and what the compiler makes of every row."""

from __future__ import annotations

import numpy as np
import pytest
from resource_cases import left_out, sampled

from cuattn import compile
from cuattn.errors import LaunchError
from cuattn.head_dims import HEAD_DIM_BUCKETS
from cuattn.ops.attention.forward.config import FEW_QUERIES
from cuattn.ops.attention.shipped import CAUSAL, WINDOW
from cuattn.ops.attention.variants import EVERYTHING, PLAIN
from cuattn.ops.differential.arguments import MAX_HEAD_DIM
from cuattn.ops.differential.config import DIFFERENTIAL_CONFIGS, DifferentialConfig, select
from cuattn.ops.differential.kernels import GROUPS, variant_of

KIB = 1024
LIMITS = (99 * KIB, 163 * KIB, 227 * KIB)  # sm_86, sm_80, sm_90
SIZES = tuple(size for size in HEAD_DIM_BUCKETS if size <= MAX_HEAD_DIM)


def problems():
    for dtype in map(np.dtype, (np.float16, np.float32, np.float64)):
        for limit in LIMITS:
            for seqlen_q in (1, FEW_QUERIES, FEW_QUERIES + 1):
                for options in (PLAIN, EVERYTHING):
                    for shared in (False, True):
                        of_call = {"seqlen_q": seqlen_q, "smem_limit_bytes": limit, "options": options}
                        yield dtype, of_call | {"shared_keys": shared}


def test_every_problem_has_a_legal_row_and_every_row_a_problem():
    found = set()
    for dtype, of_call in problems():
        shared, limit = of_call["shared_keys"], of_call["smem_limit_bytes"]
        for head_dim in SIZES:
            for head_dim_v in SIZES:
                row = select(dtype, head_dim, head_dim_v, **of_call)
                assert row.is_legal(head_dim, head_dim_v, limit, shared_keys=shared)
                assert (row.products == "mma") == (dtype.itemsize == 2) and row.itemsize == dtype.itemsize
                assert row.score_options or of_call["options"] == PLAIN
                found.add(row)
    assert found == set(DIFFERENTIAL_CONFIGS)


def test_illegal_rows():
    good = dict(products="mma", itemsize=2, max_head_dim=64, max_head_dim_v=64, block_m=64, block_n=64, num_warps=8)
    good["num_stages"] = 2
    assert DifferentialConfig(**good).is_legal(64, 64, 99 * KIB, shared_keys=False)
    for change in ({"block_m": 96}, {"num_stages": 1}, {"block_n": 24}, {"num_warps": 7}, {"products": "fma"}):
        assert not DifferentialConfig(**(good | change)).is_legal(64, 64, 227 * KIB, shared_keys=False), change
    of_call = {"shared_keys": False, "seqlen_q": 1, "smem_limit_bytes": 1024}
    with pytest.raises(LaunchError, match="needs more shared memory than the 1024 bytes"):
        select(np.dtype(np.float16), 64, 64, **of_call)


def most_of(row):
    return EVERYTHING if row.score_options else WINDOW


def rows_with_everything():
    for number, row in enumerate(DIFFERENTIAL_CONFIGS):
        yield row, most_of(row), False, True, ("sm_90a", "sm_80")[number % 2]


def other_variants():
    always = set(rows_with_everything())
    for row in DIFFERENTIAL_CONFIGS:
        for arch in ("sm_80", "sm_90a"):
            cases = [
                (row, options, shared, True, arch)
                for options in (PLAIN, CAUSAL, most_of(row))
                for shared in (False, True)
            ]
            cases.append((row, most_of(row), False, False, arch))
            yield from (case for case in cases if case not in always)


@pytest.mark.parametrize(
    ("row", "options", "shared", "aligned", "arch"),
    [*sampled(rows_with_everything(), one_in=4), *left_out(other_variants())],
    ids=str,
)
def test_no_row_spills(row, options, shared, aligned, arch):
    variant = variant_of(row, options, shared_keys=shared, aligned=aligned)
    resources = compile.build(variant.kernel, variant.constants, arch=arch, kind="cubin").resources[row.entry]
    assert (resources.spill_stores, resources.spill_loads, resources.stack_bytes) == (0, 0, 0), resources


def small_kernels():
    names = ("differential_backward_rows", "differential_backward_sums", "differential_combine")
    return [(variant,) for variant in GROUPS[0].variants() if variant.kernel in names]


@pytest.mark.parametrize("variant", left_out(small_kernels()), ids=lambda variant: variant.label)
def test_no_other_kernel_spills(variant):
    for resources in compile.build(variant.kernel, variant.constants, arch="sm_90a", kind="cubin").resources.values():
        assert (resources.spill_stores, resources.spill_loads, resources.stack_bytes) == (0, 0, 0), resources
