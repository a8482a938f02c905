// wgmma: a warpgroup multiplies [64 x 16] by [16 x N] elements of 16 bits, or [64 x 32] by [32 x N] of 8 bits, into
// fp32 accumulators, asynchronously.
//
// Warp w of the warpgroup holds rows 16 w to 16 w + 15 of the accumulator, in N / 8 tiles laid out as those of mma.sync
// (frag_acc_row and frag_acc_col of mma.cuh). a comes from shared memory or, as fragments of mma.sync, from registers;
// b comes from shared memory. Neither accumulators nor fragments may be touched between the issue and the wait.
//
// Tiles in shared memory are columns of SPAN_BYTES, written by bulk tensor copies with the 128-byte swizzle: row r of a
// column begins at byte r * SPAN_BYTES, and its 16-byte units are permuted by r % 8. They start on multiples of 1024.
#pragma once
#include "hopper/ptx_wgmma.cuh"

constexpr int SPAN_BYTES = 128;
constexpr int SWIZZLE_ROWS = 8;  // rows after which the permutation repeats
constexpr int WARPGROUP_SIZE = 128;
constexpr int WGMMA_M = 64;
constexpr int WGMMA_K_BYTES = 32;

// Descriptor of an operand in shared memory: start address, distance of neighbouring columns (MN-major operands only),
// distance of groups of eight rows; all in bytes, kept in units of 16. A multiple of 16 bytes further on is
// descriptor + bytes / 16.
__device__ __forceinline__ unsigned long long wgmma_descriptor(unsigned s_tile, int column_bytes) {
    constexpr unsigned long long SWIZZLE_128B = 1ull << 62;
    constexpr unsigned long long GROUP_BYTES = SWIZZLE_ROWS * SPAN_BYTES;
    const unsigned long long start = s_tile / 16, column = column_bytes / 16;
    return SWIZZLE_128B | GROUP_BYTES / 16 << 32 | column << 16 | start;
}
