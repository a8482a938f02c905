"""Bulk copies without a tensor map, to other CTAs of a cluster, in groups, with hints; and how late they land."""

from __future__ import annotations

import bulk_kernels
import numpy as np
import pytest
from bulk_kernels import MODES, PRELUDE, array_of, launch

import cuattn.host as host
from cuattn.runtime.tensor_map import tensor_map

CLUSTER = r"""
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
}
__device__ __forceinline__ unsigned at_rank(const void* p, unsigned rank) {
  unsigned remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(smem(p)), "r"(rank));
  return remote;
}
"""

COPY_SOURCE = (
    PRELUDE
    + CLUSTER
    + r"""
// Words [first, first + n) of x to s_data, then by ordinary stores to y.
extern "C" __global__ void linear(const unsigned* x, unsigned* y, int first, int n) {
  __shared__ __align__(128) unsigned s_data[256];
  __shared__ u64 bar;
  if (threadIdx.x == 0) {
    mbarrier_init(&bar, 1);
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" :: "l"(x + first), "r"(4 * n) : "memory");
    expect(&bar, 4 * n);
    asm volatile("cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes.L2::cache_hint"
                 " [%0], [%1], %2, [%3], %4;"
                 :: "r"(smem(s_data)), "l"(x + first), "r"(4 * n), "r"(smem(&bar)), "l"(policy) : "memory");
  }
  __syncthreads();
  wait(&bar, 0);
  if (threadIdx.x < n) y[threadIdx.x] = s_data[threadIdx.x];
}

// Each CTA of a cluster of four loads its quarter of x to all the CTAs of `mask`; each writes what it got.
extern "C" __global__ void __cluster_dims__(4, 1, 1) multicast(const unsigned* x, unsigned* y, unsigned mask) {
  __shared__ __align__(128) unsigned s_data[4][32];
  __shared__ u64 bar;
  unsigned rank = blockIdx.x;
  if (threadIdx.x == 0) {
    mbarrier_init(&bar, 1);
    expect(&bar, mask >> rank & 1 ? 512 : 0);
  }
  cluster_sync();
  if (threadIdx.x == 0)
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
                 " [%0], [%1], 128, [%2], %3;"
                 :: "r"(smem(s_data[rank])), "l"(x + 32 * rank), "r"(smem(&bar)), "h"((unsigned short)mask) : "memory");
  wait(&bar, 0);
  for (int i = 0; i < 4; i++)
    if (mask >> rank & 1) y[128 * rank + 32 * i + threadIdx.x] = s_data[i][threadIdx.x];
  cluster_sync();
}

// A box by CTA 1 to both CTAs of the cluster.
extern "C" __global__ void __cluster_dims__(2, 1, 1) multicast_box(const __grid_constant__ TensorMap map, unsigned* y) {
  __shared__ __align__(1024) unsigned s_data[256];
  __shared__ u64 bar;
  if (threadIdx.x == 0) {
    mbarrier_init(&bar, 1);
    expect(&bar, 1024);
  }
  cluster_sync();
  if (threadIdx.x == 0 && blockIdx.x == 1)
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
                 " [%0], [%1, {%2, %2}], [%3], %4;"
                 :: "r"(smem(s_data)), "l"(&map), "r"(0), "r"(smem(&bar)), "h"((unsigned short)3) : "memory");
  wait(&bar, 0);
  for (int i = threadIdx.x; i < 256; i += blockDim.x) y[256 * blockIdx.x + i] = s_data[i];
  cluster_sync();
}

// A box by CTA 0 straight into the shared memory of CTA 1, whose mbarrier counts it.
extern "C" __global__ void __cluster_dims__(2, 1, 1) remote_box(const __grid_constant__ TensorMap map, unsigned* y) {
  __shared__ __align__(1024) unsigned s_data[256];
  __shared__ u64 bar;
  if (threadIdx.x == 0) {
    mbarrier_init(&bar, 1);
    expect(&bar, 1024 * blockIdx.x);
  }
  cluster_sync();
  if (threadIdx.x == 0 && blockIdx.x == 0)
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 " [%0], [%1, {%2, %2}], [%3];"
                 :: "r"(at_rank(s_data, 1)), "l"(&map), "r"(0), "r"(at_rank(&bar, 1)) : "memory");
  if (blockIdx.x == 1) {
    wait(&bar, 0);
    for (int i = threadIdx.x; i < 256; i += blockDim.x) y[i] = s_data[i];
  }
  cluster_sync();
}

// Every CTA sends its 32 words to its neighbor.
extern "C" __global__ void __cluster_dims__(4, 1, 1) ring(const unsigned* x, unsigned* y) {
  __shared__ __align__(16) unsigned s_mine[32], s_got[32];
  __shared__ u64 bar;
  unsigned rank = blockIdx.x, next = (rank + 1) % 4;
  s_mine[threadIdx.x] = x[32 * rank + threadIdx.x];
  proxy_fence();
  if (threadIdx.x == 0) {
    mbarrier_init(&bar, 1);
    expect(&bar, 128);
  }
  cluster_sync();
  if (threadIdx.x == 0)
    asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], 128, [%2];"
                 :: "r"(at_rank(s_got, next)), "r"(smem(s_mine)), "r"(at_rank(&bar, next)) : "memory");
  wait(&bar, 0);
  y[32 * rank + threadIdx.x] = s_got[threadIdx.x];
  cluster_sync();
}

// y[i] = x[i] + 1 through two stages of shared memory: a stage is filled anew when its store has read it.
extern "C" __global__ void stages(const unsigned* x, unsigned* y, int num_tiles) {
  __shared__ __align__(16) unsigned s_data[2][32];
  for (int i = 0; i < num_tiles; i++) {
    if (threadIdx.x == 0) wait_group_read<1>();
    __syncthreads();
    s_data[i % 2][threadIdx.x] = x[32 * i + threadIdx.x] + 1;
    proxy_fence();
    __syncthreads();
    if (threadIdx.x == 0) {
      bulk_store(y + 32 * i, s_data[i % 2], 128);
      commit();
    }
  }
  if (threadIdx.x == 0) wait_group_read<0>();
}

// Written, waited for and read again by the thread that stored.
extern "C" __global__ void there_and_back(unsigned* y, unsigned* z) {
  __shared__ __align__(16) unsigned s_data[4];
  if (threadIdx.x == 0) {
    for (int i = 0; i < 4; i++) s_data[i] = 7 + i;
    proxy_fence();
    bulk_store(y, s_data, 16);
    commit();
    wait_group<0>();
    for (int i = 0; i < 4; i++) z[i] = y[i];
  }
}

// Every lane stores its own 16 bytes, and waits for its own group.
extern "C" __global__ void lanes(unsigned* y) {
  __shared__ __align__(16) unsigned s_data[32][4];
  for (int round = 0; round < 3; round++) {
    for (int i = 0; i < 4; i++) s_data[threadIdx.x][i] = 1000 * round + 4 * threadIdx.x + i;
    proxy_fence();
    bulk_store(y + 128 * round + 4 * threadIdx.x, s_data[threadIdx.x], 16);
    commit();
    wait_group_read<0>();
  }
}

// CTA 0 stores, waits and raises a flag; CTA 1 reads what it stored when it sees that.
extern "C" __global__ void published(unsigned* y, unsigned* flag, unsigned* z) {
  __shared__ __align__(16) unsigned s_data[4];
  if (threadIdx.x != 0) return;
  if (blockIdx.x == 0) {
    for (int i = 0; i < 4; i++) s_data[i] = 7 + i;
    proxy_fence();
    bulk_store(y, s_data, 16);
    commit();
    wait_group<0>();
    __threadfence();
    atomicExch(flag, 1u);
  } else {
    while (atomicAdd(flag, 0u) == 0) __nanosleep(20);
    __threadfence();
    for (int i = 0; i < 4; i++) z[4 * blockIdx.x + i] = y[i];
  }
}

// Hints change nothing.
extern "C" __global__ void hints(const __grid_constant__ TensorMap map, const __grid_constant__ TensorMap out,
                                 unsigned* sum) {
  __shared__ __align__(1024) unsigned s_data[256];
  __shared__ u64 bar;
  if (threadIdx.x != 0) return;
  u64 keep, pass;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(keep));
  asm volatile("createpolicy.fractional.L2::evict_first.L2::evict_unchanged.b64 %0, 0.5;" : "=l"(pass));
  unsigned first;
  asm volatile("ld.global.L2::cache_hint.u32 %0, [%1], %2;" : "=r"(first) : "l"(sum), "l"(keep) : "memory");
  asm volatile("st.global.L2::cache_hint.u32 [%0], %1, %2;" :: "l"(sum), "r"(first), "l"(keep) : "memory");
  asm volatile("fence.proxy.async.global;" ::: "memory");
  asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%0, {%1, %1}];" :: "l"(&map), "r"(0) : "memory");
  asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global.L2::cache_hint [%0, {%1, %1}], %2;"
               :: "l"(&map), "r"(0), "l"(keep) : "memory");
  mbarrier_init(&bar, 1);
  expect(&bar, 1024);
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
               " [%0], [%1, {%2, %2}], [%3], %4;"
               :: "r"(smem(s_data)), "l"(&map), "r"(0), "r"(smem(&bar)), "l"(keep) : "memory");
  wait(&bar, 0);
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group.L2::cache_hint [%0, {%1, %1}], [%2], %3;"
               :: "l"(&out), "r"(0), "r"(smem(s_data)), "l"(pass) : "memory");
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.L2::cache_hint.add.u32 [%0], [%1], 1024, %2;"
               :: "l"(sum), "r"(smem(s_data)), "l"(pass) : "memory");
  commit();
  wait_group<0>();
}

// Wrong on purpose: looks before it waits, and changes a source before it has been read.
extern "C" __global__ void impatient(const unsigned* x, unsigned* seen, unsigned* sent) {
  __shared__ __align__(16) unsigned s_in[4], s_out[4];
  __shared__ u64 bar;
  mbarrier_init(&bar, 1);
  expect(&bar, 16);
  bulk_load(s_in, x, 16, &bar);
  for (int i = 0; i < 4; i++) seen[i] = reinterpret_cast<volatile unsigned*>(s_in)[i];
  wait(&bar, 0);
  for (int i = 0; i < 4; i++) seen[4 + i] = reinterpret_cast<volatile unsigned*>(s_in)[i];
  for (int i = 0; i < 4; i++) s_out[i] = 1;
  proxy_fence();
  bulk_store(sent, s_out, 16);
  commit();
  for (int i = 0; i < 4; i++) reinterpret_cast<volatile unsigned*>(s_out)[i] = 2;
  wait_group<0>();
}
"""
)


