"""What dual-chunk attention refuses before anything runs, its positions and factors, and what it allocates."""

from __future__ import annotations

import math

import idle_executor
import numpy as np
import pytest

import cuattn
from cuattn import reference
from cuattn.errors import ArgumentError, ArrayTypeError, DTypeError, NonFiniteError, OverlapError, ShapeError
from cuattn.ops.dual_chunk.positions import Chunking
from cuattn.ops.dual_chunk.tiles import tile_counts
from cuattn.reference.dual_chunk import chunks_ahead, query_positions

CHUNKS = {"chunk_size": 8, "local_size": 2}


def normal(*shape, dtype=np.float32):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def call(**changes):
    given = {"q": normal(2, 5, 4, 32), "k": normal(2, 9, 2, 32), "v": normal(2, 9, 2, 16), **CHUNKS}
    return cuattn.dual_chunk_attention(**{**given, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"chunk_size": 1}, ArgumentError, "chunk_size is 1"),
        ({"chunk_size": 2**31 + 1}, ArgumentError, "chunk_size is 2147483649"),
        ({"chunk_size": 8.0}, ArgumentError, "chunk_size is 8.0"),
        ({"local_size": 0}, ArgumentError, "local_size is 0"),
        ({"local_size": 8}, ArgumentError, "local_size is 8; an integer from 1 to 7"),
        ({"local_size": True}, ArgumentError, "local_size is True"),
        ({"rope": None}, ArgumentError, "rope is None; a cuattn.Rotary is needed"),
        ({"rope": cuattn.Rotary(rotary_dim=33)}, ArgumentError, "rotary_dim"),
        ({"keys_rotated": 1}, ArgumentError, "keys_rotated is 1"),
        ({"return_lse": None}, ArgumentError, "return_lse is None"),
        ({"scale": math.nan}, NonFiniteError, "scale"),
        ({"scale": "1"}, ArgumentError, "scale"),
        ({"logit_factor": math.inf}, NonFiniteError, "logit_factor"),
        ({"logit_factor": None}, ArgumentError, "logit_factor is None"),
        ({"logit_factor": 1e38, "scale": 1e38}, NonFiniteError, "logit_factor is 1e.38; with it, scale"),
        ({"logit_factor": [1.0]}, ShapeError, "logit_factor has shape"),
        ({"logit_factor": [1.0, math.nan]}, NonFiniteError, "logit_factor holds nan"),
        ({"softcap": 0.0}, ArgumentError, "softcap"),
        ({"q": normal(2, 5, 4, 32, dtype=np.int32)}, DTypeError, "q has dtype int32"),
        ({"q": normal(2, 5, 4, 32, dtype=np.float64)}, DTypeError, "they must be the same"),
        ({"q": normal(2, 5, 3, 32)}, ShapeError, "multiple"),
        ({"k": normal(2, 9, 2, 31)}, ShapeError, "head dim"),
        ({"v": normal(2, 8, 2, 16)}, ShapeError, "v has shape"),
        ({"cu_seqlens_q": [0, 5]}, ArgumentError, "cu_seqlens_k is None"),
        ({"cu_seqlens_k": [0, 5]}, ArgumentError, "cu_seqlens_q is None"),
        ({"out": np.zeros((2, 5, 4, 32), np.float32)}, ShapeError, "out has shape"),
        ({"out": "out"}, ArrayTypeError, "out"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_what_is_refused(changes, error, words):
    with pytest.raises(error, match=words):
        call(**changes)


def test_what_out_may_not_be():
    q = normal(2, 5, 4, 16)
    with pytest.raises(OverlapError, match="out lies in the memory range of q"):
        call(q=q, k=normal(2, 9, 2, 16), out=q)
    cos, sin = cuattn.rope_frequencies(32, 9)
    with pytest.raises(OverlapError, match="out lies in the memory range of cos"):
        out = np.zeros((2, 5, 4, 16), np.float32)
        call(rope=cuattn.Rotary(cos=out.reshape(-1)[: 9 * 16].reshape(9, 16), sin=sin), out=out)
    assert cos.shape == (9, 16)


def test_eight_bits_have_no_rotation():
    narrow = {name: normal(2, 5, 2, 32).astype("float8_e4m3fn") for name in "qkv"}
    with pytest.raises(DTypeError, match="q has dtype float8_e4m3fn"):
        call(**narrow)


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 1), (5, 5), (5, 6), (3, 7), (1, 9), (9, 13), (13, 4), (1, 30)])
@pytest.mark.parametrize("chunking", [Chunking(8, 2), Chunking(8, 7), Chunking(10, 6)])
def test_the_last_position_of_a_table(seqlen_q, seqlen_k, chunking):
    """Tables have to hold every position that a visible pair stands at, and no more."""
    chunk_size, local_size = chunking
    places = np.maximum(np.arange(seqlen_q) + seqlen_k - seqlen_q, 0)
    ahead = chunks_ahead(seqlen_q, seqlen_k, chunking.length)
    last = int(reference.dual_chunk_positions(np.arange(seqlen_k), chunk_size, local_size).max())
    for part, positions in enumerate(query_positions(places, chunk_size, local_size)):
        seen = (ahead == part).any(axis=1)
        last = max(last, int(positions[seen].max(initial=-1)))
    assert chunking.last_position(seqlen_q, seqlen_k) == last


