// What the forward kernels without tensor cores have in common: how a CTA goes from tile to tile of keys, and where its
// rows go in the end. To be included after attention/lane_state.cuh.
//
// Constant used: ONE_PLACE (k and v take turns in one place of shared memory).
#pragma once
#include "common/tiles.cuh"

// Goes from `tile`, whose k the caller has begun to load, through those before it.
//
// exists(tile), before(tile): how tiles follow each other. load_k(tile), load_v(tile): begin to load, as a group of
// copies. weigh(tile): puts the probabilities of the warp's rows into shared memory, and returns whether there are any
// to multiply with v. s_weights: those of the lane's rows; s_v: v, from the lane's first column on.
template <typename Tile, typename Exists, typename Before, typename LoadK, typename LoadV, typename Weigh>
__device__ __forceinline__ void walk_tiles(LaneState& state, Tile tile, const Exists& exists, const Before& before,
                                           const LoadK& load_k, const LoadV& load_v, const Weigh& weigh,
                                           const Element* s_weights, const Element* s_v) {
    while (exists(tile)) {
        cp_async_wait<0>();
        // SYNC: this tile's k (and q) has landed for all; every warp is done with the v of the tile before.
        __syncthreads();
        if (!ONE_PLACE) load_v(tile);  // on its way during the first product
        const bool active = weigh(tile);
        const Tile this_tile = tile;
        tile = before(tile);
        cp_async_wait<0>();
        // SYNC: v has landed and the probabilities are written; every warp is done with k.
        __syncthreads();
        if constexpr (ONE_PLACE) {
            load_v(this_tile);
            cp_async_wait<0>();
            // SYNC: v has landed where k was.
            __syncthreads();
        } else if (exists(tile)) {
            load_k(tile);  // on its way during the second product
        }
        if (active) multiply_add<HEAD_DIM_V>(state.acc_out, s_weights, s_v);
        if constexpr (ONE_PLACE) {
            // SYNC: every warp is done with v, whose place the next k takes.
            __syncthreads();
            if (exists(tile)) load_k(tile);
        }
    }
}

// Finishes the rows of a lane, from the query first_query on (those below end_query exist), and writes them to out and,
// where it is asked for, lse. columns: those of the CTA (column_block.cuh); out_col: the lane's first of them.
template <typename Block, typename Columns>
__device__ __forceinline__ void store_rows(LaneState& state, const Params& params, const Block& block,
                                           const Columns& columns, Element* g_out, Element* g_lse,
                                           const Element* g_sinks, int first_query, int end_query, int out_col) {
    const bool vectors =
        ((reinterpret_cast<unsigned long long>(g_out) | params.out.batch * sizeof(Element) |
          params.out.seq * sizeof(Element) | params.out.head * sizeof(Element)) & 15) == 0;
    g_out += block.batch_idx * params.out.batch + block.head_idx * params.out.head + block.q_start * params.out.seq +
             columns.first + out_col;
    if (g_lse != nullptr) {
        g_lse += block.batch_idx * params.lse_batch + block.head_idx * params.lse_head + block.q_start;
    }
#pragma unroll
    for (int i = 0; i < LANE_M; i++) {
        SoftmaxRow& row = state.rows[i];
        const Element factor = finish_row(row, g_sinks, block.head_idx) * params.keep_scale;
        const int query_idx = first_query + i;
        if (query_idx < end_query) {
            store_row(g_out + query_idx * params.out.seq, state.acc_out[i], factor, out_col, columns.count, vectors);
            if (g_lse != nullptr && columns.is_first() && out_col == 0) g_lse[query_idx] = row.lse();
        }
    }
}
