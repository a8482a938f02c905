"""Clusters: which CTAs form one, shared memory of the others, cluster barriers, arrivals at their mbarriers."""

from __future__ import annotations

import numpy as np
import pytest
from async_wrappers import compile_kernel, results, run

from cuattn import errors, host

OUT = np.zeros(128, np.uint32)
PAIR = "__cluster_dims__(2, 1, 1)"


def test_special_registers_of_a_cluster():
    names = [
        f"%{name}.{axis}" for name in ("cluster_ctaid", "cluster_nctaid", "clusterid", "nclusterid") for axis in "xyz"
    ]
    names += ["%cluster_ctarank", "%cluster_nctarank", "%ctaid.x", "%ctaid.y"]
    reads = "\n".join(f'asm volatile("mov.u32 %0, %{name};" : "=r"(mine[{i}]));' for i, name in enumerate(names))
    body = f"""
    u32* mine = out + 16 * (blockIdx.x + gridDim.x * blockIdx.y);
    {reads}
    """
    kernel = compile_kernel(body, bounds="__cluster_dims__(2, 2, 1)")
    out = np.zeros((6, 4, 16), np.uint32)
    with host.check("mem", "init", "race"):
        kernel((4, 6), (1,), (out,))
    for y in range(6):
        for x in range(4):
            expected = [x % 2, y % 2, 0, 2, 2, 1, x // 2, y // 2, 0, 2, 3, 1, x % 2 + 2 * (y % 2), 4, x, y]
            assert out[y, x].tolist() == expected


def test_without_cluster_dims_every_cta_is_a_cluster():
    body = """
    u32 size, explicit_cluster;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    asm volatile("{ .reg .pred p; mov.pred p, %%is_explicit_cluster; selp.u32 %0, 1, 0, p; }" : "=r"(explicit_cluster));
    out[4 * blockIdx.x] = size; out[4 * blockIdx.x + 1] = cluster_rank(); out[4 * blockIdx.x + 2] = explicit_cluster;
    cluster_sync();
    out[4 * blockIdx.x + 3] = 9;
    """
    assert results(compile_kernel(body), np.zeros(8, np.uint32), grid=2, block=1).tolist() == [1, 0, 0, 9] * 2


EXCHANGE = """
__shared__ u32 data[32];
u32 rank = cluster_rank(), size = gridDim.x;
data[threadIdx.x] = 100 * rank + threadIdx.x;
cluster_sync();
for (u32 other = 0; other < 4; other++)
  out[128 * rank + 32 * other + threadIdx.x] = load_cluster(map_to(smem(&data[31 - threadIdx.x]), other));
cluster_sync();
"""


def test_every_cta_reads_the_shared_memory_of_every_other():
    kernel = compile_kernel(EXCHANGE, bounds="__cluster_dims__(4, 1, 1)")
    out = results(kernel, np.zeros(512, np.uint32), grid=4).reshape(4, 4, 32)
    expected = 100 * np.arange(4)[:, None] + np.arange(31, -1, -1)
    np.testing.assert_array_equal(out, np.broadcast_to(expected, (4, 4, 32)))


def test_generic_addresses_and_ranks():
    body = """
    __shared__ u32 data[32];
    u32 rank = cluster_rank(), back, any, own;
    data[threadIdx.x] = 0;
    cluster_sync();
    u32* theirs;
    asm volatile("mapa.u64 %0, %1, %2;" : "=l"(theirs) : "l"(data + threadIdx.x), "r"(rank ^ 1));
    atomicAdd(theirs, 10 + threadIdx.x);
    asm volatile("getctarank.u64 %0, %1;" : "=r"(back) : "l"(theirs));
    asm volatile("{ .reg .pred p; isspacep.shared::cluster p, %1; selp.u32 %0, 1, 0, p; }" : "=r"(any) : "l"(theirs));
    asm volatile("{ .reg .pred p; isspacep.shared::cta p, %1; selp.u32 %0, 1, 0, p; }" : "=r"(own) : "l"(theirs));
    cluster_sync();
    out[64 * blockIdx.x + threadIdx.x] = data[threadIdx.x];
    out[64 * blockIdx.x + 32 + threadIdx.x] = back + 16 * any + 32 * own;
    """
    out = results(compile_kernel(body, bounds=PAIR), OUT, grid=2).reshape(2, 2, 32)
    np.testing.assert_array_equal(out[:, 0], np.broadcast_to(10 + np.arange(32), (2, 32)))
    assert (out[0, 1] == 17).all() and (out[1, 1] == 16).all()


def test_a_remote_mbarrier_hands_over_what_was_stored_before():
    body = """
    __shared__ u32 data[32];
    __shared__ alignas(8) u64 bar;
    u32 rank = cluster_rank();
    if (threadIdx.x == 0) {
      init(smem(&bar), 32);
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    cluster_sync();
    if (rank == 1) {
      store_cluster(map_to(smem(&data[threadIdx.x]), 0), 3 * threadIdx.x);
      arrive_cluster(map_to(smem(&bar), 0));
    } else {
      wait(smem(&bar), 0);
      out[threadIdx.x] = data[31 - threadIdx.x];
    }
    cluster_sync();
    """
    out = results(compile_kernel(body, bounds=PAIR), OUT, grid=2)
    np.testing.assert_array_equal(out[:32], 3 * np.arange(31, -1, -1))


def test_work_between_arrive_and_wait_and_threads_that_have_exited():
    body = """
    __shared__ u32 data[64];
    if (threadIdx.x >= 32 && cluster_rank() == 1) return;    // a warp that never takes part
    data[threadIdx.x] = threadIdx.x;
    cluster_arrive();
    out[64 * blockIdx.x + threadIdx.x] = 1;
    cluster_wait();
    u32 theirs = map_to(smem(&data[threadIdx.x]), 1 - cluster_rank());
    if (threadIdx.x < 32) out[64 * blockIdx.x + threadIdx.x] += load_cluster(theirs);
    cluster_sync();
    """
    out = results(compile_kernel(body, bounds=PAIR), OUT, grid=2, block=64).reshape(2, 64)
    np.testing.assert_array_equal(out[:, :32], np.broadcast_to(1 + np.arange(32), (2, 32)))
    assert (out[0, 32:] == 1).all() and (out[1, 32:] == 0).all()


def test_lanes_arrive_and_wait_on_paths_of_their_own():
    body = """
    __shared__ u32 data[32];
    data[threadIdx.x] = 100 * cluster_rank() + threadIdx.x;
    if (threadIdx.x < 16) {
      asm volatile("barrier.cluster.arrive.release;" ::: "memory");
      out[32 * blockIdx.x + threadIdx.x] = 1;
      asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
    } else {
      out[32 * blockIdx.x + threadIdx.x] = 2;
      asm volatile("barrier.cluster.arrive;" ::: "memory");
      asm volatile("barrier.cluster.wait;" ::: "memory");
    }
    out[32 * blockIdx.x + threadIdx.x] += load_cluster(map_to(smem(&data[31 - threadIdx.x]), 1 - cluster_rank()));
    cluster_sync();
    """
    out = results(compile_kernel(body, bounds=PAIR), OUT, grid=2)[:64].reshape(2, 32)
    theirs = np.arange(31, -1, -1) + np.where(np.arange(32) < 16, 1, 2)
    np.testing.assert_array_equal(out, [100 + theirs, theirs])


def test_a_cluster_barrier_orders_global_memory_too():
    body = """
    out[32 * cluster_rank() + threadIdx.x] = threadIdx.x;
    cluster_sync();
    out[64 + 32 * cluster_rank() + threadIdx.x] = out[32 * (1 - cluster_rank()) + 31 - threadIdx.x];
    """
    out = results(compile_kernel(body, bounds=PAIR), OUT, grid=2)
    np.testing.assert_array_equal(out[64:].reshape(2, 32), np.broadcast_to(np.arange(31, -1, -1), (2, 32)))


def test_atomics_on_the_shared_memory_of_another_cta():
    body = """
    __shared__ u32 sum;
    if (threadIdx.x == 0) sum = 0;
    cluster_sync();
    u32 old;
    asm volatile("atom.shared::cluster.add.u32 %0, [%1], %2;"
                 : "=r"(old) : "r"(map_to(smem(&sum), 0)), "r"(threadIdx.x) : "memory");
    asm volatile("red.shared::cluster.add.u32 [%0], %1;" :: "r"(map_to(smem(&sum), 0)), "r"(1) : "memory");
    cluster_sync();
    if (blockIdx.x == 0 && threadIdx.x == 0) out[0] = sum;
    """
    assert results(compile_kernel(body, bounds=PAIR), OUT, grid=2)[0] == 2 * (496 + 32)


def test_many_clusters_run_apart():
    body = """
    __shared__ u32 data;
    data = blockIdx.x;
    cluster_sync();
    out[blockIdx.x] = load_cluster(map_to(smem(&data), 1 - cluster_rank()));
    cluster_sync();
    """
    out = results(compile_kernel(body, bounds=PAIR), np.zeros(40, np.uint32), grid=40, block=1)
    np.testing.assert_array_equal(out, np.arange(40) ^ 1)


def test_a_grid_that_clusters_do_not_divide_is_refused():
    kernel = compile_kernel("out[blockIdx.x] = 1;", bounds=PAIR)
    with pytest.raises(errors.LaunchError, match=r"grid\.x is 3, .*multiples of the cluster's 2"):
        run(kernel, OUT, grid=3, block=1)
