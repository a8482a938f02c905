// The parts of a gradient, added up in a fixed order: the columns of a matrix of sums, or two arrays; rounded once.
//
// Constants: Element, Accumulator; NUM_WARPS (of the first entry).
#include "common/elements.cuh"

constexpr int WARP_SIZE = 32;

// Grid: one warp for each column. Block: NUM_WARPS warps. Lane l of a warp sums rows l, l + 32, ..., then the warp sums
// over its lanes.
extern "C" __global__ void __launch_bounds__(NUM_WARPS * WARP_SIZE) cuattn_differential_backward_sums(
    const Accumulator* __restrict__ g_parts,  // [num_rows, num_cols], contiguous
    Accumulator* __restrict__ g_sums,         // [num_cols]
    const long long num_rows,
    const int num_cols)
{
    const int lane_idx = threadIdx.x % WARP_SIZE;
    const int column = blockIdx.x * NUM_WARPS + threadIdx.x / WARP_SIZE;
    if (column >= num_cols) return;
    Accumulator sum = 0;
    for (long long row = lane_idx; row < num_rows; row += WARP_SIZE) sum += g_parts[row * num_cols + column];
#pragma unroll
    for (int lane_mask = WARP_SIZE / 2; lane_mask > 0; lane_mask /= 2) {
        sum += __shfl_xor_sync(0xffffffff, sum, lane_mask);
    }
    if (lane_idx == 0) g_sums[column] = sum;
}

// Grid: one thread for each element.
extern "C" __global__ void cuattn_differential_backward_add(
    const Accumulator* __restrict__ g_both,  // [2, count], contiguous
    Element* __restrict__ g_sums,            // [count]
    const long long count)
{
    const long long at = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at < count) from_real(g_both[at] + g_both[count + at], g_sums[at]);
}
