// Attention as the formula says, in three kernels with the whole logit matrix in memory between them. The baseline that
// the fused kernels are compared with: it moves num_heads * seqlen_q * seqlen_k numbers to memory and back, twice.
//
//     cuattn_attention_scores:         scores = options(scale * q k^T): softcap, ALiBi, bias, masks
//     cuattn_attention_probabilities:  probabilities = softmax(scores), weights = dropout(probabilities), lse; weights
//                                      are 2^LOG2_P_FACTOR times as large (probability_factor.cuh)
//     cuattn_attention_output:         out = weights v
//
// Grid and block of the two products: a CTA of TILE x TILE threads computes TILE x TILE numbers, one a thread;
// x = (head * row tiles + row tile) * column tiles + column tile, where head = batch_idx * num_heads + head_idx.
// Of the softmax: x = rows / NUM_WARPS, one warp a row. Head h reads key/value head h / heads_per_kv_head.
//
// Constants: Storage (of q, k, v), Probability (Element is the same), Output, BiasElement, Accumulator; TILE,
// NUM_WARPS;
// BOUND_LEFT, BOUND_RIGHT, SOFTCAP, ALIBI, BIAS, MASK, DROPOUT, all of them true: an option that a call does not use is
// skipped at run time.
#include "common/elements.cuh"
#include "common/float8.cuh"
#include "attention/logits.cuh"
#include "attention/philox.cuh"
#include "attention/probability_factor.cuh"

constexpr int WARP_SIZE = 32;
constexpr Accumulator WEIGHT_FACTOR = 1 << LOG2_P_FACTOR;

using Params = AttentionParams<Accumulator>;
using Layout = OneLogit<Accumulator>;

static_assert(BOUND_LEFT && BOUND_RIGHT && SOFTCAP && ALIBI && BIAS && MASK && DROPOUT, "every option is compiled in");

// Two tiles in shared memory; the odd row length keeps a column of `b` in different banks.
struct Smem {
    Accumulator a[TILE][TILE + 1];
    Accumulator b[TILE][TILE + 1];
};

// Where a CTA of a product stands.
struct ProductTile {
    unsigned head;                        // batch_idx * num_heads + head_idx
    int batch_idx, head_idx, kv_head_idx;
    int kv_head;                          // batch_idx * num_kv_heads + kv_head_idx
    int row, col;                         // of this thread

    __device__ __forceinline__ ProductTile(int num_cols, const Params& params) {
        const unsigned row_tiles = (static_cast<unsigned>(params.seqlen_q) + TILE - 1) / TILE;
        const unsigned col_tiles = (static_cast<unsigned>(num_cols) + TILE - 1) / TILE;
        const unsigned row_tile = blockIdx.x / col_tiles;
        head = row_tile / row_tiles;
        batch_idx = head / params.num_heads;
        head_idx = head - batch_idx * params.num_heads;
        kv_head_idx = head_idx / params.heads_per_kv_head;
        kv_head = batch_idx * (params.num_heads / params.heads_per_kv_head) + kv_head_idx;
        row = (row_tile - head * row_tiles) * TILE + threadIdx.y;
        col = (blockIdx.x - row_tile * col_tiles) * TILE + threadIdx.x;
    }
    // Where row `row` of this head begins in an array [batch, num_heads, seqlen_q, seqlen_k].
    __device__ __forceinline__ long long row_offset(const Params& params) const {
        return (static_cast<long long>(head) * params.seqlen_q + row) * params.seqlen_k;
    }
};

template <typename Element>
__device__ __forceinline__ Accumulator load_or_zero(const Element* g_element, bool inside) {
    return inside ? static_cast<Accumulator>(to_real(*g_element)) : Accumulator(0);
}

// 1 where there is no factor.
__device__ __forceinline__ Accumulator factor_of(const Accumulator* g_factors, int idx) {
    return g_factors == nullptr ? Accumulator(1) : g_factors[idx];
}

