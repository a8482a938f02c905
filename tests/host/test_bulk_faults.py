"""Faults with bulk copies: each rule is broken once and must be reported at its line; kept, the kernel must pass.

A case is the body of a kernel. Lines with ``@fix`` are left out of the wrong kernel, lines with ``@bug`` of the right
one; ``// FAULT`` marks where the report must point.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from bulk_kernels import PRELUDE

import cuattn.host as host
from cuattn import errors
from cuattn.runtime.tensor_map import tensor_map

SCHEDULES = [("eager", 0), ("late", 0), ("random", 1), ("random", 2), ("random", 3)]
CTAS, THREADS, WORDS = 2, 64, 64  # a tile is 8 rows of 32 bytes


@dataclass
class Case:
    error: type[errors.KernelFault] | tuple[type[errors.KernelFault], ...]
    words: str
    body: str
    eager: bool = True  # the fault shows when copies land at once, too
    cluster: int = 1
    init: bool = True  # with the init checker, which may see it first


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

CASES = {
    "read before the wait": Case(
        errors.AsyncCopyError, "still in flight", r"""
  if (threadIdx.x == 0) { expect(&bar[0], 256); LOAD(0, &bar[0]); }
  wait(&bar[0], 0);  // @fix
  __syncthreads();
  y[threadIdx.x] = s_tile[0][threadIdx.x];  // FAULT
  wait(&bar[0], 0);
""", eager=False, init=False),
    "read without a wait of its own": Case(
        (errors.RaceError, errors.AsyncCopyError), "nothing orders the two", r"""
  if (threadIdx.x == 0) { expect(&bar[0], 256); LOAD(0, &bar[0]); }
  if (threadIdx.x < 32)  // @bug
  wait(&bar[0], 0);
  y[threadIdx.x] = s_tile[0][threadIdx.x];  // FAULT
""", init=False),
    "load over ordinary stores": Case(
        errors.AsyncCopyError, "no fence.proxy.async", r"""
  FILL(0);
  proxy_fence();  // @fix
  __syncthreads();
  if (threadIdx.x == 0) {
    expect(&bar[0], 256);
    LOAD(0, &bar[0]);  // FAULT
  }
  wait(&bar[0], 0);
"""),
    "stage filled while it is read": Case(
        (errors.RaceError, errors.AsyncCopyError), "an asynchronous write", r"""
  for (int i = 0; i < 2; i++) {
    if (threadIdx.x == 0) {
      expect(&bar[0], 256);
      LOAD(0, &bar[0]);  // FAULT
    }
    wait(&bar[0], i);
    y[threadIdx.x] = s_tile[0][threadIdx.x];
    __syncthreads();  // @fix
  }
"""),
    "two loads to one place": Case(
        errors.AsyncCopyError, "an asynchronous write", r"""
  if (threadIdx.x == 0) {
    expect(&bar[0], 256);
    LOAD(0, &bar[0]);
    wait(&bar[0], 0);  // @fix
    expect(&bar[1], 256);
    LOAD(0, &bar[1]);  // FAULT
  }
  wait(&bar[1], 0);
  wait(&bar[0], 0);
""", eager=False),
    "too many bytes expected": Case(
        errors.DeadlockError, "256 bytes pending", r"""
  if (threadIdx.x == 0) {
    expect(&bar[0], 256);  // @fix
    expect(&bar[0], 512);  // @bug
    LOAD(0, &bar[0]);
  }
  wait(&bar[0], 0);
"""),
    "too few bytes expected": Case(
        errors.AsyncCopyError, "bytes", r"""
  if (threadIdx.x == 0) {
    expect(&bar[0], 256);  // @fix
    expect(&bar[0], 128);  // @bug
    LOAD(0, &bar[0]);
    wait(&bar[0], 0);  // @fix
  }
