// Attention forward on Hopper (sm_90a): bulk tensor copies, wgmma, and warpgroups with roles; 16-bit elements.
//
//     out = softmax(logits) v,    lse = log(sum(exp(logits))),    logits = options(scale * q k^T)
//
// A CTA computes tiles of BLOCK_M query rows, one after the other (query_tile.cuh). Warpgroup 0 produces: one thread
// copies q, and the keys and values in tiles of BLOCK_N through two rings of NUM_STAGES buffers. Each other warpgroup
// consumes: it owns 64 rows, and keeps scores, probabilities and output in registers. While the tensor cores multiply
// the probabilities of one key tile with v, and q with the keys of the next, a warpgroup computes exponentials; with
// PING_PONG the warpgroups take turns in issuing products, so that one multiplies while another exponentiates (Shah et
// al., "FlashAttention-3", 2024; the online softmax is that of Milakov and Gimelshein, 2018).
//
// Grid: as many CTAs as the device holds at once, at most schedule.num_tiles.
// Block: (1 + NUM_CONSUMERS) warpgroups of 128 threads.
//
// Constants: Element (of q, k, v), Output; BLOCK_M = 64 NUM_CONSUMERS, BLOCK_N, HEAD_DIM, HEAD_DIM_V (buckets: the head
// dims proper are arguments and may be smaller; copies fill up with zeros), NUM_CONSUMERS, NUM_STAGES,
// PRODUCER_REGISTERS, CONSUMER_REGISTERS (of a thread, after the roles are taken), PING_PONG, SMEM_BYTES; PACKED
// (sequences packed into one array); the options that are compiled in: BOUND_LEFT and BOUND_RIGHT (mask.cuh), SOFTCAP,
// ALIBI (score_options.cuh). Sinks, offsets of the diagonal and packs of heads are always there.
#include "hopper/pipeline.cuh"
#include "hopper/quad_store.cuh"
#include "hopper/query_tile.cuh"
#include "hopper/wgmma.cuh"
#include "mask.cuh"
#include "score_tile.cuh"

constexpr int NUM_THREADS = (1 + NUM_CONSUMERS) * WARPGROUP_SIZE;
constexpr int SPAN = SPAN_BYTES / sizeof(Element);  // columns of a tile that lie side by side
constexpr int QK_SPANS = (HEAD_DIM + SPAN - 1) / SPAN;
constexpr int V_SPANS = (HEAD_DIM_V + SPAN - 1) / SPAN;
constexpr int MMA_K = WGMMA_K_BYTES / sizeof(Element);
constexpr int SPAN_STEPS = SPAN / MMA_K;

// Shared memory of a CTA. Tiles are columns of SPAN elements: see wgmma.cuh.
struct alignas(1024) Smem {
    Element q[QK_SPANS][BLOCK_M][SPAN];
    Element k[NUM_STAGES][QK_SPANS][BLOCK_N][SPAN];
    Element v[NUM_STAGES][V_SPANS][BLOCK_N][SPAN];
    RingBarriers<1> q_ring;
    RingBarriers<NUM_STAGES> k_ring, v_ring;
    unsigned long long v_tail;  // packed sequences: the last tile of values has landed and may be cut
};

static_assert(BLOCK_M == WGMMA_M * NUM_CONSUMERS, "a consumer owns the rows of one wgmma");
static_assert(BLOCK_N % (2 * MMA_N) == 0 && BLOCK_N <= 256, "keys come in steps of the second product");
static_assert(BLOCK_N * SPAN_BYTES % 1024 == 0, "every tile starts where the swizzle begins anew");
static_assert(sizeof(Smem) <= SMEM_BYTES, "config.py and this file agree on the shared-memory plan");
static_assert(PRODUCER_REGISTERS % 8 == 0 && CONSUMER_REGISTERS % 8 == 0, "setmaxnreg counts in eights");
static_assert((PRODUCER_REGISTERS + NUM_CONSUMERS * CONSUMER_REGISTERS) * WARPGROUP_SIZE <= 65536, "of an SM");
static_assert(!BIAS && !MASK && !DROPOUT, "these take the portable kernel");

