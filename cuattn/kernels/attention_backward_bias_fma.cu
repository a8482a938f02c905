// The gradient of the bias for float32 and float64 without tensor cores: every product is an IEEE fused multiply-add.
//
//     dbias = dS, summed over the axes along which the bias is broadcast,    dS = P (Z (dout V^T) - delta)
//
// The same tiles, terms and order as in attention_backward_bias.cu (bias_sums.cuh). All arithmetic is in the element
// type and rounds to nearest; dot products are summed in blocks (lane_products.cuh), dS term by term.
//
// Grid: bias_sums.cuh. Block: NUM_WARPS warps of WARP_ROWS rows each; lane l has the rows LANE_M (l / 16) .. + LANE_M -
// 1, half of the warp's, and columns l % 16, l % 16 + 16, ...
//
// Constants: Element (float or double), BiasElement; BLOCK_M queries, BLOCK_N keys, HEAD_DIM and HEAD_DIM_V (buckets:
// the head dims proper are arguments and may be smaller), NUM_WARPS, SMEM_BYTES; ALIGNED (bases and strides of q, k, v
// and dout: multiples of 16 bytes); the options that are compiled in, as in attention_forward.cu: BIAS is one of them.
constexpr int WARP_SIZE = 32;
constexpr int NUM_THREADS = NUM_WARPS * WARP_SIZE;
constexpr int WARP_ROWS = BLOCK_M / NUM_WARPS;
constexpr int LANE_M = WARP_ROWS / 2;  // rows a lane computes: a half-warp has half of the warp's
constexpr int LANE_N = BLOCK_N / 16;
constexpr bool OWN_KEYS = false;

#include "backward/bias_sums.cuh"
#include "backward/lane_tile.cuh"

// Shared memory of a CTA.
union Smem {
    struct {
        Element q[BLOCK_M][TILE_STRIDE<HEAD_DIM>];
        Element k[BLOCK_N][TILE_STRIDE<HEAD_DIM>];
        Element dout[BLOCK_M][TILE_STRIDE<HEAD_DIM_V>];
        Element v[BLOCK_N][TILE_STRIDE<HEAD_DIM_V>];
    };
    Element column_sums[NUM_WARPS][BLOCK_N];  // in the place of the tiles, once the last is done
};

static_assert(BLOCK_M == NUM_WARPS * WARP_ROWS && WARP_ROWS % 2 == 0, "every lane has whole rows");
static_assert(BLOCK_N % LANES_PER_ROW == 0, "every lane has whole columns");
static_assert(sizeof(Smem) == SMEM_BYTES, "the config and this file agree on the shared-memory plan");
static_assert(BIAS && BLOCK_N <= NUM_THREADS, "there is a bias, and a thread for each column sum");

using Params = AttentionBackwardParams<Element>;

// Each row summed over its columns: the sum takes the place of the first one.
__device__ __forceinline__ void sum_rows(Weights& acc) {
#pragma unroll
    for (int i = 0; i < LANE_M; i++) {
#pragma unroll
        for (int j = 1; j < LANE_N; j++) acc[i][0] += acc[i][j];
#pragma unroll
        for (int lane_mask = 1; lane_mask < LANES_PER_ROW; lane_mask *= 2) {
            acc[i][0] += __shfl_xor_sync(0xffffffff, acc[i][0], lane_mask);
        }
    }
}

