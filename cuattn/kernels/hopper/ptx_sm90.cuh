// PTX instructions of Hopper (sm_90a), one function each: asynchronous barriers, bulk tensor copies, and what a
// warp-specialised kernel needs besides. wgmma has a file of its own, ptx_wgmma.cuh.
//
// Like those of ptx.cuh, asynchronous operations and waits carry a "memory" clobber, so that the compiler keeps them in
// program order with the plain loads and stores around them.
#pragma once
#include "common/ptx.cuh"

// What cuTensorMapEncodeTiled makes: where a tile copy finds its array, and how the tile lies in shared memory.
struct alignas(64) TensorMap {
    unsigned long long opaque[16];
};

// --- mbarrier: a barrier in shared memory that counts arrivals and bytes ---------------------------------------------

__device__ __forceinline__ void mbarrier_init(unsigned s_barrier, int num_arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(s_barrier), "r"(num_arrivals) : "memory");
}

// Makes initialised barriers known to the asynchronous proxy.
__device__ __forceinline__ void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(unsigned s_barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(s_barrier) : "memory");
}

// Arrives, and announces so many bytes of copies that complete on this barrier.
__device__ __forceinline__ void mbarrier_arrive_expect(unsigned s_barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(s_barrier), "r"(bytes) : "memory");
}

// Waits until the phase of this parity is complete. A fresh barrier passes parity 1.
__device__ __forceinline__ void mbarrier_wait(unsigned s_barrier, unsigned parity) {
    asm volatile(
        "{\n"
        ".reg .pred complete;\n"
        "AGAIN:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1;\n"
        "@complete bra DONE;\n"
        "bra AGAIN;\n"
        "DONE:\n"
        "}\n" ::"r"(s_barrier), "r"(parity) : "memory");
}

// --- bulk tensor copies: a box of an array into shared memory, issued by one thread ----------------------------------

// L2 policies, as createpolicy makes them for a whole access.
constexpr unsigned long long L2_EVICT_FIRST = 0x12F0000000000000ull;
constexpr unsigned long long L2_EVICT_LAST = 0x14F0000000000000ull;

__device__ __forceinline__ void tma_load(unsigned s_dst, const TensorMap& map, unsigned s_barrier,
                                         unsigned long long policy, int c0, int c1, int c2, int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%4, %5, %6, %7}], [%2], %3;" ::"r"(s_dst),
        "l"(&map), "r"(s_barrier), "l"(policy), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}

__device__ __forceinline__ void tma_load(unsigned s_dst, const TensorMap& map, unsigned s_barrier,
                                         unsigned long long policy, int c0, int c1, int c2, int c3, int c4) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%4, %5, %6, %7, %8}], [%2], %3;" ::"r"(s_dst),
        "l"(&map), "r"(s_barrier), "l"(policy), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
        : "memory");
}

__device__ __forceinline__ void tma_prefetch_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// --- 8-bit tiles -----------------------------------------------------------------------------------------------------

// Four 8x8 matrices of 16-bit elements to shared memory; lanes 8i..8i+7 give the addresses of the rows of matrix i.
__device__ __forceinline__ void stmatrix_x4(unsigned s_row, const unsigned (&frag)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(s_row), "r"(frag[0]),
                 "r"(frag[1]), "r"(frag[2]), "r"(frag[3])
                 : "memory");
}

// Four floats rounded to e4m3, `x0` in the lowest byte.
__device__ __forceinline__ unsigned pack_e4m3(float x0, float x1, float x2, float x3) {
    unsigned packed;
    asm("{\n"
        ".reg .b16 low, high;\n"
        "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
        "mov.b32 %0, {low, high};\n"
        "}\n"
        : "=r"(packed)
        : "f"(x0), "f"(x1), "f"(x2), "f"(x3));
    return packed;
}

// --- warpgroups ------------------------------------------------------------------------------------------------------

// Shared memory that this thread has written becomes visible to copies and wgmma that are issued later.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

template <int REGISTERS>
__device__ __forceinline__ void release_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void claim_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Named barriers of `num_threads` threads. Number 0 belongs to __syncthreads.
__device__ __forceinline__ void named_barrier_sync(int barrier, int num_threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(num_threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int barrier, int num_threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(num_threads) : "memory");
}
