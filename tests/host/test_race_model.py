"""Random programs over shared memory, against a model that compares every access with every other one.

The checkers keep few records a location, split and joined as accesses take parts of sixteen bytes or all of them; the
model keeps everything, and knows only threads, barriers and bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest

from cuattn import errors, host

SOURCE = r"""
using u8 = unsigned char;
using u32 = unsigned int;

__device__ u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

extern "C" __global__ void program(u32* out, const int* kinds, const int* places, int steps) {
  extern __shared__ __align__(16) u8 memory[];
  u32 sum = 0;
  for (int step = 0; step < steps; step++) {
    const int kind = kinds[step], place = places[step * blockDim.x + threadIdx.x];
    if (kind == 6) __syncthreads();
    if (kind == 7) __syncwarp();
    if (kind >= 6 || place < 0) continue;
    u8* p = memory + place;
    u32 x = 0;
    if (kind == 0) x = *reinterpret_cast<volatile u8*>(p);
    if (kind == 1) x = *reinterpret_cast<volatile u32*>(p);
    if (kind == 2) {
      u32 y, z, w;
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(x), "=r"(y), "=r"(z), "=r"(w) : "r"(shared_address(p)));
    }
    if (kind == 3) *reinterpret_cast<volatile u8*>(p) = step;
    if (kind == 4) *reinterpret_cast<volatile u32*>(p) = step;
    if (kind == 5)
      asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(shared_address(p)), "r"(step) : "memory");
    sum += x;
  }
  out[threadIdx.x] = sum;
}
"""
SIZES = np.array([1, 4, 16, 1, 4, 16])  # of the kinds: three loads, three stores
NUM_LOADS, SYNC_THREADS, SYNC_WARP = 3, 6, 7
BYTES = 32
WARP = 32


@cache
def kernel() -> host.RawKernel:
    return host.RawModule(code=SOURCE, arch="sm_80").get_function("program")


@dataclass
class Program:
    """`kinds` of the steps, and the place of each thread in each: [steps, threads], -1 where a thread does nothing."""

    kinds: np.ndarray
    places: np.ndarray

    @classmethod
    def random(cls, rng: np.random.Generator) -> Program:
        threads, steps = WARP * int(rng.integers(1, 4)), int(rng.integers(2, 12))
        kinds = rng.choice(8, steps, p=[0.1, 0.12, 0.15, 0.06, 0.07, 0.1, 0.25, 0.15])
        places = np.full((steps, threads), -1, np.int32)
        if rng.random() < 0.6:  # all of the memory is written first
            kinds = np.concatenate([[5, SYNC_THREADS], kinds])
            everything = np.full((2, threads), -1, np.int32)
            everything[0, : BYTES // 16] = np.arange(BYTES // 16) * 16
            places = np.concatenate([everything, places])
        before = np.zeros(threads, int)
        few = rng.choice(threads, 3)
        for step, kind in enumerate(kinds):
            if kind >= SYNC_THREADS or (places[step] >= 0).any():
                continue
            size = SIZES[kind]
            lanes = np.arange(threads)
            spread = [
                lanes,
                lanes[::-1],
                lanes // 4,
                before // size,
                (before + 4) // size,
                np.full(threads, rng.integers(4)),
            ]
            place = spread[rng.integers(len(spread))] * size % BYTES
            if rng.random() < 0.8:  # few threads, mostly the same ones: what several do together races at once
                hot = (
                    np.isin(lanes, rng.choice(few, rng.integers(1, 3)))
                    if rng.random() < 0.8
                    else rng.random(threads) < 0.9
                )
                place = np.where(hot, place, -1)
            places[step] = place
            before = np.maximum(place, 0)
        return cls(kinds.astype(np.int32), places)

    def run(self) -> str:
        """The name of the fault that the checkers find, or nothing."""
        threads = self.places.shape[1]
        out = np.zeros(threads, np.uint32)
        try:
            kernel()((1,), (threads,), (out, self.kinds, self.places, np.int32(len(self.kinds))), shared_mem=BYTES)
        except errors.KernelFault as fault:
            return type(fault).__name__
        return ""

    def faults(self) -> tuple[bool, bool]:
        """Whether two accesses race, and whether a load takes a byte that no store before it has written."""
        steps, threads = np.nonzero((self.places >= 0) & (self.kinds < SYNC_THREADS)[:, None])
        kinds = self.kinds[steps]
        start = self.places[steps, threads]
        end, is_store = start + SIZES[kinds], kinds >= NUM_LOADS
        barriers = np.cumsum(self.kinds == SYNC_THREADS)[steps]
        in_warp = np.cumsum(self.kinds >= SYNC_THREADS)[steps]
        same_thread = threads[:, None] == threads
        same_warp = threads[:, None] // WARP == threads // WARP
        before = barriers[:, None] < barriers
        before |= same_thread & (steps[:, None] < steps)
        before |= same_warp & (in_warp[:, None] < in_warp)
        meet = (start[:, None] < end) & (start < end[:, None]) & (is_store[:, None] | is_store) & ~same_thread
        races = bool((meet & ~before & ~before.T).any())
        unwritten = False
        for byte in range(16):
            place = start + byte
            covered = is_store[:, None] & (start[:, None] <= place) & (place < end[:, None]) & before
            unwritten |= bool((~is_store & (place < end) & ~covered.any(axis=0)).any())
        return races, unwritten


@pytest.mark.parametrize("mode", ["late", "random"])
def test_the_checkers_find_what_the_model_finds(mode: str) -> None:
    found = {"RaceError": 0, "UninitializedReadError": 0, "": 0}
    for seed in range(600):
        program = Program.random(np.random.default_rng(seed))
        races, unwritten = program.faults()
        with host.schedule(mode, seed):
            with host.check("mem", "race"):
                assert program.run() == ("RaceError" if races else ""), seed
            if not races:
                with host.check("mem", "init", "race"):
                    fault = program.run()
                    assert fault == ("UninitializedReadError" if unwritten else ""), seed
                    found[fault] += 1
        found["RaceError"] += races
    assert all(count > 10 for count in found.values()), found


@pytest.mark.parametrize(
    ("steps", "fault"),
    [
        ([(2, 0, 0), (1, 0, 0), (4, 33, 8)], "RaceError"),
        ([(5, 0, 0), (4, 0, 0), (1, 33, 8)], "RaceError"),
        ([(5, 0, 0), (4, 0, 0), (SYNC_THREADS, 0, 0), (2, 33, 0), (1, 33, 4), (3, 33, 4)], ""),
        ([(5, 0, 0), (3, 0, 0), (5, 0, 0), (SYNC_THREADS, 0, 0), (0, 33, 3), (5, 34, 0)], "RaceError"),
    ],
)
def test_a_part_of_a_line_keeps_what_was_known_of_all_of_it(steps: list[tuple[int, int, int]], fault: str) -> None:
    """Steps of one thread each: kind, thread, place."""
    places = np.full((len(steps), 2 * WARP), -1, np.int32)
    for row, (_, thread, place) in zip(places, steps, strict=True):
        row[thread] = place
    program = Program(np.array([kind for kind, _, _ in steps], np.int32), places)
    with host.check("mem", "race"):
        assert program.run() == fault
