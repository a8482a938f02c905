"""How much the forward kernel does, counted by the host executor: no tile that a mask hides is visited."""

from __future__ import annotations

import numpy as np
import pytest

from cuattn import host
from cuattn.attention import evaluate
from cuattn.config import MMA_ROWS, FlashFwdConfig, select

MMA_COLS, MMA_DEPTH = 8, 16


def count(row, seqlen_q, seqlen_k, heads, kv_heads, head_dim, causal):
    q = np.ones((1, seqlen_q, heads, head_dim), np.float16)
    k = np.ones((1, seqlen_k, kv_heads, head_dim), np.float16)
    with host.profile() as profile:
        evaluate(q, k, k, causal=causal, config=row)
    barriers = sum(number for opcode, number in profile.opcodes.items() if opcode.startswith("bar.sync"))
    return profile.instructions["mma"], barriers, profile.bytes["global"]


def key_end(query, seqlen_q, seqlen_k, causal):
    return max(0, min(seqlen_k, query + seqlen_k - seqlen_q + 1)) if causal else seqlen_k


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("seqlens", ((512, 512), (130, 70), (70, 300), (256, 64), (33, 1)), ids=str)
def test_work(seqlens, causal):
    seqlen_q, seqlen_k = seqlens
    heads, head_dim = 2, 64
    row = select(np.dtype(np.float16), 64, 64, seqlen_q=seqlen_q, smem_limit_bytes=163 * 1024)
    mma, barriers, moved = count(row, seqlen_q, seqlen_k, heads, 1, head_dim, causal)

    warp_rows = row.block_m // row.num_warps
    row_tiles = warp_rows // MMA_ROWS
    mma_per_tile = row_tiles * row.block_n // MMA_COLS * (head_dim // MMA_DEPTH + head_dim // MMA_DEPTH)
    expected_mma = expected_barriers = expected_read = 0
    for first in range(0, seqlen_q, row.block_m):
        last = min(first + row.block_m, seqlen_q) - 1
        tiles = -(-key_end(last, seqlen_q, seqlen_k, causal) // row.block_n)
        expected_barriers += row.num_warps * (tiles + 1)
        queries = last - first + 1 if tiles else 0
        expected_read += 2 * head_dim * (queries + 2 * min(tiles * row.block_n, seqlen_k))
        for warp in range(first, last + 1, warp_rows):
            warp_last = min(warp + warp_rows, seqlen_q) - 1
            expected_mma += mma_per_tile * -(-key_end(warp_last, seqlen_q, seqlen_k, causal) // row.block_n)
    assert mma == heads * expected_mma
    assert barriers == heads * expected_barriers
    assert moved["read"] == heads * expected_read
    assert moved["write"] == heads * seqlen_q * head_dim * 2  # out, once; lse was not asked for


def test_a_wider_tile_reads_keys_less_often():
    """The reason for large query tiles: every key and value is read once a tile."""
    narrow = FlashFwdConfig(2, 64, block_m=64, block_n=64, num_warps=4, num_stages=2)
    wide = FlashFwdConfig(2, 64, block_m=128, block_n=64, num_warps=4, num_stages=2)
    reads = [count(row, 512, 512, 1, 1, 64, False)[2]["read"] for row in (narrow, wide)]
    row_bytes = 64 * 2
    assert reads == [512 * row_bytes * (1 + 2 * 8), 512 * row_bytes * (1 + 2 * 4)]
