"""Chunked local attention on Hopper: the kernel finds what a row sees once, and keeps it in shared memory."""

from __future__ import annotations

from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from hopper_calls import (
    BF16,
    F16,
    SMALL,
    TURNS,
    assert_right,
    assert_varlen_right,
    call,
    everything,
    make,
    name_of,
    same_bits,
)
from packed_sequences import LENGTHS, pack

import cuattn
from cuattn import host, reference
from cuattn.ops.attention.forward.hopper_config import HOPPER_ALTERNATIVES, HOPPER_FWD_CONFIGS
from cuattn.testing import assert_attention_close, kernels

#: Rows that are there for calls with chunks: the ones before them in the table have no registers for that.
FOR_CHUNKS = [row for before, row in pairwise(HOPPER_FWD_CONFIGS) if row.chunks and not before.chunks]
#: Values of 8 bits are transposed on the way.
SMALL_E4M3 = next(row for row in HOPPER_FWD_CONFIGS if row.itemsize == 1)


def test_rows_that_are_there_for_chunks():
    assert [(row.itemsize, row.max_head_dim) for row in FOR_CHUNKS] == [(2, 128), (1, 256)]


@pytest.mark.parametrize("row", [SMALL, TURNS, FOR_CHUNKS[0]], ids=name_of)
@pytest.mark.parametrize("chunk", [1, 50, 128])
def test_chunks(executor, row, chunk):
    """Chunks that end within a tile of keys, with it, and with every key; two tiles of queries, the second cut."""
    seqlens = row.block_m + 9, 2 * row.block_n + 5
    assert_right(executor, *make(seqlens, (F16, BF16)[chunk % 2]), config=row, chunk=chunk)


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"causal": "top_left", "window": (30, None)},
        {"window": (9, 70)},
        {"diagonal_offset": -40},
        {"diagonal_offset": 2**31 - 1},
        {"diagonal_offset": -(2**31) + 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("seqlens", [(70, 300), (200, 90)], ids=str)
def test_other_bounds_by_position(executor, options, seqlens):
    for chunk in (40, 129):
        assert_right(executor, *make(seqlens, heads=(2, 1)), chunk=chunk, **options)


@pytest.mark.parametrize("row", [SMALL, TURNS], ids=["one", "turns"])
@pytest.mark.parametrize("seqlens", [(70, 300), (300, 70)], ids=str)
def test_everything(executor, row, seqlens):
    options = everything(np.random.default_rng(3), 2, 4, *seqlens)
    assert_right(executor, *make(seqlens, heads=(4, 2), batch=2), config=row, chunk=45, **options)


@pytest.mark.parametrize("row", [SMALL, TURNS], ids=["one", "turns"])
def test_slopes_without_a_softcap(executor, row):
    """The kernel that takes them has a softcap as well, which is absent."""
    slopes = np.float32([0.5, -0.25])
    assert_right(executor, *make((200, 300), heads=(2, 1)), config=row, chunk=90, alibi_slopes=slopes)


@pytest.mark.parametrize(
    ("seqlens", "heads"), [((1, 200), (8, 1)), ((9, 130), (8, 2)), ((5, 130), (7, 1)), ((40, 300), (6, 2))], ids=str
)
def test_rows_of_several_heads(executor, seqlens, heads):
    """Heads that share a tile: rows side by side are one query's, and see the same."""
    assert_right(executor, *make(seqlens, BF16, heads=heads, batch=2), chunk=33, causal=True)


def test_sequences(executor):
    """Chunks begin with each sequence."""
    for name in ("mixed", "more_queries_than_keys"):
        arrays, starts = pack(LENGTHS[name], heads=(4, 2), head_dims=(64, 40))
        results = [
            assert_varlen_right(executor, arrays, starts, schedule_on_device=on_device, chunk=19, causal=True)
            for on_device in (False, True)
        ]
        assert same_bits(*results)


@pytest.mark.parametrize("row", [SMALL_E4M3, FOR_CHUNKS[1]], ids=["small", "large"])
def test_e4m3(executor, row):
    n, m = row.block_m + 5, 2 * row.block_n + 33
    arrays = make((n, m), np.dtype(ml_dtypes.float8_e4m3fn), heads=(2, 1))
    options = {"chunk": 70, "causal": True, "precision": "fp8"}
    out, lse = kernels.attention(*map(executor.array, arrays), config=row, return_lse=True, **options)
    assert_attention_close(executor.numpy(out), *arrays, lse=executor.numpy(lse), **options)


def test_a_chunk_that_holds_everything_is_none(executor):
    arrays = make((70, 300))
    expected = call(executor, *arrays, causal=True)
    for chunk in (300, 2**31 - 1):
        assert same_bits(call(executor, *arrays, causal=True, chunk=chunk), expected)


@pytest.mark.parametrize("asynchrony, seed", [("late", 1), ("random", 2), ("random", 3)])
def test_schedules_change_no_bit(executor, asynchrony, seed):
    """Warps write what their rows see over that of the tile before, whoever is ahead: several tiles a CTA."""
    arrays = make((300, 300), heads=(2, 1), batch=2)
    expected = call(executor, *arrays, config=SMALL, chunk=77)
    with executor.active(asynchrony=asynchrony, seed=seed):
        assert same_bits(call(executor, *arrays, config=SMALL, chunk=77), expected)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (20, 90)}, {"diagonal_offset": 30}], ids=str)
