"""Shapes of the Hopper kernel over lists of tiles: legal, selected somewhere, and without spills."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from resource_cases import sampled

from cuattn import compile
from cuattn.ops.attention import arguments
from cuattn.ops.attention.forward import hopper_listed
from cuattn.ops.attention.forward import kernels as forward_kernels
from cuattn.ops.attention.forward.hopper_config import HEAD_DIM_BUCKETS
from cuattn.ops.attention.listed import KeptBlocks

LIMIT = 227 * 1024
OPTIONS = ({}, {"causal": True}, {"softcap": 2.0})
LISTED = [one for group in forward_kernels.GROUPS for one in group.variants() if one.row.endswith("_listed")]
HOPPER = [(one,) for one in LISTED if one.kernel == "attention_forward_hopper"]


def tiles_of(kept):
    """Tiles of so many keys for every CTA."""
    return lambda queries, keys: 1024 // queries * -(-kept // keys)


def test_every_row_is_legal_and_selected_somewhere():
    found = set()
    for head_dim, options, heads, kept in itertools.product(
        HEAD_DIM_BUCKETS, OPTIONS, (1, 2), (64, 128, 160, 192, 384)
    ):
        q, k = (np.broadcast_to(np.float16(0), (1, 1024, number, head_dim)) for number in (heads, 1))
        q, k = np.ascontiguousarray(q), np.ascontiguousarray(k)
        problem = arguments.check(
            q,
            k,
            k,
            scale=None,
            causal=options.get("causal", False),
            out=None,
            **{name: value for name, value in options.items() if name != "causal"},
        )
        blocks = KeptBlocks(64, 64, False, tiles_of(kept))
        assert hopper_listed.why_not(problem, None, blocks, "sm_90a") is None
        chosen = hopper_listed.placement(problem, None, blocks)
        assert chosen.row.is_legal(head_dim, head_dim, LIMIT, chosen.options)
        assert chosen.row.block_n % chosen.piece == 0 and chosen.queries == 64
        assert chosen.options in hopper_listed.compiled_options()
        found.add(chosen.row)
    assert found == set(hopper_listed.HOPPER_LISTED_CONFIGS)


def test_two_ctas_share_a_multiprocessor():
    for row in hopper_listed.HOPPER_LISTED_CONFIGS:
        divided = (row.producer_registers + row.num_consumers * row.consumer_registers) * 128
        assert divided * row.ctas_per_sm <= 65536
        assert (
            row.smem_bytes(row.max_head_dim, row.max_head_dim_v) * row.ctas_per_sm
            <= 228 * 1024 - 1024 * row.ctas_per_sm
        )


@pytest.mark.parametrize("one", sampled(HOPPER, one_in=9), ids=lambda one: one.row)
def test_registers_hold_everything(one):
    (resources,) = compile.build(one.kernel, one.constants, arch="sm_90a", kind="cubin").resources.values()
    assert (resources.spill_stores, resources.spill_loads) == (0, 0)
