// PTX instructions that CUDA C has no word for, one function each. Inline assembly stands here, and for Hopper's own
// instructions in hopper/ptx_sm90.cuh and hopper/ptx_wgmma.cuh; nowhere else.
//
// Asynchronous copies and waits carry a "memory" clobber, so that the compiler keeps them in program order with the
// plain loads and stores around them. ldmatrix carries one as well: it reads shared memory that cp.async wrote behind
// the compiler's back.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// 32-bit shared-memory address of a generic pointer, as the instructions below want it.
__device__ __forceinline__ unsigned smem_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// --- cp.async: global to shared memory, without a register in between ------------------------------------------------

// Copies `src_bytes` (0 to 16) and fills the rest of the 16 bytes at `s_dst` with zeros. Both addresses are multiples
// of 16; with src_bytes == 0 the source is not read.
__device__ __forceinline__ void cp_async_16(unsigned s_dst, const void* g_src, int src_bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(s_dst), "l"(g_src), "r"(src_bytes) : "memory");
}

__device__ __forceinline__ void cp_async_8(unsigned s_dst, const void* g_src, int src_bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(s_dst), "l"(g_src), "r"(src_bytes) : "memory");
}

__device__ __forceinline__ void cp_async_4(unsigned s_dst, const void* g_src, int src_bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(s_dst), "l"(g_src), "r"(src_bytes) : "memory");
}

// Ends the group of copies that this thread has issued since the last commit.
__device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most NUM_PENDING of this thread's latest groups are still under way.
template <int NUM_PENDING>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(NUM_PENDING) : "memory");
}

// --- ldmatrix: 8x8 matrices of 16-bit elements from shared memory into mma fragments ---------------------------------

// Four matrices; lanes 8i..8i+7 give the addresses of the rows of matrix i, which arrives in frag[i].
__device__ __forceinline__ void ldmatrix_x4(unsigned (&frag)[4], unsigned s_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(frag[0]), "=r"(frag[1]), "=r"(frag[2]), "=r"(frag[3])
                 : "r"(s_row)
                 : "memory");
}

// The same, each matrix transposed on the way.
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&frag)[4], unsigned s_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(frag[0]), "=r"(frag[1]), "=r"(frag[2]), "=r"(frag[3])
                 : "r"(s_row)
                 : "memory");
}

// One float of a tile that cp.async wrote.
__device__ __forceinline__ float load_shared_float(unsigned s_src) {
    float x;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(s_src) : "memory");
    return x;
}

// --- mma: acc[16x8] += a[16xK] * b[Kx8], fp32 accumulation; K is 16, and 8 for tf32 ----------------------------------

// The element type is a tag: fragments of all types are plain 32-bit registers.
__device__ __forceinline__ void mma(__half, float (&acc)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma(__nv_bfloat16, float (&acc)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// tf32
__device__ __forceinline__ void mma(float, float (&acc)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The nearest number with ten bits of mantissa, ties away from zero.
__device__ __forceinline__ unsigned round_to_tf32(float x) {
    unsigned y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
}

// Two floats rounded to a pair of elements; `low` in the low half of the register.
__device__ __forceinline__ unsigned pack_pair(__half, float low, float high) {
    unsigned pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ unsigned pack_pair(__nv_bfloat16, float low, float high) {
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// --- arithmetic ------------------------------------------------------------------------------------------------------

// 1 / x to 1 ulp; flushes denormal operands and results to zero.
__device__ __forceinline__ float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 2^x to about 2 ulp; flushes denormal results to zero. exp2(-inf) = 0, exp2(NaN) = NaN.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// x, of which the compiler forgets where it comes from: what depends on it is computed here, and not kept in registers
// from before a loop.
__device__ __forceinline__ int forget_origin(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// blockIdx.x, read at this place: what depends on it is computed again, and not kept in registers from an earlier use.
__device__ __forceinline__ unsigned reread_cta_idx() {
    unsigned cta_idx;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(cta_idx));
    return cta_idx;
}
