// Differential attention for float32 and float64 without tensor cores: every product is an IEEE fused multiply-add.
//
//     out = norm(softmax(logits 1) v - lambda softmax(logits 2) v),    logits s = options(scale * q_s k_s^T)
//
// The two streams of an output head have a half of the warps each, as in differential_attention.cu; a warp computes as
// in attention_forward_fma.cu, with the same accuracy.
//
// Grid: one CTA for each block of queries of each output head (query_block.cuh).
// Block: NUM_WARPS warps of WARP_M = 8 query rows each (4 where the registers hold no more), the first half of them for
// the first stream; lane l has the rows LANE_M (l / 16) .. + LANE_M - 1, half of the warp's, and columns l % 16,
// l % 16 + 16, ...
//
// Constants: Element (float or double), BiasElement; SHARED_KEYS; BLOCK_M, BLOCK_N, HEAD_DIM and HEAD_DIM_V (buckets:
// the head dims proper are arguments and may be smaller), ONE_PLACE (k and v take turns), NUM_WARPS (of both streams),
// SMEM_BYTES; ALIGNED (bases and strides of q, k, v: multiples of 16 bytes); the options that are compiled in:
// BOUND_LEFT and BOUND_RIGHT (mask.cuh), SOFTCAP, ALIBI, BIAS, MASK (logits.cuh), DROPOUT (philox.cuh).
#include "common/elements.cuh"
#include "attention/logits.cuh"
#include "attention/online_softmax.cuh"
#include "attention/philox.cuh"
#include "attention/query_block.cuh"
#include "common/tiles.cuh"
#include "differential/differential_params.cuh"
#include "differential/row_norm.cuh"

constexpr int WARP_SIZE = 32;
constexpr int NUM_THREADS = NUM_WARPS * WARP_SIZE;
constexpr int STREAM_WARPS = NUM_WARPS / 2;
constexpr int WARP_M = BLOCK_M / STREAM_WARPS;
constexpr int LANE_M = WARP_M / 2;    // rows a lane computes: a half-warp has half of the warp's
constexpr int LANE_N = BLOCK_N / 16;  // columns of the scores
constexpr int KEY_STREAMS = SHARED_KEYS ? 1 : 2;

#include "attention/lane_products.cuh"

// Shared memory of a CTA. The outputs of the second stream take the place of k and v once the last tile is done.
struct Smem {
    static constexpr int K_SIZE = BLOCK_N * TILE_STRIDE<HEAD_DIM>, V_SIZE = BLOCK_N * TILE_STRIDE<HEAD_DIM_V>;
    static constexpr int KV_SIZE = ONE_PLACE ? (KEY_STREAMS * K_SIZE > V_SIZE ? KEY_STREAMS * K_SIZE : V_SIZE)
                                             : KEY_STREAMS * K_SIZE + V_SIZE;
    static constexpr int OUT_SIZE = BLOCK_M * TILE_STRIDE<HEAD_DIM_V>;

    Element q[2][BLOCK_M][TILE_STRIDE<HEAD_DIM>];
    Element kv[KV_SIZE > OUT_SIZE ? KV_SIZE : OUT_SIZE];
    Element p[2][BLOCK_M][TILE_STRIDE<BLOCK_N>];  // each warp uses its own rows

    __device__ __forceinline__ Element* k(int stream) { return kv + (SHARED_KEYS ? 0 : stream * K_SIZE); }
    __device__ __forceinline__ Element* v() { return kv + (ONE_PLACE ? 0 : KEY_STREAMS * K_SIZE); }
    __device__ __forceinline__ Element* out(int row) { return kv + row * TILE_STRIDE<HEAD_DIM_V>; }
};

static_assert(BLOCK_M == STREAM_WARPS * WARP_M && WARP_M % 2 == 0, "every lane has whole rows");
static_assert(BLOCK_N % LANES_PER_ROW == 0, "every lane has whole columns");
static_assert(HEAD_DIM % DOT_BLOCK == 0, "head dims come in buckets");
static_assert(sizeof(Smem) == SMEM_BYTES, "config.py and this file agree on the shared-memory plan");

