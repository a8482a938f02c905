"""`PagedKVCache` by examples: pages with several owners, and copy-on-write."""

from __future__ import annotations

import numpy as np
import pytest
from cache_model import CacheModel
from paged_steps import prompt, step


@pytest.mark.smoke
def test_fork_shares_every_page_and_copies_the_last_one_when_it_is_written(executor) -> None:
    model = CacheModel(executor, num_pages=8, page_size=4)
    first = prompt(model, range(6))
    second, third = model.fork(first), model.fork(first)
    assert first.pages == second.pages == third.pages and model.cache.stats().used == 2
    step(model, [first, second, third], 3 * [1], [[10], [11], [12]])
    # The full page stays shared. Two of three need a copy of the other one; the last owner writes it itself.
    assert model.cache.stats().copies == 2 and model.cache.stats().used == 4
    assert len({seq.pages[0] for seq in (first, second, third)}) == 1
    assert len({seq.pages[1] for seq in (first, second, third)}) == 3
    model.finish()


def test_a_fork_at_the_end_of_a_page_copies_nothing(executor) -> None:
    model = CacheModel(executor, num_pages=8, page_size=4)
    first = prompt(model, range(8))
    step(model, [first, model.fork(first)], [1, 1], [[1], [2]])
    assert model.cache.stats().copies == 0
    model.finish()


def test_abort_gives_copies_back_also_after_layers_were_written(executor) -> None:
    model = CacheModel(executor, num_pages=8, page_size=4, prefix_caching=False)
    first = prompt(model, range(6))
    second = model.fork(first)
    pages = first.pages
    for num_layers in range(3):
        made = model.reserve([first, second], [4, 1])
        for _ in range(num_layers):
            model.append(made)
        model.abort(made)
        model.check()
        assert first.pages == second.pages == pages and model.cache.stats().used == 2
    model.finish()


def test_a_page_that_an_open_step_may_want_back_is_not_written_by_others(executor) -> None:
    model = CacheModel(executor, num_pages=8, page_size=4, prefix_caching=False)
    long = prompt(model, range(7))
    short = model.fork(long)
    model.truncate(short, 5)
    open_step = model.reserve([long], [1])  # copies the page, of which `short` is the only owner now
    model.append(open_step)
    step(model, [short], [2])  # would write tokens 5 and 6 of `long`
    model.abort(open_step)
    model.check()
    model.finish()


@pytest.mark.parametrize("order", [1, -1])
def test_of_several_owners_in_a_step_the_longest_writes_the_page_itself(executor, order) -> None:
    model = CacheModel(executor, num_pages=8, page_size=4, prefix_caching=False)
    long = prompt(model, range(7))
    short = model.fork(long)
    model.truncate(short, 5)
    made = model.reserve([long, short][::order], [1, 2][::order])
    for _ in range(2):
        model.append(made)
    model.abort(made)  # both have the page again, with all that they had there
    model.check()
    assert long.pages == short.pages
    model.finish()


def test_a_page_that_was_written_and_aborted_is_found_no_more(executor) -> None:
    model = CacheModel(executor, num_pages=8, page_size=4)
    seq = prompt(model, range(8))
    model.truncate(seq, 6)
    made = model.reserve([seq], [2], [[98, 99]])
    model.append(made)
    model.abort(made)
    model.check()
    assert set(model.published()) == {seq.pages[0]}
    model.finish()


def test_beam_search_with_reorderings(executor) -> None:
    model = CacheModel(executor, num_pages=16, page_size=2)
    rng = np.random.default_rng(0)
    beams = [prompt(model, range(5))]
    beams += [model.fork(beams[0]) for _ in range(3)]
    for _ in range(8):
        step(model, beams, [1] * 4, [[int(token)] for token in rng.integers(0, 9, 4)])
        parents = rng.integers(0, 4, 4)  # of the candidates that go on
        chosen = [model.fork(beams[parent]) for parent in parents]
        for beam in beams:
            model.free(beam)
        beams = chosen
        model.check()
    stats = model.cache.stats()
    assert stats.shared > 0 and stats.used < sum(len(beam.pages) for beam in beams)
    model.finish()


def test_truncation_into_a_shared_page(executor) -> None:
    model = CacheModel(executor, num_pages=8, page_size=4)
    first = prompt(model, range(8))
    second = model.fork(first)
    model.truncate(second, 6)
    assert second.pages == first.pages and second.tokens == tuple(range(6))
    step(model, [second], [1], [[99]])
    assert second.pages[0] == first.pages[0] and second.pages[1] != first.pages[1]
    model.truncate(first, 0)
    assert first.pages == ()
    model.finish()


def test_a_sole_owner_takes_a_page_out_of_the_index_before_writing_it(executor) -> None:
    model = CacheModel(executor, num_pages=8, page_size=4)
    seq = prompt(model, range(8))
    pages = seq.pages
    assert set(model.published()) == set(pages)
    model.truncate(seq, 6)
    made = model.reserve([seq], [1], [[99]])
    assert seq.pages == pages and set(model.published()) == {pages[0]}
    model.abort(made)  # nothing was written: the page holds what it held
    assert set(model.published()) == set(pages)
    step(model, [seq], [2], [[98, 99]])
    other = model.add([*range(8), 0])
    assert other.length == 4
    model.finish()
