// Differential attention on the portable tensor-core path (mma.sync, cp.async; sm_80 and newer), 16-bit elements.
//
//     out = norm(softmax(logits 1) v - lambda softmax(logits 2) v),    logits s = options(scale * q_s k_s^T)
//
// Query heads 2 h and 2 h + 1 are the streams of output head h. One CTA computes BLOCK_M queries of one output head:
// the first half of its warps has the first stream, the other half the second, over the same queries. They walk over
// the keys together, as attention_forward.cu does, and share what is loaded: a tile of v serves both, and so does a
// tile of k where both streams read one key head (SHARED_KEYS). Every warp has one output to accumulate, so that the
// registers are those of attention. At the end the second stream leaves its output in shared memory, and the first
// subtracts it from its own (Ye et al., "Differential transformer", 2024).
//
// Grid: one CTA for each block of queries of each output head (query_block.cuh).
// Block: NUM_WARPS warps; of a stream's, warp w owns query rows [w * WARP_M, (w + 1) * WARP_M) of the tile.
//
// Constants: Element, BiasElement; SHARED_KEYS; BLOCK_M, BLOCK_N, HEAD_DIM and HEAD_DIM_V (buckets: the head dims
// proper are arguments and may be smaller), NUM_WARPS (of both streams), NUM_STAGES, SMEM_BYTES; ALIGNED (bases and
// strides of q, k, v: multiples of 16 bytes); the options that are compiled in: BOUND_LEFT and BOUND_RIGHT (mask.cuh),
// SOFTCAP, ALIBI, BIAS, MASK (logits.cuh), DROPOUT (philox.cuh).
#include "attention/philox.cuh"
#include "attention/query_block.cuh"
#include "attention/score_tile.cuh"
#include "common/tiles.cuh"
#include "differential/differential_params.cuh"
#include "differential/finish_row.cuh"

constexpr int NUM_THREADS = NUM_WARPS * 32;
constexpr int STREAM_WARPS = NUM_WARPS / 2;
constexpr int WARP_M = BLOCK_M / STREAM_WARPS;
constexpr int ROW_TILES = WARP_M / MMA_M;
constexpr int KEY_STREAMS = SHARED_KEYS ? 1 : 2;
constexpr int QK_STRIDE = TILE_STRIDE<HEAD_DIM>;
constexpr int V_STRIDE = TILE_STRIDE<HEAD_DIM_V>;

using Output = Element;

// Shared memory of a CTA. Once the last tile is done, outputs take the place of everything else: a row of float is two
// rows of elements, one for each stream.
union Smem {
    struct {
        Element q[2][BLOCK_M][QK_STRIDE];
        Element k[NUM_STAGES][KEY_STREAMS][BLOCK_N][QK_STRIDE];
        Element v[NUM_STAGES][BLOCK_N][V_STRIDE];
    };
    float out[BLOCK_M][V_STRIDE];
};

static_assert(ROW_TILES * MMA_M * STREAM_WARPS == BLOCK_M, "every row belongs to one warp, in whole mma tiles");
static_assert(NUM_STAGES >= 2, "the next tile loads while this one is used");
static_assert(sizeof(Smem) == SMEM_BYTES, "config.py and this file agree on the shared-memory plan");

using Params = DifferentialParams<float>;
using Layout = AccLayout<ROW_TILES, BLOCK_N>;
using Scores = Layout::Tile;
using LanePosition = TilePosition<false>;

#include "attention/warp_state.cuh"

// The step of the softmax in every row of a warp's tile. What has been accumulated is left alone where no maximum of
// eight rows rises, which is most of the time once a few tiles are done.
__device__ __forceinline__ void step(WarpState& state, Scores& scores, float scale_log2) {
#pragma unroll
    for (int i = 0; i < 2 * ROW_TILES; i++) {
        const float correction = softmax_row(state.rows[i / 2][i % 2], scores[i / 2], i % 2, scale_log2);
        if (__any_sync(0xffffffff, correction != 1.0f)) rescale_row(state.acc_out[i / 2], i % 2, correction);
    }
}

// Divides by the row sums.
__device__ __forceinline__ void finish_output(WarpState& state, float factor) {
#pragma unroll
    for (int i = 0; i < 2 * ROW_TILES; i++) {
        rescale_row(state.acc_out[i / 2], i % 2, state.rows[i / 2][i % 2].inverse_sum() * factor);
    }
}

