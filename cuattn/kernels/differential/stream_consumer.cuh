// A consuming warpgroup of differential_attention_hopper.cu: one stream of a pair of heads, from scores to outputs; and
// what it agrees on with the producer.
//
// Constants: those of differential_attention_hopper.cu.
#pragma once
#include "differential/differential_params.cuh"
#include "differential/finish_row.cuh"
#include "hopper/pipeline.cuh"
#include "hopper/quad_store.cuh"
#include "hopper/query_tile.cuh"
#include "hopper/tile_products.cuh"

constexpr int NUM_CONSUMERS = 2;  // one for each stream
#include "hopper/turns.cuh"

constexpr int NUM_THREADS = (1 + NUM_CONSUMERS) * WARPGROUP_SIZE;
constexpr int KEY_STREAMS = SHARED_KEYS ? 1 : 2;

// Shared memory of a CTA. Tiles are columns of SPAN elements: see wgmma.cuh.
struct alignas(1024) Smem {
    Element q[2][QK_SPANS][BLOCK_M][SPAN];
    Element k[NUM_STAGES][KEY_STREAMS][QK_SPANS][BLOCK_N][SPAN];
    Element v[NUM_STAGES][V_SPANS][BLOCK_N][SPAN];
    // The output of the second stream: what a thread writes is read by the thread of its number in the other warpgroup.
    float4 second[HEAD_DIM_V / MMA_N][WARPGROUP_SIZE];
    RingBarriers<1> q_ring;
    RingBarriers<NUM_STAGES> k_ring, v_ring;
};

static_assert(BLOCK_M == WGMMA_M, "a warpgroup owns the rows of one wgmma");
static_assert(BLOCK_N % MMA_K == 0 && BLOCK_N <= 256, "keys come in steps of the second product");
static_assert(BLOCK_N * SPAN_BYTES % 1024 == 0, "every tile starts where the swizzle begins anew");
static_assert(NUM_STAGES >= 2, "the next tile of keys is multiplied before this one is released");
static_assert(sizeof(Smem) <= SMEM_BYTES, "config.py and this file agree on the shared-memory plan");
static_assert(!BIAS && !MASK && !DROPOUT, "these take the portable kernel");

using Params = DifferentialParams<float>;
using LanePosition = TilePosition<false>;

// A block of queries of a pair of heads, as both roles see it.
struct PairTile {
    QueryBlock block;
    KeyBand band;
    int last_query;
    int key_begin, key_end;  // tiles of keys to visit

    __device__ __forceinline__ PairTile(const Params& params, const HopperSchedule& schedule, int tile_idx,
                                        const int* g_diagonal_offsets)
        : block(query_tile<BLOCK_M, BOUND_RIGHT>(params, schedule, tile_idx, nullptr, nullptr, nullptr,
                                                 g_diagonal_offsets)),
          band(params, block), last_query(min(block.first_query + BLOCK_M, block.seqlen_q) - 1) {
        const KeyTiles keys(band, BLOCK_N, block.first_query, last_query);
        key_begin = keys.begin;
        key_end = max(keys.begin, keys.end);
    }
};

// Where a warpgroup stands in the rings.
struct RingPositions {
    RingPosition<1> q;
    RingPosition<NUM_STAGES> k, v;
};

// What a warpgroup carries from key tile to key tile.
struct StreamState {
    OutputTile acc_out;
    SoftmaxRow rows[2];

    __device__ __forceinline__ void reset() {
        rows[0].reset();
        rows[1].reset();
        clear(acc_out);
    }
};

// The first of a thread's two rows in the tile; the other is eight below.
__device__ __forceinline__ int first_row_of(int thread_idx) {
    return thread_idx / WARP_SIZE * MMA_M + frag_acc_row(thread_idx % WARP_SIZE);
}

