// Which lane of a warp holds which element of a tensor-core fragment: written here once, used by every mma kernel.
//
// mma.m16n8k16 multiplies a [16 x 16] by b [16 x 8] of 16-bit elements, mma.m16n8k8 a [16 x 8] by b [8 x 8] of tf32: 32
// bytes of k either way. Elements of a row-major a tile and of a b tile are fetched with ldmatrix, for which each lane
// gives the address of 16 bytes of a row.
#pragma once
#include "common/ptx.cuh"

constexpr int WARP_SIZE = 32;
constexpr int MMA_M = 16;
constexpr int MMA_N = 8;
constexpr int MMA_STEP_BYTES = 32;  // of k: 16 elements of 16 bits, 8 of 32

// a fragment from a [16 rows x 32 bytes of k] tile stored row by row: ldmatrix_x4 with this lane's row and byte.
__device__ __forceinline__ int frag_a_row(int lane_idx) { return lane_idx % 16; }
__device__ __forceinline__ int frag_a_bytes(int lane_idx) { return lane_idx / 16 * 16; }

// Two b fragments (n 0..7 in registers 0 and 1, n 8..15 in 2 and 3) from a [16 n x 32 bytes of k] tile: ldmatrix_x4.
__device__ __forceinline__ int frag_b_n(int lane_idx) { return lane_idx % 8 + lane_idx / 16 * 8; }
__device__ __forceinline__ int frag_b_bytes(int lane_idx) { return lane_idx / 8 % 2 * 16; }

// The same two b fragments of 16-bit elements from a tile stored the other way, [16 k x 16 n]: ldmatrix_x4_trans.
__device__ __forceinline__ int frag_b_trans_k(int lane_idx) { return lane_idx % 16; }
__device__ __forceinline__ int frag_b_trans_bytes(int lane_idx) { return lane_idx / 16 * 16; }

// a fragment of 16-bit elements from a tile stored the other way, [16 k x 16 rows]: ldmatrix_x4_trans.
__device__ __forceinline__ int frag_a_trans_k(int lane_idx) { return lane_idx % 8 + lane_idx / 16 * 8; }
__device__ __forceinline__ int frag_a_trans_bytes(int lane_idx) { return lane_idx / 8 % 2 * 16; }

// Accumulator [16 x 8]: acc[i] is at row frag_acc_row(lane) + 8 (i / 2), column frag_acc_col(lane) + i % 2. So the four
// lanes of a quad hold a row between them, and every lane holds elements of two rows, eight apart.
__device__ __forceinline__ int frag_acc_row(int lane_idx) { return lane_idx / 4; }
__device__ __forceinline__ int frag_acc_col(int lane_idx) { return lane_idx % 4 * 2; }

// Two accumulators side by side, [16 x 16], rounded and reused as an a fragment: the maps agree, so nothing moves.
template <typename Element>
__device__ __forceinline__ void frag_a_from_acc(unsigned (&frag_a)[4], const float (&left)[4],
                                                const float (&right)[4]) {
    frag_a[0] = pack_pair(Element(), left[0], left[1]);
    frag_a[1] = pack_pair(Element(), left[2], left[3]);
    frag_a[2] = pack_pair(Element(), right[0], right[1]);
    frag_a[3] = pack_pair(Element(), right[2], right[3]);
}

// Two neighbouring accumulated numbers, rounded and stored.
template <typename Element>
__device__ __forceinline__ void store_pair(Element* s_pair, float left, float right) {
    *reinterpret_cast<unsigned*>(s_pair) = pack_pair(Element(), left, right);
}
__device__ __forceinline__ void store_pair(float* s_pair, float left, float right) {
    *reinterpret_cast<float2*>(s_pair) = make_float2(left, right);
}

// Numbers [0, num_cols) of a row of accumulators side by side (`half` 1: of the row eight below), times a factor, to
// memory: a quad writes 32 bytes of each. `pairs`: the row begins at a multiple of 8 bytes.
template <int TILES>
__device__ __forceinline__ void store_acc_row(float* g_row, const float (&acc)[TILES][4], int half, float factor,
                                              int num_cols, bool pairs, int lane_idx) {
#pragma unroll
    for (int e = 0; e < TILES; e++) {
        const int col = e * MMA_N + frag_acc_col(lane_idx);
        const float left = acc[e][2 * half] * factor, right = acc[e][2 * half + 1] * factor;
        if (pairs && col + 1 < num_cols) {
            store_pair(g_row + col, left, right);
        } else {
            if (col < num_cols) g_row[col] = left;
            if (col + 1 < num_cols) g_row[col + 1] = right;
        }
    }
}

// Fragments of 16-bit elements are ready for mma as they were fetched; those of floats are rounded to tf32 first.
template <typename Element>
__device__ __forceinline__ void round_fragment(Element, unsigned (&)[4]) {}
__device__ __forceinline__ void round_fragment(float, unsigned (&frag)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) frag[i] = round_to_tf32(__uint_as_float(frag[i]));
}

// Reductions over the four lanes of a quad, that is, over a row of an accumulator.
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
}
