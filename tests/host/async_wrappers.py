"""PTX wrappers for kernels of the tests, and how to run one under the checkers."""

from __future__ import annotations

import numpy as np
import pytest

import cuattn.host as host

WRAPPERS = r"""
typedef unsigned u32;
typedef unsigned long long u64;
#define DEVICE __device__ __forceinline__
DEVICE u32 smem(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DEVICE void init(u32 b, u32 n) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(b), "r"(n) : "memory"); }
DEVICE void fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void inval(u32 b) { asm volatile("mbarrier.inval.shared::cta.b64 [%0];" :: "r"(b) : "memory"); }
DEVICE u64 arrive(u32 b) {
  u64 t;
  asm volatile("mbarrier.arrive.shared::cta.b64 %0, [%1];" : "=l"(t) : "r"(b) : "memory");
  return t;
}
DEVICE u64 arrive_n(u32 b, u32 n) {
  u64 t;
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 %0, [%1], %2;" : "=l"(t) : "r"(b), "r"(n) : "memory");
  return t;
}
DEVICE u64 arrive_drop(u32 b) {
  u64 t;
  asm volatile("mbarrier.arrive_drop.shared::cta.b64 %0, [%1];" : "=l"(t) : "r"(b) : "memory");
  return t;
}
DEVICE void arrive_expect(u32 b, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(b), "r"(bytes) : "memory");
}
DEVICE void expect(u32 b, u32 bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" :: "r"(b), "r"(bytes) : "memory");
}
DEVICE void complete(u32 b, u32 bytes) {
  asm volatile("mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%0], %1;" :: "r"(b), "r"(bytes) : "memory");
}
DEVICE u32 pending(u64 t) {
  u32 n;
  asm volatile("mbarrier.pending_count.b64 %0, %1;" : "=r"(n) : "l"(t));
  return n;
}
DEVICE u32 test(u32 b, u64 t) {
  u32 done;
  asm volatile("{ .reg .pred p; mbarrier.test_wait.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
               : "=r"(done) : "r"(b), "l"(t) : "memory");
  return done;
}
DEVICE u32 test_parity(u32 b, u32 parity) {
  u32 done;
  asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
               : "=r"(done) : "r"(b), "r"(parity) : "memory");
  return done;
}
DEVICE u32 try_parity(u32 b, u32 parity) {
  u32 done;
  asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
               : "=r"(done) : "r"(b), "r"(parity) : "memory");
  return done;
}
DEVICE void wait(u32 b, u32 parity) { while (!try_parity(b, parity)) {} }
DEVICE void named_sync(u32 id, u32 threads) { asm volatile("bar.sync %0, %1;" :: "r"(id), "r"(threads) : "memory"); }
DEVICE void named_arrive(u32 id, u32 threads) {
  asm volatile("bar.arrive %0, %1;" :: "r"(id), "r"(threads) : "memory");
}
DEVICE void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
DEVICE void cluster_sync() { cluster_arrive(); cluster_wait(); }
DEVICE u32 cluster_rank() { u32 r; asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r)); return r; }
DEVICE u32 map_to(u32 address, u32 rank) {
  u32 r;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(address), "r"(rank));
  return r;
}
DEVICE u32 load_cluster(u32 a) {
  u32 v;
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(v) : "r"(a) : "memory");
  return v;
}
DEVICE void store_cluster(u32 a, u32 v) {
  asm volatile("st.shared::cluster.u32 [%0], %1;" :: "r"(a), "r"(v) : "memory");
}
DEVICE void arrive_cluster(u32 b) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" :: "r"(b) : "memory");
}
DEVICE void bulk_store(void* to, u32 from, u32 bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
               :: "l"(to), "r"(from), "r"(bytes) : "memory");
}
DEVICE void bulk_load(u32 to, const void* from, u32 bytes, u32 b) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               :: "r"(to), "l"(from), "r"(bytes), "r"(b) : "memory");
}
DEVICE void bulk_wait() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
template <int N> DEVICE void registers_dec() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(N)); }
template <int N> DEVICE void registers_inc() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(N)); }
"""

#: Every way to schedule a right program.
SCHEDULES = [("eager", 0), ("late", 0), ("random", 1), ("random", 2), ("random", 3)]
CHECKS = ("mem", "init", "race")


def compile_kernel(body: str, *, params: str = "u32* out", bounds: str = "", arch: str = "sm_90a") -> host.RawKernel:
    """The kernel ``k`` with this body."""
    code = f'{WRAPPERS}\nextern "C" __global__ void {bounds} k({params}) {{\n{body}\n}}\n'
    return host.RawModule(code=code, arch=arch).get_function("k")


def run(kernel, out, *args, grid=1, block=32, shared_mem=0, mode="late", seed=0, checks=CHECKS) -> np.ndarray:
    """Launch on a copy of ``out`` and return it."""
    result = out.copy()
    with host.check(*checks), host.schedule(mode, seed):
        kernel((grid,), (block,), (result, *args), shared_mem=shared_mem)
    return result


def results(kernel, out, *args, **options) -> np.ndarray:
    """The result of every schedule, which must be one."""
    first = run(kernel, out, *args, mode="late", **options)
    for mode, seed in SCHEDULES:
        np.testing.assert_array_equal(run(kernel, out, *args, mode=mode, seed=seed, **options), first)
    return first


def expect(error, match, body, *args, out=None, schedules=(("late", 0),), block=32, grid=1, shared_mem=0, **options):
    """The kernel with this body is refused with ``error`` under each of the schedules."""
    kernel = compile_kernel(body, **options)
    out = np.zeros(64, np.uint32) if out is None else out
    for mode, seed in schedules:
        with pytest.raises(error, match=match) as caught:
            run(kernel, out, *args, block=block, grid=grid, mode=mode, seed=seed, shared_mem=shared_mem)
        assert caught.value.kernel == "k"
    return caught.value
