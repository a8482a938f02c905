// Three ways to the state of a row, each over the columns [begin, end) of it.
//
//   naive    row_sum = sum e^x                        1 read    the textbook formula: overflows for x > 88 (float32)
//   safe     row_max first, then sum e^(x - row_max)  2 reads   the usual remedy
//   online   both at once, rescaling as it goes       1 read    Milakov and Gimelshein (2018)
//
// Writing the result costs one more read and one write: naive 2 + 1, safe 3 + 1, online 2 + 1.
//
// Called by all threads of a CTA; a thread without a row passes begin >= end.
//
// Needs from the constants: ALGORITHM and those of softmax_rows.cuh.
#pragma once
#include "softmax/softmax_rows.cuh"

constexpr int NAIVE = 0;
constexpr int SAFE = 1;
constexpr int ONLINE = 2;
static_assert(ALGORITHM == NAIVE || ALGORITHM == SAFE || ALGORITHM == ONLINE, "unknown ALGORITHM");

__device__ __forceinline__ RowState naive_state(const Element* g_row, long long col_stride, unsigned begin,
                                                unsigned end, int thread, Smem& smem) {
    Accumulator row_sum = 0;
    for (unsigned tile = begin; tile < end; tile += TILE_COLS) {
        const Pack pack = load_pack(g_row, col_stride, tile, thread, end);
#pragma unroll
        for (int i = 0; i < PACK; ++i) row_sum += exponential(pack.value[i]);
    }
    return {Accumulator(0), reduce_row<Sum>(row_sum, smem.row_sum)};
}

__device__ __forceinline__ RowState safe_state(const Element* g_row, long long col_stride, unsigned begin, unsigned end,
                                               int thread, Smem& smem) {
    Accumulator row_max = -infinity();
    for (unsigned tile = begin; tile < end; tile += TILE_COLS) {
        const Pack pack = load_pack(g_row, col_stride, tile, thread, end);
#pragma unroll
        for (int i = 0; i < PACK; ++i) row_max = maximum(row_max, pack.value[i]);
    }
    row_max = reduce_row<Maximum>(row_max, smem.row_max);

    const Accumulator shift = exponent_shift(row_max);
    Accumulator row_sum = 0;
    for (unsigned tile = begin; tile < end; tile += TILE_COLS) {
        const Pack pack = load_pack(g_row, col_stride, tile, thread, end);
#pragma unroll
        for (int i = 0; i < PACK; ++i) row_sum += exponential(pack.value[i] - shift);
    }
    return {row_max, reduce_row<Sum>(row_sum, smem.row_sum)};
}

// The maximum is the running one of everything seen so far, not that of the pack: the old sum is rescaled to it.
__device__ __forceinline__ RowState online_update(RowState state, const Pack& pack) {
    Accumulator row_max = state.row_max;
#pragma unroll
    for (int i = 0; i < PACK; ++i) row_max = maximum(row_max, pack.value[i]);

    const Accumulator shift = exponent_shift(row_max);
    Accumulator row_sum = rescaled_sum(state, row_max);
#pragma unroll
    for (int i = 0; i < PACK; ++i) row_sum += exponential(pack.value[i] - shift);
    return {row_max, row_sum};
}

__device__ __forceinline__ RowState online_state(const Element* g_row, long long col_stride, unsigned begin,
                                                 unsigned end, int thread, Smem& smem) {
    RowState state = empty_state();
    for (unsigned tile = begin; tile < end; tile += TILE_COLS) {
        state = online_update(state, load_pack(g_row, col_stride, tile, thread, end));
    }
    return reduce_state(state, smem);
}

__device__ __forceinline__ RowState row_state(const Element* g_row, long long col_stride, unsigned begin, unsigned end,
                                              int thread, Smem& smem) {
    if constexpr (ALGORITHM == NAIVE) return naive_state(g_row, col_stride, begin, end, thread, smem);
    if constexpr (ALGORITHM == SAFE) return safe_state(g_row, col_stride, begin, end, thread, smem);
    return online_state(g_row, col_stride, begin, end, thread, smem);
}
