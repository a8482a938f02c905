"""Shapes of the Hopper kernel: which is selected, what is legal, and what its CTAs are told about their tiles."""

from __future__ import annotations

import dataclasses
import itertools

import ml_dtypes
import numpy as np
import pytest

from cuattn.errors import LaunchError
from cuattn.ops.attention import arguments
from cuattn.ops.attention.arguments import Extents
from cuattn.ops.attention.forward import hopper_select as select
from cuattn.ops.attention.forward.config import FEW_QUERIES
from cuattn.ops.attention.forward.hopper_config import (
    BUCKETS,
    HEAD_DIM_BUCKETS,
    HOPPER_ALTERNATIVES,
    HOPPER_FWD_CONFIGS,
    HopperFwdConfig,
)
from cuattn.ops.attention.forward.hopper_schedule import HopperSchedule, dense_schedule, pack_heads, packed_schedule
from cuattn.ops.attention.variants import PLAIN, ForwardOptions

KIB = 1024
LIMIT = 227 * KIB
CAUSAL = {"causal": True}
FORMS = ({"dtype": np.float16}, {"dtype": ml_dtypes.float8_e4m3fn, "precision": "fp8"})
CHUNK = {"chunk": 9}
OPTIONS = (
    *({}, CAUSAL, {"window": (9, 9)}, CHUNK, {"softcap": 3.0}, {"alibi_slopes": [0.5] * 4}),
    *({"softcap": 1.0, **CAUSAL}, {"softcap": 1.0, **CHUNK}),
)


def problem(seqlen_q=300, *, heads=(4, 4), head_dims=(128, 128), dtype=np.float16, **options):
    """A problem without memory: its rows are all one row."""
    shapes = ((1, seqlen_q, heads[0], head_dims[0]), (1, 300, heads[1], head_dims[0]), (1, 300, heads[1], head_dims[1]))
    q, k, v = (np.broadcast_to(np.zeros(shape[-1], dtype), shape) for shape in shapes)
    given = {"scale": None, "causal": False, "out": None, **options}
    return arguments.check(q, k, v, **given)


def selected():
    """Every row that some call takes, with the call's buckets."""
    for head_dims, options, seqlen_q, form in itertools.product(
        itertools.product(HEAD_DIM_BUCKETS, repeat=2), OPTIONS, (1, FEW_QUERIES, FEW_QUERIES + 1, 5000), FORMS
    ):
        checked = problem(seqlen_q, head_dims=head_dims, **options, **form)
        call = select.kernel_options(checked.options), seqlen_q, checked.dtype.itemsize
        yield select.select(checked, None, LIMIT), head_dims, call


def test_buckets():
    assert [BUCKETS[d] for d in (1, 64, 65, 96, 97, 128, 129, 192, 193, 256)] == [
        *(64, 64, 96, 96, 128, 128, 192, 192, 256, 256)
    ]


def test_every_call_finds_a_legal_row_that_is_meant_for_it():
    for row, head_dims, call in selected():
        assert row.is_legal(*head_dims, LIMIT, call[0]) and row.serves(*head_dims, *call)
        assert row.score_options or not call[0].on_scores
        assert row.chunks or not call[0].chunk


def test_every_row_is_selected_somewhere():
    assert set(HOPPER_FWD_CONFIGS) == {row for row, *_ in selected()}


def test_alternatives_are_legal_and_others():
    rows = HOPPER_FWD_CONFIGS + HOPPER_ALTERNATIVES
    assert len(set(rows)) == len(rows)
    for row in HOPPER_ALTERNATIVES:
        assert row.is_legal(row.max_head_dim, row.max_head_dim_v, LIMIT)


def test_few_queries_take_a_row_of_their_own_whoever_they_belong_to():
    """Those of the heads of a group count together, as they share a tile."""
    for heads, few in (((4, 4), 64), ((4, 1), 16), ((6, 2), 64)):  # three heads do not divide a tile
        rows = [select.select(problem(seqlen_q, heads=heads), None, LIMIT) for seqlen_q in (few, few + 1)]
        assert [row.max_seqlen_q for row in rows] == [FEW_QUERIES, 0], heads


def test_no_row_fits_into_little_shared_memory():
    with pytest.raises(LaunchError, match="into the 4096 bytes"):
        select.select(problem(), None, 4096)


