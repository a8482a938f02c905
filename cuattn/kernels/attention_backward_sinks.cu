// The gradient of the sinks, which are one more logit of every query, and have no value:
//
//     dsinks[h] = -sum over b, i of e^(sink[h] - lse[b, h, i]) delta[b, h, i]
//
// One CTA computes one head: its threads take every NUM_THREADS-th row of the batch, and their sums are added in a
// tree.
//
// Grid: x = heads. Block: NUM_WARPS warps.
//
// Constants: Real (float or double, of all arrays), Element (of q, which delta has a factor for), NUM_WARPS.
#include "backward/ready_lse.cuh"

constexpr int WARP_SIZE = 32;
constexpr int NUM_THREADS = NUM_WARPS * WARP_SIZE;

extern "C" __global__ void __launch_bounds__(NUM_THREADS) cuattn_attention_backward_sinks(
    const Real* __restrict__ g_sinks,  // [num_heads]
    const Real* __restrict__ g_lse,    // [num_batch, num_heads, seqlen], natural, as forward returned it
    const Real* __restrict__ g_delta,  // likewise, times 2^-LOG2_P_FACTOR
    Real* __restrict__ g_dsinks,       // [num_heads]
    const long long batch_stride, const long long head_stride,  // of lse and delta, in elements
    const unsigned num_batch, const unsigned seqlen)
{
    __shared__ double s_sums[NUM_WARPS];
    const int head_idx = blockIdx.x;
    const Real sink = g_sinks[head_idx];
    // In double: a million rows of float lose their last digits otherwise.
    double sum = 0;
    if (seqlen > 0 && sink != negative_infinity<Real>()) {
        // Rows are numbered over the whole batch: many short sequences keep every thread busy, too.
        const unsigned batch_step = NUM_THREADS / seqlen, row_step = NUM_THREADS % seqlen;
        unsigned batch_idx = threadIdx.x / seqlen, row = threadIdx.x % seqlen;
        while (batch_idx < num_batch) {
            const long long at = batch_idx * batch_stride + head_idx * head_stride + row;
            const Real lse = g_lse[at];
            if (lse != negative_infinity<Real>()) {
                Real difference = sink - lse;
                if (difference > Real(0) && is_large(lse)) difference = 0;
                sum -= static_cast<double>(exp(difference)) * static_cast<double>(g_delta[at]);
            }
            batch_idx += batch_step;
            row += row_step;
            if (row >= seqlen) {
                row -= seqlen;
                batch_idx++;
            }
        }
    }
#pragma unroll
    for (int lane_mask = WARP_SIZE / 2; lane_mask > 0; lane_mask /= 2) {
        sum += __shfl_xor_sync(0xffffffff, sum, lane_mask);
    }
    if (threadIdx.x % WARP_SIZE == 0) s_sums[threadIdx.x / WARP_SIZE] = sum;
    // SYNC: the sums of all warps are written.
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int warp = 1; warp < NUM_WARPS; warp++) sum += s_sums[warp];
        g_dsinks[head_idx] = static_cast<Real>(sum * (1 << LOG2_P_FACTOR));
    }
}
