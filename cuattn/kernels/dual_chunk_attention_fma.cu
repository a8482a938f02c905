// Dual-chunk attention for float32 and float64 without tensor cores: every product is an IEEE fused multiply-add.
//
// What is computed, and how queries and keys are shared out, is told in dual_chunk_attention.cu; the tiles of products
// are those of attention_forward_fma.cu. Queries are turned as rope turns them, to the bit, at every position.
//
// Grid: one CTA for each tile of queries of each head (dual_chunk/chunk_block.cuh), or COLUMN_BLOCKS of them
// (column_block.cuh).
// Block: NUM_WARPS warps of WARP_M = 8 query rows each (4 where the registers hold no more); lane l has the rows
// LANE_M (l / 16) .. + LANE_M - 1, half of the warp's, and columns l % 16, l % 16 + 16, ...
//
// Constants: those of attention_forward_fma.cu, with BOUND_RIGHT, and of the options at most SOFTCAP; INTERLEAVED,
// TABLES, Table (rotary/rope.cuh).
#include "attention/column_block.cuh"
#include "attention/logits.cuh"
#include "attention/online_softmax.cuh"
#include "common/elements.cuh"
#include "common/tiles.cuh"
#include "dual_chunk/chunk_block.cuh"
#include "dual_chunk/dual_chunk_params.cuh"
#include "rotary/rotate_tile.cuh"

constexpr int WARP_SIZE = 32;
constexpr int NUM_THREADS = NUM_WARPS * WARP_SIZE;
constexpr int WARP_M = BLOCK_M / NUM_WARPS;
constexpr int LANE_M = WARP_M / 2;    // rows a lane computes: a half-warp has half of the warp's
constexpr int LANE_N = BLOCK_N / 16;  // columns of the scores

#include "attention/lane_products.cuh"
#include "attention/lane_smem.cuh"

static_assert(!(BOUND_LEFT || ALIBI || BIAS || MASK || DROPOUT), "options that dual-chunk attention has not");

using Params = DualChunkParams<Element>;
using SoftmaxRow = OnlineSoftmaxRow<Element>;
using LanePosition = TilePosition<false>;

