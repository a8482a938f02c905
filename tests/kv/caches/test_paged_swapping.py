"""`PagedKVCache` by examples: sequences that are swapped to host memory and back."""

from __future__ import annotations

import pytest
from cache_model import CacheModel
from paged_steps import prompt, step

from cuattn import errors


@pytest.mark.parametrize("kv_format", [None, "int8", "nvfp4"])
def test_swapping_keeps_contents_and_sharing(executor, kv_format) -> None:
    model = CacheModel(executor, num_pages=8, page_size=4, kv_format=kv_format, prefix_caching=False)
    first = prompt(model, range(6))
    second, third = model.fork(first), model.fork(first)
    step(model, [first], [1], [[9]])
    cache = model.cache
    cache.swap_out([first])
    cache.swap_out([second])  # stored with what is already there
    assert cache.stats().host_pages == 3 and cache.stats().used == 2
    model.check()
    model.swap_in([second])  # the third one never left
    assert second.pages == third.pages and cache.stats().used == 2
    cache.swap_out([second, third])
    assert cache.stats().used == 0 and cache.stats().host_pages == 3
    blocker = model.add()
    step(model, [blocker], [24])
    assert model.swap_in([first]) is None and first.state == "live"
    model.free(blocker)
    model.swap_in([third])
    model.swap_in([second])
    assert second.pages == third.pages and first.pages[0] == second.pages[0]
    assert cache.stats().host_pages == 0 and cache.stats().used == 3
    model.check()
    step(model, [first, second, third], [1, 1, 1])
    model.finish()


def test_what_was_swapped_out_is_not_what_a_sibling_writes_later(executor) -> None:
    model = CacheModel(executor, num_pages=8, page_size=4, prefix_caching=False)
    first = prompt(model, range(7))
    second = model.fork(first)
    model.cache.swap_out(first)
    model.truncate(second, 5)
    step(model, [second], [1])  # where `first` has its sixth token
    model.swap_in([first])
    model.check()
    assert first.pages[0] == second.pages[0] and first.pages[1] != second.pages[1]
    model.finish()


def test_swapping_in_without_room_changes_nothing(executor) -> None:
    model = CacheModel(executor, num_pages=4, page_size=2)
    seqs = [prompt(model, [1, 2, 3]), prompt(model, [4, 5, 6])]
    model.cache.swap_out(seqs)
    blocker = model.add()
    step(model, [blocker], [5])
    before = model.state()
    with pytest.raises(errors.OutOfPagesError, match="pages are needed to swap 2 sequences in"):
        model.cache.swap_in(seqs)
    assert model.state() == before
    model.free(seqs[0])  # a swapped sequence can be freed
    model.free(blocker)
    model.swap_in(seqs[1:])
    model.finish()


def test_a_cached_page_that_comes_back_itself_is_no_room_for_others(executor) -> None:
    model = CacheModel(executor, num_pages=4, page_size=2)
    seq = prompt(model, [1, 2, 3])
    model.cache.swap_out(seq)
    assert model.cache.stats().cached == 1  # the first page, still there
    blocker = model.add()
    step(model, [blocker], [6])
    assert model.cache.stats().allocatable == 1
    before = model.state()
    with pytest.raises(errors.OutOfPagesError, match="1 pages are needed to swap 1 sequences in; 0 of 4"):
        model.cache.swap_in(seq)
    assert model.state() == before
    model.truncate(blocker, 4)
    model.swap_in([seq])
    model.check()
    model.finish()


def test_a_prefix_can_be_found_again_after_swapping(executor) -> None:
    model = CacheModel(executor, num_pages=4, page_size=2)
    seq = prompt(model, [1, 2, 3, 4, 5])
    model.cache.swap_out(seq)
    step(model, [blocker := model.add()], [8])  # every page holds something else now
    assert model.published() == {}
    model.free(blocker)
    model.swap_in([seq])
    assert model.add([1, 2, 3, 4, 6]).pages == seq.pages[:2]
    model.finish()
