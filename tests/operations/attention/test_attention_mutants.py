"""What the mutants of the attention kernels asked for (docs/mutants.md): cases that no other test reached."""

from __future__ import annotations

import numpy as np
import pytest

import cuattn
from cuattn import host


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("excess", [2**-11 + 2**-12, 2**-12], ids=["up", "down"])
def test_tf32_rounds_to_nearest(executor, name, excess):
    """10 bits of mantissa, by rounding: cutting off the rest would be off by twice as much, always to the same side."""
    arrays = {other: np.ones((1, 1, 1, 1), np.float32) for other in "qkv"}
    arrays[name][...] = 1 + excess
    rounded = 1 + (2**-10 if excess > 2**-11 else 0)
    inputs = (executor.array(arrays[other]) for other in "qkv")
    out, lse = cuattn.attention(*inputs, scale=1.0, precision="tf32", return_lse=True)
    result = executor.numpy(out if name == "v" else lse)
    np.testing.assert_allclose(result.item(), rounded, rtol=2e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float32], ids=["tensor_cores", "fma"])
def test_dropout_where_a_random_word_is_the_threshold(executor, dtype):
    """A probability is kept when its word is below the threshold, not when it is equal."""

    def keeps(threshold):
        return bool(cuattn.dropout_mask(1, 1, 1, 1, dropout_p=1 - threshold / 2**32, dropout_seed=7).item())

    low, high = 0, 2**32  # the word is in [low, high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if keeps(middle) else (middle, high)
    one = executor.array(np.ones((1, 1, 1, 1), dtype))
    for threshold, kept in ((low, False), (low + 1, True)):
        p = 1 - threshold / 2**32
        out = executor.numpy(cuattn.attention(one, one, one, dropout_p=p, dropout_seed=7))
        assert keeps(threshold) == kept == (out.item() != 0)


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
