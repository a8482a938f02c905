// What the backward pass needs of every query before anything else: delta, and lse made ready for the other kernels
// (ready_lse.cuh).
//
//     delta = (sum(dout * out) - dlse) 2^-LOG2_P_FACTOR
//
// delta is what the softmax takes from every dP of the row (Dao et al., "FlashAttention", 2022, appendix B.4); the
// factor is the other side of that of the probabilities. Where lse is NaN (a logit was +inf) delta is 0: NaN
// probabilities make NaN of all that the query sees, and what it does not see has probability 0 and stays 0.
//
// Grid: one warp for each query of each head; row = (batch_idx * seqlen_q + query_idx) * num_heads + head_idx, so that
// neighbouring warps read neighbouring memory. Packed sequences: batch 1, all tokens.
// Block: NUM_WARPS warps.
//
// Constants: Element (of dout and out), Accumulator, NUM_WARPS.
#include "backward/attention_backward_params.cuh"
#include "common/elements.cuh"
#include "backward/ready_lse.cuh"

constexpr int WARP_SIZE = 32;

extern "C" __global__ void __launch_bounds__(NUM_WARPS * WARP_SIZE) cuattn_attention_backward_rows(
    const Element* __restrict__ g_dout,      // [batch, seqlen_q, num_heads, head_dim_v], last axis contiguous
    const Element* __restrict__ g_out,       // likewise
    const Accumulator* __restrict__ g_lse,   // [batch, num_heads, seqlen_q], contiguous
    const Accumulator* __restrict__ g_dlse,  // likewise; may be null
    Accumulator* __restrict__ g_ready_lse,   // likewise
    Accumulator* __restrict__ g_delta,       // likewise
    const int base_2,                        // 1: the other kernels have base-2 logits
    const long long num_rows,
    const AttentionBackwardParams<Accumulator> params)
{
    const int lane_idx = threadIdx.x % WARP_SIZE;
    const long long row = static_cast<long long>(blockIdx.x) * NUM_WARPS + threadIdx.x / WARP_SIZE;
    if (row >= num_rows) return;
    const int head_idx = row % params.num_heads;
    const long long position = row / params.num_heads;
    const int query_idx = position % params.seqlen_q;
    const long long batch_idx = position / params.seqlen_q;

    g_dout += batch_idx * params.dout.batch + query_idx * params.dout.seq + head_idx * params.dout.head;
    g_out += batch_idx * params.out.batch + query_idx * params.out.seq + head_idx * params.out.head;
    Accumulator sum = 0;
    for (int col = lane_idx; col < params.head_dim_v; col += WARP_SIZE) {
        sum = fma(static_cast<Accumulator>(to_real(g_dout[col])), static_cast<Accumulator>(to_real(g_out[col])), sum);
    }
#pragma unroll
    for (int lane_mask = WARP_SIZE / 2; lane_mask > 0; lane_mask /= 2) {
        sum += __shfl_xor_sync(0xffffffff, sum, lane_mask);
    }
    if (lane_idx == 0) {
        const long long at = batch_idx * params.lse_batch + head_idx * params.lse_head + query_idx;
        const Accumulator lse = g_lse[at];
        if (g_dlse != nullptr) sum -= g_dlse[at];
        g_delta[at] = isnan(lse) ? Accumulator(0) : sum * Accumulator(INVERSE_P_FACTOR);
        g_ready_lse[at] = make_ready_lse(lse, base_2);
    }
}