using Params = DifferentialParams<Element>;
using SoftmaxRow = OnlineSoftmaxRow<Element>;
using LanePosition = TilePosition<false>;
using OutRow = RowPart<HEAD_DIM_V>;

#include "attention/lane_state.cuh"
#include "attention/lane_walk.cuh"

// f(x, column) for every number that a lane has of an output row, the column counted from its first.
template <typename F>
__device__ __forceinline__ void each_number(OutRow& row, const F& f) {
#pragma unroll
    for (int e = 0; e < OutRow::VECTORS; e++) {
#pragma unroll
        for (int x = 0; x < OutRow::VECTOR; x++) f(row.x[e][x], e * OutRow::STEP + x);
    }
}

// A row of the first stream's output becomes one of the result: lambda times that of the second is taken away, the row
// is divided by its root mean square, and everything is scaled. s_second: this lane's first column of the second's.
__device__ __forceinline__ void subtract(OutRow& row, const Params& params, const Element* s_second, Element lambda,
                                         const Element* g_norm_weight, int out_col) {
    each_number(row, [&](Element& x, int column) { x = fma(-lambda, s_second[column], x); });
    Element factor = params.output_scale;
    if (params.norm) {
        auto sum_of_squares = [&](Element by) {
            Element sum = 0;
            each_number(row, [&](Element x, int) { sum = fma(x * by, x * by, sum); });
#pragma unroll
            for (int lane_mask = 1; lane_mask < LANES_PER_ROW; lane_mask *= 2) {
                sum += __shfl_xor_sync(0xffffffff, sum, lane_mask);
            }
            return sum;
        };
        const RowNorm<Element> norm(sum_of_squares, params.head_dim_v, params.eps);
        row.scale(norm.factor);
        factor *= norm.inverse;
    }
    row.scale(factor);
    if (g_norm_weight != nullptr) {
        each_number(row, [&](Element& x, int column) {
            if (out_col + column < params.head_dim_v) x *= g_norm_weight[out_col + column];
        });
    }
}