extern "C" __global__ void __launch_bounds__(TILE * TILE, 1) cuattn_attention_scores(
    const Storage* __restrict__ g_q,         // [batch, seqlen_q, num_heads, head_dim], last axis contiguous
    const Storage* __restrict__ g_k,         // [batch, seqlen_k, num_kv_heads, head_dim]
    Accumulator* __restrict__ g_scores,      // [batch, num_heads, seqlen_q, seqlen_k], contiguous
    const BiasElement* __restrict__ g_bias,  // broadcast to the shape of the scores; this and all below: or null
    const unsigned char* __restrict__ g_mask,        // likewise; 0 hides a key
    const Accumulator* __restrict__ g_alibi_slopes,  // [batch or 1, num_heads]
    const Accumulator* __restrict__ g_q_descale,     // [batch, num_kv_heads]
    const Accumulator* __restrict__ g_k_descale,     // likewise
    const int* __restrict__ g_diagonal_offsets,      // [batch]
    const Params params)
{
    __shared__ Smem smem;
    const ProductTile tile(params.seqlen_k, params);
    const int key_row = tile.col - threadIdx.x + threadIdx.y;  // the key that this thread loads
    const bool row_inside = tile.row < params.seqlen_q, key_inside = key_row < params.seqlen_k;
    g_q += tile.batch_idx * params.q.batch + tile.row * params.q.seq + tile.head_idx * params.q.head;
    g_k += tile.batch_idx * params.k.batch + key_row * params.k.seq + tile.kv_head_idx * params.k.head;

    Accumulator sum = 0;
    for (int first = 0; first < params.head_dim; first += TILE) {
        const int d = first + threadIdx.x;
        smem.a[threadIdx.y][threadIdx.x] = load_or_zero(g_q + d, row_inside && d < params.head_dim);
        smem.b[threadIdx.y][threadIdx.x] = load_or_zero(g_k + d, key_inside && d < params.head_dim);
        // SYNC: both tiles are complete.
        __syncthreads();
        for (int i = 0; i < TILE; i++) sum += smem.a[threadIdx.y][i] * smem.b[threadIdx.x][i];
        // SYNC: everyone is done with the tiles, which the next pass overwrites.
        __syncthreads();
    }
    if (tile.row >= params.seqlen_q || tile.col >= params.seqlen_k) return;

    int diagonal_offset = g_diagonal_offsets == nullptr ? params.diagonal_offset : g_diagonal_offsets[tile.batch_idx];
    if (params.diagonal_from_end) diagonal_offset += params.seqlen_k - params.seqlen_q;
    const KeyBand band(params, params.seqlen_k, diagonal_offset);
    const ScoreOptions<Accumulator> options(params, g_bias, g_mask, nullptr, g_alibi_slopes, tile.batch_idx,
                                            tile.head_idx, 0);
    const Accumulator descale = factor_of(g_q_descale, tile.kv_head) * factor_of(g_k_descale, tile.kv_head);
    const TilePosition<false> at{tile.row, tile.col};
    const TileRows<Layout, false, Accumulator> alibi_row(at, diagonal_offset, options.slope);
    natural_logits<Layout>(sum, params, params.scale * descale, alibi_row);
    add_bias_and_mask<Layout>(sum, params, options, at, params.seqlen_q, params.seqlen_k);
    hide_by_position<Layout>(sum, negative_infinity<Accumulator>(), band, at);
    g_scores[tile.row_offset(params) + tile.col] = sum;
}

