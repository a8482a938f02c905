"""Rules of bulk loads, broken and kept: see test_bulk_faults.py."""

from __future__ import annotations

from bulk_fault_case import Case

from cuattn import errors

LOADS = {
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
}  # fmt: skip
