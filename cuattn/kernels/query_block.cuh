// Which part of an attention problem a CTA computes: BLOCK_M queries of one head of one sequence.
//
// Grid of a batch of equal lengths: x = (batch_idx * num_heads + head_idx) * num_q_blocks + block, so that any batch
// and number of heads fits, and CTAs that run at the same time share the keys and values of their head. Of packed
// sequences: x = work_idx * num_heads + head_idx, where g_work [num_work, 2] lists (batch_idx, block): those with the
// most keys first if the host made it, in order of the sequences if attention_schedule.cu did. An entry with batch_idx
// < 0 is no work. Query head h reads key/value head h / heads_per_kv_head.
#pragma once
#include "attention_params.cuh"

struct QueryBlock {
    int batch_idx, head_idx, kv_head_idx;
    int first_query;
    int seqlen_q, seqlen_k;  // of this sequence
    int q_start, k_start;    // its first row in a packed array, else 0
    int diagonal_offset;     // query i is aligned with key i + diagonal_offset

    __device__ __forceinline__ bool has_work() const { return batch_idx >= 0 && first_query < seqlen_q; }
};

// Start and length of a sequence in a packed array of `total` rows. The list may be device data that nobody has
// checked: it may be nonsense, but must not lead outside of the array.
__device__ __forceinline__ void sequence_bounds(const int* g_cu_seqlens, int batch_idx, int total, int max_length,
                                                int& start, int& length) {
    start = max(0, min(g_cu_seqlens[batch_idx], total));
    const int end = max(0, min(g_cu_seqlens[batch_idx + 1], total));
    length = max(0, min(max_length, end - start));
}

// LAST_FIRST: the last queries get the first CTAs. Under a causal mask these have the most keys to visit, and the CTAs
// that run last are short.
template <int BLOCK_M, bool LAST_FIRST, typename Real>
__device__ __forceinline__ QueryBlock query_block(const AttentionParams<Real>& params, const int* g_work,
                                                  const int* g_cu_seqlens_q, const int* g_cu_seqlens_k,
                                                  const int* g_diagonal_offsets) {
    QueryBlock block;
    block.seqlen_q = params.seqlen_q;
    block.seqlen_k = params.seqlen_k;
    block.q_start = block.k_start = 0;
    if (g_work == nullptr) {
        const unsigned num_q_blocks = (static_cast<unsigned>(params.seqlen_q) + BLOCK_M - 1) / BLOCK_M;
        const unsigned head = blockIdx.x / num_q_blocks;
        const unsigned q_block = blockIdx.x - head * num_q_blocks;
        block.batch_idx = head / params.num_heads;
        block.head_idx = head - block.batch_idx * params.num_heads;
        block.first_query = (LAST_FIRST ? num_q_blocks - 1 - q_block : q_block) * BLOCK_M;
    } else {
        const unsigned work_idx = blockIdx.x / params.num_heads;
        block.head_idx = blockIdx.x - work_idx * params.num_heads;
        block.batch_idx = g_work[2 * work_idx];
        block.first_query = g_work[2 * work_idx + 1] * BLOCK_M;
        if (block.batch_idx < 0) return block;
        sequence_bounds(g_cu_seqlens_q, block.batch_idx, params.seqlen_q, params.max_seqlen_q, block.q_start,
                        block.seqlen_q);
        sequence_bounds(g_cu_seqlens_k, block.batch_idx, params.seqlen_k, params.max_seqlen_k, block.k_start,
                        block.seqlen_k);
    }
    block.kv_head_idx = block.head_idx / params.heads_per_kv_head;
    block.diagonal_offset = params.diagonal_offset;
    if (g_diagonal_offsets != nullptr) block.diagonal_offset = g_diagonal_offsets[block.batch_idx];
    if (params.diagonal_from_end) block.diagonal_offset += block.seqlen_k - block.seqlen_q;
    return block;
}