// f(row, column, left, right) for every pair of neighbouring numbers that a lane has of its row i of the warp's output:
// that is row `row` of the warp's.
template <typename F>
__device__ __forceinline__ void each_pair(WarpState& state, int i, int lane_idx, const F& f) {
#pragma unroll
    for (int e = 0; e < HEAD_DIM_V / MMA_N; e++) {
        f(i / 2 * MMA_M + i % 2 * 8 + frag_acc_row(lane_idx), e * MMA_N + frag_acc_col(lane_idx),
          state.acc_out[i / 2][e][i % 2 * 2], state.acc_out[i / 2][e][i % 2 * 2 + 1]);
    }
}

// The warp's output, rounded, to its rows [num_rows x num_cols] of an array, by way of s_out, which only it uses.
__device__ __forceinline__ void store_output(WarpState& state, Output (*s_out)[V_STRIDE], Output* g_rows,
                                             long long g_stride, int num_rows, int num_cols, int lane_idx) {
#pragma unroll
    for (int i = 0; i < 2 * ROW_TILES; i++) {
        each_pair(state, i, lane_idx, [&](int row, int column, float left, float right) {
            store_pair(s_out[row] + column, left, right);
        });
    }
    // SYNC: the warp's output rows are in shared memory; only the warp that wrote them reads them.
    __syncwarp();
    const bool vectors = ((reinterpret_cast<unsigned long long>(g_rows) | g_stride * sizeof(Output)) & 15) == 0;
    store_tile_by_warp<WARP_M, HEAD_DIM_V>(g_rows, g_stride, s_out[0], num_rows, num_cols, vectors, lane_idx);
}