@pytest.fixture(scope="module")
def copies():
    return host.RawModule(code=COPY_SOURCE, arch="sm_90a")


def words(count, seed=0):
    return array_of(count, np.uint32, seed)


@pytest.mark.parametrize(("mode", "seed"), MODES)
def test_a_load_without_a_tensor_map(copies, mode, seed):
    x = words(300)
    for first, count in ((0, 64), (4, 4), (300 - 64, 64), (0, 0)):
        y = np.zeros(64, np.uint32)
        launch(copies.get_function("linear"), (x, y, np.int32(first), np.int32(count)), mode=mode, seed=seed)
        assert (y[:count] == x[first : first + count]).all() and not y[count:].any()


@pytest.mark.parametrize(("mode", "seed"), MODES)
@pytest.mark.parametrize("mask", [0b1111, 0b0110, 0b1000])
def test_multicast_reaches_the_ctas_of_the_mask(copies, mask, mode, seed):
    x, y = words(128), np.zeros((4, 128), np.uint32)
    launch(copies.get_function("multicast"), (x, y, np.uint32(mask)), grid=4, block=32, mode=mode, seed=seed)
    for rank in range(4):
        assert (y[rank] == (x if mask >> rank & 1 else 0)).all()


@pytest.mark.parametrize(("mode", "seed"), MODES)
def test_boxes_for_other_ctas(copies, mode, seed):
    array = array_of((8, 32), np.uint32)
    described = tensor_map(array, (32, 8), swizzle="128B")
    wanted = bulk_kernels.tile(array, (32, 8), (1, 1), (0, 0), swizzle="128B")
    expected = np.zeros(1024, np.uint8)
    expected[list(wanted)] = list(wanted.values())
    y = np.zeros((2, 256), np.uint32)
    launch(copies.get_function("multicast_box"), (described, y), grid=2, mode=mode, seed=seed)
    assert (y.view(np.uint8) == expected).all()
    y[:] = 0
    launch(copies.get_function("remote_box"), (described, y), grid=2, mode=mode, seed=seed)
    assert (y[0].view(np.uint8) == expected).all()


