"""Checkers, schedules and profiles belong to a thread or a task; fresh memory is tracked for all of them."""

from __future__ import annotations

import asyncio
import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import cuattn.host as host
from cuattn import errors
from cuattn.host import memory

COPY = 'extern "C" __global__ void k(float* y, const float* x) { y[threadIdx.x] = x[threadIdx.x]; }'
COUNT = 'extern "C" __global__ void k(int* y) { atomicAdd(y, 1); __threadfence(); atomicAdd(y + 1, 1); }'


def in_threads(work, count):
    """Run ``work(index)`` in as many threads at once; what they return."""
    gate = threading.Barrier(count)

    def wait_and_work(index):
        gate.wait()
        return work(index)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(wait_and_work, range(count)))


def test_overlapping_blocks_of_threads_do_not_feel_each_other():
    before = host.current()
    entered, left = threading.Event(), threading.Event()
    seen = []

    def short():
        with host.check("race"), host.schedule("random", 7), host.profile() as profile:
            entered.set()
            other_entered.wait(10)
        left.set()
        seen.append(profile.launches)

    other_entered = threading.Event()
    thread = threading.Thread(target=short)
    thread.start()
    entered.wait(10)
    kernel = host.RawModule(COPY).get_function("k")
    x = np.zeros(4, np.float32)
    assert host.current() == before
    with host.check("mem"):
        kernel((1,), (4,), (x.copy(), x))
        other_entered.set()
        left.wait(10)
        assert host.current().checks == {"mem"}
        with pytest.raises(errors.MemoryFaultError):
            kernel((1,), (5,), (x.copy(), x))
    thread.join()
    assert host.current() == before
    assert seen == [0]  # its profile counts its own launches


def test_overlapping_blocks_of_tasks_do_not_feel_each_other():
    async def task(name, steps):
        seen = []
        with host.check(name):
            for _ in range(steps):
                await asyncio.sleep(0)
                seen.append(set(host.current().checks))
        return seen

    async def both():
        return await asyncio.gather(task("mem", 2), task("race", 5), task("init", 3))

    before = host.current()
    for name, seen in zip(("mem", "race", "init"), asyncio.run(both()), strict=True):
        assert all(checks == {name} for checks in seen)
    assert host.current() == before


def test_a_new_thread_starts_with_what_the_environment_says(monkeypatch):
    monkeypatch.setenv("CUATTN_HOST_CHECK", "init")
    with host.check("race"):
        assert in_threads(lambda index: set(host.current().checks), 2) == [{"init"}] * 2


def test_one_kernel_may_run_from_several_threads_with_all_checkers():
    kernel = host.RawModule(COUNT).get_function("k")

    def work(index):
        with host.check("all"):
            for _ in range(10):
                y = np.zeros(2, np.int32)
                kernel((8,), (32,), (y,))
                if y.tolist() != [256, 256]:
                    return False
        return True

    assert all(in_threads(work, 4))


def test_fresh_memory_is_tracked_in_many_threads():
    """Arrays come and go at the same addresses; what another thread does with its own makes no read uninitialised."""
    kernel = host.RawModule(COPY).get_function("k")

    def work(index):
        x = np.full(32, index, np.float32)
        for step in range(40):
            checks = ("mem", "init") if (index + step) % 3 else ()
            with host.check(*checks):
                y = host.empty(32, np.float32)
                kernel((1,), (32,), (y, x))
                kept = host.empty(step % 7 * 100, np.uint8)  # never written, never read
                host.finish(y)
                x = y.copy()
                del kept
        return bool((x == index).all())

    before = set(memory._tracked)
    assert all(in_threads(work, 6))
    gc.collect()
    assert set(memory._tracked) <= before


def test_a_launch_without_checkers_makes_its_arrays_ordinary():
    kernel = host.RawModule(COPY).get_function("k")
    x = np.ones(32, np.float32)
    with host.check("init"):
        y = host.empty(32, np.float32)
        unwritten = host.empty(32, np.float32)
    kernel((1,), (32,), (y, x))
    with host.check("init"):
        host.finish(y)
        with pytest.raises(errors.UninitializedReadError):
            host.finish(unwritten)


def test_an_entry_that_outlives_its_array_says_nothing_about_the_next_one():
    """Its removal may have been interrupted: an exception in a callback of the garbage collector is lost."""
    kernel = host.RawModule(COPY).get_function("k")
    with host.check("init"):
        y = host.empty(32, np.float32)
        memory._tracked[y.ctypes.data].owner = lambda: None
        kernel((1,), (32,), (np.zeros(32, np.float32), y))
    del memory._tracked[y.ctypes.data]