using Params = AttentionParams<float>;
using KeyBand = Band<BOUND_LEFT, BOUND_RIGHT>;
using Scores = float[1][BLOCK_N / MMA_N][4];
using OutputTile = float[1][HEAD_DIM_V / MMA_N][4];
using Probabilities = unsigned[BLOCK_N / MMA_K][4];

// A work item as both roles see it.
struct WorkTile {
    QueryBlock block;
    KeyBand band;
    int num_queries;  // of the sequence, in this tile
    int key_begin, key_end;  // tiles of keys to visit
};

__device__ __forceinline__ WorkTile work_tile(const Params& params, const HopperSchedule& schedule, int tile_idx,
                                              const int* g_work, const int* g_cu_seqlens_q, const int* g_cu_seqlens_k,
                                              const int* g_diagonal_offsets) {
    WorkTile tile;
    tile.block = query_tile<BLOCK_M, BOUND_RIGHT>(params, schedule, tile_idx, g_work, g_cu_seqlens_q, g_cu_seqlens_k,
                                                  g_diagonal_offsets);
    tile.num_queries = 0;
    tile.key_begin = tile.key_end = 0;
    if (tile.block.has_work()) {
        tile.num_queries = min(BLOCK_M / schedule.pack, tile.block.seqlen_q - tile.block.first_query);
        tile.band = KeyBand(tile.block.seqlen_k, tile.block.diagonal_offset, params.window_left, params.window_right);
        const KeyTiles keys(tile.band, BLOCK_N, tile.block.first_query, tile.block.first_query + tile.num_queries - 1);
        tile.key_begin = keys.begin;
        tile.key_end = max(keys.begin, keys.end);
    }
    return tile;
}

// Where a warpgroup stands in the rings.
struct RingPositions {
    RingPosition<1> q;
    RingPosition<NUM_STAGES> k, v;
};

// --- producer --------------------------------------------------------------------------------------------------------

// A tile of keys or values, `ring` of k or of v.
template <int SPANS>
__device__ __forceinline__ void load_keys(Element (&s_tile)[SPANS][BLOCK_N][SPAN], const TensorMap& map,
                                          const unsigned long long& barrier, const QueryBlock& block, int first_key) {
    const unsigned s_barrier = smem_address(&barrier);
    mbarrier_arrive_expect(s_barrier, SPANS * BLOCK_N * SPAN_BYTES);
#pragma unroll
    for (int span = 0; span < SPANS; span++) {
        tma_load(smem_address(s_tile[span]), map, s_barrier, L2_EVICT_LAST, span * SPAN, block.k_start + first_key,
                 block.kv_head_idx, PACKED ? 0 : block.batch_idx);
    }
}

// Behind the last key of a packed sequence lie the values of the next one, and a probability of 0 does not stop a NaN.
__device__ __forceinline__ void clear_rows(Element (&s_tile)[V_SPANS][BLOCK_N][SPAN], int first_row, int lane_idx) {
    constexpr int RUNS = SPAN_BYTES / 16;
    for (int span = 0; span < V_SPANS; span++) {
        uint4* s_runs = reinterpret_cast<uint4*>(s_tile[span][0]);
        for (int i = first_row * RUNS + lane_idx; i < BLOCK_N * RUNS; i += WARP_SIZE) {
            s_runs[i] = make_uint4(0, 0, 0, 0);
        }
    }
}

