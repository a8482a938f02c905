// The second product in 8 bits: what probabilities and values go through for it.
//
// wgmma takes 8-bit operands with the summed index, here the keys, side by side. Probabilities: a lane has pairs of
// neighbouring keys from the scores (frag_acc_col: keys 8 n + 2 c and + 1 of tile n, for c = lane % 4) and the product
// wants runs of four, 4 c to 4 c + 3 of every sixteen. A sum has no order, so that the keys of a sixteen are numbered
// anew, run c being pairs c of the left and of the right tile, and no element changes lanes. Values must follow: they
// arrive key by key and are stored column by column, the keys of a sixteen in the new order. Transposed in pairs of
// bytes by ldmatrix, a lane has keys 2 c and 2 c + 1 of either tile, of two columns: run c of both.
#pragma once
#include "common/float8.cuh"
#include "hopper/wgmma.cuh"
#include "common/mma.cuh"

constexpr int GROUP_KEYS = 32;  // of one wgmma, and of one transposition
constexpr int UNIT_BYTES = 16;  // what swizzles permute, and what ldmatrix and stmatrix move

// Accumulators of 32 keys, rounded and reused as an a fragment.
__device__ __forceinline__ void frag_a_from_acc(unsigned (&frag_a)[4], const float (*acc)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int left = i / 2 * 2, half = i % 2 * 2;
        frag_a[i] = pack_e4m3(acc[left][half], acc[left][half + 1], acc[left + 1][half], acc[left + 1][half + 1]);
    }
}

// Byte of a 16-byte unit of a swizzled tile (wgmma.cuh).
__device__ __forceinline__ int swizzled_byte(int row_idx, int unit_idx) {
    return row_idx * SPAN_BYTES + (unit_idx ^ row_idx % SWIZZLE_ROWS) * UNIT_BYTES;
}

// 0xffff in the lower and upper half of a pair of keys, where they are below num_keys.
__device__ __forceinline__ unsigned pair_mask(int first_key, int num_keys) {
    return (first_key < num_keys ? 0xffffu : 0u) | (first_key + 1 < num_keys ? 0xffff0000u : 0u);
}

// One warp of NUM_WARPS transposes its part of a tile, COLS columns of ROWS keys: s_rows is columns of 128 bytes, rows
// are keys; s_columns is runs of 128 keys, rows are columns. CUT: keys from num_keys on become zeros.
//
// A step is two blocks of 32 keys by 16 columns, so that one loads while the other is on its way. Which of its two
// columns a lane stores first depends on the half of its warp: the eight rows of a store lie in different banks.
template <int ROWS, int COLS, int NUM_WARPS, bool CUT>
__device__ __forceinline__ void transpose_e4m3(unsigned s_columns, unsigned s_rows, int num_keys, int warp_idx,
                                               int lane_idx) {
    constexpr int SPAN_UNITS = SPAN_BYTES / UNIT_BYTES;
    constexpr int GROUPS = ROWS / GROUP_KEYS, COLUMN_UNITS = COLS / UNIT_BYTES, BLOCKS = 2;
    static_assert(COLUMN_UNITS % BLOCKS == 0, "blocks are transposed in pairs");
    const int matrix = lane_idx / 8, matrix_row = lane_idx % 8;  // whose address this lane gives
    const int stored_column = 2 * matrix_row + (matrix % 2 ^ matrix_row / 4);
    const unsigned first = lane_idx < WARP_SIZE / 2 ? 0x6420 : 0x7531, second = first ^ (0x6420 ^ 0x7531);
#pragma unroll 1
    for (int step = warp_idx; step < GROUPS * (COLUMN_UNITS / BLOCKS); step += NUM_WARPS) {
        const int group = step % GROUPS, first_unit = step / GROUPS * BLOCKS;
        unsigned pairs[BLOCKS][4];
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
            const int unit = first_unit + b;
            ldmatrix_x4_trans(pairs[b], s_rows + unit / SPAN_UNITS * (ROWS * SPAN_BYTES) +
                                            swizzled_byte(group * GROUP_KEYS + lane_idx, unit % SPAN_UNITS));
        }
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
            if (CUT) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    pairs[b][i] &= pair_mask(group * GROUP_KEYS + i * 8 + lane_idx % 4 * 2, num_keys);
                }
            }
            const unsigned runs[4] = {
                __byte_perm(pairs[b][0], pairs[b][1], first), __byte_perm(pairs[b][0], pairs[b][1], second),
                __byte_perm(pairs[b][2], pairs[b][3], first), __byte_perm(pairs[b][2], pairs[b][3], second)};
            const int key_unit = group * 2 + matrix / 2;
            stmatrix_x4(s_columns + key_unit / SPAN_UNITS * (COLS * SPAN_BYTES) +
                            swizzled_byte((first_unit + b) * UNIT_BYTES + stored_column, key_unit % SPAN_UNITS),
                        runs);
        }
    }
}