GOOD = HopperFwdConfig(128, 128, 2, 128, 2, 40, 232, ping_pong=True)


@pytest.mark.parametrize(
    "change",
    [
        {"num_consumers": 0},
        {"num_consumers": 4, "consumer_registers": 120},
        {"num_stages": 1},
        {"block_n": 120},
        {"block_n": 272},
        {"producer_registers": 16},
        {"producer_registers": 28},
        {"consumer_registers": 264},
        {"producer_registers": 48},  # together more than the 168 * 384 that the kernel starts with
        {"producer_registers": 176, "consumer_registers": 160},  # the producer has to give, the consumers to take
        {"producer_registers": 24, "consumer_registers": 160},
        {"num_consumers": 1, "ping_pong": True},
        {"num_stages": 4},  # 288 KiB
    ],
    ids=str,
)
def test_illegal_rows(change):
    assert GOOD.is_legal(128, 128, LIMIT)
    assert not dataclasses.replace(GOOD, **change).is_legal(128, 128, LIMIT)


def test_shared_memory_is_what_the_tiles_take():
    assert GOOD.smem_bytes(128, 128) == 2 * (128 * 128 + 2 * 128 * (128 + 128)) + KIB
    # Columns come in spans of 64: 96 take as many as 128.
    assert GOOD.smem_bytes(96, 64) == 2 * (128 * 128 + 2 * 128 * (128 + 64)) + KIB
    # e4m3: spans of 128, and values a second time, each column with its keys.
    narrow = dataclasses.replace(GOOD, itemsize=1)
    assert narrow.smem_bytes(192, 64) == 128 * 256 + 2 * 128 * (256 + 128) + 2 * 64 * 128 + KIB
    # With chunks two numbers of 4 bytes a row: 128 rows take what the multiple of 1024 has no room for.
    chunked = ForwardOptions(bound_left=True, bound_right=True, chunk=True)
    assert GOOD.smem_bytes(128, 128, chunked) == GOOD.smem_bytes(128, 128) + KIB
    full = GOOD.smem_bytes(128, 128)
    assert GOOD.is_legal(128, 128, full) and not GOOD.is_legal(128, 128, full, chunked)
    assert dataclasses.replace(narrow, block_n=160).smem_bytes(64, 64) == 128 * 128 + 4 * 160 * 128 + 2 * 64 * 256 + KIB
    assert not dataclasses.replace(narrow, block_n=144).is_legal(64, 64, LIMIT)  # half a step of 32 keys


def test_constants():
    """One value for each constant that the kernel's header names, and no other but the flags of options."""
    options = ForwardOptions(bound_right=True)
    constants = GOOD.constants("bfloat16", 96, 64, options, packed=True)
    assert {name: constants[name] for name in constants if name not in options.constants()} == {
        "Element": "__nv_bfloat16",
        "Output": "__nv_bfloat16",
        "BLOCK_M": 128,
        "BLOCK_N": 128,
        "CHUNK": False,
        "CONSUMER_REGISTERS": 232,
        "CTAS_PER_SM": 1,
        "HEAD_DIM": 96,
        "HEAD_DIM_V": 64,
        "NUM_CONSUMERS": 2,
        "NUM_STAGES": 2,
        "PACKED": True,
        "PING_PONG": True,
        "PRODUCER_REGISTERS": 40,
        "SMEM_BYTES": GOOD.smem_bytes(96, 64),
        "TILE_LIST": False,
    }
    assert GOOD.constants("bfloat16", 96, 64, listed=True)["TILE_LIST"]
    assert constants["BOUND_RIGHT"] and not constants["BIAS"]


def test_options_of_kernels():
    """Few kernels serve all calls: each bound alone, chunks, softcap and ALiBi alone, and all of it together."""
    found = {select.kernel_options(problem(**options).options) for options in OPTIONS}
    assert found == {
        PLAIN,
        ForwardOptions(bound_right=True),
        ForwardOptions(bound_left=True, bound_right=True),
        ForwardOptions(bound_left=True, bound_right=True, chunk=True),
        ForwardOptions(bound_left=True, bound_right=True, chunk=True, softcap=True),
        ForwardOptions(softcap=True),
        ForwardOptions(alibi=True),
        ForwardOptions(bound_right=True, softcap=True),
    }
    both = problem(softcap=1.0, alibi_slopes=[0.5] * 4)
    assert select.kernel_options(both.options) == ForwardOptions(True, True, softcap=True, alibi=True)
    slopes = problem(chunk=9, alibi_slopes=[0.5] * 4)
    assert select.kernel_options(slopes.options) == ForwardOptions(True, True, True, softcap=True, alibi=True)


