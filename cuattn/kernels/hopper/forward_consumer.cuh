// A consuming warpgroup of attention_forward_hopper.cu: 64 rows from scores to out and lse.
#pragma once
#include "hopper/forward_tile.cuh"
#include "hopper/quad_store.cuh"
#include "hopper/turns.cuh"
#include "hopper/transpose_e4m3.cuh"

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

// What a thread's two rows see, `half` 0 and 1: rows eight apart, as in mma.cuh. Here in registers, ...
template <bool CHUNKS>
struct VisibleKeys {
    TileBand::RowBounds keys[2];  // counted from the first column of this thread

    __device__ __forceinline__ void find(RowEnds<CHUNKS>&, const WorkTile&, int, int, int) {}
    __device__ __forceinline__ void keep(int half, const TileBand& band, int query, int lane_idx) {
        keys[half] = band.row(query).from(frag_acc_col(lane_idx));
    }
    // Counted from the thread's first column in a key tile.
    __device__ __forceinline__ TileBand::RowBounds from(int half, int tile_key) const {
        return keys[half].from(tile_key);
    }
};
// ... and here in shared memory, where the four lanes of a row share them. They are found before all that follows: with
// it, the row of 128 x 192 spilled.
template <>
struct VisibleKeys<true> {
    const TileBand::RowBounds* s_keys;  // of the first row
    int first_column;

    __device__ __forceinline__ void find(RowEnds<true>& s_ends, const WorkTile& tile, int pack, int first_row,
                                         int lane_idx) {
        s_keys = s_ends.keys + first_row;
        first_column = frag_acc_col(lane_idx);
        // SYNC: the warp has read what its rows saw of the tile before.
        __syncwarp();
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const TileBand::RowBounds keys = tile.band.row(Row(tile, pack, first_row + half * 8).query);
            if (lane_idx % 4 == 0) s_ends.keys[first_row + half * 8] = keys;
        }
        // SYNC: all lanes of a row read what one of them has written.
        __syncwarp();
    }
    __device__ __forceinline__ void keep(int, const TileBand&, int, int) {}
    __device__ __forceinline__ TileBand::RowBounds from(int half, int tile_key) const {
        return s_keys[half * 8].from(tile_key + first_column);
    }
};

// What the logits of a thread's two rows go through. Keys are counted from the first column of this thread.
struct RowOptions {
    VisibleKeys<CHUNK> keys;
    long long first_diagonal;    // the key that ALiBi measures distances of the first row from ...
    int next_diagonal;           // ... and how many keys behind it that of the second lies
    float slope[2];

    __device__ __forceinline__ float distance(int half, int tile_key) const {
        return static_cast<float>(first_diagonal + (half == 0 ? 0 : next_diagonal) - tile_key);
    }
};

__device__ __forceinline__ RowOptions row_options(Smem& smem, const WorkTile& tile, const Params& params, int pack,
                                                  int first_row, int lane_idx, const float* g_alibi_slopes) {
    const int first_key = frag_acc_col(lane_idx);
    RowOptions options;
    options.keys.find(smem.row_ends, tile, pack, first_row, lane_idx);
    const int first_query = Row(tile, pack, first_row).query;
    options.first_diagonal = static_cast<long long>(first_query) + tile.block.diagonal_offset - first_key;
    options.next_diagonal = Row(tile, pack, first_row + 8).query - first_query;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const Row row(tile, pack, first_row + half * 8);
        options.keys.keep(half, tile.band, row.query, lane_idx);
        options.slope[half] = 0.0f;
        if (ALIBI && g_alibi_slopes != nullptr) {
            options.slope[half] = g_alibi_slopes[tile.block.batch_idx * params.alibi_batch + row.head_idx];
        }
    }
    return options;
}

// Where the descales of the tile's key/value head are.
__device__ __forceinline__ int descale_idx(const WorkTile& tile, const Params& params) {
    return tile.block.batch_idx * (params.num_heads / params.heads_per_kv_head) + tile.block.kv_head_idx;
}

// Factors of scores: 8-bit elements bring some of their own.
struct TileScales {
    float scale, scale_log2;
};

__device__ __forceinline__ TileScales tile_scales(const WorkTile& tile, const Params& params, const float* g_q_descale,
                                                  const float* g_k_descale) {
    TileScales scales = {params.scale, params.scale_log2};
    if (sizeof(Element) == 1) {
        const int kv_idx = descale_idx(tile, params);
        const float descale = (g_q_descale == nullptr ? 1.0f : g_q_descale[kv_idx]) *
                              (g_k_descale == nullptr ? 1.0f : g_k_descale[kv_idx]);
        scales.scale *= descale;
        scales.scale_log2 *= descale;
    }
    return scales;
}

// What a consumer carries from key tile to key tile.
struct ConsumerState {
    OutputTile acc_out;
    SoftmaxRow rows[1][2];
};

// The queries of a consumer's rows.
struct ConsumerQueries {
    int first, last;

    __device__ __forceinline__ ConsumerQueries(const WorkTile& tile, int pack, int consumer_idx) {
        const int first_row = consumer_idx * WGMMA_M;
        first = tile.block.first_query + first_row / pack;
        last = tile.block.first_query + min(tile.num_queries - 1, (first_row + WGMMA_M - 1) / pack);
        first = min(first, last);
    }
};

// The walk of a consumer over the key tiles of a band: a tile is its number. Another is in listed_tiles.cuh.
struct BandWalk {
    static constexpr bool LISTED = false;

    __device__ __forceinline__ int entry(int key_tile) const { return key_tile; }
};

