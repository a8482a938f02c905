"""A cache that a call writes shares no memory with what the call reads afterwards: queries, lengths, tables."""

from __future__ import annotations

import numpy as np
import pytest

from cuattn.compat.flash_attn import flash_attn_with_kvcache
from cuattn.errors import OverlapError


def views(cache):
    """Arguments of a call that lie in the cache, whose numbers are integers there."""
    integers = cache.reshape(-1).view(np.int32)
    return {
        "q": cache[:, 4:5],
        "cache_seqlens": integers[:2],
        "block_table": integers[:4].reshape(2, 2),
        "cache_batch_idx": integers[:2],
        "cache_leftpad": integers[:2],
    }


@pytest.mark.parametrize("cache_name", ["k_cache", "v_cache"])
@pytest.mark.parametrize("name", ["q", "cache_seqlens", "block_table", "cache_batch_idx", "cache_leftpad"])
def test_a_cache_with_arguments_in_it(name, cache_name):
    cache, other = np.zeros((2, 8, 1, 32), np.float32), np.zeros((2, 8, 1, 32), np.float32)
    cache.reshape(-1).view(np.int32)[:4] = [0, 1, 1, 0]
    new = np.ones((2, 1, 1, 32), np.float32)
    given = {"q": new, "k_cache": cache, "v_cache": other, "k": new, "v": new, "cache_seqlens": [4, 4]}
    if cache_name == "v_cache":
        given |= {"k_cache": other, "v_cache": cache}
    before = cache.copy()
    with pytest.raises(OverlapError, match=f"{cache_name} shares memory with {name}"):
        flash_attn_with_kvcache(**given | {name: views(cache)[name]})
    np.testing.assert_array_equal(cache, before)
    assert not other.any()
