"""Pages of more than 64 slots, powers of two and others: a slot in its page, at both sides of a page's end."""

from __future__ import annotations

import numpy as np
import pytest
from append_calls import assert_right, make

import cuattn
from cuattn.testing import assert_paged_close, assert_paged_varlen_close

PAGE_SIZES = (65, 96, 100, 128, 256, 1000)
F16 = np.dtype(np.float16)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(F16)


def ends(page_size, num_pages):
    """Slots at both sides of the ends of pages, and of 64, in no order."""
    places = {64, page_size - 1, page_size, 2 * page_size - 1, 2 * page_size, num_pages * page_size - 1, 0, 63}
    return np.random.default_rng(page_size).permutation(sorted(places))


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_append(executor, page_size):
    slots = ends(page_size, 3)
    new = normal(len(slots), 2, 40), normal(len(slots), 2, 24, seed=1)
    for name, more in (("float16", {}), ("int8", {"per_slot": True}), ("nvfp4", {})):
        assert_right(executor, make(name, new, slots, 3, page_size, **more))


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_slots_and_copies(executor, page_size):
    lengths, counts = [64, page_size - 1, 2 * page_size], [page_size, 3, 1]
    tables = np.array([[4, 1, 0], [2, 5, -1], [3, 6, 7]])
    wanted = [
        int(tables[b, i // page_size]) * page_size + i % page_size
        for b in range(3)
        for i in range(lengths[b], lengths[b] + counts[b])
    ]
    assert cuattn.slot_mapping(tables, lengths, counts, page_size).tolist() == wanted
    pages = normal(6, page_size, 2, 8)
    expected = pages.copy()
    expected[[3, 0]] = expected[[5, 1]]
    given = executor.array(pages)
    cuattn.copy_pages(given, [5, 1], [3, 0])
    np.testing.assert_array_equal(executor.numpy(given), expected)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_attention(executor, page_size):
    pages = normal(6, page_size, 2, 32, seed=1), normal(6, page_size, 2, 32, seed=2)
    tables = np.array([[4, 1], [2, -1], [3, 0], [5, -1]], np.int32)
    lengths = np.array([page_size + 1, page_size, page_size + 65, 64], np.int32)
    q = normal(4, 2, 4, 32)
    given = [executor.array(x) for x in (q, *pages)]
    for num_splits in (1, 3):
        out, lse = cuattn.paged_attention(*given, tables, lengths, num_splits=num_splits, return_lse=True)
        assert_paged_close(executor.numpy(out), q, *pages, tables, lengths, lse=executor.numpy(lse))
    packed, starts = normal(9, 4, 32, seed=3), np.array([0, 1, 6, 6, 9], np.int32)
    out, lse = cuattn.paged_attention_varlen(
        executor.array(packed), *given[1:], tables, starts, lengths, return_lse=True
    )
    assert_paged_varlen_close(executor.numpy(out), packed, *pages, tables, starts, lengths, lse=executor.numpy(lse))


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_cache(executor, page_size):
    """A prompt that ends in a page, forks that grow over its end, a prefix that is found, and a way to the host."""
    cache = cuattn.PagedKVCache(
        8,
        page_size,
        num_layers=1,
        num_kv_heads=2,
        head_dim=32,
        dtype=F16,
        array_module=executor.xp,
        prefix_caching=True,
    )
    rng = np.random.default_rng(page_size)

    def step(seqs, counts, tokens=None):
        with cache.reserve(seqs, counts, tokens) as made:
            new = [rng.standard_normal((made.num_tokens, heads, 32)).astype(F16) for heads in (2, 2, 4)]
            made.append(0, *map(executor.array, new[:2]))
            if made.num_tokens < 10:  # what was written by long steps is read by the short ones
                out = made.attend(0, executor.array(new[2]))
                pages = [executor.numpy(cache.layer_arrays(0)[name]) for name in ("k_pages", "v_pages")]
                tables = made.block_tables, made.cu_seqlens, made.seqlens_k
                assert_paged_varlen_close(executor.numpy(out), new[2], *pages, *tables)
            made.commit()

    prompt = list(range(2 * page_size - 2))
    first = cache.add(prompt)
    step([first], [page_size - 1])
    step([first], [page_size - 1])
    second = cache.fork(first)
    assert cache.stats().used == 2 and cache.stats().waste == 2
    step([first, second], [4, 1], [[7, 7, 7, 7], [8]])
    assert cache.stats().copies == 1 and (len(first.pages), len(second.pages)) == (3, 2)
    found = cache.add([*prompt[: page_size + 1]])
    assert found.pages == first.pages[:1] and found.length == page_size
    cache.free(found)
    cache.swap_out([first])
    cache.swap_in([first])
    cache.truncate(first, page_size + 1)
    step([first, second], [1, 3])
    for seq in (first, second):
        cache.free(seq)
    assert cache.stats().used == 0