// The output of the first stream becomes the result: lambda times that of the second is taken away, rows are divided by
// their root mean square, and everything is scaled. s_out: the warp's rows of the second output.
__device__ __forceinline__ void subtract(WarpState& state, const Params& params, const float (*s_out)[V_STRIDE],
                                         const float* g_lambda, const float* g_norm_weight, const QueryBlock& block,
                                         int warp_query, int lane_idx) {
#pragma unroll
    for (int i = 0; i < 2 * ROW_TILES; i++) {
        const int query_idx = warp_query + i / 2 * MMA_M + i % 2 * 8 + frag_acc_row(lane_idx);
        float lambda = 0.0f;
        if (query_idx < block.seqlen_q) {
            lambda = lambda_of(params, g_lambda, block.batch_idx, query_idx, block.head_idx);
        }
        each_pair(state, i, lane_idx, [&](int row, int column, float& left, float& right) {
            const float2 second = *reinterpret_cast<const float2*>(s_out[row] + column);
            left = fmaf(-lambda, second.x, left);
            right = fmaf(-lambda, second.y, right);
        });
        finish_row(state.acc_out[i / 2], i % 2, params, g_norm_weight, lane_idx);
    }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) cuattn_differential_attention(
    const Element* __restrict__ g_q,  // [batch, seqlen_q, 2 num_heads, head_dim], last axis contiguous
    const Element* __restrict__ g_k,  // [batch, seqlen_k, KEY_STREAMS num_kv_heads, head_dim]
    const Element* __restrict__ g_v,  // [batch, seqlen_k, num_kv_heads, head_dim_v]
    Element* __restrict__ g_out,      // [batch, seqlen_q, num_heads, head_dim_v]
    // From here on, null is what a call does not use.
    const float* __restrict__ g_lambda,              // [batch, seqlen_q, num_heads] or less
    const float* __restrict__ g_norm_weight,         // [head_dim_v]
    float* __restrict__ g_lse,                       // [batch, num_heads, 2, seqlen_q], contiguous
    Element* __restrict__ g_out1,                    // [batch, seqlen_q, num_heads, head_dim_v], strides params.state;
    Element* __restrict__ g_out2,                    // both or none
    const BiasElement* __restrict__ g_bias,          // broadcast to [batch, num_heads, 2, seqlen_q, seqlen_k]
    const unsigned char* __restrict__ g_mask,        // likewise; 0 hides a key
    const unsigned char* __restrict__ g_tile_class,  // of the bias and the mask, broadcast likewise: score_options.cuh
    const float* __restrict__ g_alibi_slopes,        // [batch or 1, num_heads, 2 or 1]
    const int* __restrict__ g_diagonal_offsets,      // [batch]
    const Params params)
{
    extern __shared__ __align__(16) unsigned char s_bytes[];
    Smem& smem = *reinterpret_cast<Smem*>(s_bytes);
    const int warp_idx = threadIdx.x / WARP_SIZE;
    const int lane_idx = threadIdx.x % WARP_SIZE;
    const StreamOfPair own{warp_idx / STREAM_WARPS};
    const int warp_row = warp_idx % STREAM_WARPS * WARP_M;

    const QueryBlock block =
        query_block<BLOCK_M, BOUND_RIGHT>(params, nullptr, nullptr, nullptr, g_diagonal_offsets);
    const int first_query = block.first_query;
    const int num_queries = min(BLOCK_M, block.seqlen_q - first_query);

    g_q += block.batch_idx * params.q.batch + block.head_idx * params.q.head +
           static_cast<long long>(first_query) * params.q.seq;
    g_k += block.batch_idx * params.k.batch + block.kv_head_idx * params.k.head;
    g_v += block.batch_idx * params.v.batch + block.kv_head_idx * params.v.head;
    const KeyBand band(params, block);
    const KeyTiles tiles(band, BLOCK_N, first_query, first_query + num_queries - 1);
    const int keys_end = band.end(first_query + num_queries - 1);  // keys behind are not read, whatever they hold
    const ScoreOptions<float> options = own.options(params, g_bias, g_mask, g_tile_class, g_alibi_slopes,
                                                  block.batch_idx, block.head_idx, first_query / BLOCK_M);

    WarpState state;
#pragma unroll
    for (int t = 0; t < ROW_TILES; t++) {
        state.rows[t][0].reset();
        state.rows[t][1].reset();
    }
    clear(state.acc_out);

    // Fragment addresses, those of k and v in the first stage. Their origin is forgotten so that they stay in
    // registers: the compiler would find them anew for every tile.
    const unsigned s_q = forget_origin(smem_address(smem.q[own.stream]) + lane_offset_a<HEAD_DIM>(warp_row, lane_idx));
    const unsigned s_k = forget_origin(smem_address(smem.k[0][SHARED_KEYS ? 0 : own.stream]) +
                                       lane_offset_bt<HEAD_DIM>(lane_idx));
    const unsigned s_v = forget_origin(smem_address(smem.v[0]) + lane_offset_b<HEAD_DIM_V>(lane_idx));
    const float softmax_scale_log2 = positive_scale_log2(params.scale_log2);
    const int warp_query = first_query + warp_row;
    // Whether this warp's queries may see any key of a tile.
    auto sees = [&](int first_key) {
        const int last_query = min(warp_query + WARP_M, block.seqlen_q) - 1;
        return warp_query < block.seqlen_q && band.rows(warp_query, last_query).meet(first_key, BLOCK_N);
    };
    auto visible_tile = [&](int tile_idx) { return own.visible_tile(params, options, tiles.begin, tile_idx); };
    auto load_keys = [&](int tile_idx, unsigned stage) {
        const int first_key = tile_idx * BLOCK_N;
        const int num_keys = keys_end - first_key;
#pragma unroll
        for (int s = 0; s < KEY_STREAMS; s++) {
            load_tile<ALIGNED, BLOCK_N, HEAD_DIM, NUM_THREADS>(
                smem.k[stage][s][0], g_k + s * params.k_stream + first_key * params.k.seq, params.k.seq, num_keys,
                params.head_dim);
        }
        load_tile<ALIGNED, BLOCK_N, HEAD_DIM_V, NUM_THREADS>(smem.v[stage][0], g_v + first_key * params.v.seq,
                                                             params.v.seq, num_keys, params.head_dim_v);
    };
    // Tiles are taken from the last to the first, so that the masked ones come first. load_idx runs NUM_STAGES - 1
    // tiles ahead of tile_idx; tiles that are hidden from both streams are passed over by both.
    int tile_idx = visible_tile(tiles.end - 1);
    int load_idx = tile_idx;
    if (tile_idx >= tiles.begin) {
#pragma unroll
        for (int s = 0; s < 2; s++) {
            load_tile<ALIGNED, BLOCK_M, HEAD_DIM, NUM_THREADS>(smem.q[s][0], g_q + s * params.q_stream, params.q.seq,
                                                               num_queries, params.head_dim);
        }
    }
#pragma unroll
    for (int stage = 0; stage < NUM_STAGES - 1; stage++) {
        if (load_idx >= tiles.begin) {
            load_keys(load_idx, stage);
            load_idx = visible_tile(load_idx - 1);
        }
        cp_async_commit();
    }

    for (unsigned stage = 0; tile_idx >= tiles.begin; stage = (stage + 1) % NUM_STAGES) {
        cp_async_wait<NUM_STAGES - 2>();
        // SYNC: every thread's part of this tile (and of q) has landed; and every warp is done with the tile before,
        // whose stage the next load overwrites.
        __syncthreads();
        if (load_idx >= tiles.begin) {
            load_keys(load_idx, (stage + NUM_STAGES - 1) % NUM_STAGES);
            load_idx = visible_tile(load_idx - 1);
        }
        cp_async_commit();  // an empty group at the end keeps the count that cp_async_wait relies on
        const int first_key = tile_idx * BLOCK_N;
        const bool in_full = tiles.in_full(tile_idx);
        const TileClass tile_class = options.tile_class(params, tile_idx);
        tile_idx = visible_tile(tile_idx - 1);
        if (!sees(first_key) || (TILE_CLASSES && tile_class == TILE_HIDDEN)) continue;

        const LanePosition lane{warp_query + frag_acc_row(lane_idx), first_key + frag_acc_col(lane_idx)};
        Scores scores;
        multiply_abt<HEAD_DIM>(scores, s_q, s_k + stage * sizeof(smem.k[0]));
        const TileRows<Layout, false, float> alibi_rows(lane, block.diagonal_offset, options.slope);
        softmax_logits<Layout>(scores, params, params.scale, params.scale_log2, alibi_rows);
        if (TILE_CLASSES && tile_class == TILE_MIXED) {
            add_bias_and_mask<Layout>(scores, params, options, lane, block.seqlen_q, block.seqlen_k);
        }
        if (!in_full) hide_by_position<Layout>(scores, negative_infinity<float>(), band, lane);
        step(state, scores, softmax_scale_log2);
        if (DROPOUT && params.use_dropout) {
            const unsigned head = dropout_head(params.dropout, 2 * params.num_heads, block.batch_idx,
                                               own.head(block.head_idx));
            drop_probabilities(scores, params.dropout, head, lane);
        }
        multiply_add(Element(), state.acc_out, scores, s_v + stage * sizeof(smem.v[0]));
    }

    // SYNC: every warp is done with q, k and v, whose place the outputs take.
    __syncthreads();
    // Where results go is found anew: kept over the loop it would take registers that the loop needs.
    const QueryBlock out_block = query_block<BLOCK_M, BOUND_RIGHT>(params, nullptr, nullptr, nullptr,
                                                                   g_diagonal_offsets, reread_cta_idx());
    const int out_query = out_block.first_query + warp_row;
    const int num_rows = out_block.seqlen_q - out_query;
    finish_rows(state, params.scale, params.scale_log2, nullptr, 0);
    finish_output(state, params.keep_scale * INVERSE_P_FACTOR);

    float(*s_second)[V_STRIDE] = smem.out + warp_row;
    Output(*s_out)[V_STRIDE] = reinterpret_cast<Output(*)[V_STRIDE]>(s_second[0]) + own.stream * WARP_M;
    if (g_out1 != nullptr) {
        Element* g_state = (own.stream == 0 ? g_out1 : g_out2) + out_block.batch_idx * params.state.batch +
                           out_block.head_idx * params.state.head +
                           static_cast<long long>(out_query) * params.state.seq;
        store_output(state, s_out, g_state, params.state.seq, num_rows, params.head_dim_v, lane_idx);
        // SYNC: both streams have read their rows, whose place that of the second in float takes.
        __syncthreads();
    }
    if (g_lse != nullptr && lane_idx % 4 == 0) {
        g_lse += out_block.batch_idx * params.lse_batch + own.head(out_block.head_idx) * params.lse_head;
        const int lane_query = out_query + frag_acc_row(lane_idx);
#pragma unroll
        for (int i = 0; i < 2 * ROW_TILES; i++) {
            const int query_idx = lane_query + i * 8;
            if (query_idx < out_block.seqlen_q) g_lse[query_idx] = state.rows[i / 2][i % 2].lse();
        }
    }
    if (own.stream == 1) {
#pragma unroll
        for (int i = 0; i < 2 * ROW_TILES; i++) {
            each_pair(state, i, lane_idx, [&](int row, int column, float left, float right) {
                *reinterpret_cast<float2*>(s_second[row] + column) = make_float2(left, right);
            });
        }
    }
    // SYNC: the output of the second stream is in shared memory.
    __syncthreads();
    if (own.stream == 1) return;
    subtract(state, params, s_second, g_lambda, g_norm_weight, out_block, out_query, lane_idx);
    // SYNC: the warp has read its rows of the second output, whose place the result takes.
    __syncwarp();
    g_out += out_block.batch_idx * params.out.batch + out_block.head_idx * params.out.head +
             static_cast<long long>(out_query) * params.out.seq;
    store_output(state, s_out, g_out, params.out.seq, num_rows, params.head_dim_v, lane_idx);
}
