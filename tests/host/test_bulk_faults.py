"""Faults with bulk copies: each rule is broken once and must be reported at its line; kept, the kernel must pass.

A case is the body of a kernel. Lines with ``@fix`` are left out of the wrong kernel, lines with ``@bug`` of the right
one; ``// FAULT`` marks where the report must point.
"""

from __future__ import annotations

import numpy as np
import pytest
from bulk_fault_case import Case
from bulk_kernels import PRELUDE
from bulk_load_faults import LOADS
from bulk_store_faults import STORES

import cuattn.host as host
from cuattn.runtime.tensor_map import tensor_map

SCHEDULES = [("eager", 0), ("late", 0), ("random", 1), ("random", 2), ("random", 3)]
CTAS, THREADS, WORDS = 2, 64, 64  # a tile is 8 rows of 32 bytes

HEADER = r"""
#define LOAD(stage, bar) asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %2}], [%3];" :: "r"(smem(s_tile[stage])), "l"(&map), "r"(0), "r"(smem(bar)) : "memory")
#define STORE(stage) asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %1}], [%2];" :: "l"(&out), "r"(0), "r"(smem(s_tile[stage])) : "memory")
#define FILL(stage) s_tile[stage][threadIdx.x] = 100 + threadIdx.x
__device__ __forceinline__ unsigned at_rank(const void* p, unsigned rank) {
  unsigned remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(smem(p)), "r"(rank));
  return remote;
}
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
}
"""  # noqa: E501

CASES = {**LOADS, **STORES}


def entry(name: str) -> str:
    return name.replace(" ", "_").replace(".", "_")


def body(case: Case, wrong: bool) -> str:
    drop = "@fix" if wrong else "@bug"
    return "\n".join("" if drop in line else line for line in case.body.splitlines())


def source(wrong: bool) -> str:
    """All cases of a kind in one module: one call of the compiler."""
    text = PRELUDE + HEADER
    for name, case in CASES.items():
        cluster = f"__cluster_dims__({case.cluster}, 1, 1)" if case.cluster > 1 else ""
        text += f"""
extern "C" __global__ void {cluster} {entry(name)}(
    const __grid_constant__ TensorMap map, const __grid_constant__ TensorMap out, const unsigned* x, unsigned* y) {{
  __shared__ __align__(1024) unsigned s_tile[2][{WORDS}];
  __shared__ __align__(16) u64 bar[6];
  if (threadIdx.x == 0) {{
    mbarrier_init(&bar[0], 1);
    mbarrier_init(&bar[1], 1);
  }}
  __syncthreads();
{body(case, wrong)}
}}
"""
    return text


@pytest.fixture(scope="module")
def right():
    return host.RawModule(code=source(False), arch="sm_90a")


@pytest.fixture(scope="module")
def wrong():
    return host.RawModule(code=source(True), arch="sm_90a")


def aligned(values):
    array = host.empty(values.shape, values.dtype)
    array[...] = values
    host.finish(array)
    return array


def run(module, name, mode, seed):
    x = aligned(np.arange(WORDS, dtype=np.uint32))
    y, z = aligned(np.zeros(WORDS, np.uint32)), aligned(np.zeros((8, 8), np.uint32))
    maps = tensor_map(x, (8, 8), dims=(8, 8), strides=(4, 32)), tensor_map(z, (8, 8))
    with host.check("mem", "race", *(["init"] if CASES[name].init else [])), host.schedule(mode, seed, threads=1):
        module.get_function(entry(name))((CASES[name].cluster,), (THREADS,), (*maps, x, y))


@pytest.mark.parametrize("name", CASES)
def test_a_rule_that_is_kept(right, name):
    for mode, seed in SCHEDULES:
        run(right, name, mode, seed)


@pytest.mark.parametrize("name", CASES)
def test_a_rule_that_is_broken(wrong, name):
    case = CASES[name]
    lines = source(True).splitlines()
    begin = next(i for i, line in enumerate(lines) if f" {entry(name)}(" in line)
    end = next((i for i, line in enumerate(lines) if i > begin and "extern" in line), len(lines))
    marked = [i + 1 for i in range(begin, end) if "FAULT" in lines[i]]
    for mode, seed in SCHEDULES if case.eager else SCHEDULES[1:2]:
        with pytest.raises(case.error) as caught:
            run(wrong, name, mode, seed)
        assert case.words in str(caught.value), mode
        assert not marked or f":{marked[0]}" in str(caught.value), (mode, str(caught.value))