extern "C" __global__ void __launch_bounds__(NUM_WARPS * WARP_SIZE) cuattn_attention_probabilities(
    const Accumulator* __restrict__ g_scores,   // [batch, num_heads, seqlen_q, seqlen_k], contiguous, as the next two
    Probability* __restrict__ g_probabilities,  // null: not wanted
    Probability* __restrict__ g_weights,        // after dropout, before the factor 1 / (1 - p), times WEIGHT_FACTOR
    Accumulator* __restrict__ g_lse,            // [batch, num_heads, seqlen_q], contiguous
    const Accumulator* __restrict__ g_sinks,    // [num_heads], or null
    long long num_rows, const Params params)
{
    const int lane_idx = threadIdx.x % WARP_SIZE;
    const int seqlen_k = params.seqlen_k;
    const long long row_idx = static_cast<long long>(blockIdx.x) * NUM_WARPS + threadIdx.x / WARP_SIZE;
    if (row_idx >= num_rows) return;
    const unsigned head = row_idx / params.seqlen_q;
    const int query_idx = row_idx - static_cast<long long>(head) * params.seqlen_q;
    const int batch_idx = head / params.num_heads, head_idx = head - batch_idx * params.num_heads;
    const unsigned head_of_mask = dropout_head(params.dropout, params.num_heads, batch_idx, head_idx);
    g_scores += row_idx * seqlen_k;
    g_weights += row_idx * seqlen_k;
    if (g_probabilities != nullptr) g_probabilities += row_idx * seqlen_k;

    // The sink is one more logit, whose value is nowhere; -inf is none.
    const Accumulator sink = g_sinks == nullptr ? negative_infinity<Accumulator>() : g_sinks[head_idx];
    Accumulator row_max = sink;
    for (int i = lane_idx; i < seqlen_k; i += WARP_SIZE) row_max = fmax(row_max, g_scores[i]);
    for (int lane_mask = 16; lane_mask > 0; lane_mask /= 2) {
        row_max = fmax(row_max, __shfl_xor_sync(0xffffffff, row_max, lane_mask));
    }
    // A row without a visible key subtracts 0: -inf - (-inf) would be NaN.
    const Accumulator reference = row_max == negative_infinity<Accumulator>() ? Accumulator(0) : row_max;

    Accumulator sum = lane_idx == 0 ? exp(sink - reference) : Accumulator(0);
    for (int i = lane_idx; i < seqlen_k; i += WARP_SIZE) sum += exp(g_scores[i] - reference);
    for (int lane_mask = 16; lane_mask > 0; lane_mask /= 2) sum += __shfl_xor_sync(0xffffffff, sum, lane_mask);

    const Accumulator inverse_sum = sum == Accumulator(0) ? Accumulator(0) : Accumulator(1) / sum;
    for (int i = lane_idx; i < seqlen_k; i += WARP_SIZE) {
        const Accumulator probability = exp(g_scores[i] - reference) * inverse_sum;
        const bool kept = !params.use_dropout || dropout_keeps(params.dropout, head_of_mask, query_idx, i);
        if (g_probabilities != nullptr) g_probabilities[i] = static_cast<Probability>(probability);
        // A product, because a row that is NaN stays NaN.
        g_weights[i] = static_cast<Probability>(probability * (kept ? WEIGHT_FACTOR : Accumulator(0)));
    }
    if (lane_idx == 0) g_lse[row_idx] = reference + log(sum);
}

extern "C" __global__ void __launch_bounds__(TILE * TILE, 1) cuattn_attention_output(
    const Probability* __restrict__ g_weights,      // [batch, num_heads, seqlen_q, seqlen_k], contiguous
    const Storage* __restrict__ g_v,                // [batch, seqlen_k, num_kv_heads, head_dim_v]
    Output* __restrict__ g_out,                     // [batch, seqlen_q, num_heads, head_dim_v]
    const Accumulator* __restrict__ g_v_descale,    // [batch, num_kv_heads], or null
    const Params params)
{
    __shared__ Smem smem;
    const ProductTile tile(params.head_dim_v, params);
    const bool row_inside = tile.row < params.seqlen_q, col_inside = tile.col < params.head_dim_v;
    g_weights += tile.row_offset(params);
    g_v += tile.batch_idx * params.v.batch + tile.kv_head_idx * params.v.head + tile.col;

    Accumulator sum = 0;
    for (int first = 0; first < params.seqlen_k; first += TILE) {
        const int key_col = first + threadIdx.x;
        const int key_row = first + threadIdx.y;
        smem.a[threadIdx.y][threadIdx.x] = load_or_zero(g_weights + key_col, row_inside && key_col < params.seqlen_k);
        smem.b[threadIdx.y][threadIdx.x] =
            load_or_zero(g_v + key_row * params.v.seq, key_row < params.seqlen_k && col_inside);
        // SYNC: both tiles are complete.
        __syncthreads();
        for (int i = 0; i < TILE; i++) sum += smem.a[threadIdx.y][i] * smem.b[i][threadIdx.x];
        // SYNC: everyone is done with the tiles, which the next pass overwrites.
        __syncthreads();
    }
    if (row_inside && col_inside) {
        g_out += tile.batch_idx * params.out.batch + tile.row * params.out.seq + tile.head_idx * params.out.head;
        g_out[tile.col] =
            static_cast<Output>(sum * (params.keep_scale / WEIGHT_FACTOR * factor_of(g_v_descale, tile.kv_head)));
    }
}