// This warp's rows summed, column by column: s_sums [BLOCK_N].
__device__ __forceinline__ void sum_columns(const Weights& acc, Element* s_sums, int lane_idx) {
#pragma unroll
    for (int j = 0; j < LANE_N; j++) {
        Element sum = acc[0][j];
#pragma unroll
        for (int i = 1; i < LANE_M; i++) sum += acc[i][j];
        sum += __shfl_xor_sync(0xffffffff, sum, LANES_PER_ROW);
        if (lane_idx < LANES_PER_ROW) s_sums[j * LANES_PER_ROW + lane_idx] = sum;
    }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) cuattn_attention_backward_bias_fma(
    const Element* __restrict__ g_dout,   // [batch, seqlen_q, num_heads, head_dim_v], last axis contiguous
    const Element* __restrict__ g_q,      // [batch, seqlen_q, num_heads, head_dim]
    const Element* __restrict__ g_k,      // [batch, seqlen_k, num_kv_heads, head_dim]
    const Element* __restrict__ g_v,      // [batch, seqlen_k, num_kv_heads, head_dim_v]
    const Element* __restrict__ g_lse,    // [batch, num_heads, seqlen_q], contiguous; ready: attention_backward_rows.cu
    const Element* __restrict__ g_delta,  // likewise
    BiasElement* __restrict__ g_dbias,    // the gradient, strides in sums
    Element* __restrict__ g_partial,      // [num_parts, elements of the gradient]; null with one part
    const BiasElement* __restrict__ g_bias,      // broadcast to [batch, num_heads, seqlen_q, seqlen_k]
    // From here on, null is what a call does not use.
    const unsigned char* __restrict__ g_mask,    // likewise; 0 hides a key
    const Element* __restrict__ g_alibi_slopes,  // [batch or 1, num_heads]
    const int* __restrict__ g_diagonal_offsets,  // [batch]
    const int* __restrict__ g_cu_seqlens_q,      // [batch + 1]: q and dout are packed, [tokens, num_heads, ...],
    const int* __restrict__ g_cu_seqlens_k,      // lse [num_heads, tokens], k and v [tokens, num_kv_heads, ...]
    const BiasSums sums, const Params params)
{
    extern __shared__ __align__(16) unsigned char s_bytes[];
    Smem& smem = *reinterpret_cast<Smem*>(s_bytes);
    const int warp_idx = threadIdx.x / WARP_SIZE;
    const int lane_idx = threadIdx.x % WARP_SIZE;
    const int lane_row = threadIdx.x / LANES_PER_ROW * LANE_M;  // this lane's first row of the tile, ...
    const int lane_col = lane_idx % LANES_PER_ROW;              // ... and its first column

    Weights acc = {}, scores;
    Element lse[LANE_M], delta[LANE_M];
    Position lane;
    unsigned head;  // as dropout counts them
    bool active;    // some row of this warp sees a key of the tile
    BiasWalk walk(sums, params, g_cu_seqlens_q, g_cu_seqlens_k, g_diagonal_offsets);

    auto use_qk = [&] {
        const BiasTerm& term = walk.term;
        const Sequence& sequence = walk.sequence;
        const int first_query = term.q_tile * BLOCK_M, first_key = term.k_tile * BLOCK_N;
        const int warp_query = first_query + warp_idx * WARP_ROWS;
        const int last_query = min(warp_query + WARP_ROWS, sequence.seqlen_q) - 1;
        const KeyBand band(params, sequence);
        const KeyTiles tiles(band, BLOCK_N, warp_query, max(warp_query, last_query));
        active = warp_query <= last_query && term.k_tile >= tiles.begin && term.k_tile < tiles.end;
        if (!active) return;
        head = dropout_head(params.dropout, params.num_heads, term.batch_idx, term.head_idx);
        lane = {first_query + lane_row, first_key + lane_col};
        const long long first_row =
            term.batch_idx * params.lse_batch + term.head_idx * params.lse_head + sequence.q_start;
#pragma unroll
        for (int i = 0; i < LANE_M; i++) {
            const int query = lane.own + i;
            // +inf: a row that does not exist has probabilities 0.
            const bool exists = query <= last_query;
            lse[i] = exists ? g_lse[first_row + query] : -negative_infinity<Element>();
            delta[i] = exists ? g_delta[first_row + query] : Element(0);
        }
        const ScoreOptions<Element> options(params, g_bias, g_mask, nullptr, g_alibi_slopes, term.batch_idx,
                                            term.head_idx, 0);
        const AlibiRows alibi_rows(lane, sequence.diagonal_offset, options.slope);
        multiply_abt<HEAD_DIM>(scores, smem.q[lane_row], smem.k[lane_col], params.head_dim);
        natural_logits<LaneLayout>(scores, params, params.scale, alibi_rows);
        add_bias_and_mask<LaneLayout>(scores, params, options, lane, sequence.seqlen_q, sequence.seqlen_k);
        if (!tiles.in_full(term.k_tile)) {
            hide_by_position<LaneLayout>(scores, negative_infinity<Element>(), band, lane);
        }
    };
    auto use_dout_v = [&] {
        if (!active) return;
        Weights ds;
        multiply_abt<HEAD_DIM_V>(ds, smem.dout[lane_row], smem.v[lane_col], params.head_dim_v);
        differentiate(scores, ds, params, lse, delta, head, lane);
#pragma unroll
        for (int i = 0; i < LANE_M; i++) {
#pragma unroll
            for (int j = 0; j < LANE_N; j++) acc[i][j] += ds[i][j];
        }
    };
    walk_over_terms(walk, smem, BiasOperands<Element>{g_dout, g_q, g_k, g_v}, params, use_qk, use_dout_v);

    const BiasTarget<Element> target(sums, walk.term, g_dbias, g_partial);
    const bool keys_summed = sums.strides.key == 0;
    if (keys_summed) sum_rows(acc);
    if (sums.strides.query != 0) {
#pragma unroll
        for (int i = 0; i < LANE_M; i++) {
#pragma unroll
            for (int j = 0; j < LANE_N; j++) target.store(lane_row + i, lane_col + j * LANES_PER_ROW, acc[i][j]);
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
        Element sum = 0;
#pragma unroll
        for (int warp = 0; warp < NUM_WARPS; warp++) sum += smem.column_sums[warp][key];
        target.store(0, key, sum);
    }
}