__device__ __forceinline__ void produce(Smem& smem, const TensorMap& map_q, const TensorMap& map_k,
                                        const TensorMap& map_v, const WorkTile& tile, const HopperSchedule& schedule,
                                        RingPositions& rings, unsigned& tail_parity) {
    const QueryBlock& block = tile.block;
    const int lane_idx = threadIdx.x % WARP_SIZE;
    if (tile.key_begin == tile.key_end) return;
    if (lane_idx == 0) {
        rings.q.wait_empty(smem.q_ring);
        const unsigned s_barrier = smem_address(&smem.q_ring.full[0]);
        mbarrier_arrive_expect(s_barrier, sizeof(smem.q));
#pragma unroll
        for (int span = 0; span < QK_SPANS; span++) {
            tma_load(smem_address(smem.q[span]), map_q, s_barrier, L2_EVICT_FIRST, span * SPAN, 0,
                     block.q_start + block.first_query, block.head_idx / schedule.pack, PACKED ? 0 : block.batch_idx);
        }
    }
    rings.q.advance();
#pragma unroll 1
    for (int key_tile = tile.key_end - 1; key_tile >= tile.key_begin; key_tile--) {
        const int first_key = key_tile * BLOCK_N;
        const int num_keys = block.seqlen_k - first_key;
        const bool cut = PACKED && num_keys < BLOCK_N;
        if (lane_idx == 0) {
            rings.k.wait_empty(smem.k_ring);
            load_keys(smem.k[rings.k.stage], map_k, smem.k_ring.full[rings.k.stage], block, first_key);
            rings.v.wait_empty(smem.v_ring);
            load_keys(smem.v[rings.v.stage], map_v, cut ? smem.v_tail : smem.v_ring.full[rings.v.stage], block,
                      first_key);
        }
        if (cut) {
            mbarrier_wait(smem_address(&smem.v_tail), tail_parity);
            tail_parity ^= 1;
            clear_rows(smem.v[rings.v.stage], num_keys, lane_idx);
            fence_proxy_async();
            // SYNC: every lane has written its zeros, and wgmma will see them.
            __syncwarp();
            if (lane_idx == 0) mbarrier_arrive(smem_address(&smem.v_ring.full[rings.v.stage]));
        }
        rings.k.advance();
        rings.v.advance();
    }
}

// --- consumer --------------------------------------------------------------------------------------------------------

// A row of the tile: a query of a head.
struct Row {
    int query, head_idx;
    bool in_range;

    __device__ __forceinline__ Row(const WorkTile& tile, int pack, int row_idx) {
        const int query_idx = pack == 1 ? row_idx : row_idx / pack;
        query = tile.block.first_query + query_idx;
        in_range = query_idx < tile.num_queries;
        head_idx = tile.block.head_idx + (pack == 1 || !in_range ? 0 : row_idx - query_idx * pack);
    }
};

// What the logits of a thread's two rows go through, `half` 0 and 1: rows eight apart, as in mma.cuh. Keys are counted
// from the first column of this thread.
struct RowOptions {
    int key_begin[2], key_end[2];  // visible keys
    long long diagonal[2];         // the key that ALiBi measures distances from
    float slope[2];
};

__device__ __forceinline__ RowOptions row_options(const WorkTile& tile, const Params& params, int pack, int first_row,
                                                  int first_key, const float* g_alibi_slopes) {
    RowOptions options;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const Row row(tile, pack, first_row + half * 8);
        options.key_begin[half] = tile.band.begin(row.query) - first_key;
        options.key_end[half] = tile.band.end(row.query) - first_key;
        options.diagonal[half] = static_cast<long long>(row.query) + tile.block.diagonal_offset - first_key;
        options.slope[half] = 0.0f;
        if (ALIBI && g_alibi_slopes != nullptr) {
            options.slope[half] = g_alibi_slopes[tile.block.batch_idx * params.alibi_batch + row.head_idx];
        }
    }
    return options;
}

// What a consumer carries from key tile to key tile.
struct ConsumerState {
    OutputTile acc_out;
    SoftmaxRow rows[1][2];
};

