// Which part of a decode problem a CTA computes: some query rows of one key/value head of one sequence, against one
// split of its keys.
//
// Rows are packed: a row is one token and one of the query heads that share the key/value head, so that keys and values
// are read once for the whole group. A block has tokens_per_block tokens times heads_per_block heads, at most BLOCK_M
// rows; a group of more than BLOCK_M heads is cut into head blocks. Row r is token r / heads_per_block and head
// r % heads_per_block of the block.
//
// Keys are cut into splits of whole tiles, as even as they can be, among the tiles that the block's queries see: a long
// sequence then keeps many CTAs busy (Dao et al., "Flash-Decoding for long-context inference", 2023). The number of
// splits is the same for every sequence, or its own (g_splits); a sequence of one split is finished by its CTA, the
// others leave partial results to attention_decode_reduce.cu.
//
// Grid: x = (work_idx * kv_heads + kv_head_idx) * head_blocks + head_block, so that CTAs that run at the same time read
// neighbouring memory. Work items are, in this order, batch entries x token blocks x splits; or what g_work lists:
// [num_work, 2] (batch_idx, token_block), times the splits; or [num_work, 3] (batch_idx, token_block, split_idx). An
// entry with batch_idx < 0 is no work. Where COLUMN_BLOCKS CTAs share the columns of the result (column_block.cuh), x
// counts them as one.
#pragma once
#include "attention/mask.cuh"
#include "decode/splits.cuh"

struct DecodeBlock {
    int batch_idx, kv_head_idx;
    int first_head, num_heads;    // query heads of the block, the first one counted from 0
    int first_token, num_tokens;  // queries of the block, within the sequence
    int q_start;                  // first query of the sequence, of all queries
    int seqlen_q, seqlen_k;
    int diagonal_offset;  // query i is aligned with key i + diagonal_offset
    int split_idx;
    Splits splits;

    __device__ __forceinline__ bool has_work() const {
        return batch_idx >= 0 && num_tokens > 0 && split_idx < splits.count;
    }
    __device__ __forceinline__ bool is_whole() const { return splits.count == 1; }

    // Of partial results of a token of the sequence.
    __device__ __forceinline__ long long partial_row(int token) const {
        return splits.first + static_cast<long long>(split_idx) * seqlen_q + token;
    }
};

// A query row of a block.
struct QueryRow {
    int token;  // within the sequence
    int head;   // of all query heads
    bool exists;
};

template <typename Real>
__device__ __forceinline__ QueryRow query_row(const DecodeParams<Real>& params, const DecodeBlock& block, int row) {
    const int token = row * params.heads_inverse >> 16;
    const int head = row - token * params.heads_per_block;
    return {block.first_token + token, block.first_head + head, token < block.num_tokens && head < block.num_heads};
}

template <typename Real>
__device__ __forceinline__ DecodeBlock decode_block(const DecodeParams<Real>& params, unsigned cta_idx,
                                                    const int* g_seqlens_k, const int* g_cu_seqlens_q,
                                                    const int* g_work, const int* g_splits) {
    DecodeBlock block;
    const int group = params.heads_per_kv_head;
    const unsigned head_blocks = static_cast<unsigned>(group + params.heads_per_block - 1) / params.heads_per_block;
    const unsigned kv_heads = params.num_heads / group;
    unsigned work_idx = cta_idx / (kv_heads * head_blocks);
    const unsigned head_idx = cta_idx - work_idx * (kv_heads * head_blocks);
    block.kv_head_idx = head_idx / head_blocks;
    const int head_in_group = (head_idx - block.kv_head_idx * head_blocks) * params.heads_per_block;
    block.first_head = block.kv_head_idx * group + head_in_group;
    block.num_heads = min(params.heads_per_block, group - head_in_group);

    int token_block;
    if (params.work_columns == 3) {
        block.batch_idx = g_work[3 * work_idx];
        token_block = g_work[3 * work_idx + 1];
        block.split_idx = g_work[3 * work_idx + 2];
    } else {
        const unsigned item = work_idx / params.num_splits;
        block.split_idx = work_idx - item * params.num_splits;
        if (params.work_columns == 2) {
            block.batch_idx = g_work[2 * item];
            token_block = g_work[2 * item + 1];
        } else {
            const unsigned token_blocks =
                static_cast<unsigned>(params.seqlen_q + params.tokens_per_block - 1) / params.tokens_per_block;
            block.batch_idx = item / token_blocks;
            token_block = item - block.batch_idx * token_blocks;
        }
    }
    block.num_tokens = 0;
    if (block.batch_idx < 0) return block;

    find_queries(params, g_cu_seqlens_q, block.batch_idx, block.q_start, block.seqlen_q);
    block.seqlen_k = max(0, min(g_seqlens_k[block.batch_idx], params.seqlen_k));
    block.diagonal_offset = params.diagonal_offset;
    if (params.diagonal_from_end) block.diagonal_offset += block.seqlen_k - block.seqlen_q;
    block.first_token = token_block * params.tokens_per_block;
    block.num_tokens = min(params.tokens_per_block, block.seqlen_q - block.first_token);
    block.splits = splits_of(params, g_splits, block.batch_idx, block.q_start);
    return block;
}

// The key tiles of the block's split, [begin, end), of those that its queries see. It may be empty.
struct SplitTiles {
    int begin, end;

    __device__ __forceinline__ SplitTiles(const KeyTiles& tiles, const DecodeBlock& block) {
        const long long count = max(0, tiles.end - tiles.begin);
        begin = tiles.begin + static_cast<int>(count * block.split_idx / block.splits.count);
        end = tiles.begin + static_cast<int>(count * (block.split_idx + 1) / block.splits.count);
    }
};
