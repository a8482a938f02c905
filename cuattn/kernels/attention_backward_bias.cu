// The gradient of the bias on the portable tensor-core path: 16-bit elements, and float32 with its products in tf32.
//
//     dbias = dS, summed over the axes along which the bias is broadcast,    dS = P (Z (dout V^T) - delta)
//
// One CTA computes one tile of the gradient, or a part of its sum: bias_sums.cuh says which, and in which order. For
// each term it has q, k, dout and v of a tile in shared memory, computes the scores and dP once more (they are not kept
// by the kernel that computes dq: that would be a matrix of seqlen_q x seqlen_k), and adds dS to accumulators. These
// are summed over rows or columns at the very end, and written once: no atomics, and the same bits every time.
//
// Grid: bias_sums.cuh. Block: NUM_WARPS warps; warp w has rows [w * WARP_ROWS, (w + 1) * WARP_ROWS) of a tile.
//
// Constants: Element, BiasElement; BLOCK_M queries, BLOCK_N keys, HEAD_DIM and HEAD_DIM_V (buckets: the head dims
// proper are arguments and may be smaller), NUM_WARPS, SMEM_BYTES; ALIGNED (bases and strides of q, k, v and dout:
// multiples of 16 bytes); the options that are compiled in, as in attention_forward.cu: BIAS is one of them.
#include "common/mma.cuh"

constexpr int NUM_THREADS = NUM_WARPS * WARP_SIZE;
constexpr int WARP_ROWS = BLOCK_M / NUM_WARPS;
constexpr int ROW_TILES = WARP_ROWS / MMA_M;
constexpr bool OWN_KEYS = false;
constexpr int BLOCK_OTHER = BLOCK_N;

#include "backward/backward_tile.cuh"
#include "backward/bias_sums.cuh"

// Shared memory of a CTA.
union Smem {
    struct {
        Element q[BLOCK_M][TILE_STRIDE<HEAD_DIM>];
        Element k[BLOCK_N][TILE_STRIDE<HEAD_DIM>];
        Element dout[BLOCK_M][TILE_STRIDE<HEAD_DIM_V>];
        Element v[BLOCK_N][TILE_STRIDE<HEAD_DIM_V>];
    };
    float column_sums[NUM_WARPS][BLOCK_N];  // in the place of the tiles, once the last is done
};

static_assert(ROW_TILES * MMA_M * NUM_WARPS == BLOCK_M, "every row belongs to one warp, in whole mma tiles");
static_assert(sizeof(Smem) == SMEM_BYTES, "the config and this file agree on the shared-memory plan");
static_assert(BIAS && BLOCK_N <= NUM_THREADS, "there is a bias, and a thread for each column sum");

using Params = AttentionBackwardParams<float>;

// Each row summed over its columns: the sum takes the place of the first one.
__device__ __forceinline__ void sum_rows(Tile& acc) {
#pragma unroll
    for (int t = 0; t < ROW_TILES; t++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = 0.0f;
#pragma unroll
            for (int n = 0; n < COL_TILES; n++) sum += acc[t][n][2 * half] + acc[t][n][2 * half + 1];
            acc[t][0][2 * half] = quad_sum(sum);
        }
    }
}