@pytest.mark.parametrize("chunk", [7, 64, 128, 200])
def test_tiles_of_other_chunks_are_not_loaded(options, chunk):
    """Counted: products, and copies into shared memory; NaN in the other tiles is not felt."""
    seqlen_q, seqlen_k = 64, 500
    visible = reference.visible(seqlen_q, seqlen_k, chunk=chunk, **options)[0, 0]
    keys = np.flatnonzero(visible.any(axis=0))
    first, last = int(keys.min()) // 128, int(keys.max()) // 128
    q, k, v = make((seqlen_q, seqlen_k))
    for x in (k, v):
        x[:, : first * 128] = np.nan
        x[:, (last + 1) * 128 :] = np.nan
    with host.profile() as profile:
        out, lse = kernels.attention(q, k, v, config=SMALL, chunk=chunk, return_lse=True, **options)
    assert np.isfinite(out.astype(np.float32)).all() and not np.isnan(lse).any()
    number = last - first + 1
    executed = {
        name: sum(n for opcode, n in profile.opcodes.items() if opcode.startswith(name))
        for name in ("wgmma.mma_async", "cp.async.bulk")
    }
    assert executed == {"wgmma.mma_async": number * 4 * (64 // 16 + 128 // 16), "cp.async.bulk": 1 + 2 * number}


def test_rows_that_no_chunk_reaches_see_nothing(executor):
    out, lse = assert_right(executor, *make((200, 50), heads=(2, 1)), chunk=16)
    assert not out[:, :150].any() and np.isneginf(lse[..., :150]).all()


@pytest.mark.parametrize("head_dim", [64, 128])
def test_calls_take_it(executor, monkeypatch, head_dim):
    """Without a config, where kernels are compiled for sm_90a; in the row that has registers for it."""
    monkeypatch.setenv("CUATTN_HOST_ARCH", "sm_90a")
    arrays = make((70, 150), head_dims=(head_dim, head_dim))
    moved = [executor.array(x) for x in arrays]
    path = cuattn.forward_path(*moved, chunk=40, causal=True)
    assert path.kernel == "attention_forward_hopper" and path.options.chunk and path.row.chunks
    assert "attention_forward_hopper (chunk) for sm_90a" in str(path)
    assert not cuattn.forward_path(*moved, window=(40, 0)).options.chunk


def test_a_row_that_is_not_meant_for_it_is_right_all_the_same(executor):
    """A config is obeyed: registers that are missing cost time, not results."""
    row = next(row for row in (*HOPPER_FWD_CONFIGS, *HOPPER_ALTERNATIVES) if not row.chunks)
    assert_right(executor, *make((70, 300)), config=row, chunk=60, causal=True)
