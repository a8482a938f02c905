"""dual_chunk_attention against float64: chunks of any length, any alignment of queries and keys, every layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cuattn
from cuattn.ops.attention.sequences import PackedSequences
from cuattn.ops.dual_chunk import tiles
from cuattn.runtime.executor import executor_for
from cuattn.testing.arrays import Guarded, Layout, place
from cuattn.testing.dual_chunk_tolerance import assert_dual_chunk_close, assert_dual_chunk_varlen_close
from cuattn.testing.rounding import to_numpy
from cuattn.testing.strategies import examples

F16, BF16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
F32, F64 = np.dtype(np.float32), np.dtype(np.float64)

#: C and W. L is C - W: 1, less than a tile, a tile, around one, and W of all sizes beside it; tiles of at most 64
#: queries, and of more.
CHUNKINGS = ((2, 1), (8, 7), (20, 3), (45, 8), (72, 8), (64, 1), (65, 1), (90, 70))
LONG_CHUNKINGS = ((66, 1), (140, 12), (230, 40), (400, 3))
LENGTHS = ((70, 70), (1, 133), (65, 100), (40, 17), (66, 110), (3, 3), (16, 64), (5, 0), (90, 90))
MORE_LENGTHS = ((129, 150), (65, 200), (200, 200), (96, 301))


@dataclass(frozen=True)
class Problem:
    q: Guarded
    k: Guarded
    v: Guarded
    out_layout: Layout
    options: dict[str, Any]

    def __repr__(self) -> str:
        shapes = [x.array.shape for x in (self.q, self.k, self.v)]
        return f"Problem({shapes}, {self.out_layout}, {self.options})"


def layouts(aligned: bool) -> st.SearchStrategy[Layout]:
    """Of rows at multiples of 16 bytes, contiguous, padded or heads first; or of any."""
    if aligned:
        return st.sampled_from((Layout(), Layout(pad=(0, 1, 1, 8), offset=8), Layout(order=(0, 2, 1, 3))))
    return st.sampled_from((Layout(pad=(1, 1, 1, 3), offset=1), Layout(order=(1, 0, 2, 3), pad=(0, 0, 1, 1))))


@st.composite
def problems(
    draw: st.DrawFn, dtype: np.dtype, *, aligned: bool = True, softcap: bool = False, long: bool = False
) -> Problem:
    batch = draw(st.sampled_from((1, 2)))
    seqlen_q, seqlen_k = draw(st.sampled_from(MORE_LENGTHS if long else LENGTHS))
    num_heads, num_kv_heads = draw(st.sampled_from(((1, 1), (3, 1), (5, 5), (4, 2))))
    head_dim, head_dim_v = draw(st.sampled_from(((64, 64), (40, 64), (48, 40)) if aligned else ((63, 48), (34, 61))))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    chunk_size, local_size = draw(st.sampled_from(LONG_CHUNKINGS if long else CHUNKINGS))
    rotary_dim = draw(st.sampled_from((None, 16, 2)))
    options: dict[str, Any] = {"chunk_size": chunk_size, "local_size": local_size}
    base = draw(st.sampled_from((10000.0, 100.0)))
    options["rope"] = cuattn.Rotary(base=base, rotary_dim=rotary_dim or head_dim // 2 * 2)
    options["keys_rotated"] = draw(st.booleans())
    options["scale"] = draw(st.sampled_from((None, 0.3, -0.1)))
    options["logit_factor"] = draw(st.sampled_from((1.0, 1.3, [1.0, 1.7][:batch])))
    if softcap:
        options["softcap"] = draw(st.sampled_from((2.0, 15.0)))
    shapes = (batch, seqlen_q, num_heads, head_dim), (batch, seqlen_k, num_kv_heads, head_dim)
    shapes = *shapes, (batch, seqlen_k, num_kv_heads, head_dim_v)
    arrays = [place(rng.standard_normal(shape).astype(dtype), draw(layouts(aligned))) for shape in shapes]
    return Problem(*arrays, draw(layouts(aligned)), options)


def check_problem(executor, problem):
    q, k, v = (executor.array(x) for x in (problem.q, problem.k, problem.v))
    out = executor.guarded((*q.shape[:3], v.shape[3]), q.dtype, problem.out_layout)
    result, lse = cuattn.dual_chunk_attention(q, k, v, out=out.array, return_lse=True, **problem.options)
    assert result is out.array
    out.check()
    arrays = (to_numpy(x) for x in (q, k, v))
    assert_dual_chunk_close(executor.numpy(result), *arrays, lse=executor.numpy(lse), **problem.options)


@pytest.mark.parametrize(
    ("dtype", "long"), ((F16, False), (F16, True), (BF16, False), (F32, False), (F32, True), (F64, False)), ids=str
)
def test_against_float64(executor, dtype, long):
    @examples(10)
    @given(problem=problems(dtype, long=long))
    def check(problem):
        check_problem(executor, problem)

    check()


@pytest.mark.parametrize("dtype", (F16, F64), ids=str)
def test_rows_that_are_not_aligned(executor, dtype):
    @examples(6)
    @given(problem=problems(dtype, aligned=False))
    def check(problem):
        check_problem(executor, problem)

    check()


@pytest.mark.parametrize("dtype", (F16, F32), ids=str)
def test_softcap(executor, dtype):
    @examples(5)
    @given(problem=problems(dtype, softcap=True))
    def check(problem):
        check_problem(executor, problem)

    check()


def normal(*shape, dtype=F16, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("dtype", (F16, F32), ids=str)
@pytest.mark.parametrize("on_device", (False, True))
def test_packed_sequences(executor, dtype, on_device):
    """Each sequence has chunks of its own; those without queries or keys, and with more queries than keys, too."""
    from cuattn.testing import kernels

    seqlens = [(30, 30), (0, 9), (5, 133), (40, 17), (7, 0), (1, 60), (100, 100)]
    cu_q, cu_k = (np.cumsum([0, *column]).astype(np.int32) for column in zip(*seqlens, strict=True))
    q = executor.array(normal(cu_q[-1], 4, 64, dtype=dtype, seed=1))
    k, v = (executor.array(normal(cu_k[-1], 2, 64, dtype=dtype, seed=seed)) for seed in (2, 3))
    factors = [1.0, 2.0, 1.5, 1.0, 1.0, 0.5, 1.2]
    options = {"chunk_size": 45, "local_size": 8, "logit_factor": factors}
    out, lse = kernels.dual_chunk_attention(
        q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, schedule_on_device=on_device, return_lse=True, **options
    )
    arrays = (executor.numpy(x) for x in (out, q, k, v))
    assert_dual_chunk_varlen_close(*arrays, cu_q, cu_k, lse=executor.numpy(lse), **options)


@pytest.mark.parametrize("length", (1, 37, 64, 100))
def test_the_list_that_a_device_makes(executor, length):
    """Every tile of every chunk once, sequence by sequence and the last of each first; the rest of it is no work."""
    lengths = np.random.default_rng(length).integers(0, 160, (2, 30))
    lengths[0, ::7] = lengths[1, ::5] = 0
    starts = [np.cumsum([0, *side]).astype(np.int32) for side in lengths]
    packed = PackedSequences(*(executor.array(x) for x in starts), None, None, None)
    own = executor_for(cu_seqlens_q=packed.cu_seqlens_q)
    found = executor.numpy(tiles.work(own, packed, int(starts[0][-1]), int(starts[1][-1]), 64, length))
    expected = []
    for batch_idx, (n, m) in enumerate(lengths.T):
        chunks = np.maximum(np.arange(m - n, m), 0) // length
        count = sum(-(-int(queries) // 64) for queries in np.unique(chunks, return_counts=True)[1])
        expected += [(batch_idx, tile) for tile in reversed(range(count))]
    assert [tuple(x) for x in found[: len(expected)].tolist()] == expected
    assert (found[len(expected) :] == (-1, 0)).all()


@pytest.mark.parametrize("dtype", (F16, F64), ids=str)
def test_tables(executor, dtype):
    """Cosines and sines that are looked up: the positions reached are those up to C, and no more are needed."""
    scaling = {"scaling": "yarn", "factor": 2, "original_max_position": 32}
    cos, sin = (executor.array(x) for x in cuattn.rope_frequencies(64, 46, **scaling))
    q, k, v = (executor.array(normal(2, 133, heads, 64, dtype=dtype, seed=heads)) for heads in (4, 2, 2))
    options = {"chunk_size": 45, "local_size": 8}
    out = cuattn.dual_chunk_attention(q, k, v, rope=cuattn.Rotary(cos=cos, sin=sin), **options)
    rope = cuattn.Rotary(cos=to_numpy(cos), sin=to_numpy(sin))
    assert_dual_chunk_close(*(executor.numpy(x) for x in (out, q, k, v)), rope=rope, **options)
    assert np.isfinite(executor.numpy(out).astype(np.float32)).all()


def test_large_logits_with_a_factor(executor):
    """Where the rounding of a product would be felt, maxima are kept as they are: the factor is no less in lse."""
    q, k, v = (executor.array(normal(2, 90, heads, 64, seed=heads)) for heads in (4, 2, 2))
    options = {"chunk_size": 45, "local_size": 8, "scale": 2000.0, "logit_factor": [3.0, 1.0]}
    out, lse = cuattn.dual_chunk_attention(q, k, v, return_lse=True, **options)
    assert_dual_chunk_close(*(executor.numpy(x) for x in (out, q, k, v)), lse=executor.numpy(lse), **options)


def test_interleaved_pairs(executor):
    q, k, v = (executor.array(normal(1, 90, heads, 64, seed=heads)) for heads in (4, 2, 2))
    options = {"chunk_size": 45, "local_size": 8, "rope": cuattn.Rotary(interleaved=True)}
    out = cuattn.dual_chunk_attention(q, k, v, **options)
    assert_dual_chunk_close(*(executor.numpy(x) for x in (out, q, k, v)), **options)


def test_chunks_behind_are_never_felt(executor):
    """A tile of queries lies in one chunk, and reads no key of the next: whatever stands there."""
    q, k, v = (executor.array(normal(1, 100, 2, 64, seed=seed)) for seed in (1, 2, 3))
    options = {"chunk_size": 45, "local_size": 8, "return_lse": True}
    whole = [executor.numpy(x) for x in cuattn.dual_chunk_attention(q, k, v, **options)]
    for x in (k, v):
        x[:, 37:] = np.nan
    part = [executor.numpy(x) for x in cuattn.dual_chunk_attention(q, k, v, **options)]
    assert np.array_equal(part[0][:, :37], whole[0][:, :37])
    assert np.array_equal(part[1][..., :37], whole[1][..., :37])