// Issues scores = q k^T of this warpgroup's rows.
__device__ __forceinline__ void issue_scores(Scores& scores, unsigned long long desc_q, unsigned long long desc_k) {
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < HEAD_DIM / MMA_K; step++) {
        const int column = step % SPAN_STEPS * WGMMA_K_BYTES / 16, span = step / SPAN_STEPS;
        Wgmma<BLOCK_N>::template issue<false>(
            Element(), scores[0], desc_q + span * (BLOCK_M * SPAN_BYTES / 16) + column,
            desc_k + span * (BLOCK_N * SPAN_BYTES / 16) + column, step > 0);
    }
    wgmma_commit();
}

// Issues acc_out += probabilities v.
__device__ __forceinline__ void issue_output(OutputTile& acc_out, const Probabilities& probabilities,
                                             unsigned long long desc_v) {
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < BLOCK_N / MMA_K; step++) {
        Wgmma<HEAD_DIM_V>::template issue<true>(Element(), acc_out[0], probabilities[step],
                                                desc_v + step * (MMA_K * SPAN_BYTES / 16), 1);
    }
    wgmma_commit();
}

__device__ __forceinline__ void round_probabilities(Probabilities& probabilities, const Scores& scores) {
#pragma unroll
    for (int step = 0; step < BLOCK_N / MMA_K; step++) {
        frag_a_from_acc<Element>(probabilities[step], scores[0][2 * step], scores[0][2 * step + 1]);
    }
}

// Scores become logits in the base of the softmax, up to a positive factor: scale, softcap, ALiBi; then -inf where a
// key is not visible by its position.
__device__ __forceinline__ void score_logits(Scores& scores, const Params& params, const RowOptions& options,
                                             int tile_key, bool masked) {
    if (NATURAL_LOGITS) {
        multiply_scores(scores, params.scale);
        if (SOFTCAP && params.softcap != 0.0f) cap_scores(scores, params.softcap);
        if (ALIBI) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float position = static_cast<float>(options.diagonal[i / 2] - (tile_key + i % 2));
#pragma unroll
                for (int n = 0; n < BLOCK_N / MMA_N; n++) {
                    scores[0][n][i] -= options.slope[i / 2] * fabsf(position - static_cast<float>(n * MMA_N));
                }
            }
        }
    } else if (params.scale_log2 <= 0.0f) {
        multiply_scores(scores, params.scale_log2 < 0.0f ? -1.0f : 0.0f);
    }
    if (masked) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            mask_row<BOUND_LEFT>(scores[0], half, options.key_begin[half] - tile_key,
                                 options.key_end[half] - tile_key);
        }
    }
}

// Warpgroups take turns in issuing products: each waits for its own turn, and gives the turn to the next.
struct Turns {
    int consumer_idx;

    static constexpr bool ON = PING_PONG && NUM_CONSUMERS > 1;
    static constexpr int FIRST_BARRIER = 1;

    // The last one gives the first turn.
    __device__ __forceinline__ void start() const {
        if (ON && consumer_idx == NUM_CONSUMERS - 1) pass();
    }
    __device__ __forceinline__ void take() const {
        if (ON) named_barrier_sync(FIRST_BARRIER + consumer_idx, 2 * WARPGROUP_SIZE);
    }
    __device__ __forceinline__ void pass() const {
        if (ON) named_barrier_arrive(FIRST_BARRIER + (consumer_idx + 1) % NUM_CONSUMERS, 2 * WARPGROUP_SIZE);
    }
    // What the last one passed last.
    __device__ __forceinline__ void finish() const {
        if (ON && consumer_idx == 0) take();
    }
};