@pytest.mark.parametrize(("mode", "seed"), MODES)
def test_copies_to_a_neighbor(copies, mode, seed):
    x, y = words(128), np.zeros(128, np.uint32)
    launch(copies.get_function("ring"), (x, y), grid=4, block=32, mode=mode, seed=seed)
    assert (y.reshape(4, 32) == np.roll(x.reshape(4, 32), 1, axis=0)).all()


@pytest.mark.parametrize(("mode", "seed"), MODES)
def test_stores_in_groups(copies, mode, seed):
    x, y = words(32 * 5), host.empty(32 * 5, np.uint32)
    launch(copies.get_function("stages"), (x, y, np.int32(5)), block=32, mode=mode, seed=seed)
    host.finish(y)
    assert (y == x + 1).all()
    y, z = np.zeros(4, np.uint32), np.zeros(4, np.uint32)
    launch(copies.get_function("there_and_back"), (y, z), mode=mode, seed=seed)
    assert z.tolist() == [7, 8, 9, 10]


@pytest.mark.parametrize(("mode", "seed"), MODES)
def test_each_lane_has_its_own_groups(copies, mode, seed):
    y = np.zeros((3, 128), np.uint32)
    launch(copies.get_function("lanes"), (y,), block=32, mode=mode, seed=seed)
    assert (y == np.arange(128) + 1000 * np.arange(3)[:, None]).all()