"""),
    "end before a load": Case(
        errors.AsyncCopyError, "has ended while a bulk copy of 256 bytes into its shared memory", r"""
  if (threadIdx.x == 0) {
    expect(&bar[0], 256);
    LOAD(0, &bar[0]);  // FAULT
    wait(&bar[0], 0);  // @fix
  }
""", eager=False),
    "no mbarrier": Case(
        errors.AsyncCopyError, "there is no mbarrier", r"""
  if (threadIdx.x == 0) {
    u64* wrong = &bar[0];  // @fix
    u64* wrong = &bar[2];  // @bug
    expect(&bar[0], 256);
    LOAD(0, wrong);  // FAULT
  }
  wait(&bar[0], 0);
"""),
    "over an mbarrier": Case(
        errors.MemoryFaultError, "over a live mbarrier", r"""
  if (threadIdx.x == 0) {
    void* to = &bar[4];  // @fix
    void* to = &bar[0];  // @bug
    expect(&bar[0], 16);
    bulk_load(to, x, 16, &bar[0]);  // FAULT
  }
  wait(&bar[0], 0);
"""),
    "tile alignment": Case(
        errors.MemoryFaultError, "not a multiple of 128", r"""
  if (threadIdx.x == 0) {
    int at = 0;  // @fix
    int at = 64;  // @bug
    expect(&bar[0], 256);
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 " [%0], [%1, {%2, %2}], [%3];"
                 :: "r"(smem(s_tile) + at), "l"(&map), "r"(0), "r"(smem(&bar[0])) : "memory");  // FAULT
  }
  wait(&bar[0], 0);
"""),
    "source alignment": Case(
        errors.MemoryFaultError, "not a multiple of 16", r"""
  if (threadIdx.x == 0) {
    const unsigned* from = x;  // @fix
    const unsigned* from = x + 1;  // @bug
    expect(&bar[0], 16);
    bulk_load(s_tile[0], from, 16, &bar[0]);  // FAULT
  }
  wait(&bar[0], 0);
"""),
    "size": Case(
        errors.MemoryFaultError, "a bulk copy of 20 bytes", r"""
  if (threadIdx.x == 0) {
    int bytes = 16;  // @fix
    int bytes = 20;  // @bug
    expect(&bar[0], bytes);
    bulk_load(s_tile[0], x, bytes, &bar[0]);  // FAULT
  }
  wait(&bar[0], 0);
"""),
    "source bounds": Case(
        errors.MemoryFaultError, "which is in no argument array", r"""
  if (threadIdx.x == 0) {
    int bytes = 256;  // @fix
    int bytes = 272;  // @bug
    expect(&bar[0], bytes);
    bulk_load(s_tile[0], x, bytes, &bar[0]);  // FAULT
  }
  wait(&bar[0], 0);
"""),
    "shared bounds": Case(
        errors.MemoryFaultError, "a bulk copy of 256 bytes at shared byte", r"""
  if (threadIdx.x == 0) {
    void* to = s_tile[0];  // @fix
    void* to = (char*)s_tile + 384;  // @bug
    expect(&bar[0], 256);
    bulk_load(to, x, 256, &bar[0]);  // FAULT
  }
  wait(&bar[0], 0);
"""),
    "rank": Case(
        errors.MemoryFaultError, "3 coordinates for a tensor map of 2 dimensions", r"""
  if (threadIdx.x == 0) {
    expect(&bar[0], 256);
    LOAD(0, &bar[0]);  // @fix
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"  // @bug
                 " [%0], [%1, {%2, %2, %2}], [%3];"  // @bug
                 :: "r"(smem(s_tile)), "l"(&map), "r"(0), "r"(smem(&bar[0])) : "memory");  // @bug FAULT
  }
  wait(&bar[0], 0);
"""),
    "global source without a fence": Case(
        errors.AsyncCopyError, "no fence.proxy.async", r"""
  if (threadIdx.x == 0) {
    for (int i = 0; i < 4; i++) y[i] = i;
    asm volatile("fence.proxy.async.global;" ::: "memory");  // @fix
    expect(&bar[0], 16);
    bulk_load(s_tile[0], y, 16, &bar[0]);  // FAULT
  }
  wait(&bar[0], 0);
