"""How much the forward kernels do, counted by the host executor: nothing that a mask hides, and nothing for an option
that is off."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
from visible_keys import visible

import cuattn
from cuattn import environment, host
from cuattn.ops.attention.forward.config import MMA_ROWS, FlashFwdConfig, select
from cuattn.ops.attention.variants import ForwardOptions
from cuattn.runtime.executor import HostExecutor
from cuattn.testing import kernels

MMA_COLS, MMA_DEPTH = 8, 16
ROW = select(np.dtype(np.float16), 64, 64, seqlen_q=512, smem_limit_bytes=163 * 1024)
MASKED_ROW = select(
    np.dtype(np.float16), 64, 64, seqlen_q=512, smem_limit_bytes=163 * 1024, options=ForwardOptions(mask=True)
)

# Warp instructions of attention(q, q, q) with q = ones((1, 512, 2, D)), no lse, compiled for sm_80 by NVRTC 12.9: as
# cuattn.host.profile() counted them when the kernels had no options but a causal mask. What is off must cost nothing.
INSTRUCTIONS_WITHOUT_OPTIONS = {
    ("float16", 64): 254_496,
    ("float16", 128): 472_704,
    ("float32", 64): 3_026_816,
    ("float32", 128): 6_135_552,
    ("float64", 64): 4_986_240,
}


@contextmanager
def counting():
    """A profile of the forward kernel alone, without the launches that prepare masks."""
    profile = host.Profile()
    start = HostExecutor._start

    def counted(self, kernel, *launch):
        if not kernel.entry.startswith("cuattn_attention_forward"):
            return start(self, kernel, *launch)
        with host.profile() as one:
            start(self, kernel, *launch)
        for name in ("instructions", "opcodes"):
            getattr(profile, name).update(getattr(one, name))
        for access in ("read", "write"):
            profile.bytes["global"][access] += one.bytes["global"][access]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostExecutor, "_start", counted)
        yield profile


def count(seqlen_q, seqlen_k, heads, kv_heads, *, row=ROW, head_dim=64, **options):
    q = np.ones((1, seqlen_q, heads, head_dim), np.float16)
    k = np.ones((1, seqlen_k, kv_heads, head_dim), np.float16)
    with counting() as profile:
        kernels.attention(q, k, k, config=row, **options)
    return profile


def num_barriers(profile):
    return sum(number for opcode, number in profile.opcodes.items() if opcode.startswith("bar.sync"))


@pytest.mark.parametrize(
    ("causal", "window"),
    [(False, (None, None)), (True, (None, None)), (True, (100, None)), (False, (64, 30)), (False, (None, 0))],
    ids=["all", "causal", "causal_window", "window", "right"],
)
@pytest.mark.parametrize("seqlens", ((512, 512), (130, 70), (70, 300), (256, 64), (33, 1)), ids=str)
def test_work(seqlens, causal, window):
    """Exactly the tiles in which some query of the warp sees some key; barriers and loads: of the CTA."""
    seqlen_q, seqlen_k = seqlens
    heads, head_dim = 2, 64
    row = select(np.dtype(np.float16), 64, 64, seqlen_q=seqlen_q, smem_limit_bytes=163 * 1024)
    options = {} if window == (None, None) else {"window": window}
    profile = count(seqlen_q, seqlen_k, heads, 1, row=row, causal=causal, **options)

    def tiles(first, last):
        begin = visible(first, seqlen_q, seqlen_k, causal, window)[0] // row.block_n
        end = -(-visible(last, seqlen_q, seqlen_k, causal, window)[1] // row.block_n)
        return range(begin, max(begin, end))

    warp_rows = row.block_m // row.num_warps
    row_tiles = warp_rows // MMA_ROWS
    mma_per_tile = row_tiles * row.block_n // MMA_COLS * (head_dim // MMA_DEPTH + head_dim // MMA_DEPTH)
    expected_mma = expected_barriers = expected_read = 0
    for first in range(0, seqlen_q, row.block_m):
        last = min(first + row.block_m, seqlen_q) - 1
        visited = tiles(first, last)
        expected_barriers += row.num_warps * (len(visited) + 1)
        queries = last - first + 1 if visited else 0
        keys_end = visible(last, seqlen_q, seqlen_k, causal, window)[1]  # what lies behind is not read
        keys = sum(min(row.block_n, keys_end - tile * row.block_n) for tile in visited)
        expected_read += 2 * head_dim * (queries + 2 * keys)
        for warp in range(first, last + 1, warp_rows):
            expected_mma += mma_per_tile * len(tiles(warp, min(warp + warp_rows, seqlen_q) - 1))
    assert profile.instructions["mma"] == heads * expected_mma
    assert num_barriers(profile) == heads * expected_barriers
    moved = profile.bytes["global"]
    assert moved["read"] == heads * expected_read
    assert moved["write"] == heads * seqlen_q * head_dim * 2  # out, once; lse was not asked for


def test_a_wider_tile_reads_keys_less_often():
    """The reason for large query tiles: every key and value is read once a tile."""
    narrow = FlashFwdConfig("mma", 2, 64, block_m=64, block_n=64, num_warps=4, num_stages=2)
    wide = FlashFwdConfig("mma", 2, 64, block_m=128, block_n=64, num_warps=4, num_stages=2)
    reads = [count(512, 512, 1, 1, row=row).bytes["global"]["read"] for row in (narrow, wide)]
    row_bytes = 64 * 2
    assert reads == [512 * row_bytes * (1 + 2 * 8), 512 * row_bytes * (1 + 2 * 4)]


@pytest.mark.skipif(environment.host_arch() != "sm_80", reason="the counts are of code for sm_80")
@pytest.mark.parametrize(("dtype", "head_dim"), INSTRUCTIONS_WITHOUT_OPTIONS)
def test_options_that_are_off_cost_nothing(dtype, head_dim):
    q = np.ones((1, 512, 2, head_dim), dtype)
    with host.profile() as profile:
        cuattn.attention(q, q, q)
    assert profile.launches == 1
    assert profile.warp_instructions <= 1.02 * INSTRUCTIONS_WITHOUT_OPTIONS[dtype, head_dim]


def test_causal_does_half_of_the_tiles():
    """Of T x T square tiles, T (T + 1) / 2: the half, and half of the diagonal."""
    seqlen = 2048
    row = FlashFwdConfig("mma", 2, 64, block_m=64, block_n=64, num_warps=4, num_stages=2)
    everything, causal = (count(seqlen, seqlen, 1, 1, row=row, causal=causal) for causal in (False, True))
    tiles = seqlen // row.block_n
    for counted in (lambda p: p.instructions["mma"], lambda p: num_barriers(p) - row.num_warps * tiles):
        assert counted(causal) / counted(everything) == (tiles + 1) / (2 * tiles)
    assert sum(causal.instructions.values()) < 0.58 * sum(everything.instructions.values())


@pytest.mark.parametrize("window", [(128, 0), (40, 40), (0, 0)], ids=str)
def test_the_work_of_a_window_grows_with_the_length_not_its_square(window):
    """Twice the queries, twice the work; what begins and ends the sequence apart."""
    work = [count(n, n, 1, 1, window=window) for n in (512, 1024, 2048)]
    for counted in (
        lambda p: p.instructions["mma"],
        lambda p: p.bytes["global"]["read"],
        num_barriers,
        lambda p: sum(p.instructions.values()),
    ):
        small, medium, large = map(counted, work)
        assert large - medium == 2 * (medium - small)
        assert large < 2.2 * medium


def test_the_work_of_a_window_grows_with_its_width():
    narrow, wide = (count(2048, 2048, 1, 1, window=(left, 0)).instructions["mma"] for left in (256, 512))
    assert 1.5 < wide / narrow < 2


def mask_of(shape, hidden_tiles):
    """True but for the tiles that `hidden_tiles` names."""
    mask = np.ones(shape, np.bool_)
    for q_tile, k_tile in hidden_tiles:
        mask[
            q_tile * MASKED_ROW.block_m : (q_tile + 1) * MASKED_ROW.block_m,
            k_tile * MASKED_ROW.block_n : (k_tile + 1) * MASKED_ROW.block_n,
        ] = 0
    return mask


def class_bytes(tiles):
    """At most so much is read to know what to do with the tiles: a byte at a time, by every thread alike."""
    return 4 * MASKED_ROW.num_threads * tiles


@pytest.mark.parametrize("as_bias", [False, True], ids=["mask", "bias"])
def test_hidden_tiles_are_not_visited(as_bias):
    """Neither computed nor loaded, wherever they lie; a row of them is no work at all."""
    seqlen, head_dim = 512, 64
    hidden = [(0, 0), (0, 3), (1, 7), *((2, k) for k in range(8)), (3, 5)]
    mask = mask_of((seqlen, seqlen), hidden)
    option = {"bias": np.where(mask, 0, -np.inf).astype(np.float16)} if as_bias else {"mask": mask}
    plain, masked = count(seqlen, seqlen, 1, 1, row=MASKED_ROW), count(seqlen, seqlen, 1, 1, row=MASKED_ROW, **option)
    tiles = (seqlen // MASKED_ROW.block_m) * (seqlen // MASKED_ROW.block_n)
    assert masked.instructions["mma"] * tiles == plain.instructions["mma"] * (tiles - len(hidden))
    assert num_barriers(plain) - num_barriers(masked) == MASKED_ROW.num_warps * len(hidden)
    queries_not_loaded = MASKED_ROW.block_m  # of the row of tiles in which everything is hidden
    unread = 2 * head_dim * (2 * MASKED_ROW.block_n * len(hidden) + queries_not_loaded)
    classes = masked.bytes["global"]["read"] - (plain.bytes["global"]["read"] - unread)
    assert 0 < classes <= class_bytes(tiles)


@pytest.mark.parametrize("as_bias", [False, True], ids=["mask", "bias"])
def test_tiles_in_which_nothing_is_masked_take_the_unmasked_path(as_bias):
    """The bias or mask itself is not read there, and what else is done is done once a tile and not once an element."""
    seqlen = 512
    shape = (1, 1, seqlen, seqlen)
    option = {"bias": np.zeros(shape, np.float16)} if as_bias else {"mask": np.ones(shape, np.bool_)}
    plain, open_, mixed = (
        count(seqlen, seqlen, 1, 1, row=MASKED_ROW, **keywords)
        for keywords in ({}, option, {"mask": np.arange(seqlen * seqlen).reshape(shape) % 3 != 0})
    )
    tiles = (seqlen // MASKED_ROW.block_m) * (seqlen // MASKED_ROW.block_n)
    assert 0 < open_.bytes["global"]["read"] - plain.bytes["global"]["read"] <= class_bytes(tiles)
    assert mixed.bytes["global"]["read"] >= plain.bytes["global"]["read"] + seqlen * seqlen
    total = {name: sum(p.instructions.values()) for name, p in (("plain", plain), ("open", open_), ("mixed", mixed))}
    assert total["mixed"] > 1.2 * total["plain"]
    if not as_bias:  # a kernel with a bias keeps natural logits, which costs an operation an element
        assert total["open"] < 1.1 * total["plain"]


@pytest.mark.parametrize("dtype", (np.float32, np.float64), ids=("float32", "float64"))
def test_warps_without_tensor_cores_skip_what_lies_left_of_their_window(dtype):
    """With window=(8, 0), only the first of a CTA's warps sees a key of the tile before its own queries; with (63, 0),
    all but the last row do."""
    q = np.ones((1, 256, 1, 64), dtype)
    counts = []
    for left in (8, 63):
        with host.profile() as profile:
            cuattn.attention(q, q, q, window=(left, 0))
        counts.append(profile.warp_instructions)
    assert counts[0] < 0.75 * counts[1]


@pytest.mark.parametrize("num_tiles", [1, 3])
def test_tiles_that_every_query_sees_in_whole_compare_no_positions(num_tiles):
    """One key less, and the last tile compares each of its positions: nothing of that is done otherwise."""
    predicates = []
    for seqlen_k in (64 * num_tiles, 64 * num_tiles - 1):
        q, k = np.ones((1, 128, 1, 64), np.float16), np.ones((1, seqlen_k, 1, 64), np.float16)
        with host.profile() as profile:
            cuattn.attention(q, k, k)
        predicates.append(profile.instructions["predicate"])
    whole, cut = predicates
    elements_a_lane = 128 * 64 // 128  # of a tile, with four warps
    assert cut - whole >= 4 * elements_a_lane  # four warps
    assert whole < 4 * elements_a_lane * (num_tiles + 1)
