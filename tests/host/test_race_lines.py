"""Accesses of every size, in turns of several warps: exactly those races are found that the bytes say there are.

The race checker keeps one record for 16 bytes while accesses take all of them, and one for each granule afterwards.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cuattn import errors, host

# A step of the plan: warp, log2 of the bytes, offset, whether it writes, whether a barrier comes before it.
KERNEL = r"""
template <typename T> __device__ void touch(unsigned char* at, bool writes, unsigned long long* sink) {
  volatile T* place = reinterpret_cast<T*>(at);
  if (writes) *place = T(1);
  else *sink += (unsigned long long)*place;
}
extern "C" __global__ void
k(unsigned char* array, unsigned long long* sinks, const int* plan, int steps, int in_shared) {
  extern __shared__ __align__(16) unsigned char tile[];
  unsigned char* base = in_shared ? tile : array;
  int warp = threadIdx.x / 32;
  for (int i = 0; i < steps; i++) {
    const int* step = plan + 5 * i;
    if (step[4]) __syncthreads();
    if (step[0] != warp || threadIdx.x % 32) continue;
    unsigned char* at = base + step[2];
    bool writes = step[3];
    unsigned long long* sink = sinks + warp;
    switch (step[1]) {
      case 0: touch<unsigned char>(at, writes, sink); break;
      case 1: touch<unsigned short>(at, writes, sink); break;
      case 2: touch<unsigned>(at, writes, sink); break;
      case 3: touch<unsigned long long>(at, writes, sink); break;
      default:
        if (writes) *reinterpret_cast<int4*>(at) = make_int4(1, 1, 1, 1);
        else {
          int4 value = *reinterpret_cast<const int4*>(at);
          *sink += value.x + value.y + value.z + value.w;
        }
    }
  }
}
"""
NUM_WARPS, NUM_BYTES = 3, 64


def races(plan: np.ndarray) -> bool:
    """Whether two steps with no barrier between them are of different warps, overlap, and one of them writes."""
    phases = np.cumsum(plan[:, 4])
    for (i, one), (j, other) in itertools.combinations(enumerate(plan), 2):
        begins, ends = (one[2], other[2]), (one[2] + (1 << one[1]), other[2] + (1 << other[1]))
        if phases[i] == phases[j] and one[0] != other[0] and max(begins) < min(ends) and (one[3] or other[3]):
            return True
    return False


@pytest.mark.parametrize("place", ["shared", "global", "global, from the middle of a line"])
def test_races_of_mixed_sizes(place: str) -> None:
    kernel = host.RawModule(code=KERNEL).get_function("k")
    rng = np.random.default_rng(len(place))
    memory = host.empty(NUM_BYTES + 16, np.uint8)
    memory[:] = 0
    # An array that begins inside a line has its first whole line 8 bytes on.
    array, first = (memory[8:], 8) if "middle" in place else (memory, 0)
    found = {True: 0, False: 0}
    for _ in range(300):
        steps = int(rng.integers(2, 7))
        sizes = rng.choice([0, 1, 2, 3, 4], steps, p=[0.1, 0.15, 0.15, 0.15, 0.45])
        offsets = first + rng.integers(0, 3, steps) * 16 + (rng.integers(0, 16, steps) >> sizes << sizes)
        plan = np.stack(
            [rng.integers(0, NUM_WARPS, steps), sizes, offsets, rng.random(steps) < 0.4, rng.random(steps) < 0.3], 1
        ).astype(np.int32)
        expected = races(plan)
        found[expected] += 1
        arguments = (array, np.zeros(NUM_WARPS, np.uint64), plan, np.int32(steps), np.int32(place == "shared"))
        with host.check("race", "mem"):
            try:
                kernel((1,), (32 * NUM_WARPS,), arguments, shared_mem=NUM_BYTES)
            except errors.RaceError:
                assert expected, plan
            else:
                assert not expected, plan
    assert min(found.values()) > 50
