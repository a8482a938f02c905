"""`PagedKVCache` by examples: sharing, copy-on-write, prefixes, swapping, and what happens when pages run out."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from cache_model import CacheModel

import cuattn
from cuattn import errors
from cuattn.testing import assert_paged_close, assert_paged_varlen_close


def step(model, seqs, counts, tokens=None):
    """A whole step, checked against the model."""
    made = model.reserve(seqs, counts, tokens)
    assert made is not None, "out of pages"
    for _ in range(model.cache.num_layers):
        model.append(made)
    model.commit(made)
    model.check()


def prompt(model, tokens, cache_key=None):
    """A sequence whose prompt has been computed."""
    seq = model.add(list(tokens), cache_key)
    step(model, [seq], [len(tokens) - seq.length])
    return seq


def make(num_pages=8, page_size=4, **options):
    """A cache whose tables are all that matters."""
    shape = dict(num_layers=1, num_kv_heads=1, head_dim=1, dtype="float32")
    return cuattn.PagedKVCache(num_pages, page_size, **{**shape, **options})


# --- sharing and copy-on-write --------------------------------------------------------------------------------------


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


# --- prefixes -------------------------------------------------------------------------------------------------------


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


# --- swapping -------------------------------------------------------------------------------------------------------


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


# --- running out, and misuse ----------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_out_of_pages_in_the_middle_changes_nothing(executor) -> None:
    model = CacheModel(executor, num_pages=6, page_size=4)
    first = prompt(model, range(6))
    second = model.fork(first)
    cached = prompt(model, range(50, 55))
    model.free(cached)
    before = model.state()
    with pytest.raises(errors.OutOfPagesError, match="5 pages are needed for 19 tokens of 2 sequences; 4 of 6") as info:
        model.cache.reserve([first, second], [9, 10])
    assert model.state() == before
    assert (info.value.needed, info.value.allocatable) == (5, 4)
    assert isinstance(info.value, MemoryError)
    step(model, [first, second], [2, 10])  # one copy and three pages: just as many as there are
    assert model.cache.stats().allocatable == 1
    model.finish()


def test_a_failed_copy_changes_nothing(monkeypatch) -> None:
    cache = make(prefix_caching=True)
    seq = cache.add([1, 2, 3])
    rows = np.zeros((3, 1, 1), np.float32)
    with cache.reserve([seq], [3]) as made:
        made.append(0, rows, rows)
        made.commit()
    other = cache.fork(seq)
    before = cache.stats(), seq.pages, other.pages

    def fail(*args):
        raise errors.LaunchError("no")

    monkeypatch.setattr(cache._storage, "copy", fail)
    with pytest.raises(errors.LaunchError):
        cache.reserve([seq, other], 1)
    assert (cache.stats(), seq.pages, other.pages) == before
    cache.free(other)
    cache.reserve([seq], 1).abort()


def test_steps_out_of_order() -> None:
    cache = make(num_layers=2)
    seq = cache.add()
    made = cache.reserve([seq], 2)
    rows, q = np.zeros((2, 1, 1), np.float32), np.zeros((2, 1, 1), np.float32)
    with pytest.raises(errors.StepError, match="must be appended before"):
        made.attend(0, q)
    with pytest.raises(errors.ArgumentError, match="layer is 2; an integer from 0 to 1"):
        made.append(2, rows, rows)
    with pytest.raises(errors.ShapeError, match="k has shape"):
        made.append(0, rows[:1], rows)
    with pytest.raises(errors.ArrayTypeError):
        made.append(0, np.ndarray, rows)
    with pytest.raises(errors.DTypeError):
        made.append(0, rows.astype(np.float16), rows.astype(np.float16))
    made.append(0, rows, rows)
    with pytest.raises(errors.StepError, match="layer 0 has been appended"):
        made.append(0, rows, rows)
    with pytest.raises(errors.ShapeError, match="the step has 1 sequences"):
        made.attend(0, np.zeros((2, 1, 1, 1), np.float32))
    with pytest.raises(TypeError, match="k_pages"):
        made.attend(0, q, k_pages=rows)
    with pytest.raises(errors.StepError, match=r"layers \[1\] have not been appended"):
        made.commit()
    assert made.is_open and seq.length == 0
    for call in (cache.free, cache.fork, cache.swap_out, lambda seq: cache.reserve([seq], 1)):
        with pytest.raises(errors.SequenceError, match="is in an open step"):
            call(seq)
    made.append(1, rows, rows)
    made.commit()
    assert seq.length == 2
    for call in (made.commit, made.abort, lambda: made.append(0, rows, rows), lambda: made.attend(0, q)):
        with pytest.raises(errors.StepError, match="the step is over"):
            call()
    cache.free(seq)
    with pytest.raises(errors.SequenceError, match="freed"):
        cache.free(seq)
    assert cache.stats().free == cache.num_pages


def test_leaving_a_step_by_an_exception_aborts_it() -> None:
    cache = make()
    seq = cache.add()
    with pytest.raises(ZeroDivisionError), cache.reserve([seq], 4):
        raise ZeroDivisionError
    assert cache.stats().used == 0 and seq.length == 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c, s: c.reserve([s], 1.5), errors.ArgumentError, "counts is 1.5"),
        (lambda c, s: c.reserve([s], [1, 2]), errors.ArgumentError, "counts has 2 numbers for 1"),
        (lambda c, s: c.reserve([s], [True]), errors.ArgumentError, r"counts\[0\] is True"),
        (lambda c, s: c.reserve([s], np.array([-1])), errors.ArgumentError, r"counts\[0\] is"),
        (lambda c, s: c.reserve([s, s], 1), errors.ArgumentError, "twice"),
        (lambda c, s: c.reserve([3], 1), errors.ArgumentError, r"seqs\[0\]: int"),
        (lambda c, s: c.reserve(None, 1), errors.ArgumentError, "seqs: NoneType"),
        (lambda c, s: c.reserve([s], ((1,), 2)), errors.ArgumentError, "counts has 2 numbers for 1"),
        (lambda c, s: c.reserve([s], [(1,)]), errors.ArgumentError, r"counts\[0\] is"),
        (lambda c, s: c.swap_out(np.array(0.5)), errors.ArgumentError, "seqs: ndarray"),
        (lambda c, s: c.block_tables([s, 1]), errors.ArgumentError, r"seqs\[1\]: int"),
        (lambda c, s: c.layer_arrays(-1), errors.ArgumentError, "layer is -1; an integer from 0 to 0"),
        (lambda c, s: c.reserve([s], 2, [1]), errors.ArgumentError, "tokens has 1 numbers; 2"),
        (lambda c, s: c.reserve([s], 2, [[1]]), errors.ArgumentError, r"tokens\[0\] has 1 numbers"),
        (lambda c, s: c.reserve([s], 2, [[1, 2], None]), errors.ArgumentError, "tokens has 2 entries"),
        (lambda c, s: c.reserve([s], 2, [[7, 7]]), errors.ArgumentError, "but add"),
        (lambda c, s: c.reserve([s], 2, "ab"), errors.ArrayTypeError, "tokens: str"),
        (lambda c, s: c.reserve([s], 2, [[1, 2.5]]), errors.ArgumentError, "holds 2.5"),
        (lambda c, s: c.add("prompt"), errors.ArrayTypeError, "tokens: str"),
        (lambda c, s: c.add([1.0]), errors.ArgumentError, "tokens holds 1.0"),
        (lambda c, s: c.add(np.zeros((2, 2), int)), errors.ArgumentError, "integers"),
        (lambda c, s: c.add([1], cache_key=[]), errors.ArgumentError, "hashable"),
        (lambda c, s: c.truncate(s, 1), errors.ArgumentError, "length is 1; an integer from 0 to 0"),
        (lambda c, s: c.swap_in(s), errors.SequenceError, "one that is swapped is needed"),
        (lambda c, s: make().fork(s), errors.SequenceError, "belongs to another cache"),
    ],
)
def test_bad_arguments_change_nothing(call, error, message) -> None:
    cache = make()
    seq = cache.add([1, 2, 3])
    before = cache.stats(), seq.pages, seq.tokens
    with pytest.raises(error, match=message):
        call(cache, seq)
    assert (cache.stats(), seq.pages, seq.tokens) == before
    cache.reserve([seq], [3]).abort()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(num_pages=0), errors.ArgumentError, "num_pages is 0"),
        (dict(page_size=-1), errors.ArgumentError, "page_size is -1"),
        (dict(num_layers=1.0), errors.ArgumentError, "num_layers is 1.0"),
        (dict(num_kv_heads=True), errors.ArgumentError, "num_kv_heads is True"),
        (dict(head_dim=513), errors.ArgumentError, "head_dim is 513; 1 to 512"),
        (dict(head_dim_v=513), errors.ArgumentError, "head_dim_v is 513"),
        (dict(dtype=np.int32), errors.DTypeError, "dtype is .*int32"),
        (dict(dtype="no"), errors.DTypeError, "dtype is 'no'"),
        (dict(kv_format="int4"), errors.ArgumentError, "kv_format is 'int4'"),
        (dict(kv_format="float16"), errors.ArgumentError, "a plain format is the dtype's own"),
        (dict(kv_format="int8", dtype=np.float64), errors.DTypeError, "dtype is float64"),
        (dict(kv_format="nvfp4", head_dim=3), errors.ArgumentError, "head_dim is 3"),
        (dict(k_scale=1.0), errors.ArgumentError, "k_scale was given"),
        (dict(kv_format="mxfp4", head_dim=2, v_scale=1.0), errors.ArgumentError, "v_scale was given"),
        (dict(kv_format="int8", k_scale=0.0), errors.NonFiniteError, "k_scale is 0.0"),
        (dict(kv_format="int8", k_scale=[1.0, 2.0]), errors.ShapeError, "k_scale"),
        (dict(prefix_caching=1), errors.ArgumentError, "prefix_caching is 1"),
        (dict(array_module=threading), errors.ArrayTypeError, "array_module"),
    ],
)
def test_bad_caches(options, error, message) -> None:
    with pytest.raises(error, match=message):
        make(**options)


# --- attention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kv_format", "scales"),
    [(None, {}), ("int8", {}), ("e4m3fn", dict(k_scale=[[0.5, 0.25], [1.0, 2.0]], v_scale=0.125)), ("nvfp4", {})],
)
def test_attention_over_steps_is_that_of_the_reference(executor, kv_format, scales) -> None:
    """Prefill, chunks and single tokens in one batch, with a fork on the way; every layer of every step."""
    rng, dtype = np.random.default_rng(0), np.dtype(np.float16)
    options = dict(num_layers=2, num_kv_heads=2, head_dim=32, dtype=dtype, array_module=executor.xp, **scales)
    cache = cuattn.PagedKVCache(16, 4, kv_format=kv_format, **options)
    seqs = [cache.add(), cache.add()]

    def draw(*shape):
        return rng.standard_normal(shape).astype(dtype)

    def check(counts):
        with cache.reserve(seqs, counts) as made:
            for layer in range(2):
                k, v = draw(made.num_tokens, 2, 32), draw(made.num_tokens, 2, 32)
                made.append(layer, executor.array(k), executor.array(v))
                q = draw(made.num_tokens, 4, 32)
                out, lse = made.attend(layer, executor.array(q), return_lse=True)
                arrays = {name: x for name, x in cache.layer_arrays(layer).items() if name != "kv_format"}
                arrays = {name: x if isinstance(x, float) else executor.numpy(x) for name, x in arrays.items()}
                pages = arrays.pop("k_pages"), arrays.pop("v_pages")
                tables = made.block_tables, made.cu_seqlens, made.seqlens_k
                how = dict(kv_format=cache.kv_format, **arrays)
                assert_paged_varlen_close(executor.numpy(out), q, *pages, *tables, lse=executor.numpy(lse), **how)
                if len(set(counts)) == 1:
                    batch = q.reshape(len(seqs), counts[0], 4, 32)
                    out, lse = made.attend(layer, executor.array(batch), return_lse=True)
                    tables = made.block_tables, made.seqlens_k
                    assert_paged_close(executor.numpy(out), batch, *pages, *tables, lse=executor.numpy(lse), **how)
            made.commit()

    check([7, 1])
    check([1, 5])
    seqs.append(cache.fork(seqs[0]))
    check([1, 1, 1])
    check([2, 2, 2])
    cache.swap_out(seqs[:1])
    cache.swap_in(seqs[:1])
    check([1, 1, 1])


def test_attend_writes_where_it_is_told(executor) -> None:
    cache = make(head_dim=8, array_module=executor.xp)
    rng = np.random.default_rng(0)
    seqs = [cache.add(), cache.add()]
    for counts in ([1, 1], [3, 2]):
        with cache.reserve(seqs, counts) as made:
            k, q = (rng.standard_normal((made.num_tokens, heads, 8), np.float32) for heads in (1, 2))
            made.append(0, executor.array(k), executor.array(k))
            out = executor.guarded(q.shape, np.float32)
            result = made.attend(0, executor.array(q), out=out.array)
            expected = made.attend(0, executor.array(q))
            np.testing.assert_array_equal(executor.numpy(out.array), executor.numpy(expected))
            assert result.shape == q.shape
            out.check()
            made.commit()


def test_keys_are_turned_at_the_positions_of_their_tokens(executor) -> None:
    cache = make(head_dim=8, array_module=executor.xp)
    rng = np.random.default_rng(0)
    seq, start = cache.add(), 0
    for count in (3, 4):
        k = rng.standard_normal((count, 1, 8), np.float32)
        with cache.reserve([seq], count) as made:
            made.append(0, executor.array(k), executor.array(k), rope=cuattn.Rotary())
            made.commit()
        pages = executor.numpy(cache.layer_arrays(0)["k_pages"])
        stored = pages[list(seq.pages)].reshape(-1, 1, 8)[start : seq.length]
        turned = executor.numpy(cuattn.rope(executor.array(k), np.arange(start, start + count)))
        np.testing.assert_array_equal(stored, turned)
        start += count


def test_threads_share_a_cache() -> None:
    """Metadata from several threads at once: the lock keeps every count right."""
    cache = make(num_pages=64, page_size=2, prefix_caching=True)
    failures = []

    def work(seed):
        rng = np.random.default_rng(seed)
        try:
            for _ in range(60):
                seqs = [cache.add(rng.integers(0, 2, 6).tolist())]
                made = cache.reserve(seqs, 6 - seqs[0].length)
                rows = np.zeros((made.num_tokens, 1, 1), np.float32)
                made.append(0, rows, rows)
                made.commit()
                seqs.append(cache.fork(seqs[0]))
                cache.reserve(seqs, [1, 2]).abort()
                cache.swap_out(seqs)
                cache.swap_in(seqs)
                for seq in seqs:
                    cache.free(seq)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    stats = cache.stats()
    assert stats.used == stats.host_pages == 0 and stats.cached + stats.free == 64
    assert not any(cache._pool.references)
