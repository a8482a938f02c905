"""`PagedKVCache` by examples: prefixes that have been computed before."""

from __future__ import annotations

import pytest
from cache_model import CacheModel
from paged_steps import prompt, step


@pytest.mark.parametrize(("num_tokens", "num_cached"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8), (13, 8)])
def test_the_last_token_of_a_prompt_is_never_cached(executor, num_tokens, num_cached) -> None:
    model = CacheModel(executor, num_pages=8, page_size=4)
    seq = prompt(model, range(9))
    assert model.add(range(num_tokens)).length == num_cached
    model.free(seq)
    assert model.add(range(num_tokens)).length == num_cached  # from cached pages, too
    model.check()
    model.finish()


def test_a_prompt_in_parts_is_found_as_far_as_it_is_computed(executor) -> None:
    model = CacheModel(executor, num_pages=8, page_size=2)
    seq = model.add(range(7))
    for count, num_found in ((3, 1), (2, 2), (1, 3), (1, 3)):
        step(model, [seq], [count])
        assert set(model.published()) == set(seq.pages[:num_found])
    model.finish()


def test_cache_keys_keep_prefixes_apart(executor) -> None:
    model = CacheModel(executor, num_pages=8, page_size=2)
    prompt(model, range(4), cache_key="a")
    assert model.add(range(4), cache_key="b").length == model.add(range(4)).length == 0
    assert model.add(range(4), cache_key="a").length == 2
    model.finish()


def test_pages_of_tokens_that_nobody_named_are_never_found(executor) -> None:
    model = CacheModel(executor, num_pages=8, page_size=2)
    seq = model.add([1, 2, 3])
    step(model, [seq], [3])
    step(model, [seq], [1])  # not named
    step(model, [seq], [4], [[5, 6, 7, 8]])
    assert model.published() == {seq.pages[0]: (None, (1, 2))}
    unnamed = model.add()
    step(model, [unnamed], [4])
    assert len(model.published()) == 1
    model.truncate(seq, 3)  # everything is named again
    step(model, [seq], [1], [[4]])
    assert set(model.published()) == set(seq.pages)
    model.finish()


@pytest.mark.parametrize("keep", [0, 1])
def test_equal_hashes_never_give_wrong_pages(executor, keep) -> None:
    model = CacheModel(executor, num_pages=16, page_size=2)
    model.cache._index._digest = lambda x: 0  # everything collides
    sequences = [prompt(model, tokens, key) for key in (None, "a") for tokens in ([1, 2, 3, 4], [3, 4, 3, 4])]
    for seq in sequences[keep:]:
        model.free(seq)
    for tokens, length in (([1, 2, 3, 4, 5], 4), ([3, 4, 3, 4, 5], 4), ([1, 2, 1, 2, 5], 2), ([3, 1, 2], 0)):
        for key in (None, "a", "b"):
            seq = model.add(tokens, key)
            assert seq.length == (0 if key == "b" else length)
            model.check()
            model.free(seq)
    model.finish()


def test_the_tail_of_a_freed_sequence_is_evicted_first_and_old_ones_before_new_ones(executor) -> None:
    model = CacheModel(executor, num_pages=6, page_size=2)
    old, new = prompt(model, [1, 2, 3, 4, 5, 6]), prompt(model, [7, 8, 9, 10])
    old_pages, new_pages = old.pages, new.pages
    model.free(old)
    model.free(new)
    assert model.cache._pool.cached_pages == (*old_pages[::-1], *new_pages[::-1])
    assert model.cache.stats().free == 1 and model.cache.stats().cached == 5
    step(model, [model.add()], [4])  # one free page, and one evicted
    assert model.cache.stats().evictions == 1
    used_again = model.add([1, 2, 3, 4, 5, 6, 7])
    assert used_again.pages == old_pages[:2]
    model.free(used_again)
    assert model.cache._pool.cached_pages == (*new_pages[::-1], *old_pages[1::-1])
    model.finish()


def test_two_sequences_that_compute_one_prefix_at_the_same_time(executor) -> None:
    model = CacheModel(executor, num_pages=8, page_size=2)
    first, second = model.add([1, 2, 3, 4, 5]), model.add([1, 2, 3, 4, 6])
    step(model, [first, second], [5, 5])
    assert not set(first.pages) & set(second.pages)  # nothing was there when they were added
    assert set(model.published()) == set(first.pages[:2])
    model.free(first)
    step(model, [second], [2], [[7, 8]])  # its third page goes behind two that `first` left
    assert model.add([1, 2, 3, 4, 6, 7, 8]).pages == (*first_two(model), second.pages[2])
    model.finish()


def first_two(model):
    by_length = sorted(model.published().items(), key=lambda item: len(item[1][1]))
    return tuple(page for page, _ in by_length[:2])
