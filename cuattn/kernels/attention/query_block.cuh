// Which part of an attention problem a CTA computes: a block of queries of one head of one sequence or, where keys own
// the work (gradients of k and v), a block of keys of one key/value head.
//
// Grid of a batch of equal lengths: x = (batch_idx * heads + head_idx) * num_blocks + block, so that any batch and
// number of heads fits, and CTAs that run at the same time share the keys and values of their head. Of packed
// sequences, and where a list says what rows see (tile_list.cuh): x = work_idx * heads + head_idx, where g_work
// [num_work, 2] lists (batch_idx, block): those with the most to visit first if the host made it, in order of the
// sequences if attention_schedule.cu did. An entry with batch_idx < 0 is no work. Query head h reads key/value head
// h / heads_per_kv_head.
#pragma once
#include "attention/attention_params.cuh"

// A CTA's place in the grid.
struct GridPlace {
    int batch_idx, head_idx, first_row;
};

// LAST_FIRST: the last blocks get the first CTAs. Under a causal mask the last queries have the most keys to visit, and
// the CTAs that run last are short. cta_idx: x, or what column_block.cuh makes of it.
template <int BLOCK, bool LAST_FIRST>
__device__ __forceinline__ GridPlace grid_place(const int* g_work, int seqlen, int num_heads,
                                                unsigned cta_idx = blockIdx.x) {
    GridPlace place;
    if (g_work == nullptr) {
        const unsigned num_blocks = (static_cast<unsigned>(seqlen) + BLOCK - 1) / BLOCK;
        const unsigned head = cta_idx / num_blocks;
        const unsigned block = cta_idx - head * num_blocks;
        place.batch_idx = head / num_heads;
        place.head_idx = head - place.batch_idx * num_heads;
        place.first_row = (LAST_FIRST ? num_blocks - 1 - block : block) * BLOCK;
    } else {
        const unsigned work_idx = cta_idx / num_heads;
        place.head_idx = cta_idx - work_idx * num_heads;
        place.batch_idx = g_work[2 * work_idx];
        place.first_row = g_work[2 * work_idx + 1] * BLOCK;
    }
    return place;
}

// Start and length of a sequence in a packed array of `total` rows. The list may be device data that nobody has
// checked: it may be nonsense, but must not lead outside of the array.
__device__ __forceinline__ void sequence_bounds(const int* g_cu_seqlens, int batch_idx, int total, int max_length,
                                                int& start, int& length) {
    start = max(0, min(g_cu_seqlens[batch_idx], total));
    const int end = max(0, min(g_cu_seqlens[batch_idx + 1], total));
    length = max(0, min(max_length, end - start));
}

// Where a sequence lies and how its queries are aligned with its keys.
struct Sequence {
    int seqlen_q, seqlen_k;
    int q_start, k_start;  // its first row in a packed array, else 0
    int diagonal_offset;   // query i is aligned with key i + diagonal_offset

    template <typename Real>
    __device__ __forceinline__ void find(const AttentionParams<Real>& params, int batch_idx, const int* g_cu_seqlens_q,
                                         const int* g_cu_seqlens_k, const int* g_diagonal_offsets) {
        seqlen_q = params.seqlen_q;
        seqlen_k = params.seqlen_k;
        q_start = k_start = 0;
        if (g_cu_seqlens_q != nullptr) {
            sequence_bounds(g_cu_seqlens_q, batch_idx, params.seqlen_q, params.max_seqlen_q, q_start, seqlen_q);
            sequence_bounds(g_cu_seqlens_k, batch_idx, params.seqlen_k, params.max_seqlen_k, k_start, seqlen_k);
        }
        diagonal_offset = params.diagonal_offset;
        if (g_diagonal_offsets != nullptr) diagonal_offset = g_diagonal_offsets[batch_idx];
        if (params.diagonal_from_end) diagonal_offset += seqlen_k - seqlen_q;
    }
};

struct QueryBlock : Sequence {
    int batch_idx, head_idx, kv_head_idx;
    int first_query;

    __device__ __forceinline__ bool has_work() const { return batch_idx >= 0 && first_query < seqlen_q; }
};

template <int BLOCK_M, bool LAST_FIRST, typename Real>
__device__ __forceinline__ QueryBlock query_block(const AttentionParams<Real>& params, const int* g_work,
                                                  const int* g_cu_seqlens_q, const int* g_cu_seqlens_k,
                                                  const int* g_diagonal_offsets, unsigned cta_idx = blockIdx.x) {
    QueryBlock block;
    const GridPlace place = grid_place<BLOCK_M, LAST_FIRST>(g_work, params.seqlen_q, params.num_heads, cta_idx);
    block.batch_idx = place.batch_idx;
    block.head_idx = place.head_idx;
    block.kv_head_idx = place.head_idx / params.heads_per_kv_head;
    block.first_query = place.first_row;
    if (block.batch_idx >= 0) {
        block.find(params, block.batch_idx, g_cu_seqlens_q, g_cu_seqlens_k, g_diagonal_offsets);
    }
    return block;
}

// The first tile of 16 queries of a packed sequence, where each sequence begins with a tile of its own: those before it
// may each end within one.
__device__ __forceinline__ long long packed_row_tile(int q_start, int batch_idx) {
    return q_start / 16 + static_cast<long long>(batch_idx);
}

// A block of rows of either side: queries of a query head, or keys of a key/value head.
struct OwnedBlock : Sequence {
    int batch_idx, head_idx;
    int first_row;
};

template <bool OWN_KEYS, int BLOCK_OWN, bool LAST_FIRST, typename Real>
__device__ __forceinline__ OwnedBlock owned_block(const AttentionParams<Real>& params, const int* g_work,
                                                  const int* g_cu_seqlens_q, const int* g_cu_seqlens_k,
                                                  const int* g_diagonal_offsets) {
    OwnedBlock block;
    const GridPlace place = grid_place<BLOCK_OWN, LAST_FIRST>(
        g_work, OWN_KEYS ? params.seqlen_k : params.seqlen_q,
        OWN_KEYS ? params.num_heads / params.heads_per_kv_head : params.num_heads);
    block.batch_idx = place.batch_idx;
    block.head_idx = place.head_idx;
    block.first_row = place.first_row;
    if (block.batch_idx >= 0) {
        block.find(params, block.batch_idx, g_cu_seqlens_q, g_cu_seqlens_k, g_diagonal_offsets);
    }
    return block;
}
