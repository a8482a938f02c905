// Attention forward, written to be read: one warp computes one query row, key by key, with every option.
//
//     out = dropout(softmax(logits)) v,    lse = log(sum(exp(logits))),    logits = options(scale * q k^T)
//
// The 32 lanes share a row of q (lane l holds elements l, l + 32, ...). For each key they form the dot product
// together, make a logit of it, update the running maximum and sum of the online softmax, and add the key's value to
// the output. No tile, no tensor core, no shared memory: attention_forward.cu and attention_forward_fma.cu do the same
// arithmetic on BLOCK_M queries and BLOCK_N keys at a time, and take the same arguments.
//
// Grid: one CTA for each block of NUM_WARPS queries of each head (query_block.cuh).
// Block: NUM_WARPS warps, one query row each.
//
// Constants: Storage (of q, k, v), Output, BiasElement, Accumulator; MAX_HEAD_DIM (of either), NUM_WARPS; BOUND_LEFT,
// BOUND_RIGHT, SOFTCAP, ALIBI, BIAS, MASK, DROPOUT, all of them true: an option that a call does not use is skipped at
// run time.
#include "common/elements.cuh"
#include "common/float8.cuh"
#include "attention/logits.cuh"
#include "attention/online_softmax.cuh"
#include "attention/philox.cuh"
#include "attention/query_block.cuh"

constexpr int WARP_SIZE = 32;
constexpr int MAX_PER_LANE = MAX_HEAD_DIM / WARP_SIZE;  // elements of a row that one lane holds

using Params = AttentionParams<Accumulator>;
using SoftmaxRow = OnlineSoftmaxRow<Accumulator>;
using Layout = OneLogit<Accumulator>;

static_assert(BOUND_LEFT && BOUND_RIGHT && SOFTCAP && ALIBI && BIAS && MASK && DROPOUT, "every option is compiled in");

// This lane's elements of a row of `length` elements; zero beyond its end.
__device__ __forceinline__ void load_row(Accumulator (&row)[MAX_PER_LANE], const Storage* g_row, int length,
                                         int lane_idx) {
#pragma unroll
    for (int i = 0; i < MAX_PER_LANE; i++) {
        const int col = lane_idx + i * WARP_SIZE;
        row[i] = col < length ? static_cast<Accumulator>(to_real(g_row[col])) : Accumulator(0);
    }
}

__device__ __forceinline__ Accumulator warp_sum(Accumulator x) {
#pragma unroll
    for (int lane_mask = 16; lane_mask > 0; lane_mask /= 2) x += __shfl_xor_sync(0xffffffff, x, lane_mask);
    return x;
}

