// A row of HEAD_DIM_V columns (a bucket) that a warp has: lane l the columns l, l + 32, ...
//
// Constants used: HEAD_DIM_V, Accumulator.
#pragma once

constexpr int WARP_SIZE = 32;
constexpr int COLUMNS = HEAD_DIM_V / WARP_SIZE;  // of a lane

using Row = Accumulator[COLUMNS];

__device__ __forceinline__ Accumulator warp_sum(Accumulator x) {
#pragma unroll
    for (int lane_mask = WARP_SIZE / 2; lane_mask > 0; lane_mask /= 2) x += __shfl_xor_sync(0xffffffff, x, lane_mask);
    return x;
}

// f(i, column) for every column that a lane has.
template <typename F>
__device__ __forceinline__ void each_column(int lane_idx, int num_cols, const F& f) {
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) {
        if (lane_idx + i * WARP_SIZE < num_cols) f(i, lane_idx + i * WARP_SIZE);
    }
}

// The sum over a row of f(i), for all lanes.
template <typename F>
__device__ __forceinline__ Accumulator row_sum(const F& f) {
    Accumulator sum = 0;
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) sum += f(i);
    return warp_sum(sum);
}
