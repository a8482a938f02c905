"""Rules of bulk stores, and of bulk copies within a cluster, broken and kept: see test_bulk_faults.py."""

from __future__ import annotations

from bulk_fault_case import Case

from cuattn import errors

STORES = {
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