# --- schedules --------------------------------------------------------------------------------------------------------


def tiles_of(schedule, *, causal, num_heads, batch):
    """(pack of heads of all batch entries, block) of every tile, in the order in which CTAs take them.

    Written from the comment of kernels/hopper/query_tile.cuh: groups of heads, in each the blocks one after the other.
    """
    packs = batch * num_heads // schedule.pack
    blocks = range(schedule.num_blocks)
    order = list(reversed(blocks)) if causal else list(blocks)
    groups = [
        range(first, min(first + schedule.heads_at_once, packs)) for first in range(0, packs, schedule.heads_at_once)
    ]
    return [(pack, block) for group in groups for block in order for pack in group]


@pytest.mark.parametrize("group", (1, 2, 8))
@pytest.mark.parametrize("batch", (1, 3))
@pytest.mark.parametrize("seqlen_q", (1, 64, 65, 1000))
@pytest.mark.parametrize("pack", (False, True))
def test_a_dense_schedule_has_every_tile_once(group, batch, seqlen_q, pack):
    extents = Extents(batch, seqlen_q, 512, 8, 8 // group, 128, 64)
    num_heads = group if pack else 1
    schedule = dense_schedule(extents, pack=num_heads, block_m=128, itemsize=2, l2_bytes=3 * 512 * 192 * 2)
    tiles = tiles_of(schedule, causal=True, num_heads=8, batch=batch)
    assert len(tiles) == len(set(tiles)) == schedule.num_tiles
    # Blocks of all heads cover all queries, and no block is empty.
    queries = 128 // num_heads
    assert (schedule.num_blocks - 1) * queries < seqlen_q <= schedule.num_blocks * queries
    assert {tile[0] for tile in tiles} == set(range(batch * 8 // num_heads))


@pytest.mark.parametrize(
    ("kv_heads_in_l2", "pack", "expected"), [(0, 1, 4), (1, 1, 4), (2, 1, 8), (3, 4, 3), (99, 1, 16)]
)
def test_heads_at_once_are_those_whose_keys_and_values_fit(kv_heads_in_l2, pack, expected):
    """One key/value head at least; at most all of both batch entries."""
    extents = Extents(2, 256, 1000, 8, 2, 64, 128)
    one = 1000 * (64 + 128) * 2
    schedule = dense_schedule(extents, pack=pack, block_m=64, itemsize=2, l2_bytes=kv_heads_in_l2 * one + 5)
    assert schedule.heads_at_once == expected


def test_packed_sequences_do_every_entry_of_the_list_for_all_heads():
    extents = Extents(5, 70, 70, 8, 2, 64, 64, packed=True)
    assert packed_schedule(extents, pack=4, num_work=9) == HopperSchedule(18, 9, 2, 4)
    assert packed_schedule(extents, pack=1, num_work=9) == HopperSchedule(72, 9, 8, 1)


def test_the_struct_is_four_ints():
    argument = HopperSchedule(7, 5, 3, 1).argument()
    assert np.frombuffer(argument.tobytes(), np.int32).tolist() == [7, 5, 3, 1]


@pytest.mark.parametrize("block_m", (64, 128, 192))
def test_heads_are_packed_where_tiles_are_fuller_for_it(block_m):
    for seqlen_q, group in itertools.product((1, 5, 30, 64, 65, 130, 5000), range(1, 20)):
        pack = pack_heads(seqlen_q, group, block_m)
        assert pack in (1, group)
        apart, together = group * -(-seqlen_q // block_m), -(-seqlen_q * group // block_m)
        if pack > 1:
            assert block_m % pack == 0 and together < apart
        elif block_m % group == 0:
            assert apart <= 1.1 * together


def test_numbers_of_tiles_do_not_wrap():
    """A CTA looks beyond the last tile by as many as there are CTAs, and has 32 bits for it."""
    for seqlen_q, too_many in ((2**31 - 300, True), (2**30, False)):
        reason = select.why_not(problem(seqlen_q, heads=(1, 1)), "sm_90a")
        assert reason is not None and ("tiles" in reason) == too_many