"""),
    "global source changed in flight": Case(
        (errors.RaceError, errors.AsyncCopyError), "a write of global memory", r"""
  if (threadIdx.x == 0) {
    expect(&bar[0], 16);
    bulk_load(s_tile[0], y, 16, &bar[0]);
    wait(&bar[0], 0);  // @fix
    y[0] = 1;  // FAULT
  }
  wait(&bar[0], 0);
"""),
    "store without a fence": Case(
        errors.AsyncCopyError, "no fence.proxy.async", r"""
  FILL(0);
  proxy_fence();  // @fix
  __syncthreads();
  if (threadIdx.x == 0) {
    STORE(0);  // FAULT
    commit();
    wait_group<0>();
  }
"""),
    "store without a barrier": Case(
        (errors.RaceError, errors.AsyncCopyError), "an asynchronous read", r"""
  FILL(0);
  proxy_fence();
  __syncthreads();  // @fix
  if (threadIdx.x == 0) {
    STORE(0);  // FAULT
    commit();
    wait_group<0>();
  }
""", init=False),
    "store of what nobody wrote": Case(
        errors.UninitializedReadError, "shared memory that nothing has written", r"""
  if (threadIdx.x < 60)  // @bug
  FILL(0);
  proxy_fence();
  __syncthreads();
  if (threadIdx.x == 0) {
    STORE(0);  // FAULT
    commit();
    wait_group<0>();
  }
"""),
    "source overwritten before it is read": Case(
        (errors.RaceError, errors.AsyncCopyError), "a write of shared memory", r"""
  FILL(0);
  proxy_fence();
  __syncthreads();
  if (threadIdx.x == 0) {
    STORE(0);
    commit();
    wait_group_read<0>();  // @fix
  }
  __syncthreads();
  s_tile[0][threadIdx.x] = 0;  // FAULT
  if (threadIdx.x == 0) wait_group<0>();
"""),
    "a wait that leaves the group": Case(
        (errors.RaceError, errors.AsyncCopyError), "a write of shared memory", r"""
  FILL(0);
  FILL(1);
  proxy_fence();
  __syncthreads();
  if (threadIdx.x == 0) {
    STORE(0);
    commit();
    bulk_store(y, s_tile[1], 256);
    commit();
    wait_group_read<0>();  // @fix
    wait_group_read<1>();  // @bug
    s_tile[1][0] = 0;  // FAULT
    wait_group<0>();
  }
"""),
    "a wait by another thread": Case(
        errors.AsyncCopyError, "yet to read", r"""
  FILL(0);
  proxy_fence();
  __syncthreads();
  if (threadIdx.x == 0) {
    STORE(0);  // FAULT
    commit();
  }
  if (threadIdx.x == 0)  // @fix
  if (threadIdx.x == 1)  // @bug
    wait_group<0>();
""", eager=False),
    "never committed": Case(
        errors.AsyncCopyError, "commit it and wait with cp.async.bulk.wait_group.read", r"""
  FILL(0);
  proxy_fence();
  __syncthreads();
  if (threadIdx.x == 0) {
    STORE(0);  // FAULT
    commit();  // @fix
    wait_group<0>();
  }
""", eager=False),
    "result read after wait_group.read": Case(
        (errors.RaceError, errors.AsyncCopyError), "a read of global memory", r"""
  FILL(0);
  proxy_fence();
  __syncthreads();
  if (threadIdx.x == 0) {
    bulk_store(y, s_tile[0], 16);
    commit();
    wait_group<0>();  // @fix
    wait_group_read<0>();  // @bug
    y[8] = y[0];  // FAULT
  }