#include "attention/lane_state.cuh"
#include "attention/lane_walk.cuh"

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) cuattn_dual_chunk_attention_fma(
    const Element* __restrict__ g_q,  // [batch, seqlen_q, num_heads, head_dim], last axis contiguous
    const Element* __restrict__ g_k,  // [batch, seqlen_k, num_kv_heads, head_dim], turned
    const Element* __restrict__ g_v,  // [batch, seqlen_k, num_kv_heads, head_dim_v]
    Element* __restrict__ g_out,      // [batch, seqlen_q, num_heads, head_dim_v]
    // From here on, null is what a call does not use.
    Element* __restrict__ g_lse,                     // [batch, num_heads, seqlen_q], contiguous
    const Element* __restrict__ g_logit_factors,     // [batch]: more than params.scale for the scores of a sequence
    const unsigned long long* __restrict__ g_turns,  // see Rotations; null with TABLES
    const Table* __restrict__ g_cos,                 // [num_positions, num_pairs]; with TABLES
    const Table* __restrict__ g_sin,                 // the same
    const int* __restrict__ g_cu_seqlens_q,          // [batch + 1]: q and out are packed, [tokens, num_heads, ...], lse
    const int* __restrict__ g_cu_seqlens_k,          // [num_heads, tokens], k and v [tokens, num_kv_heads, ...]
    const int* __restrict__ g_work,                  // [num_work, 2]: chunk_block.cuh; given with the two before
    const Params params)
{
    extern __shared__ __align__(16) unsigned char s_bytes[];
    Smem& smem = *reinterpret_cast<Smem*>(s_bytes);
    const int lane_idx = threadIdx.x % WARP_SIZE;
    const int lane_row = threadIdx.x / LANES_PER_ROW * LANE_M;  // this lane's first row of the tile, ...
    const int lane_col = lane_idx % LANES_PER_ROW;              // ... its first column, and that of the output
    const int out_col = lane_col * RowPart<HEAD_DIM_V>::VECTOR;

    const ColumnBlock columns(params.head_dim_v);
    const ChunkBlock block = chunk_block<BLOCK_M>(params, g_work, g_cu_seqlens_q, g_cu_seqlens_k, columns.cta_idx);
    if (!block.has_work()) return;
    const int first_query = block.first_query;
    const int num_queries = block.end_query - first_query;

    g_q += block.batch_idx * params.q.batch + block.head_idx * params.q.head +
           (static_cast<long long>(block.q_start) + first_query) * params.q.seq;
    g_k += block.batch_idx * params.k.batch + block.kv_head_idx * params.k.head + block.k_start * params.k.seq;
    g_v += block.batch_idx * params.v.batch + block.kv_head_idx * params.v.head + block.k_start * params.v.seq +
           columns.first;
    const int own_key = block.chunk * params.chunk_length;
    const TileRotations rotations(g_turns, params.num_pairs, g_cos, g_sin, params.tables);
    const Element scale = params.scale * (g_logit_factors == nullptr ? Element(1) : g_logit_factors[block.batch_idx]);
    const int warp_query = first_query + threadIdx.x / WARP_SIZE * WARP_M;
    // Where this warp's first and last query stand: keys from there on are hidden from it.
    const int first_position = block.position(warp_query);
    const int last_position = block.position(min(warp_query + WARP_M, block.end_query) - 1);

    LaneState state;
    clear<HEAD_DIM_V>(state.acc_out);
#pragma unroll
    for (int i = 0; i < LANE_M; i++) state.rows[i].reset();

    for (Stretch stretch = Stretch::own(block, params.chunk_length); stretch.exists();
         stretch = stretch.older(own_key, params.chunk_length)) {
        const bool own = stretch.end > own_key;
        auto load_k = [&](int first_key) {
            load_tile<ALIGNED, BLOCK_N, HEAD_DIM, NUM_THREADS>(smem.k(), g_k + first_key * params.k.seq, params.k.seq,
                                                               stretch.end - first_key, params.head_dim);
            cp_async_commit();
        };
        auto load_v = [&](int first_key) {
            load_tile<ALIGNED, BLOCK_N, HEAD_DIM_V, NUM_THREADS>(smem.v(), g_v + first_key * params.v.seq,
                                                                 params.v.seq, stretch.end - first_key, columns.count);
            cp_async_commit();
        };
        // The tile's probabilities, if this warp's queries see any key of it.
        auto weigh = [&](int first_key) {
            const bool active = warp_query < block.end_query && !(own && first_key > last_position);
            if (active) {
                const LanePosition lane{first_query + lane_row, first_key + lane_col};
                Weights scores;
                multiply_abt<HEAD_DIM>(scores, smem.q[lane_row], smem.k() + lane_col * TILE_STRIDE<HEAD_DIM>,
                                       params.head_dim);
                const TileRows<LaneLayout, false, Element> no_slopes(lane, block.diagonal_offset, Element(0));
                natural_logits<LaneLayout>(scores, params, scale, no_slopes);
                if (first_key + BLOCK_N > (own ? first_position + 1 : stretch.end)) {
                    const int first_end = (own ? block.position(lane.query()) + 1 : stretch.end) - lane.key();
                    hide_by_position<LaneLayout>(scores, negative_infinity<Element>(), [&](int r) {
                        return Bounds<false>{0, own ? first_end + LaneLayout::row(r) : first_end};
                    });
                }
                softmax_step(state, scores);
                store_weights(scores, smem.p[lane_row] + lane_col);
            }
            return active;
        };

        const int last_tile = stretch.last_tile<BLOCK_N>();
        // SYNC: every warp is done with the queries as they were turned before, and with the last keys and values.
        __syncthreads();
        load_tile<ALIGNED, BLOCK_M, HEAD_DIM, NUM_THREADS>(smem.q[0], g_q, params.q.seq, num_queries, params.head_dim);
        load_k(last_tile);
        cp_async_wait<0>();
        // SYNC: every thread's part of q has landed.
        __syncthreads();
        const TurnPositions positions(params, block, stretch);
        rotate_tile<HEAD_DIM, NUM_THREADS>(smem.q[0], num_queries, rotations, params.num_pairs, params.rotary_vectors,
                                           [&](int row) { return positions.of(row); });
        // Its first barrier is also that behind the rotation.
        walk_tiles(
            state, last_tile, [&](int first_key) { return first_key >= stretch.begin; },
            [](int first_key) { return first_key - BLOCK_N; }, load_k, load_v, weigh, smem.p[lane_row],
            smem.v() + out_col);
    }
    store_rows(state, params, block, columns, g_out, g_lse, nullptr, first_query + lane_row, block.end_query, out_col);
}
