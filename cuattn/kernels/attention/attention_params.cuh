// What an attention kernel is told about a problem besides its arrays: one struct, passed by value.
// Python packs the fields by their names (cuattn/ops/attention/params.py). Real is the type of the accumulators.
#pragma once

// Element strides of a [batch, seqlen, heads, head_dim] array whose last axis is contiguous. A packed [tokens, heads,
// head_dim] array has no batch axis: batch = 0.
struct RowStrides {
    long long batch, seq, head;
};

// Element strides of an array that is broadcast to [batch, heads, seqlen_q, seqlen_k]; 0 along a broadcast axis.
struct LogitStrides {
    long long batch, head, query, key;

    __device__ __forceinline__ long long offset(int batch_idx, int head_idx, int query_idx, int key_idx) const {
        return batch_idx * batch + head_idx * head + query_idx * query + key_idx * key;
    }
};

// Philox counters and keys of a dropout mask: see philox.cuh.
struct DropoutParams {
    unsigned seed_low, seed_high, offset;
    unsigned threshold;  // a probability is kept when its random word is below
    // Head x of the call, batch included, is head x * head_step + first_head of the mask, and absent_heads more for
    // each batch entry before its own: 1, 0 and 0 where the call has all heads.
    unsigned head_step, first_head, absent_heads;
    // Query i and key j of the call are query first_query + i * step and key first_key + j * step of the mask.
    unsigned first_query, first_key, step;
    unsigned by_element;  // 1: the blocks of 16 x 16 elements that share random numbers (philox.cuh) are not the call's
};

constexpr int UNBOUNDED = 0x7fffffff;  // a side of the window

template <typename Real>
struct AttentionParams {
    RowStrides q, k, v, out;
    LogitStrides bias, mask;
    LogitStrides tile_class;  // of tiles, not of elements: see score_options.cuh
    long long lse_batch, lse_head;  // strides of lse
    long long alibi_batch;          // stride of alibi_slopes [batch or 1, num_heads]
    int num_heads, heads_per_kv_head;
    int seqlen_q, seqlen_k;          // of every sequence; of all of them together when packed
    int max_seqlen_q, max_seqlen_k;  // of one sequence: packed ones that claim more are cut; bias and mask end there
    int head_dim, head_dim_v;
    int diagonal_offset;              // query i is aligned with key i + o, with o = diagonal_offset, and ...
    int diagonal_from_end;            // ... seqlen_k - seqlen_q more when this is 1
    int window_left, window_right;    // keys i + o - left to i + o + right are visible
    int chunk;                        // of them, those j with j / chunk == (i + o) / chunk; 0: all
    int use_dropout;                  // 0 or 1
    DropoutParams dropout;
    Real keep_scale;                  // 1 / (1 - p), or 1 without dropout
    Real scale, scale_log2;           // scale_log2 = scale * log2(e)
    Real softcap;                     // 0: none
};