// Whether every row of an array begins at a multiple of 16 bytes.
__device__ __forceinline__ bool in_vectors(const Element* g_rows, const RowStrides& strides) {
    const unsigned long long elements = strides.batch | strides.seq | strides.head;
    return ((reinterpret_cast<unsigned long long>(g_rows) | elements * sizeof(Element)) & 15) == 0;
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) cuattn_differential_attention_fma(
    const Element* __restrict__ g_q,  // [batch, seqlen_q, 2 num_heads, head_dim], last axis contiguous
    const Element* __restrict__ g_k,  // [batch, seqlen_k, KEY_STREAMS num_kv_heads, head_dim]
    const Element* __restrict__ g_v,  // [batch, seqlen_k, num_kv_heads, head_dim_v]
    Element* __restrict__ g_out,      // [batch, seqlen_q, num_heads, head_dim_v]
    // From here on, null is what a call does not use.
    const Element* __restrict__ g_lambda,            // [batch, seqlen_q, num_heads] or less
    const Element* __restrict__ g_norm_weight,       // [head_dim_v]
    Element* __restrict__ g_lse,                     // [batch, num_heads, 2, seqlen_q], contiguous
    Element* __restrict__ g_out1,                    // [batch, seqlen_q, num_heads, head_dim_v], strides params.state;
    Element* __restrict__ g_out2,                    // both or none
    const BiasElement* __restrict__ g_bias,          // broadcast to [batch, num_heads, 2, seqlen_q, seqlen_k]
    const unsigned char* __restrict__ g_mask,        // likewise; 0 hides a key
    const unsigned char* __restrict__ g_tile_class,  // of the bias and the mask, broadcast likewise: score_options.cuh
    const Element* __restrict__ g_alibi_slopes,      // [batch or 1, num_heads, 2 or 1]
    const int* __restrict__ g_diagonal_offsets,      // [batch]
    const Params params)
{
    extern __shared__ __align__(16) unsigned char s_bytes[];
    Smem& smem = *reinterpret_cast<Smem*>(s_bytes);
    const int lane_idx = threadIdx.x % WARP_SIZE;
    const int warp_idx = threadIdx.x / WARP_SIZE;
    const StreamOfPair own{warp_idx / STREAM_WARPS};
    const int warp_row = warp_idx % STREAM_WARPS * WARP_M;
    const int lane_row = warp_row + lane_idx / LANES_PER_ROW * LANE_M;  // this lane's first row of the tile, ...
    const int lane_col = lane_idx % LANES_PER_ROW;                      // ... its first column, and that of the output
    const int out_col = lane_col * OutRow::VECTOR;

    const QueryBlock block = query_block<BLOCK_M, BOUND_RIGHT>(params, nullptr, nullptr, nullptr, g_diagonal_offsets);
    const int first_query = block.first_query;
    const int num_queries = min(BLOCK_M, block.seqlen_q - first_query);

    g_q += block.batch_idx * params.q.batch + block.head_idx * params.q.head +
           static_cast<long long>(first_query) * params.q.seq;
    g_k += block.batch_idx * params.k.batch + block.kv_head_idx * params.k.head;
    g_v += block.batch_idx * params.v.batch + block.kv_head_idx * params.v.head;
    const KeyBand band(params, block);
    const KeyTiles tiles(band, BLOCK_N, first_query, first_query + num_queries - 1);
    const int keys_end = band.end(first_query + num_queries - 1);  // keys behind are not read, whatever they hold
    const ScoreOptions<Element> options = own.options(params, g_bias, g_mask, g_tile_class, g_alibi_slopes,
                                                  block.batch_idx, block.head_idx, first_query / BLOCK_M);
    const int warp_query = first_query + warp_row;
    const int last_warp_query = min(warp_query + WARP_M, block.seqlen_q) - 1;
    const KeyBand::RowBounds warp_keys =
        warp_query < block.seqlen_q ? band.rows(warp_query, last_warp_query) : KeyBand::RowBounds{0, 0};

    LaneState state;
    clear<HEAD_DIM_V>(state.acc_out);
#pragma unroll
    for (int i = 0; i < LANE_M; i++) state.rows[i].reset();

    auto visible_tile = [&](int tile_idx) { return own.visible_tile(params, options, tiles.begin, tile_idx); };
    auto load_k = [&](int tile_idx) {
        const int first_key = tile_idx * BLOCK_N;
#pragma unroll
        for (int s = 0; s < KEY_STREAMS; s++) {
            load_tile<ALIGNED, BLOCK_N, HEAD_DIM, NUM_THREADS>(
                smem.k(s), g_k + s * params.k_stream + first_key * params.k.seq, params.k.seq, keys_end - first_key,
                params.head_dim);
        }
        cp_async_commit();
    };
    auto load_v = [&](int tile_idx) {
        const int first_key = tile_idx * BLOCK_N;
        load_tile<ALIGNED, BLOCK_N, HEAD_DIM_V, NUM_THREADS>(smem.v(), g_v + first_key * params.v.seq, params.v.seq,
                                                             keys_end - first_key, params.head_dim_v);
        cp_async_commit();
    };

    // The tile's probabilities, if this warp's queries see any key of it.
    auto weigh = [&](int tile_idx) {
        const int first_key = tile_idx * BLOCK_N;
        const TileClass tile_class = options.tile_class(params, tile_idx);
        const bool active = warp_keys.meet(first_key, BLOCK_N) && !(TILE_CLASSES && tile_class == TILE_HIDDEN);
        if (active) {
            const LanePosition lane{first_query + lane_row, first_key + lane_col};
            Weights scores;
            multiply_abt<HEAD_DIM>(scores, smem.q[own.stream][lane_row],
                                   smem.k(own.stream) + lane_col * TILE_STRIDE<HEAD_DIM>, params.head_dim);
            const TileRows<LaneLayout, false, Element> alibi_rows(lane, block.diagonal_offset, options.slope);
            natural_logits<LaneLayout>(scores, params, params.scale, alibi_rows);
            if (TILE_CLASSES && tile_class == TILE_MIXED) {
                add_bias_and_mask<LaneLayout>(scores, params, options, lane, block.seqlen_q, block.seqlen_k);
            }
            if (!tiles.in_full(tile_idx)) {
                hide_by_position<LaneLayout>(scores, negative_infinity<Element>(), band, lane);
            }
            softmax_step(state, scores);
            if (DROPOUT && params.use_dropout) {
                const unsigned head = dropout_head(params.dropout, 2 * params.num_heads, block.batch_idx,
                                                   own.head(block.head_idx));
                drop_probabilities(scores, params.dropout, head, lane);
            }
            store_weights(scores, smem.p[own.stream][lane_row] + lane_col);
        }
        return active;
    };

    // Tiles are taken from the last to the first; those that are hidden from both streams are passed over.
    const int last_tile = visible_tile(tiles.end - 1);
    if (last_tile >= tiles.begin) {
#pragma unroll
        for (int s = 0; s < 2; s++) {
            load_tile<ALIGNED, BLOCK_M, HEAD_DIM, NUM_THREADS>(smem.q[s][0], g_q + s * params.q_stream, params.q.seq,
                                                               num_queries, params.head_dim);
        }
        load_k(last_tile);
    }
    walk_tiles(
        state, last_tile, [&](int tile_idx) { return tile_idx >= tiles.begin; },
        [&](int tile_idx) { return visible_tile(tile_idx - 1); }, load_k, load_v, weigh,
        smem.p[own.stream][lane_row], smem.v() + out_col);

    // SYNC: every warp is done with k and v, whose place the second output takes.
    __syncthreads();
    const bool keeps_state = g_out1 != nullptr;
    Element* g_state = own.stream == 0 ? g_out1 : g_out2;
    const bool vectors = in_vectors(g_out, params.out), state_vectors = in_vectors(g_state, params.state);
    g_out += block.batch_idx * params.out.batch + block.head_idx * params.out.head + out_col;
    g_state += block.batch_idx * params.state.batch + block.head_idx * params.state.head + out_col;
    if (g_lse != nullptr) g_lse += block.batch_idx * params.lse_batch + own.head(block.head_idx) * params.lse_head;
#pragma unroll
    for (int i = 0; i < LANE_M; i++) {
        SoftmaxRow& row = state.rows[i];
        state.acc_out[i].scale(finish_row(row, nullptr, 0) * params.keep_scale);
        const int query_idx = first_query + lane_row + i;
        if (query_idx < block.seqlen_q) {
            if (keeps_state) {
                store_row(g_state + query_idx * params.state.seq, state.acc_out[i], Element(1), out_col,
                          params.head_dim_v, state_vectors);
            }
            if (g_lse != nullptr && lane_col == 0) g_lse[query_idx] = row.lse();
        }
        if (own.stream == 1) {
            Element* s_second = smem.out(lane_row + i) + out_col;
            each_number(state.acc_out[i], [&](Element x, int column) { s_second[column] = x; });
        }
    }
    // SYNC: the output of the second stream is in shared memory.
    __syncthreads();
    if (own.stream == 1) return;
#pragma unroll
    for (int i = 0; i < LANE_M; i++) {
        const int query_idx = first_query + lane_row + i;
        Element lambda = 0;
        if (query_idx < block.seqlen_q) {
            lambda = lambda_of(params, g_lambda, block.batch_idx, query_idx, block.head_idx);
        }
        subtract(state.acc_out[i], params, smem.out(lane_row + i) + out_col, lambda, g_norm_weight, out_col);
        if (query_idx < block.seqlen_q) {
            store_row(g_out + query_idx * params.out.seq, state.acc_out[i], Element(1), out_col, params.head_dim_v,
                      vectors);
        }
    }
}
