"""What the compiler makes of the kernels of dual-chunk attention."""

from __future__ import annotations

import numpy as np
import pytest
from resource_cases import sampled

from cuattn import compile
from cuattn.head_dims import COLUMNS, HEAD_DIM_BUCKETS
from cuattn.ops.dual_chunk.config import entry_of, select, smem_bytes, source_of, takes_tables
from cuattn.ops.dual_chunk.kernels import ROWS, variant_of
from cuattn.ops.registry import ARCHS, TYPICAL_DTYPE

KIB = 1024
LIMITS = {99 * KIB: "sm_86", 163 * KIB: "sm_80", 227 * KIB: "sm_90a"}


def cases():
    """Every row on both architectures: as a usual call takes it, with everything, and with tables."""
    for row in ROWS:
        dtype = TYPICAL_DTYPE[row.itemsize]
        for arch in ARCHS:
            yield variant_of(row, dtype), arch
            yield variant_of(row, dtype, softcap=row.score_options, aligned=False), arch
            if takes_tables(row):
                yield variant_of(row, dtype, table_dtype="float32"), arch


def assert_no_spills(variant, arch):
    (resources,) = compile.build(variant.kernel, variant.constants, arch=arch, kind="cubin").resources.values()
    assert (resources.spill_stores, resources.spill_loads, resources.stack_bytes) == (0, 0, 0), resources


@pytest.mark.parametrize(("variant", "arch"), sampled(cases(), one_in=24), ids=lambda case: getattr(case, "row", case))
def test_no_row_spills(variant, arch):
    assert_no_spills(variant, arch)


@pytest.mark.parametrize("limit", LIMITS, ids=LIMITS.get)
@pytest.mark.parametrize("dtype", (np.float16, np.float32, np.float64))
def test_every_problem_has_a_row(limit, dtype):
    for head_dim in HEAD_DIM_BUCKETS:
        for columns, _ in {COLUMNS[size] for size in HEAD_DIM_BUCKETS}:
            for few in (False, True):
                for softcap in (False, True):
                    for tables in (False, True):
                        named = {"few": few, "softcap": softcap, "tables": tables}
                        row = select(np.dtype(dtype), head_dim, columns, smem_limit_bytes=limit, **named)
                        assert smem_bytes(row, head_dim, columns, tables) <= limit
                        assert entry_of(row) == f"cuattn_{source_of(row)}"