"""),
    "store bounds": Case(
        errors.MemoryFaultError, "which is in no argument array", r"""
  FILL(0);
  proxy_fence();
  __syncthreads();
  if (threadIdx.x == 0) {
    bulk_store(y, s_tile[0], 256);  // @fix
    bulk_store(y + 4, s_tile[0], 256);  // @bug FAULT
    commit();
    wait_group<0>();
  }
"""),
    "mbarrier of another CTA": Case(
        errors.MemoryFaultError, "is in CTA 1 of the cluster, its destination in CTA 0", r"""
  cluster_sync();
  if (threadIdx.x == 0) {
    unsigned rank = blockIdx.x;  // @fix
    unsigned rank = 1;  // @bug
    expect(&bar[0], 256);
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], 256, [%2];"
                 :: "r"(smem(s_tile)), "l"(x), "r"(at_rank(&bar[0], rank)) : "memory");  // FAULT
    wait(&bar[0], 0);
  }
  cluster_sync();
""", cluster=2),
    "multicast beyond the cluster": Case(
        errors.MemoryFaultError, "multicast to CTAs 0x7 of a cluster of 2", r"""
  if (threadIdx.x == 0) expect(&bar[0], 256);
  cluster_sync();
  if (threadIdx.x == 0 && blockIdx.x == 0) {
    unsigned short mask = 3;  // @fix
    unsigned short mask = 7;  // @bug
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
                 " [%0], [%1], 256, [%2], %3;"
                 :: "r"(smem(s_tile)), "l"(x), "r"(smem(&bar[0])), "h"(mask) : "memory");  // FAULT
  }
  wait(&bar[0], 0);
  cluster_sync();
""", cluster=2),
    "copy within a CTA": Case(
        errors.MemoryFaultError, "to that of the same CTA", r"""
  unsigned to = blockIdx.x ^ 1;  // @fix
  unsigned to = blockIdx.x;  // @bug
  FILL(0);
  proxy_fence();
  if (threadIdx.x == 0) expect(&bar[0], 256);
  __syncthreads();
  cluster_sync();
  if (threadIdx.x == 0)
    asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], 256, [%2];"
                 :: "r"(at_rank(s_tile[1], to)), "r"(smem(s_tile)), "r"(at_rank(&bar[0], to)) : "memory");  // FAULT
  wait(&bar[0], 0);
  cluster_sync();
""", cluster=2),
    "end before a copy to another CTA": Case(
        errors.AsyncCopyError, "yet to read: wait for its mbarrier", r"""
  if (blockIdx.x == 1 && threadIdx.x == 0) expect(&bar[0], 256);
  if (blockIdx.x == 0) FILL(0);
  proxy_fence();
  __syncthreads();
  cluster_sync();
  if (blockIdx.x == 0 && threadIdx.x == 0)
    asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], 256, [%2];"
                 :: "r"(at_rank(s_tile, 1)), "r"(smem(s_tile)), "r"(at_rank(&bar[0], 1)) : "memory");  // FAULT
  if (blockIdx.x == 1) wait(&bar[0], 0);
  cluster_sync();  // @fix
""", eager=False, cluster=2),
    "copy to a CTA that has not begun": Case(
        errors.AsyncCopyError, "there is no mbarrier at byte", r"""
  if (blockIdx.x == 1 && threadIdx.x == 0) {
    mbarrier_init(&bar[4], 1);
    expect(&bar[4], 256);
  }
  proxy_fence();
  if (blockIdx.x == 0) FILL(0);
  proxy_fence();
  __syncthreads();
  cluster_sync();  // @fix
  if (blockIdx.x == 0 && threadIdx.x == 0)
    asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], 256, [%2];"
                 :: "r"(at_rank(s_tile, 1)), "r"(smem(s_tile)), "r"(at_rank(&bar[4], 1)) : "memory");  // FAULT
  if (blockIdx.x == 1) wait(&bar[4], 0);
  cluster_sync();
""", eager=False, cluster=2),
}  # fmt: skip


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
