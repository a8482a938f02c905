"""How much block-sparse attention does, counted by the host executor: the kept blocks, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

import cuattn
from cuattn import BlockMask, host

N = 512


def count(call):
    """(warp instructions, mma) of a call."""
    with host.profile() as profile:
        call()
    return np.array([profile.warp_instructions, profile.instructions["mma"]])


def mask_of(n, block, kept):
    """So many blocks in each row, drawn."""
    rng, num_blocks = np.random.default_rng(0), -(-n // block)
    blocks = np.zeros((num_blocks, num_blocks), bool)
    for row in blocks:
        row[rng.permutation(num_blocks)[:kept]] = True
    return BlockMask.from_blocks(blocks, n, n, block)


def queries(n, head_dim=64):
    return np.ones((1, n, 1, head_dim), np.float16)


def forward(n, block, kept):
    q, mask = queries(n), mask_of(n, block, kept)
    return count(lambda: cuattn.block_sparse_attention(q, q, q, mask)), mask.density


def backward(n, block, kept):
    q, mask = queries(n), mask_of(n, block, kept)
    lse = np.ones((1, 1, n), np.float32)
    return count(lambda: cuattn.block_sparse_attention_backward(q, q, q, q, q, lse, mask)), mask.density


@pytest.mark.parametrize("block", [64, 16])
@pytest.mark.parametrize("call", [forward, backward], ids=["forward", "backward"])
def test_twice_the_length_is_twice_the_work(call, block):
    """At the same number of kept blocks a row; gradients of keys sum what columns keep, which is drawn."""
    kept = 3 if block == 64 else 4
    (short, _), (long, _) = call(N, block, kept), call(2 * N, block, kept)
    assert np.all(np.abs(long / short - 2) < 0.1), long / short


def test_blocks_of_64_cost_what_they_are_of_dense():
    """Each kept block at most 1.15 times its share of dense attention, beside what a launch costs that keeps one."""
    q = queries(N)
    dense = count(lambda: cuattn.attention(q, q, q))
    (one, _), (four, _) = forward(N, 64, 1), forward(N, 64, 4)
    share = 3 * 64 / N
    assert four[1] == 4 * one[1] == dense[1] * 4 * 64 / N
    assert four[0] - one[0] <= 1.15 * share * dense[0]


@pytest.mark.parametrize("kept", [2, 4, 9])
def test_small_blocks_multiply_little_more_than_they_keep(kept):
    q = queries(N)
    dense = count(lambda: cuattn.attention(q, q, q))
    work, density = forward(N, 16, kept)
    assert work[1] <= 1.6 * density * dense[1]


def test_neighbours_that_see_the_same_share_a_cta():
    """A band of small blocks is read once for 64 queries; drawn ones are not worth it."""
    band = np.abs(np.subtract.outer(np.arange(32), np.arange(32))) < 8
    q = queries(N)
    for blocks, rows in ((band, 64), (np.random.default_rng(0).random((32, 32)) < 0.1, 16)):
        mask = BlockMask.from_blocks(blocks, N, N, 16)
        assert cuattn.forward_path(q, q, q, block_mask=mask, arch="sm_80").row.block_m == rows
        dense = count(lambda: cuattn.attention(q, q, q))
        work = count(lambda mask=mask: cuattn.block_sparse_attention(q, q, q, mask))
        assert work[1] <= 1.5 * mask.density * dense[1]


def test_blocks_of_eight_keys_are_gathered():
    """The work follows the kept keys, down to blocks of eight: tiles are made of those that are kept."""
    q = queries(N)
    blocks = np.zeros((N // 64, N // 8), bool)
    blocks[:, ::8] = True
    sparse = BlockMask.from_blocks(blocks, N, N, (64, 8))
    half = BlockMask.from_blocks(np.ones((N // 64, 1), bool), N, 64, (64, 64))
    scattered = count(lambda: cuattn.block_sparse_attention(q, q, q, sparse))
    together = count(lambda: cuattn.block_sparse_attention(q, q[:, :64], q[:, :64], half))
    assert scattered[1] == together[1]
    assert scattered[0] < 1.4 * together[0]


@pytest.mark.parametrize("of_gradients", [False, True], ids=["forward", "backward"])
def test_bounds_by_position_leave_tiles_out(of_gradients):
    """A mask of all blocks under a window reads what one of the window's blocks reads."""
    q, lse, index = queries(256), np.ones((1, 1, 256), np.float32), np.arange(4)
    band = np.isin(np.subtract.outer(index, index), (0, 1))
    options = {"causal": True, "window": (64, 0), "softcap": 15.0}
    reads = []
    for blocks in (np.ones((4, 4), bool), band):
        mask = BlockMask.from_blocks(blocks, 256, 256, 64)
        with host.profile() as profile:
            if of_gradients:
                cuattn.block_sparse_attention_backward(q, q, q, q, q, lse, mask, **options)
            else:
                cuattn.block_sparse_attention(q, q, q, mask, **options)
        reads.append(profile.bytes["global"]["read"])
    assert reads[1] <= reads[0] <= 1.1 * reads[1]


def test_rows_without_blocks_cost_their_zeros():
    none = BlockMask.from_blocks(np.zeros((8, 8), bool), N, N, 64)
    q = queries(N)
    with host.profile() as profile:
        cuattn.block_sparse_attention(q, q, q, none)
    assert profile.instructions["mma"] == 0
    assert profile.bytes["global"]["write"] == N * 64 * 2
