// Rows of a wgmma accumulator to global memory, without a detour through shared memory.
#pragma once
#include "common/mma.cuh"

// Word i of lane t of a quad goes to word t of lane i.
__device__ __forceinline__ void quad_transpose(unsigned (&words)[4], int lane_idx) {
#pragma unroll
    for (int step = 1; step <= 2; step *= 2) {
        const bool upper = lane_idx & step;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i & step) continue;
            unsigned& low = words[i];
            unsigned& high = words[i + step];
            const unsigned received = __shfl_xor_sync(0xffffffff, upper ? low : high, step);
            if (upper) low = received;
            else high = received;
        }
    }
}

// Elements [0, num_columns) of one row; the four lanes of a quad hold it, in accumulator layout, as pairs of 16 bits.
// `vectors`: the row begins at, and num_columns is, a multiple of 16 bytes.
template <int TILES, typename Element>
__device__ __forceinline__ void store_quad_row(Element* g_row, unsigned (&pairs)[TILES], int num_columns, bool vectors,
                                               bool in_range, int lane_idx) {
    constexpr int RUN = 16 / sizeof(Element);
    const int quad_lane = lane_idx % 4;
    if (vectors) {
#pragma unroll
        for (int tile = 0; tile < TILES; tile += 4) {
            unsigned words[4] = {pairs[tile], pairs[tile + 1], pairs[tile + 2], pairs[tile + 3]};
            quad_transpose(words, lane_idx);
            const int column = (tile + quad_lane) * RUN;
            if (in_range && column < num_columns) {
                *reinterpret_cast<uint4*>(g_row + column) = make_uint4(words[0], words[1], words[2], words[3]);
            }
        }
        return;
    }
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        const int column = tile * MMA_N + frag_acc_col(lane_idx);
        const unsigned short halves[2] = {static_cast<unsigned short>(pairs[tile]),
                                          static_cast<unsigned short>(pairs[tile] >> 16)};
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (in_range && column + i < num_columns) {
                reinterpret_cast<unsigned short*>(g_row)[column + i] = halves[i];
            }
        }
    }
}

// A row of accumulators (`half` 1: that eight rows below) times a factor: rounded, ...
template <int TILES, typename Rounded>
__device__ __forceinline__ void write_row(Rounded* g_row, const float (&acc)[TILES][4], int half, float factor,
                                          int num_columns, bool vectors, bool in_range, int lane_idx) {
    unsigned pairs[TILES];
#pragma unroll
    for (int e = 0; e < TILES; e++) {
        pairs[e] = pack_pair(Rounded(), acc[e][2 * half] * factor, acc[e][2 * half + 1] * factor);
    }
    store_quad_row(g_row, pairs, num_columns, vectors, in_range, lane_idx);
}
// ... or as it is.
template <int TILES>
__device__ __forceinline__ void write_row(float* g_row, const float (&acc)[TILES][4], int half, float factor,
                                          int num_columns, bool vectors, bool in_range, int lane_idx) {
    if (in_range) store_acc_row(g_row, acc, half, factor, num_columns, vectors, lane_idx);
}