// All key tiles of a work tile, of which there is at least one: on return acc_out holds the sums of e^(logit - max) v,
// and each row its lane's share of the sum. Tiles are taken from the last to the first, so that the masked ones come
// first.
__device__ __forceinline__ void consume(ConsumerState& state, Smem& smem, const WorkTile& tile, const Params& params,
                                        int pack, const RowOptions& options, const Turns& turns, int thread_idx,
                                        RingPositions& rings) {
    const float scale_log2 = positive_scale_log2(params.scale_log2);
    const bool releases = thread_idx == 0;  // one thread speaks for the warpgroup: wgmma is done for all of it or none
    const int first_row = turns.consumer_idx * WGMMA_M;
    const unsigned long long desc_q = wgmma_descriptor(smem_address(smem.q[0][first_row]), SPAN_BYTES);
    const unsigned long long desc_k = wgmma_descriptor(smem_address(smem.k), SPAN_BYTES);
    const unsigned long long desc_v = wgmma_descriptor(smem_address(smem.v), BLOCK_N * SPAN_BYTES);
    // Tiles that every row of this warpgroup sees in whole.
    const int first_query = tile.block.first_query + first_row / pack;
    const int last_query = tile.block.first_query + min(tile.num_queries - 1, (first_row + WGMMA_M - 1) / pack);
    const KeyTiles whole(tile.band, BLOCK_N, min(first_query, last_query), last_query);

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
        score_logits(scores, params, options, key_tile * BLOCK_N, masked);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            corrections[half] = softmax_row(state.rows[0][half], scores[0], half, scale_log2);
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
    if (BOUND_RIGHT) {
        for (const int stop = max(tile.key_begin, whole.full_end); key_tile >= stop; key_tile--) step(true);
    }
    for (const int stop = BOUND_LEFT ? max(tile.key_begin, whole.full_begin) : 0; key_tile >= stop; key_tile--) {
        step(false);
    }
    if (BOUND_LEFT) {
        for (; key_tile >= tile.key_begin; key_tile--) step(true);
    }
    if (releases) rings.q.release(smem.q_ring);
    rings.q.advance();
    issue_next_output();
    wgmma_wait<0>();
    release_values();
}

// Completes the row sums over the quad, takes the sink in as one more term, and writes out and lse.
__device__ __forceinline__ void write_rows(ConsumerState& state, const WorkTile& tile, const Params& params,
                                           int pack, int first_row, const float* g_sinks, Output* g_out, float* g_lse,
                                           bool vectors, int lane_idx) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        SoftmaxRow& sums = state.rows[0][half];
        const Row row(tile, pack, first_row + half * 8);
        const long long query = static_cast<long long>(tile.block.q_start) + row.query;
        sums.sum = quad_sum(sums.sum);
        float correction = 1.0f;
        if (g_sinks != nullptr) {
            float term;
            sums.sink_exponents(g_sinks[row.head_idx], correction, term);
            correction = exp2_approx(correction);
            sums.sum = sums.sum * correction + exp2_approx(term);
        }
        const float factor = sums.inverse_sum() * correction;
        unsigned pairs[HEAD_DIM_V / MMA_N];