// This warp's rows summed, column by column: s_sums [BLOCK_N].
__device__ __forceinline__ void sum_columns(const Tile& acc, float* s_sums, int lane_idx) {
#pragma unroll
    for (int n = 0; n < COL_TILES; n++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float sum = 0.0f;
#pragma unroll
            for (int t = 0; t < ROW_TILES; t++) sum += acc[t][n][i] + acc[t][n][i + 2];
#pragma unroll
            for (int lane_mask = 4; lane_mask < WARP_SIZE; lane_mask *= 2) {
                sum += __shfl_xor_sync(0xffffffff, sum, lane_mask);
            }
            if (frag_acc_row(lane_idx) == 0) s_sums[n * MMA_N + frag_acc_col(lane_idx) + i] = sum;
        }
    }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) cuattn_attention_backward_bias(
    const Element* __restrict__ g_dout,  // [batch, seqlen_q, num_heads, head_dim_v], last axis contiguous
    const Element* __restrict__ g_q,     // [batch, seqlen_q, num_heads, head_dim]
    const Element* __restrict__ g_k,     // [batch, seqlen_k, num_kv_heads, head_dim]
    const Element* __restrict__ g_v,     // [batch, seqlen_k, num_kv_heads, head_dim_v]
    const float* __restrict__ g_lse,     // [batch, num_heads, seqlen_q], contiguous; ready: attention_backward_rows.cu
    const float* __restrict__ g_delta,   // likewise
    BiasElement* __restrict__ g_dbias,   // the gradient, strides in sums
    float* __restrict__ g_partial,       // [num_parts, elements of the gradient]; null with one part
    const BiasElement* __restrict__ g_bias,      // broadcast to [batch, num_heads, seqlen_q, seqlen_k]
    // From here on, null is what a call does not use.
    const unsigned char* __restrict__ g_mask,    // likewise; 0 hides a key
    const float* __restrict__ g_alibi_slopes,    // [batch or 1, num_heads]
    const int* __restrict__ g_diagonal_offsets,  // [batch]
    const int* __restrict__ g_cu_seqlens_q,      // [batch + 1]: q and dout are packed, [tokens, num_heads, ...],
    const int* __restrict__ g_cu_seqlens_k,      // lse [num_heads, tokens], k and v [tokens, num_kv_heads, ...]
    const BiasSums sums, const Params params)
{
    extern __shared__ __align__(16) unsigned char s_bytes[];
    Smem& smem = *reinterpret_cast<Smem*>(s_bytes);
    const int warp_idx = threadIdx.x / WARP_SIZE;
    const int lane_idx = threadIdx.x % WARP_SIZE;
    const unsigned s_q = smem_address(smem.q) + lane_offset_a<HEAD_DIM>(warp_idx * WARP_ROWS, lane_idx);
    const unsigned s_k = smem_address(smem.k) + lane_offset_bt<HEAD_DIM>(lane_idx);
    const unsigned s_dout = smem_address(smem.dout) + lane_offset_a<HEAD_DIM_V>(warp_idx * WARP_ROWS, lane_idx);
    const unsigned s_v = smem_address(smem.v) + lane_offset_bt<HEAD_DIM_V>(lane_idx);

    Tile acc, probabilities;
    QueryTerms lse, delta;
    bool active;  // some row of this warp sees a key of the tile
    clear(acc);
    BiasWalk walk(sums, params, g_cu_seqlens_q, g_cu_seqlens_k, g_diagonal_offsets);

    auto use_qk = [&] {
        const BiasTerm& term = walk.term;
        const Sequence& sequence = walk.sequence;
        const int warp_query = term.q_tile * BLOCK_M + warp_idx * WARP_ROWS, first_key = term.k_tile * BLOCK_N;
        const int last_query = min(warp_query + WARP_ROWS, sequence.seqlen_q) - 1;
        const KeyBand band(params, sequence);
        const KeyTiles tiles(band, BLOCK_N, warp_query, max(warp_query, last_query));
        active = warp_query <= last_query && term.k_tile >= tiles.begin && term.k_tile < tiles.end;
        if (!active) return;
        const long long first_row =
            term.batch_idx * params.lse_batch + term.head_idx * params.lse_head + sequence.q_start;
        const Position lane{warp_query + frag_acc_row(lane_idx), first_key + frag_acc_col(lane_idx)};
#pragma unroll
        for (int i = 0; i < 2 * ROW_TILES; i++) {
            const int query = lane.own + i * 8;
            // +inf: a row that does not exist has probabilities 0.
            const bool exists = query <= last_query;
            lse.rows[i / 2][i % 2] = exists ? g_lse[first_row + query] : -negative_infinity<float>();
            delta.rows[i / 2][i % 2] = exists ? g_delta[first_row + query] : 0.0f;
        }
        const ScoreOptions<float> options(params, g_bias, g_mask, nullptr, g_alibi_slopes, term.batch_idx,
                                          term.head_idx, 0);
        const AlibiRows alibi_rows(lane, sequence.diagonal_offset, options.slope);
        multiply_abt<HEAD_DIM>(probabilities, s_q, s_k);
        natural_logits<Layout>(probabilities, params, params.scale, alibi_rows);
        add_bias_and_mask<Layout>(probabilities, params, options, lane, sequence.seqlen_q, sequence.seqlen_k);
        const bool large = lse.any_large(nullptr, lane_idx);
        probabilities_from_logits(probabilities, lse, large, params.scale, params.scale_log2);
        if (!tiles.in_full(term.k_tile)) hide_by_position<Layout>(probabilities, 0.0f, band, lane);
        if (DROPOUT && params.use_dropout) {
            const unsigned head = dropout_head(params.dropout, params.num_heads, term.batch_idx, term.head_idx);
            mark_dropped(probabilities, params.dropout, head, lane);
        }
    };
    auto use_dout_v = [&] {
        if (!active) return;
        Tile ds;
        multiply_abt<HEAD_DIM_V>(ds, s_dout, s_v);
        score_gradients(ds, probabilities, delta, params.keep_scale);
#pragma unroll
        for (int t = 0; t < ROW_TILES; t++) {
#pragma unroll
            for (int n = 0; n < COL_TILES; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) acc[t][n][i] += ds[t][n][i];
            }
        }
    };
    walk_over_terms(walk, smem, BiasOperands<Element>{g_dout, g_q, g_k, g_v}, params, use_qk,
                    use_dout_v);

    const BiasTarget<float> target(sums, walk.term, g_dbias, g_partial);
    const bool keys_summed = sums.strides.key == 0;
    if (keys_summed) sum_rows(acc);
    if (sums.strides.query != 0) {
#pragma unroll
        for (int t = 0; t < ROW_TILES; t++) {
#pragma unroll
            for (int n = 0; n < COL_TILES; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    target.store(warp_idx * WARP_ROWS + t * MMA_M + i / 2 * 8 + frag_acc_row(lane_idx),
                                 n * MMA_N + i % 2 + frag_acc_col(lane_idx), acc[t][n][i]);
                }
            }
        }
        return;
    }
    // SYNC: every warp is done with dout and v, whose place the sums take.
    __syncthreads();
    sum_columns(acc, smem.column_sums[warp_idx], lane_idx);
    // SYNC: the sums of all warps are written.
    __syncthreads();
    const int key = threadIdx.x;
    if (key < (keys_summed ? 1 : BLOCK_N)) {
        float sum = 0.0f;
#pragma unroll
        for (int warp = 0; warp < NUM_WARPS; warp++) sum += smem.column_sums[warp][key];
        target.store(0, key, sum);
    }
}