// All key tiles of a work tile: on return acc_out holds the sums of e^(logit - max) v,
// and each row its lane's share of the sum. Tiles are taken from the last to the first, so that the masked ones come
// first.
__device__ __forceinline__ void consume(StreamState& state, Smem& smem, const PairTile& tile, const Params& params,
                                        const StreamOfPair& own, const float* g_alibi_slopes, const Turns& turns,
                                        int thread_idx, RingPositions& rings) {
    if (tile.key_begin == tile.key_end) return;
    const float scale_log2 = positive_scale_log2(params.scale_log2);
    const bool releases = thread_idx % WARP_SIZE == 0;  // a lane speaks for its warp, which has waited as one
    const unsigned long long desc_q = wgmma_descriptor(smem_address(smem.q[own.stream]), SPAN_BYTES);
    const unsigned long long desc_k =
        wgmma_descriptor(smem_address(smem.k[0][SHARED_KEYS ? 0 : own.stream]), SPAN_BYTES);
    const unsigned long long desc_v = wgmma_descriptor(smem_address(smem.v), BLOCK_N * SPAN_BYTES);
    const float slope = own.slope(params, g_alibi_slopes, tile.block.batch_idx, tile.block.head_idx);
    const int first_query = tile.block.first_query + first_row_of(thread_idx);
    // Tiles that every query of the work tile sees in whole.
    const KeyTiles whole(tile.band, BLOCK_N, tile.block.first_query, tile.last_query);

    Scores scores;
    Probabilities probabilities;
    float corrections[2];
    auto issue_next_scores = [&] {
        rings.k.wait_full(smem.k_ring);
        issue_scores(scores, desc_q, desc_k + rings.k.stage * (sizeof(smem.k[0]) / 16));
    };
    auto issue_next_output = [&] {
        rings.v.wait_full(smem.v_ring);
        issue_output(state.acc_out, probabilities, desc_v + rings.v.stage * (sizeof(smem.v[0]) / 16));
    };
    auto release_keys = [&] {
        if (releases) rings.k.release(smem.k_ring);
        rings.k.advance();
    };
    auto release_values = [&] {
        if (releases) rings.v.release(smem.v_ring);
        rings.v.advance();
    };
    auto exponentiate = [&](int key_tile, bool masked) {
        const LanePosition lane{first_query, key_tile * BLOCK_N + frag_acc_col(thread_idx % WARP_SIZE)};
        const TileRows<Layout, false, float> alibi_rows(lane, tile.block.diagonal_offset, slope);
        softmax_logits<Layout>(scores, params, params.scale, params.scale_log2, alibi_rows);
        if (masked) {
            // The band is found anew for every tile that is masked: kept over the loop, it takes registers.
            const KeyBand band(params, params.seqlen_k, forget_origin(tile.block.diagonal_offset));
            hide_by_position<Layout>(scores, negative_infinity<float>(), band, lane);
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            corrections[half] = softmax_row(state.rows[half], scores[0], half, scale_log2);
        }
    };

    int key_tile = tile.key_end - 1;
    rings.q.wait_full(smem.q_ring);
    turns.take();
    issue_next_scores();
    turns.pass();
    wgmma_wait<0>();
    release_keys();
    exponentiate(key_tile, true);
    round_probabilities(probabilities, scores);

    // Scores of the next tile and output of this one are multiplied at the same time.
    auto step = [&](bool masked) {
        turns.take();
        issue_next_scores();
        issue_next_output();
        turns.pass();
        wgmma_wait<1>();
        release_keys();
        exponentiate(key_tile, masked);
        wgmma_wait<0>();
        release_values();
        round_probabilities(probabilities, scores);
#pragma unroll
        for (int half = 0; half < 2; half++) rescale_row(state.acc_out[0], half, corrections[half]);
    };
    key_tile--;
    if (KeyBand::HAS_END) {
        for (const int stop = max(tile.key_begin, whole.full_end); key_tile >= stop; key_tile--) step(true);
    }
    const int whole_begin = KeyBand::HAS_BEGIN ? max(tile.key_begin, whole.full_begin) : 0;
    for (; key_tile >= whole_begin; key_tile--) step(false);
    if (KeyBand::HAS_BEGIN) {
        for (; key_tile >= tile.key_begin; key_tile--) step(true);
    }
    if (releases) rings.q.release(smem.q_ring);
    rings.q.advance();
    issue_next_output();
    wgmma_wait<0>();
    release_values();
}

// f(half, query_idx) for both rows of a thread.
template <typename F>
__device__ __forceinline__ void each_query(const QueryBlock& block, int thread_idx, const F& f) {
#pragma unroll
    for (int half = 0; half < 2; half++) f(half, block.first_query + half * 8 + first_row_of(thread_idx));
}

// Completes the row sums over the quad, and divides by them.
__device__ __forceinline__ void finish(StreamState& state, const Params& params) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        finish_softmax(state.rows[half], params.scale, params.scale_log2);
        rescale_row(state.acc_out[0], half, state.rows[half].inverse_sum() * INVERSE_P_FACTOR);
    }
}