// All key tiles of a work tile, of which there is at least one: on return acc_out holds the sums of e^(logit - max) v,
// and each row its lane's share of the sum. Tiles are taken from the last to the first, so that the masked ones come
// first.
template <typename Walk = BandWalk>
__device__ __forceinline__ void consume(ConsumerState& state, Smem& smem, const WorkTile& tile, const Params& params,
                                        const TileScales& scales, int pack, const RowOptions& options,
                                        const Turns& turns, int thread_idx, RingPositions& rings,
                                        const Walk& walk = Walk()) {
    const float scale_log2 = positive_scale_log2(scales.scale_log2);
    const bool releases = thread_idx % WARP_SIZE == 0;  // a lane speaks for its warp, which has waited as one
    const int first_row = turns.consumer_idx * WGMMA_M;
    const unsigned long long desc_q = wgmma_descriptor(smem_address(smem.q[0][first_row]), SPAN_BYTES);
    const unsigned long long desc_k = wgmma_descriptor(smem_address(smem.k), SPAN_BYTES);
    const unsigned long long desc_v = wgmma_descriptor(smem_address(smem.values.operand()), BLOCK_N * SPAN_BYTES);
    // Tiles that every row of this warpgroup sees in whole.
    const ConsumerQueries queries(tile, pack, turns.consumer_idx);
    const KeyTiles whole(tile.band, BLOCK_N, queries.first, queries.last);

    Scores scores;
    Probabilities probabilities;
    float corrections[2];
    auto issue_next_scores = [&] {
        rings.k.wait_full(smem.k_ring);
        issue_scores(scores, desc_q, desc_k + rings.k.stage * (sizeof(smem.k[0]) / 16));
    };
    auto issue_next_output = [&] {
        rings.v.wait_full(smem.v_ring);
        issue_output(state.acc_out, probabilities, desc_v + rings.v.stage * (sizeof(smem.values.operand()[0]) / 16));
    };
    auto release_keys = [&] {
        if (releases) rings.k.release(smem.k_ring);
        rings.k.advance();
    };
    auto release_values = [&] {
        if (releases) rings.v.release(smem.v_ring);
        rings.v.advance();
    };
    auto exponentiate = [&](const auto& entry, bool masked) {
        if constexpr (Walk::LISTED) {
            walk.logits(scores, entry, params, scales, options);
        } else {
            const int tile_key = entry * BLOCK_N;
            const HeadRows alibi_rows([&](int r) { return options.slope[r]; },
                                      [&](int r) { return options.distance(r, tile_key); });
            softmax_logits<Layout>(scores, params, scales.scale, scales.scale_log2, alibi_rows);
            if (masked) {
                hide_by_position<Layout>(scores, negative_infinity<float>(),
                                         [&](int r) { return options.keys.from(r, tile_key); });
            }
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            corrections[half] = softmax_row(state.rows[0][half], scores[0], half, scale_log2);
        }
    };

    int key_tile = tile.key_end - 1;
    const auto first_entry = walk.entry(key_tile);
    rings.q.wait_full(smem.q_ring);
    turns.take();
    issue_next_scores();
    turns.pass();
    wgmma_wait<0>();
    release_keys();
    exponentiate(first_entry, true);
    round_probabilities(probabilities, scores);

    // Scores of the next tile and output of this one are multiplied at the same time.
    auto step = [&](bool masked) {
        const auto entry = walk.entry(key_tile);
        turns.take();
        issue_next_scores();
        issue_next_output();
        turns.pass();
        wgmma_wait<1>();
        release_keys();
        exponentiate(entry, masked);
        wgmma_wait<0>();
        release_values();
        round_probabilities(probabilities, scores);
#pragma unroll
        for (int half = 0; half < 2; half++) rescale_row(state.acc_out[0], half, corrections[half]);
    };
    key_tile--;
    if (!Walk::LISTED && TileBand::HAS_END) {
        for (const int stop = max(tile.key_begin, whole.full_end); key_tile >= stop; key_tile--) step(true);
    }
    const int whole_begin = Walk::LISTED ? tile.key_begin
                            : TileBand::HAS_BEGIN ? max(tile.key_begin, whole.full_begin)
                                                  : 0;
    for (; key_tile >= whole_begin; key_tile--) step(false);
    if (!Walk::LISTED && TileBand::HAS_BEGIN) {
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
                                           const TileScales& scales, int pack, int first_row, const float* g_sinks,
                                           const float* g_v_descale, Output* g_out, float* g_lse, bool vectors,
                                           int lane_idx) {
    float out_factor = INVERSE_P_FACTOR;
    if (sizeof(Element) == 1 && g_v_descale != nullptr) out_factor *= g_v_descale[descale_idx(tile, params)];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        SoftmaxRow& sums = state.rows[0][half];
        const Row row(tile, pack, first_row + half * 8);
        const long long query = static_cast<long long>(tile.block.q_start) + row.query;
        finish_softmax(sums, scales.scale, scales.scale_log2);
        float correction = 1.0f;
        if (g_sinks != nullptr) {
            float term;
            sums.sink_exponents(g_sinks[row.head_idx], correction, term);
            correction = exp2_approx(correction);
            sums.sum = sums.sum * correction + exp2_approx(term);
        }
        const float factor = sums.inverse_sum() * correction * out_factor;
        Output* g_row = g_out + tile.block.batch_idx * params.out.batch + row.head_idx * params.out.head +
                        query * params.out.seq;
        write_row(g_row, state.acc_out[0], half, factor, params.head_dim_v, vectors, row.in_range, lane_idx);
        if (g_lse != nullptr && row.in_range && lane_idx % 4 == 0) {
            g_lse[tile.block.batch_idx * params.lse_batch + row.head_idx * params.lse_head + query] = sums.lse();
        }
    }
}