#pragma unroll
        for (int e = 0; e < HEAD_DIM_V / MMA_N; e++) {
            pairs[e] = pack_pair(Output(), state.acc_out[0][e][2 * half] * factor,
                                 state.acc_out[0][e][2 * half + 1] * factor);
        }
        Output* g_row = g_out + tile.block.batch_idx * params.out.batch + row.head_idx * params.out.head +
                        query * params.out.seq;
        store_quad_row(g_row, pairs, params.head_dim_v, vectors, row.in_range, lane_idx);
        if (g_lse != nullptr && row.in_range && lane_idx % 4 == 0) {
            g_lse[tile.block.batch_idx * params.lse_batch + row.head_idx * params.lse_head + query] = sums.lse();
        }
    }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) cuattn_attention_forward_hopper(
    const __grid_constant__ TensorMap map_q,  // (head_dim, pack, seqlen_q or tokens, heads / pack, batch or 1)
    const __grid_constant__ TensorMap map_k,  // (head_dim, seqlen_k or tokens, kv heads, batch or 1)
    const __grid_constant__ TensorMap map_v,  // (head_dim_v, seqlen_k or tokens, kv heads, batch or 1)
    Output* __restrict__ g_out,               // [batch, seqlen_q, num_heads, head_dim_v], last axis contiguous
    // From here on, null is what a call does not use.
    float* __restrict__ g_lse,                   // [batch, num_heads, seqlen_q]
    const float* __restrict__ g_alibi_slopes,    // [batch or 1, num_heads]
    const float* __restrict__ g_sinks,           // [num_heads]
    const int* __restrict__ g_diagonal_offsets,  // [batch]
    const int* __restrict__ g_cu_seqlens_q,      // [batch + 1]: q and out are packed, [tokens, num_heads, ...], lse
    const int* __restrict__ g_cu_seqlens_k,      // [num_heads, tokens], k and v [tokens, num_kv_heads, ...]
    const int* __restrict__ g_work,              // [num_work, 2]: query_block.cuh; given with the two before
    const Params params, const HopperSchedule schedule)
{
    extern __shared__ __align__(1024) unsigned char s_bytes[];
    Smem& smem = *reinterpret_cast<Smem*>(s_bytes);
    const int warpgroup_idx = threadIdx.x / WARPGROUP_SIZE;
    const int thread_idx = threadIdx.x % WARPGROUP_SIZE;

    if (threadIdx.x == 0) {
        smem.q_ring.init(NUM_CONSUMERS);
        smem.k_ring.init(NUM_CONSUMERS);
        smem.v_ring.init(NUM_CONSUMERS);
        mbarrier_init(smem_address(&smem.v_tail), 1);
        fence_mbarrier_init();
        tma_prefetch_map(map_q);
        tma_prefetch_map(map_k);
        tma_prefetch_map(map_v);
    }
    // SYNC: the barriers are initialised before anybody uses one.
    __syncthreads();

    RingPositions rings;
    auto tile_at = [&](int tile_idx) {
        return work_tile(params, schedule, tile_idx, g_work, g_cu_seqlens_q, g_cu_seqlens_k, g_diagonal_offsets);
    };
    if (warpgroup_idx == 0) {
        release_registers<PRODUCER_REGISTERS>();
        if (thread_idx >= WARP_SIZE) return;
        unsigned tail_parity = 0;
        for (int tile_idx = blockIdx.x; tile_idx < schedule.num_tiles; tile_idx += gridDim.x) {
            const WorkTile tile = tile_at(tile_idx);
            produce(smem, map_q, map_k, map_v, tile, schedule, rings, tail_parity);
        }
    } else {
        claim_registers<CONSUMER_REGISTERS>();
        const int lane_idx = thread_idx % WARP_SIZE;
        const Turns turns{warpgroup_idx - 1};
        const int first_row =
            turns.consumer_idx * WGMMA_M + thread_idx / WARP_SIZE * MMA_M + frag_acc_row(lane_idx);
        const unsigned long long out_strides = params.out.batch | params.out.seq | params.out.head | params.head_dim_v;
        const bool vectors = ((reinterpret_cast<unsigned long long>(g_out) | out_strides * sizeof(Output)) & 15) == 0;
        turns.start();
        for (int tile_idx = blockIdx.x; tile_idx < schedule.num_tiles; tile_idx += gridDim.x) {
            const WorkTile tile = tile_at(tile_idx);
            if (tile.num_queries == 0) continue;
            ConsumerState state;
            state.rows[0][0].reset();
            state.rows[0][1].reset();
            clear(state.acc_out);
            if (tile.key_begin < tile.key_end) {
                const RowOptions options = row_options(tile, params, schedule.pack, first_row, frag_acc_col(lane_idx),
                                                       g_alibi_slopes);
                consume(state, smem, tile, params, schedule.pack, options, turns, thread_idx, rings);
            }
            write_rows(state, tile, params, schedule.pack, first_row, g_sinks, g_out, g_lse, vectors, lane_idx);
        }
        turns.finish();
    }
}
