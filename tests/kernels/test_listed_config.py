"""The tables of shapes that walk over lists of tiles: selection by block size, and registers."""

from __future__ import annotations

import numpy as np
import pytest
from resource_cases import sampled

from cuattn import compile
from cuattn.head_dims import COLUMNS, HEAD_DIM_BUCKETS, MAX_GRADIENT_HEAD_DIM
from cuattn.ops.attention.backward import kernels as backward_kernels
from cuattn.ops.attention.backward import listed_config as backward_rows
from cuattn.ops.attention.backward.config import SIDES
from cuattn.ops.attention.forward import kernels as forward_kernels
from cuattn.ops.attention.forward import listed_config as forward_rows
from cuattn.ops.attention.listed import listed_options
from cuattn.ops.attention.variants import EVERYTHING, PLAIN, ForwardOptions, compiled_options
from cuattn.ops.registry import ARCHS

KIB = 1024
LIMITS = (99 * KIB, 163 * KIB, 227 * KIB)  # sm_86, sm_80, sm_90
KINDS = [("float16", False), ("float32", True), ("float32", False), ("float64", False)]
BLOCKS = (1, 8, 16, 24, 32, 64, 96, 128, 300, 512)
LISTED = [
    variant
    for family in (forward_kernels, backward_kernels)
    for variant in family.GROUPS[0].variants()
    if variant.row.endswith("_listed")
]


def test_options_are_few():
    compiled = {listed_options(options) for options in compiled_options(bias_dtypes=("float32",))}
    assert compiled == {PLAIN, ForwardOptions(bound_left=True, bound_right=True), EVERYTHING}


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize(("dtype", "tf32"), KINDS)
def test_every_problem_has_a_legal_row(dtype, tf32, limit):
    found = set()
    for head_dim in HEAD_DIM_BUCKETS:
        for block in BLOCKS:
            for options in (PLAIN, EVERYTHING):
                of_call = {"block": block, "smem_limit_bytes": limit, "options": options, "tf32": tf32}
                columns = COLUMNS[head_dim][0]
                row = forward_rows.select(np.dtype(dtype), head_dim, columns, **of_call)
                assert row.is_legal(head_dim, columns, limit) and row.block_n % 8 == 0
                found.add(row)
                for own in SIDES if head_dim <= MAX_GRADIENT_HEAD_DIM else ():
                    gradients = backward_rows.select(np.dtype(dtype), head_dim, head_dim, own=own, **of_call)
                    assert gradients.is_legal(head_dim, head_dim, limit)
                    found.add(gradients)
    assert found


def test_every_row_is_selected_somewhere():
    found = set()
    for dtype, tf32 in KINDS:
        for head_dim in HEAD_DIM_BUCKETS:
            for block in BLOCKS:
                for options in (PLAIN, EVERYTHING):
                    for limit in LIMITS:
                        of_call = {"block": block, "smem_limit_bytes": limit, "options": options, "tf32": tf32}
                        found.add(forward_rows.select(np.dtype(dtype), head_dim, COLUMNS[head_dim][0], **of_call))
                        for own in SIDES if head_dim <= MAX_GRADIENT_HEAD_DIM else ():
                            found.add(backward_rows.select(np.dtype(dtype), head_dim, head_dim, own=own, **of_call))
    rows = (*forward_rows.LISTED_FWD_CONFIGS, *backward_rows.LISTED_BWD_CONFIGS)
    assert [row for row in rows if row not in found] == []


@pytest.mark.parametrize(("same", "rows"), [(1.0, 128), (0.9, 64), (0.0, 16)])
def test_ctas_are_large_where_neighbours_see_the_same(same, rows):
    """``same``: the share of its keys that a block of 16 queries has in common with the one before."""

    def num_tiles(queries, columns):
        return 1000 // queries * (1 + (1 - same) * (queries / 16 - 1)) * 4096 // columns

    of_call = {"smem_limit_bytes": LIMITS[1], "options": PLAIN, "tf32": False, "num_tiles": num_tiles}
    row = forward_rows.select(np.dtype(np.float16), 64, 64, block=16, **of_call)
    assert row.block_m == rows


def test_ctas_lie_in_blocks():
    """Wherever there is a choice; and where there is none, the fewest rows."""
    for block, rows in ((16, 16), (24, 16), (32, 32), (64, 64), (128, 128), (96, 32), (300, 64)):
        of_call = {"smem_limit_bytes": LIMITS[1], "options": PLAIN, "tf32": False}
        assert forward_rows.select(np.dtype(np.float16), 64, 64, block=block, **of_call).block_m == rows


@pytest.mark.parametrize(
    ("variant", "arch"),
    sampled([(variant, arch) for variant in LISTED for arch in ARCHS], one_in=45),
    ids=lambda x: x if isinstance(x, str) else x.name,
)
def test_registers_hold_everything(variant, arch):
    (resources,) = compile.build(variant.kernel, variant.constants, arch=arch, kind="cubin").resources.values()
    assert (resources.spill_stores, resources.spill_loads) == (0, 0)
