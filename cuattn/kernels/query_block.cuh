// Which part of an attention problem a CTA computes: BLOCK_M queries of one head.
//
// Grid: x = (batch_idx * num_heads + head_idx) * num_q_blocks + block, so that any batch and number of heads fits, and
// CTAs that run at the same time share the keys and values of their head. Query head h reads key/value head
// h / heads_per_kv_head.
#pragma once

struct QueryBlock {
    unsigned head;  // batch_idx * num_heads + head_idx
    int batch_idx;
    int head_idx;
    int kv_head_idx;
    int first_query;
};

// LAST_FIRST: the last queries get the first CTAs. Under a causal mask these have the most keys to visit, and the CTAs
// that run last are short.
template <int BLOCK_M, bool LAST_FIRST>
__device__ __forceinline__ QueryBlock query_block(int seqlen_q, int num_heads, int heads_per_kv_head) {
    QueryBlock block;
    const unsigned num_q_blocks = (static_cast<unsigned>(seqlen_q) + BLOCK_M - 1) / BLOCK_M;
    block.head = blockIdx.x / num_q_blocks;
    const unsigned q_block = blockIdx.x - block.head * num_q_blocks;
    block.batch_idx = block.head / num_heads;
    block.head_idx = block.head - block.batch_idx * num_heads;
    block.kv_head_idx = block.head_idx / heads_per_kv_head;
    block.first_query = (LAST_FIRST ? num_q_blocks - 1 - q_block : q_block) * BLOCK_M;
    return block;
}