@pytest.mark.parametrize(("mode", "seed"), MODES)
def test_a_store_that_is_waited_for_can_be_published(copies, mode, seed):
    y, flag, z = np.zeros(4, np.uint32), np.zeros(1, np.uint32), np.zeros((2, 4), np.uint32)
    launch(copies.get_function("published"), (y, flag, z), grid=2, block=32, mode=mode, seed=seed)
    assert z[1].tolist() == [7, 8, 9, 10]


def test_hints_change_nothing(copies):
    array, out, total = array_of((8, 32), np.uint32), array_of((8, 32), np.uint32, 1), array_of((8, 32), np.uint32, 2)
    expected = total + array
    launch(copies.get_function("hints"), (tensor_map(array, (32, 8)), tensor_map(out, (32, 8)), total), block=32)
    assert (out == array).all() and (total == expected).all()


def test_copies_land_late(copies):
    """What a kernel sees that does not wait: poison, and a store of what was written behind its back."""
    x = words(4)
    for mode, early, sent in (("eager", x.tolist(), 1), ("late", [0xFFFFFFFF] * 4, 2)):
        seen, target = np.zeros(8, np.uint32), np.zeros(4, np.uint32)
        launch(copies.get_function("impatient"), (x, seen, target), block=1, mode=mode, checks=())
        assert seen[:4].tolist() == early and seen[4:].tolist() == x.tolist()
        assert target.tolist() == [sent] * 4


def test_the_assembler_takes_every_form():
    assert bulk_kernels.assembles(COPY_SOURCE)
