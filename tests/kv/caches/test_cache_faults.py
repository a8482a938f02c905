"""A call of a cache that raises, whatever and whenever, has changed nothing; or at its very end has done everything."""

from __future__ import annotations

import copy
import gc
import pickle

import numpy as np
import pytest

import cuattn
from bench.stress import cache_operations
from bench.stress.cache_operations import Tally, sweep
from bench.stress.cache_world import SIZES, RowTwin, World
from bench.stress.injection import Injected
from cuattn import errors
from cuattn.kv.caches.journal import Journal

STEP = ("reserve", (0, 4), [2, 4], [[1, 1], [2, 2, 2, 2]])  # copies a page, withdraws none and takes two more


def paged(*calls):
    """Two sequences that share three pages, the last of them partly filled."""
    world = World()
    for call in (("add", list(range(7))), ("reserve", (0,), [7], None), ("append", 1), ("commit", 1), ("fork", 0)):
        world.do(*call)
    for call in calls:
        world.do(*call)
    return world


@pytest.mark.parametrize(
    ("calls", "name", "args"),
    [
        ((), "add", ([0, 1, 2, 3, 4, 5, 9],)),
        ((), "fork", (0,)),
        ((), *STEP[:1], STEP[1:]),
        ((), "truncate", (0, 2)),
        ((), "free", (0,)),
        ((), "swap_out", ((0,),)),
        ((("swap_out", (0, 4)),), "swap_in", ((0,),)),
        ((("swap_out", (0, 4)),), "free", (0,)),
        ((STEP,), "append", (5,)),
        ((STEP, ("append", 5)), "commit", (5,)),
        ((STEP, ("append", 5)), "abort", (5,)),
        ((("truncate", 4, 5), ("free", 0), ("reserve", (4,), [1], None)), "abort", (7,)),  # publishes a page again
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_an_exception_at_every_bytecode_of_a_paged_cache(calls, name, args) -> None:
    tally = sweep(lambda: paged(*calls), name, *args)
    assert not tally.broken
    assert tally.before[name] > 250 and tally.after[name] > 0


def rows(make, *calls):
    world = World(RowTwin(make()), RowTwin(make()))
    for call in (("add",), ("add",), ("reserve", (0, 1), [3, 2], None), ("append", 2), ("commit", 2), *calls):
        world.do(*call)
    return world


@pytest.mark.parametrize(
    "make",
    [lambda: cuattn.KVCache(3, 8, **SIZES), lambda: cuattn.StreamingKVCache(1, 2, batch=3, **SIZES)],
    ids=["contiguous", "streaming"],
)
@pytest.mark.parametrize(
    ("calls", "name", "args"),
    [
        ((), "add", ()),
        ((), "free", (0,)),
        ((), "truncate", (0, 2)),
        ((), "reserve", ((0, 1), [2, 1], None)),
        ((("reserve", (0,), [1], None), ("append", 5)), "commit", (5,)),
        ((("reserve", (0,), [1], None), ("append", 5)), "abort", (5,)),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_an_exception_at_every_bytecode_of_a_row_cache(make, calls, name, args) -> None:
    tally = sweep(lambda: rows(make, *calls), name, *args)
    assert not tally.broken
    assert tally.before[name] > 100 and (tally.after[name] > 0 or name == "reserve")


def test_many_operations(capsys) -> None:
    assert cache_operations.main(["--count", "600", "--seed", "5"]) == 0
    assert "600 operations; broken: 0" in capsys.readouterr().out


def test_the_stress_test_sees_a_change_that_is_not_in_the_journal(monkeypatch) -> None:
    monkeypatch.setattr(Journal, "write", lambda journal, items, index, value: items.__setitem__(index, value))
    tally = Tally()
    cache_operations.attempt(paged(), tally, 1200, *STEP)
    assert "neither as before nor as after" in tally.broken[0]


@pytest.mark.parametrize("num_undone", range(4))
def test_an_undo_that_is_interrupted_is_finished_by_the_next_call(monkeypatch, num_undone) -> None:
    world = paged()
    before, undo = world.real.state(), Journal.undo

    def interrupted(journal):
        for _ in range(num_undone):
            restore, what = journal._entries.pop()
            restore(*what)
        restore, what = journal._entries[-1]
        restore(*what)  # and again by the next call
        raise Injected

    monkeypatch.setattr(cuattn.kv.caches.storage.PageStorage, "copy", lambda *args: 1 / 0)
    monkeypatch.setattr(Journal, "undo", interrupted)
    with pytest.raises(Injected):
        world.real.call(*STEP[:1], 5, STEP[1:])
    monkeypatch.setattr(Journal, "undo", undo)
    assert world.real.cache._journal
    assert world.real.seqs[0].length == 7 and len(world.real.seqs[0].pages) == 3  # the first look puts all back
    assert world.real.state() == before and not world.real.faults()


def test_evicted_pages_that_were_overwritten_hold_what_they_held(monkeypatch) -> None:
    """No page is free: the copies, and what is swapped in, go to pages whose prefixes could still be found."""
    world = World()
    for number in (0, 4):
        world.do("add", [number] * 18)
        world.do("reserve", (number,), [18], None)
        world.do("append", number + 1)
        world.do("commit", number + 1)
    world.do("add", [7, 7, 7, 7])
    world.do("reserve", (8,), [4], None)
    world.do("append", 9)
    world.do("commit", 9)  # 14 pages in use
    world.do("fork", 8)
    world.do("swap_out", (0,))
    world.do("free", 4)
    storage, before = world.real.cache._storage, world.real.state()
    assert before[0].free == 0 and before[0].cached == 12

    def spoil(target):
        for x in storage.arrays.values():
            x[target] = 77
        raise MemoryError

    monkeypatch.setattr(storage, "copy", lambda sources, targets: spoil(targets))
    monkeypatch.setattr(storage, "from_host", lambda pages, contents: spoil(pages))
    world.real.cache._host.unlink(range(14))  # as if the device held nothing of it any more
    world.real.cache._journal.commit()
    before = world.real.state()
    for call in (("reserve", 20, ((8, 12), [1, 1], None)), ("swap_in", 20, ((0,),))):
        with pytest.raises(MemoryError):
            world.real.call(*call)
        assert world.real.state() == before and not world.real.faults()


# --- steps that nobody has, and copies ------------------------------------------------------------------------------


@pytest.fixture(params=["paged", "contiguous", "streaming"])
def cache(request):
    if request.param == "paged":
        return cuattn.PagedKVCache(8, 4, prefix_caching=True, **SIZES)
    if request.param == "contiguous":
        return cuattn.KVCache(3, 8, **SIZES)
    return cuattn.StreamingKVCache(1, 4, batch=3, **SIZES)


ROWS = np.ones((2, 1, 2), np.float32)


def test_a_step_that_nobody_has_is_aborted_by_the_next_call(cache) -> None:
    seq = cache.add()
    empty = cache.stats()
    cache.reserve([seq], 2)
    gc.collect()
    assert cache.stats() == empty
    step = cache.reserve([seq], 2)
    step.append(0, ROWS, ROWS)
    step.commit()
    assert seq.length == 2


def test_copies_are_refused(cache) -> None:
    seq = cache.add()
    step = cache.reserve([seq], 2)
    for thing in (cache, seq, step):
        for make in (copy.deepcopy, pickle.dumps):
            with pytest.raises(errors.NotSupportedError, match="neither pickled nor copied deeply"):
                make(thing)
    twin = copy.copy(step)
    for call in (twin.commit, twin.abort, lambda: twin.append(0, ROWS, ROWS), lambda: twin.attend(0, ROWS)):
        with pytest.raises(errors.StepError, match="a copy of a step"):
            call()
    step.append(0, ROWS, ROWS)
    step.commit()
    twin, before = copy.copy(seq), cache.stats()
    calls = ["free", "fork", "swap_out"] if hasattr(cache, "fork") else ["free", "reset"]
    for call in (*(getattr(cache, name) for name in calls), lambda x: cache.reserve([x], 1)):
        with pytest.raises(errors.SequenceError, match="a copy of a sequence"):
            call(twin)
    for call in (copy.copy(cache).add, copy.copy(cache).stats, lambda: copy.copy(cache).free(seq)):
        with pytest.raises(errors.NotSupportedError, match="this is a copy of a"):
            call()
    assert cache.stats() == before and seq.length == 2
    cache.free(seq)


def test_what_a_step_hands_out_is_the_callers_own(cache) -> None:
    other, seq = cache.add(), cache.add()
    for each in (other, seq):
        with cache.reserve([each], 2) as step:
            step.append(0, ROWS, ROWS)
            step.commit()
    step = cache.reserve([seq], 2)
    names = ["counts", "cu_seqlens", "seqlens_k", "positions", "slot_mapping", "block_tables"]
    for name in [*names, *(["cu_rows"] if hasattr(step, "cu_rows") else [])]:
        array = getattr(step, name)
        assert getattr(step, name) is array
        array[...] = 0 if name == "slot_mapping" else 10**6
    expected = np.full((2, 1, 2), 4, np.float32)
    step.append(0, 4 * ROWS, expected)
    out = step.attend(0, 0 * ROWS)
    step.commit()
    np.testing.assert_allclose(out[:, 0, 0], [2.0, 2.5])  # (1 + 1 + 4) / 3, (1 + 1 + 4 + 4) / 4
    with cache.reserve([other], 1) as step:
        step.append(0, ROWS[:1], ROWS[:1])
        assert (step.attend(0, 0 * ROWS[:1]) == 1).all()


def test_a_call_in_the_middle_of_another_one_of_its_thread_is_refused(cache, monkeypatch) -> None:
    """As of a signal handler or a finalizer; a generator of sequences is no such call."""
    seq = cache.add()
    lengths = []

    def meddle(step, *args):
        with pytest.raises(errors.NotSupportedError, match="while another one was at work"):
            cache.add()
        lengths.append(seq.length)

    with monkeypatch.context() as patch:
        patch.setattr(type(cache), "_open_step", meddle)
        cache.reserve([seq], 1)
    assert lengths == [0] and cache.stats().sequences == 1
    cache.reserve((cache.add() for _ in range(2)), 1).abort()
    assert cache.stats().sequences == 3
