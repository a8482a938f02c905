// Before and after attention_backward.cu with ADD_DQ: zeros for the sums of dq, and dq from the sums.
//
//     dq = scale * sums
//
// The layout of the sums is told in dq_sums.cuh.
//
// cuattn_attention_backward_dq_clear: grid: any; each thread takes every so many sums.
// cuattn_attention_backward_dq: grid: one CTA for each 16 queries of each head (query_block.cuh); a warp takes every so
// many tiles of 8 columns.
// Block: NUM_WARPS warps.
//
// Constants: Element, NUM_WARPS.
#include "backward/attention_backward_params.cuh"
#include "common/mma.cuh"
#include "attention/query_block.cuh"

constexpr int SUMS_PER_TILE = 4 * WARP_SIZE;

extern "C" __global__ void __launch_bounds__(NUM_WARPS * WARP_SIZE) cuattn_attention_backward_dq_clear(
    float4* __restrict__ g_sums,  // [num_vectors]
    const long long num_vectors)
{
    const long long num_threads = static_cast<long long>(gridDim.x) * blockDim.x;
    const long long first = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    for (long long i = first; i < num_vectors; i += num_threads) g_sums[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
}

extern "C" __global__ void __launch_bounds__(NUM_WARPS * WARP_SIZE) cuattn_attention_backward_dq(
    const float* __restrict__ g_sums,
    Element* __restrict__ g_dq,              // [batch, seqlen_q, num_heads, head_dim], last axis contiguous, or packed
    const int* __restrict__ g_cu_seqlens_q,  // this and below: null, or of packed sequences
    const int* __restrict__ g_cu_seqlens_k,
    const int* __restrict__ g_work,
    const RowStrides sums,                   // strides of a batch entry, of 16 queries, and of a head
    const AttentionBackwardParams<float> params)
{
    const int warp_idx = threadIdx.x / WARP_SIZE;
    const int lane_idx = threadIdx.x % WARP_SIZE;
    const OwnedBlock block =
        owned_block<false, MMA_M, false>(params, g_work, g_cu_seqlens_q, g_cu_seqlens_k, nullptr);
    if (block.batch_idx < 0 || block.first_row >= block.seqlen_q) return;
    const int num_rows = min(MMA_M, block.seqlen_q - block.first_row);

    const long long row_tile =
        block.first_row / MMA_M + (g_work == nullptr ? 0 : packed_row_tile(block.q_start, block.batch_idx));
    g_sums += block.batch_idx * sums.batch + block.head_idx * sums.head + row_tile * sums.seq;
    g_dq += block.batch_idx * params.dq.batch + block.head_idx * params.dq.head +
            (static_cast<long long>(block.q_start) + block.first_row) * params.dq.seq;
    for (int tile = warp_idx; tile * MMA_N < params.head_dim; tile += NUM_WARPS) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = frag_acc_row(lane_idx) + i / 2 * 8;
            const int col = tile * MMA_N + frag_acc_col(lane_idx) + i % 2;
            const float sum = g_sums[tile * SUMS_PER_TILE + i * WARP_SIZE + lane_idx];
            if (row < num_rows && col < params.head_dim) {
                g_dq[row * params.dq.seq + col] = static_cast<Element>(sum * params.scale);
            }
        }
    }
}
