"""Who holds which tokens: every token once, any length, and as much to do for everybody."""

from __future__ import annotations

import numpy as np
import pytest
from distributed_calls import on_ranks
from hypothesis import given
from hypothesis import strategies as st

from cuattn.distributed import ThreadGroup, partition, rope_positions, shard, unshard
from cuattn.distributed.layout import layout
from cuattn.distributed.partitions import PARTITIONS, Strip, strips
from cuattn.distributed.pieces import Band, pairs_in_band, pieces
from cuattn.errors import ArgumentError, CuattnError, ShapeError
from cuattn.testing.strategies import examples

KINDS = pytest.mark.parametrize("kind", PARTITIONS)


@KINDS
@pytest.mark.parametrize(("n", "size"), [(0, 1), (0, 3), (1, 4), (7, 2), (50, 3), (64, 8), (61, 8)])
def test_every_token_has_one_rank(kind, n, size):
    parts = partition(n, size, kind)
    assert len(parts) == size
    assert sorted(np.concatenate(parts).tolist()) == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 2


@pytest.mark.parametrize(("n", "size"), [(23, 3), (16, 4)])
def test_chunks_of_the_contract(n, size):
    """Chunk c is [c n // 2R, (c + 1) n // 2R), and zigzag gives rank r the chunks r and 2R - 1 - r."""
    edges = [c * n // (2 * size) for c in range(2 * size + 1)]
    for rank, (zigzag, contiguous, striped) in enumerate(zip(*(partition(n, size, kind) for kind in (
        "zigzag", "contiguous", "striped")), strict=True)):  # fmt: skip
        other = 2 * size - 1 - rank
        held = [*range(edges[rank], edges[rank + 1]), *range(edges[other], edges[other + 1])]
        assert zigzag.tolist() == held
        assert contiguous.tolist() == list(range(rank * n // size, (rank + 1) * n // size))
        assert striped.tolist() == list(range(rank, n, size))


@pytest.mark.parametrize(("kind", "expected"), [("contiguous", 0.533), ("zigzag", 1.0), ("striped", 0.998)])
def test_causal_balance_at_eight_ranks(kind, expected):
    """The mean of what ranks have to do over the most that one has: 4096 tokens, causal."""
    n, size, band = 4096, 8, Band(right=0)
    work = [
        sum(
            pairs_in_band(mine, theirs, band)
            for mine in strips(n, rank, size, kind)
            for other in range(size)
            for theirs in strips(n, other, size, kind)
        )
        for rank in range(size)
    ]
    assert sum(work) == n * (n + 1) // 2
    efficiency = sum(work) / size / max(work)
    assert efficiency == pytest.approx(expected, abs=1e-3)
    assert kind == "contiguous" or efficiency >= 0.99


@given(st.data())
@examples(60)
def test_pieces_are_the_band(data):
    """The calls for two strips see each visible pair once, at ALiBi's distance, and nothing else."""
    step = data.draw(st.integers(1, 5))
    queries, keys = (Strip(data.draw(st.integers(0, 11)), data.draw(st.integers(0, 6)), step) for _ in range(2))
    sides = st.none() | st.integers(0, 9)
    band = Band(data.draw(st.integers(-8, 8)), data.draw(sides), data.draw(sides))
    rows, columns = np.mgrid[: queries.length, : keys.length]
    ahead = (queries.start + step * rows) + band.offset - (keys.start + step * columns)
    visible = np.ones(ahead.shape, bool)
    if band.left is not None:
        visible &= ahead <= band.left
    if band.right is not None:
        visible &= -ahead <= band.right
    assert pairs_in_band(queries, keys, band) == visible.sum()
    for alibi in (False, True):
        seen, distance = np.zeros(ahead.shape, int), np.zeros(ahead.shape, int)
        for piece in pieces(queries, keys, band, alibi=alibi):
            left, right = piece.window
            away = rows + piece.diagonal - columns
            of_piece = np.ones(ahead.shape, bool)
            if left is not None:
                assert left >= 0
                of_piece &= away <= left
            if right is not None:
                assert right >= 0
                of_piece &= -away <= right
            assert of_piece.any()
            seen += of_piece
            distance += of_piece * (piece.slope_factor * np.abs(away) + piece.slope_shift)
        assert (seen == visible).all()
        assert not alibi or (distance[visible] == np.abs(ahead)[visible]).all()


@KINDS
def test_layout_of_packed_sequences(kind):
    """Slots hold strips of all sequences, and `order` says where the caller has their tokens."""
    lengths, size = (5, 0, 12, 1), 3
    cu = np.concatenate([[0], np.cumsum(lengths)])
    for rank in range(size):
        of = layout(lengths, rank, size, kind)
        held = shard(np.arange(cu[-1]), _alone(rank, size), partition=kind, axis=0, cu_seqlens=cu)
        by_slots = held if of.order is None else held[of.order]
        places = [
            begin + strip.start + strip.step * np.arange(strip.length)
            for slot in of.slots
            for begin, strip in zip(cu, slot.strips, strict=False)
        ]
        assert by_slots.tolist() == np.concatenate(places).tolist()
        assert of.tokens == len(held)


def _alone(rank, size):
    return ThreadGroup.create(size)[rank]


@KINDS
@pytest.mark.parametrize("cu_seqlens", [None, [0, 5, 5, 16, 17]])
def test_shard_and_unshard(executor, kind, cu_seqlens):
    whole = np.arange(2 * 17 * 3, dtype=np.float32).reshape(2, 17, 3)
    x = executor.array(whole)

    def of_rank(group):
        part = shard(x, group, partition=kind, cu_seqlens=cu_seqlens)
        assert part.shape[1] == len(rope_positions(None if cu_seqlens else 17, group, partition=kind,
                                                   cu_seqlens=cu_seqlens))  # fmt: skip
        return executor.numpy(unshard(part, group, partition=kind, cu_seqlens=cu_seqlens))

    for result in on_ranks(3, of_rank):
        np.testing.assert_array_equal(result, whole)


def test_positions_of_packed_sequences_begin_anew():
    group = _alone(1, 2)
    assert rope_positions(None, group, cu_seqlens=[0, 4, 4, 9]).tolist() == [1, 2, 1, 2]


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda group: partition(-1, 2), ArgumentError),
        (lambda group: partition(4, 0), ArgumentError),
        (lambda group: partition(4, 2, "zig-zag"), ArgumentError),
        (lambda group: rope_positions(4, group, cu_seqlens=[0, 4]), ArgumentError),
        (lambda group: rope_positions(None, group), ArgumentError),
        (lambda group: rope_positions(None, group, cu_seqlens=[0, 4, 3]), ArgumentError),
        (lambda group: shard(np.zeros((2, 5)), group, cu_seqlens=[0, 4]), ShapeError),
        (lambda group: shard(np.zeros((2, 5)), group, axis=2), ArgumentError),
        (lambda group: shard("x", group), CuattnError),
    ],
)
def test_refusals(call, error):
    with pytest.raises(error):
        call(_alone(0, 2))


def test_parts_that_are_not_the_partition():
    def of_rank(group):
        with pytest.raises(ShapeError, match="partition"):
            unshard(np.zeros((1, 3 + 4 * group.rank)), group)
        return True

    assert on_ranks(2, of_rank) == [True, True]