// The output, rounded, to an array [batch, seqlen_q, num_heads, head_dim_v].
__device__ __forceinline__ void store_rows(const StreamState& state, Element* g_array, const RowStrides& strides,
                                           int columns, const QueryBlock& block, int thread_idx) {
    const unsigned long long multiples = (strides.batch | strides.seq | strides.head | columns) * sizeof(Element);
    const bool vectors = ((reinterpret_cast<unsigned long long>(g_array) | multiples) & 15) == 0;
    g_array += block.batch_idx * strides.batch + block.head_idx * strides.head;
    each_query(block, thread_idx, [&](int half, int query_idx) {
        unsigned pairs[HEAD_DIM_V / MMA_N];
#pragma unroll
        for (int e = 0; e < HEAD_DIM_V / MMA_N; e++) {
            pairs[e] = pack_pair(Element(), state.acc_out[0][e][2 * half], state.acc_out[0][e][2 * half + 1]);
        }
        store_quad_row(g_array + query_idx * strides.seq, pairs, columns, vectors, query_idx < block.seqlen_q,
                       thread_idx % WARP_SIZE);
    });
}

// What gradients need of a stream: its output, and the log-sum-exp of its rows.
__device__ __forceinline__ void store_state(const StreamState& state, const Params& params, const QueryBlock& block,
                                            const StreamOfPair& own, float* g_lse, Element* g_state, int thread_idx) {
    if (g_state != nullptr) store_rows(state, g_state, params.state, params.head_dim_v, block, thread_idx);
    if (g_lse == nullptr || thread_idx % 4 != 0) return;
    g_lse += block.batch_idx * params.lse_batch + own.head(block.head_idx) * params.lse_head;
    each_query(block, thread_idx, [&](int half, int query_idx) {
        if (query_idx < block.seqlen_q) g_lse[query_idx] = state.rows[half].lse();
    });
}

constexpr int PLACE_IS_FREE = Turns::FIRST_BARRIER + NUM_CONSUMERS, PLACE_IS_FULL = PLACE_IS_FREE + 1;  // barriers
constexpr int BOTH_STREAMS = 2 * WARPGROUP_SIZE;

// The second stream leaves its output for the first.
__device__ __forceinline__ void hand_over(const StreamState& state, Smem& smem, int thread_idx) {
    // SYNC: the first stream has read what was left for the tile before.
    named_barrier_sync(PLACE_IS_FREE, BOTH_STREAMS);
#pragma unroll
    for (int e = 0; e < HEAD_DIM_V / MMA_N; e++) {
        const float(&acc)[4] = state.acc_out[0][e];
        smem.second[e][thread_idx] = make_float4(acc[0], acc[1], acc[2], acc[3]);
    }
    // SYNC: it is there.
    named_barrier_arrive(PLACE_IS_FULL, BOTH_STREAMS);
}

// The output of the first stream becomes the result: lambda times that of the second is taken away, rows are divided by
// their root mean square, and everything is scaled.
__device__ __forceinline__ void subtract(StreamState& state, const Smem& smem, const Params& params,
                                         const QueryBlock& block, const float* g_lambda, const float* g_norm_weight,
                                         int thread_idx) {
    // SYNC: this warpgroup has read what was left for the tile before, ...
    named_barrier_arrive(PLACE_IS_FREE, BOTH_STREAMS);
    float lambdas[2] = {0.0f, 0.0f};
    each_query(block, thread_idx, [&](int half, int query_idx) {
        if (query_idx < block.seqlen_q) {
            lambdas[half] = lambda_of(params, g_lambda, block.batch_idx, query_idx, block.head_idx);
        }
    });
    // SYNC: ... and what is left for this one is there.
    named_barrier_sync(PLACE_IS_FULL, BOTH_STREAMS);
#pragma unroll
    for (int e = 0; e < HEAD_DIM_V / MMA_N; e++) {
        float(&acc)[4] = state.acc_out[0][e];
        const float4 second = smem.second[e][thread_idx];
        acc[0] = fmaf(-lambdas[0], second.x, acc[0]);
        acc[1] = fmaf(-lambdas[0], second.y, acc[1]);
        acc[2] = fmaf(-lambdas[1], second.z, acc[2]);
        acc[3] = fmaf(-lambdas[1], second.w, acc[3]);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        finish_row(state.acc_out[0], half, params, g_norm_weight, thread_idx % WARP_SIZE);
    }
}
