// Which columns of v and of the result a CTA computes: all of them or, where a row of the result is more than registers
// hold, HEAD_DIM_V of them. COLUMN_BLOCKS neighbouring CTAs then share the work of one: each computes the scores and
// the softmax of its own, of the same bits, so that they agree without a word; keys come from L2 for all but the first.
// What a row has one of (lse) is written by the CTA of the first columns.
//
// Constants used: HEAD_DIM_V (a bucket), COLUMN_BLOCKS.
#pragma once

struct ColumnBlock {
    int first, count;  // count: those that exist
    unsigned cta_idx;  // of the CTAs that share a row, as one

    __device__ __forceinline__ explicit ColumnBlock(int head_dim_v, unsigned grid_idx = blockIdx.x)
        : first(0), count(head_dim_v), cta_idx(grid_idx) {
        if constexpr (COLUMN_BLOCKS > 1) {
            cta_idx = grid_idx / COLUMN_BLOCKS;
            first = (grid_idx - cta_idx * COLUMN_BLOCKS) * HEAD_DIM_V;
            count = min(HEAD_DIM_V, head_dim_v - first);
        }
    }
    __device__ __forceinline__ bool is_first() const { return COLUMN_BLOCKS == 1 || first == 0; }
};