def test_tables_have_to_hold_every_position(monkeypatch):
    idle_executor.install(monkeypatch)
    cos, sin = cuattn.rope_frequencies(32, 9)
    call(rope=cuattn.Rotary(cos=cos, sin=sin))
    with pytest.raises(ArgumentError, match=r"stands at position 8 .*; cos and sin hold the positions 0 to 7"):
        call(k=normal(2, 13, 2, 32), v=normal(2, 13, 2, 16), rope=cuattn.Rotary(cos=cos[:8], sin=sin[:8]))


def test_tiles_lie_in_one_chunk_each():
    """Counted one by one: a tile ends where a chunk does, and after so many queries."""
    rng = np.random.default_rng(3)
    for _ in range(200):
        length, block = int(rng.integers(1, 40)), int(rng.choice((4, 16, 64)))
        seqlen_q, seqlen_k = (int(x) for x in rng.integers(0, 120, 2))
        chunks = [max(i + seqlen_k - seqlen_q, 0) // length for i in range(seqlen_q)]
        count = sum(-(-chunks.count(chunk) // block) for chunk in set(chunks))
        lengths = np.array([[seqlen_q], [seqlen_k]])
        assert tile_counts(lengths[0], lengths[1], block, length).tolist() == [count]


def test_memory_grows_with_the_keys_alone(monkeypatch):
    """Turned keys, if they have to be, and their positions; nothing of queries times keys, or of a chunk squared."""
    idle = idle_executor.install(monkeypatch)
    q, k = (np.broadcast_to(np.float16(0), (1, n, 4, 64)) for n in (4096, 8192))
    cuattn.dual_chunk_attention(q, k, k, chunk_size=2048, local_size=256, keys_rotated=True)
    assert [x.nbytes for x in idle.allocated] == [q.nbytes]
    idle.allocated.clear()
    cuattn.dual_chunk_attention(q, k, k, chunk_size=2048, local_size=256)
    assert sorted(x.nbytes for x in idle.allocated) == sorted([q.nbytes, k.nbytes])


def test_positions_of_keys():
    positions = np.array([[0, 5, 6], [13, 2**33, 11]])
    expected = reference.dual_chunk_positions(positions, 8, 2)
    assert np.array_equal(cuattn.dual_chunk_positions(positions, 8, 2), expected)
    for dtype in (np.int32, np.uint8, ">i8"):
        assert np.array_equal(cuattn.dual_chunk_positions(positions[0].astype(dtype), 8, 2), expected[0])
    assert cuattn.dual_chunk_positions(13, 8, 2) == 1
    assert cuattn.dual_chunk_positions([], 8, 2).shape == (0,)
    assert cuattn.dual_chunk_positions(np.arange(5, dtype=np.uint8), 2**31, 1).tolist() == [0, 1, 2, 3, 4]
    for wrong in (1.5, np.zeros(3), "positions", None):
        with pytest.raises((DTypeError, ArrayTypeError), match="positions"):
            cuattn.dual_chunk_positions(wrong, 8, 2)


def test_factors_of_logits():
    assert cuattn.dual_chunk_logit_factor(100, 200, "qwen") == 1.0
    for kind in ("qwen", "chunkllama"):
        lengths = np.array([10, 1000, 123456])
        expected = reference.dual_chunk_logit_factor(lengths, 100, kind)
        assert np.allclose(cuattn.dual_chunk_logit_factor(lengths, 100, kind), expected, rtol=1e-15)
        assert np.allclose(cuattn.dual_chunk_logit_factor(lengths.tolist(), 100, kind), expected, rtol=1e-15)
        assert math.isclose(cuattn.dual_chunk_logit_factor(1000, 100, kind), expected[1])
    for wrong in ({"kind": "other"}, {"trained": 0}, {"trained": "1"}, {"trained": 10.0}):
        with pytest.raises(ArgumentError):
            cuattn.dual_chunk_logit_factor(**{"seqlen": 100, "trained": 10, "kind": "qwen", **wrong})
    for seqlen in (None, "10", [True], [1.5], math.nan):
        with pytest.raises((ArrayTypeError, DTypeError), match="seqlen"):
            cuattn.dual_chunk_logit_factor(seqlen, 10, "qwen")
