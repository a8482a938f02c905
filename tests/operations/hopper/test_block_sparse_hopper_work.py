"""How much block-sparse attention in the Hopper kernel does, counted by the host executor; and what it is passed."""

from __future__ import annotations

import math

import numpy as np
import pytest

import cuattn
from cuattn import BlockMask, host
from cuattn.ops.attention.forward.hopper_config import HOPPER_FWD_CONFIGS
from cuattn.ops.attention.forward.hopper_listed import HOPPER_LISTED_CONFIGS
from cuattn.ops.sparse.tile_list import Side, tile_lists
from cuattn.testing import kernels

ONE = next(row for row in HOPPER_LISTED_CONFIGS if (row.max_head_dim, row.block_m, row.block_n) == (64, 64, 128))
DENSE = next(row for row in HOPPER_FWD_CONFIGS if row.max_head_dim == 64)


def mask_of(n, kept):
    """So many blocks of 64 in each row, drawn."""
    rng, blocks = np.random.default_rng(0), np.zeros((n // 64, n // 64), bool)
    for row in blocks:
        row[rng.permutation(n // 64)[:kept]] = True
    return BlockMask.from_blocks(blocks, n, n, 64)


def count(n, kept=None):
    """(warp instructions, products of warpgroups) of a call that keeps so many blocks a row, or of the dense call."""
    q = np.ones((1, n, 1, 64), np.float16)
    with host.profile() as profile:
        if kept is None:
            kernels.attention(q, q, q, config=DENSE)
        else:
            kernels.block_sparse_attention(q, q, q, mask_of(n, kept), config=ONE)
    return np.array([profile.warp_instructions, profile.instructions["mma"]])


def test_twice_the_length_is_twice_the_work():
    assert np.all(np.abs(count(1024, 4) / count(512, 4) - 2) < 0.1)


def test_blocks_cost_what_they_are_of_dense():
    """Two more at most 1.15 times their share of dense attention, beside what a CTA costs that has two."""
    (few, few_mma), (more, more_mma), (dense, _) = count(768, 2), count(768, 4), count(768)
    assert more_mma == 2 * few_mma
    assert more - few <= 1.15 * dense * 2 / 12


def test_rows_without_blocks_cost_their_zeros():
    with host.profile() as profile:
        q = np.ones((1, 512, 1, 64), np.float16)
        kernels.block_sparse_attention(q, q, q, mask_of(512, 0), config=ONE)
    assert profile.instructions["mma"] == 0
    assert profile.bytes["global"]["write"] == 512 * 64 * 2


# --- lists in pieces --------------------------------------------------------------------------------------------------


def shown(array, block, rows, columns, seqlens):
    """What the list of a block of rows shows, by elements, read as kernels read it; and the first key of each piece."""
    entries, begins, piece, _ = (int(x) for x in array[:4])
    assert entries == 1
    first, _, rows_per_word, _ = (int(x) for x in array[4:8])
    begin, end = (int(x) for x in array[begins + first + block : begins + first + block + 2])
    visible, pieces = np.zeros(seqlens, int), []
    words = max(columns // 32, 1)
    for at in range(begin, end, 2):
        place, details = (int(x) for x in array[at : at + 2])
        granules = np.arange(columns // 8) + (place >> 2)
        if place & 2:
            granules = array[details : details + columns // 8]
            details += columns // 8
        pieces += [int(x) * 8 for x in granules[:: piece // 8]]
        keys = (granules[:, None] * 8 + np.arange(8)).ravel()
        for row in range(block * rows, min((block + 1) * rows, seqlens[0])):
            word = row // rows_per_word - block * rows // rows_per_word
            bits = array[details + word * words : details + (word + 1) * words].astype(np.uint32).view(np.uint8)
            seen = np.unpackbits(bits, bitorder="little")[:columns] if place & 1 else np.ones(columns, int)
            inside = keys < seqlens[1]
            visible[row, keys[inside]] += seen[inside]
            assert not seen[~inside].any()
    return visible, pieces


@pytest.mark.parametrize("elements", [False, True])
@pytest.mark.parametrize(
    ("block_size", "columns"), [((64, 64), 128), ((128, 32), 96), ((64, 24), 160), ((64, 96), 192)]
)
def test_pieces_stay_together(block_size, columns, elements):
    rng, seqlens = np.random.default_rng(0), (150, 333)
    blocks = rng.random([-(-n // b) for n, b in zip(seqlens, block_size, strict=True)]) < 0.5
    inside = rng.random((int(blocks.sum()), *block_size)) < 0.02 if elements else None
    mask = BlockMask.from_blocks(blocks, *seqlens, block_size, inside)
    piece = math.gcd(64, block_size[1], columns)
    array = tile_lists([mask], Side(False, 64, columns, piece)).array
    found = [shown(array, block, 64, columns, seqlens) for block in range(3)]
    np.testing.assert_array_equal(sum(visible for visible, _ in found), mask.todense().astype(int))
    for _, pieces in found:
        kept = [first for first in pieces if first < seqlens[1]]
        assert kept == sorted(set(kept)) and all(first % piece == 0 for first in kept)


# --- which calls ------------------------------------------------------------------------------------------------------


def path(seqlen, block_size, *, heads=(8, 8), head_dim=128, per_head=False, **options):
    q, k = (np.broadcast_to(np.float16(0), (1, seqlen, number, head_dim)) for number in heads)
    q, k = (np.ascontiguousarray(x) for x in (q, k))
    grid = [-(-seqlen // size) for size in block_size]
    mask = BlockMask.from_blocks(np.ones([heads[0]] * per_head + grid, bool), seqlen, seqlen, block_size)
    return cuattn.forward_path(q, k, k, block_mask=mask, arch="sm_90a", **options)


def test_shapes():
    """Two consumers share what they copy, in one block or over heads; one where neither is possible."""
    for block, heads, per_head, rows in (
        (128, (8, 8), False, 128),
        (64, (8, 8), False, 64),
        (64, (8, 4), False, 128),
        (64, (8, 4), True, 64),
        (16, (8, 1), False, 128),
        (16, (4, 1), False, 64),
    ):
        found = path(1024, (block, 64), heads=heads, per_head=per_head)
        assert (found.kernel, found.row.block_m) == ("attention_forward_hopper", rows), (block, heads, per_head)
    few = path(10, (64, 64), heads=(8, 1))
    assert few.row.block_m == 128  # eighty rows of eight heads


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"block_size": (16, 64)}, "64 rows do not lie in one block of 16 queries, and 1 heads a key"),
        ({"block_size": (16, 64), "heads": (8, 1), "per_head": True}, "whose heads see different keys"),
        ({"block_size": (64, 12)}, "blocks of 12 keys are not copied in pieces of 8"),
        ({"block_size": (64, 64), "dropout_p": 0.1}, "the call has dropout"),
        ({"block_size": (64, 64), "mask": np.ones(256, bool)}, "the call has a mask"),
    ],
    ids=str,
)
def test_what_is_left_to_the_portable_kernels(how, reason):
    found = path(256, **how)
    assert found.kernel == "attention_forward"
    assert found.reason.startswith("not the Hopper kernel: ") and reason in found.reason
