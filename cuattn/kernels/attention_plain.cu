// Attention forward, written to be read: one warp computes one query row, key by key.
//
//     out = softmax(scale * q k^T + mask) v,    lse = log(sum(exp(scale * q k^T + mask)))
//
// The 32 lanes share a row of q (lane l holds elements l, l + 32, ...). For each key they form the dot product
// together, update the running maximum and sum of the online softmax, and add the key's value to the output. No tile,
// no tensor core, no shared memory: attention_forward.cu does the same arithmetic on BLOCK_M queries and BLOCK_N keys
// at a time.
//
// Grid: x = (batch_idx * num_heads + head_idx) * num_q_blocks + block (query_block.cuh).
// Block: NUM_WARPS warps, one query row each.
//
// Constants: Element, Accumulator, NUM_WARPS, CAUSAL.
#include "mask.cuh"
#include "online_softmax.cuh"
#include "query_block.cuh"

constexpr int WARP_SIZE = 32;
constexpr int MAX_HEAD_DIM = 256;
constexpr int MAX_PER_LANE = MAX_HEAD_DIM / WARP_SIZE;  // elements of a row that one lane holds

// This lane's elements of a row of `length` elements; zero beyond its end.
__device__ __forceinline__ void load_row(Accumulator (&row)[MAX_PER_LANE], const Element* g_row, int length,
                                         int lane_idx) {
#pragma unroll
    for (int i = 0; i < MAX_PER_LANE; i++) {
        const int col = lane_idx + i * WARP_SIZE;
        row[i] = col < length ? static_cast<Accumulator>(g_row[col]) : Accumulator(0);
    }
}

__device__ __forceinline__ Accumulator warp_sum(Accumulator x) {
#pragma unroll
    for (int lane_mask = 16; lane_mask > 0; lane_mask /= 2) x += __shfl_xor_sync(0xffffffff, x, lane_mask);
    return x;
}

extern "C" __global__ void __launch_bounds__(NUM_WARPS * WARP_SIZE) cuattn_attention_plain(
    const Element* __restrict__ g_q,    // [batch, seqlen_q, num_heads, head_dim], last axis contiguous
    const Element* __restrict__ g_k,    // [batch, seqlen_k, num_kv_heads, head_dim]
    const Element* __restrict__ g_v,    // [batch, seqlen_k, num_kv_heads, head_dim_v]
    Element* __restrict__ g_out,        // [batch, seqlen_q, num_heads, head_dim_v]
    Accumulator* __restrict__ g_lse,    // [batch, num_heads, seqlen_q], contiguous; null: not wanted
    long long q_batch_stride, long long q_seq_stride, long long q_head_stride,        // strides are in elements
    long long k_batch_stride, long long k_seq_stride, long long k_head_stride,
    long long v_batch_stride, long long v_seq_stride, long long v_head_stride,
    long long out_batch_stride, long long out_seq_stride, long long out_head_stride,
    int num_heads, int heads_per_kv_head, int seqlen_q, int seqlen_k, int head_dim, int head_dim_v,
    int diagonal_offset,     // query i is aligned with key i + diagonal_offset; only with CAUSAL
    Accumulator scale_log2)  // scale * log2(e)
{
    const int lane_idx = threadIdx.x % WARP_SIZE;
    const QueryBlock block = query_block<NUM_WARPS, false>(seqlen_q, num_heads, heads_per_kv_head);
    const int query_idx = block.first_query + threadIdx.x / WARP_SIZE;
    if (query_idx >= seqlen_q) return;

    Accumulator q[MAX_PER_LANE], k[MAX_PER_LANE], v[MAX_PER_LANE], acc_out[MAX_PER_LANE] = {};
    g_q += block.batch_idx * q_batch_stride + query_idx * q_seq_stride + block.head_idx * q_head_stride;
    g_k += block.batch_idx * k_batch_stride + block.kv_head_idx * k_head_stride;
    g_v += block.batch_idx * v_batch_stride + block.kv_head_idx * v_head_stride;
    load_row(q, g_q, head_dim, lane_idx);

    OnlineSoftmaxRow<Accumulator> row;
    row.reset();
    const int num_keys = key_end<CAUSAL>(query_idx, seqlen_k, diagonal_offset);
    for (int key_idx = 0; key_idx < num_keys; key_idx++) {
        load_row(k, g_k + key_idx * k_seq_stride, head_dim, lane_idx);
        load_row(v, g_v + key_idx * v_seq_stride, head_dim_v, lane_idx);

        Accumulator dot = 0;
        for (int i = 0; i < MAX_PER_LANE; i++) dot += q[i] * k[i];
        const Accumulator score_log2 = warp_sum(dot) * scale_log2;

        const Accumulator correction = exp2(row.raise_max(score_log2));
        const Accumulator probability = exp2(score_log2 - row.reference_log2());
        row.sum = row.sum * correction + probability;
        for (int i = 0; i < MAX_PER_LANE; i++) acc_out[i] = acc_out[i] * correction + probability * v[i];
    }

    g_out += block.batch_idx * out_batch_stride + query_idx * out_seq_stride + block.head_idx * out_head_stride;
    for (int i = 0; i < MAX_PER_LANE; i++) {
        const int col = lane_idx + i * WARP_SIZE;
        if (col < head_dim_v) g_out[col] = static_cast<Element>(acc_out[i] * row.inverse_sum());
    }
    if (g_lse != nullptr && lane_idx == 0) {
        g_lse[static_cast<long long>(block.head) * seqlen_q + query_idx] = row_lse(row);
    }
}