extern "C" __global__ void __launch_bounds__(NUM_WARPS * WARP_SIZE) cuattn_attention_plain(
    const Storage* __restrict__ g_q,     // [batch, seqlen_q, num_heads, head_dim], last axis contiguous
    const Storage* __restrict__ g_k,     // [batch, seqlen_k, num_kv_heads, head_dim]
    const Storage* __restrict__ g_v,     // [batch, seqlen_k, num_kv_heads, head_dim_v]
    Output* __restrict__ g_out,          // [batch, seqlen_q, num_heads, head_dim_v]
    Accumulator* __restrict__ g_lse,     // [batch, num_heads, seqlen_q], last axis contiguous; this and below: or null
    const BiasElement* __restrict__ g_bias,        // broadcast to [batch, num_heads, seqlen_q, seqlen_k]
    const unsigned char* __restrict__ g_mask,      // likewise; 0 hides a key
    const unsigned char* __restrict__ g_tile_class, // not used: there are no tiles here
    const Accumulator* __restrict__ g_alibi_slopes,  // [batch or 1, num_heads]
    const Accumulator* __restrict__ g_sinks,       // [num_heads]
    const Accumulator* __restrict__ g_q_descale,   // [batch, num_kv_heads]
    const Accumulator* __restrict__ g_k_descale,   // likewise
    const Accumulator* __restrict__ g_v_descale,   // likewise
    const int* __restrict__ g_diagonal_offsets,    // [batch]
    const int* __restrict__ g_cu_seqlens_q,        // [batch + 1]: q and out are packed, [tokens, num_heads, ...], lse
    const int* __restrict__ g_cu_seqlens_k,        // [num_heads, tokens], k and v [tokens, num_kv_heads, ...]
    const int* __restrict__ g_work,                // [num_work, 2]: query_block.cuh; given with the two before
    const Params params)
{
    const int lane_idx = threadIdx.x % WARP_SIZE;
    const QueryBlock block =
        query_block<NUM_WARPS, false>(params, g_work, g_cu_seqlens_q, g_cu_seqlens_k, g_diagonal_offsets);
    if (!block.has_work()) return;
    const int query_idx = block.first_query + threadIdx.x / WARP_SIZE;
    if (query_idx >= block.seqlen_q) return;
    const unsigned head = dropout_head(params.dropout, params.num_heads, block.batch_idx, block.head_idx);
    const int kv_head = block.batch_idx * (params.num_heads / params.heads_per_kv_head) + block.kv_head_idx;
    const long long q_row = static_cast<long long>(block.q_start) + query_idx;

    g_q += block.batch_idx * params.q.batch + q_row * params.q.seq + block.head_idx * params.q.head;
    g_k += block.batch_idx * params.k.batch + block.k_start * params.k.seq + block.kv_head_idx * params.k.head;
    g_v += block.batch_idx * params.v.batch + block.k_start * params.v.seq + block.kv_head_idx * params.v.head;
    const KeyBand band(params, block);
    const ScoreOptions<Accumulator> options(params, g_bias, g_mask, nullptr, g_alibi_slopes, block.batch_idx,
                                            block.head_idx, 0);
    Accumulator scale = params.scale, out_factor = params.keep_scale;
    if (g_q_descale != nullptr) scale *= g_q_descale[kv_head];
    if (g_k_descale != nullptr) scale *= g_k_descale[kv_head];
    if (g_v_descale != nullptr) out_factor *= g_v_descale[kv_head];

    Accumulator q[MAX_PER_LANE], k[MAX_PER_LANE], v[MAX_PER_LANE], acc_out[MAX_PER_LANE] = {};
    load_row(q, g_q, params.head_dim, lane_idx);

    SoftmaxRow row;
    row.reset();
    const KeyBand::RowBounds keys = band.row(query_idx);
    for (int key_idx = keys.begin; key_idx < keys.end; key_idx++) {
        load_row(k, g_k + key_idx * params.k.seq, params.head_dim, lane_idx);
        load_row(v, g_v + key_idx * params.v.seq, params.head_dim_v, lane_idx);

        Accumulator dot = 0;
        for (int i = 0; i < MAX_PER_LANE; i++) dot += q[i] * k[i];
        Accumulator logit = warp_sum(dot);
        const TilePosition<false> at{query_idx, key_idx};
        const TileRows<Layout, false, Accumulator> alibi_row(at, block.diagonal_offset, options.slope);
        natural_logits<Layout>(logit, params, scale, alibi_row);
        add_bias_and_mask<Layout>(logit, params, options, at, block.seqlen_q, block.seqlen_k);

        const Accumulator correction = exp2(row.raise_max(logit));
        const Accumulator probability = exp2(SoftmaxRow::exponent(logit - row.reference()));
        row.sum = row.sum * correction + probability;
        const bool kept = !params.use_dropout || dropout_keeps(params.dropout, head, query_idx, key_idx);
        const Accumulator weight = kept ? probability : Accumulator(0);
        for (int i = 0; i < MAX_PER_LANE; i++) acc_out[i] = acc_out[i] * correction + weight * v[i];
    }
    if (g_sinks != nullptr) {
        Accumulator correction, term;
        row.sink_exponents(g_sinks[block.head_idx], correction, term);
        correction = exp2(correction);
        row.sum = row.sum * correction + exp2(term);
        out_factor *= correction;
    }

    g_out += block.batch_idx * params.out.batch + q_row * params.out.seq + block.head_idx * params.out.head;
    for (int i = 0; i < MAX_PER_LANE; i++) {
        const int col = lane_idx + i * WARP_SIZE;
        if (col < params.head_dim_v) g_out[col] = static_cast<Output>(acc_out[i] * (row.inverse_sum() * out_factor));
    }
    if (g_lse != nullptr && lane_idx == 0) {
        g_lse[block.batch_idx * params.lse_batch + block.head_idx * params.lse_head + q_row] = row.lse();
    }
}
