// Dual-chunk attention on the portable tensor-core path (mma.sync, cp.async; sm_80 and newer), 16-bit elements.
//
// Positions are cut into chunks of L. Key j comes turned by RoPE to position j mod L. A query at position p is turned
// three ways: to p mod L for the keys of its own chunk, to min(p mod L + L, C) for those of the chunk before, and to
// min(2 L - 1, C) for all older ones (An et al., "Training-free long-context scaling of large language models", 2024).
// One softmax goes over all of them:
//
//     out = softmax(logits) v,    lse = log(sum(exp(logits))),    logits = softcap(scale * turned(q) k^T), causal
//
// One CTA computes at most BLOCK_M queries of one head, all of one chunk, and walks over the keys from its own chunk
// down to the oldest, as attention_forward.cu does. Where the walk leaves a chunk for older keys, at two places at
// most, the queries are read anew and turned in place.
//
// Grid: one CTA for each tile of queries of each head (dual_chunk/chunk_block.cuh), or COLUMN_BLOCKS of them
// (column_block.cuh).
// Block: NUM_WARPS warps; warp w owns query rows [w * WARP_M, (w + 1) * WARP_M) of the tile, from q to out.
//
// Constants: those of attention_forward.cu, with 16-bit Storage = Element = Output, BOUND_RIGHT, and of the options at
// most SOFTCAP; INTERLEAVED, TABLES, Table (rotary/rope.cuh).
#include "attention/column_block.cuh"
#include "attention/score_tile.cuh"
#include "common/tiles.cuh"
#include "dual_chunk/chunk_block.cuh"
#include "dual_chunk/dual_chunk_params.cuh"
#include "rotary/rotate_rows.cuh"

constexpr int NUM_THREADS = NUM_WARPS * 32;
constexpr int WARP_M = BLOCK_M / NUM_WARPS;
constexpr int ROW_TILES = WARP_M / MMA_M;
constexpr int QK_STRIDE = TILE_STRIDE<HEAD_DIM>;
constexpr int V_STRIDE = TILE_STRIDE<HEAD_DIM_V>;
// Behind the first chunk, rotations follow from each other: there are more to make, and nobody asks for rope's bits.
// The widest heads have no room for what rows share.
constexpr bool STEPS = !TABLES && HEAD_DIM <= 256;

// Shared memory of a CTA. The output tile takes the place of everything else once the last tile is done.
union Smem {
    struct {
        Element q[BLOCK_M][QK_STRIDE];
        Element k[NUM_STAGES][BLOCK_N][QK_STRIDE];
        Element v[NUM_STAGES][BLOCK_N][V_STRIDE];
        SharedTurns<STEPS ? HEAD_DIM / 2 : 4> turns;
    };
    Output out[BLOCK_M][V_STRIDE];
};

static_assert(ROW_TILES * MMA_M * NUM_WARPS == BLOCK_M, "every row belongs to one warp, in whole mma tiles");
static_assert(NUM_STAGES == 2, "a tile is loaded while the one before is multiplied");
static_assert(sizeof(Output) == sizeof(Element), "the output tile is laid out like the others");
static_assert(sizeof(Smem) == SMEM_BYTES, "config.py and this file agree on the shared-memory plan");
static_assert(!(BOUND_LEFT || ALIBI || BIAS || MASK || DROPOUT), "options that dual-chunk attention has not");

using Params = DualChunkParams<float>;
using Layout = AccLayout<ROW_TILES, BLOCK_N>;
using Scores = Layout::Tile;
using LanePosition = TilePosition<false>;

#include "attention/warp_state.cuh"

// Turns the queries of the CTA, which lie in shared memory.
__device__ __forceinline__ void turn_queries(Smem& smem, const Params& params, const TileRotations& rotations,
                                             const ChunkBlock& block, const TurnPositions& positions) {
    const int num_queries = block.end_query - block.first_query;
    if constexpr (STEPS) {
        if (block.chunk != 0 && params.rotary_vectors) {
            rotate_rows<HEAD_DIM, NUM_THREADS>(smem.q[0], num_queries, rotations, params.num_pairs, smem.turns,
                                               positions.first, positions.last);
            return;
        }
    }
    rotate_tile<HEAD_DIM, NUM_THREADS>(smem.q[0], num_queries, rotations, params.num_pairs, params.rotary_vectors,
                                       [&](int row) { return positions.of(row); });
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) cuattn_dual_chunk_attention(
    const Element* __restrict__ g_q,     // [batch, seqlen_q, num_heads, head_dim], last axis contiguous
    const Element* __restrict__ g_k,     // [batch, seqlen_k, num_kv_heads, head_dim], turned
    const Element* __restrict__ g_v,     // [batch, seqlen_k, num_kv_heads, head_dim_v]
    Output* __restrict__ g_out,          // [batch, seqlen_q, num_heads, head_dim_v]
    // From here on, null is what a call does not use.
    float* __restrict__ g_lse,                       // [batch, num_heads, seqlen_q], contiguous
    const float* __restrict__ g_logit_factors,       // [batch]: more than params.scale for the scores of a sequence
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
    const int warp_idx = threadIdx.x / WARP_SIZE;
    const int lane_idx = threadIdx.x % WARP_SIZE;

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
    const float logit_factor = g_logit_factors == nullptr ? 1.0f : g_logit_factors[block.batch_idx];
    const float scale_log2 = params.scale_log2 * logit_factor;

    WarpState state;
#pragma unroll
    for (int t = 0; t < ROW_TILES; t++) {
        state.rows[t][0].reset();
        state.rows[t][1].reset();
    }
    clear(state.acc_out);

    // This lane's fragments: of its rows of q, and of the keys and values of stage 0.
    const unsigned s_q = smem_address(smem.q) + lane_offset_a<HEAD_DIM>(warp_idx * WARP_M, lane_idx);
    const unsigned s_k = smem_address(smem.k) + lane_offset_bt<HEAD_DIM>(lane_idx);
    const unsigned s_v = smem_address(smem.v) + lane_offset_b<HEAD_DIM_V>(lane_idx);
    const int warp_query = first_query + warp_idx * WARP_M;
    // Where this warp's first and last query stand: keys behind the last are hidden from all of them.
    const int first_position = block.position(warp_query);
    const int last_position =
        warp_query < block.end_query ? block.position(min(warp_query + WARP_M, block.end_query) - 1) : -1;

    auto load_queries = [&]() {
        load_tile<ALIGNED, BLOCK_M, HEAD_DIM, NUM_THREADS>(smem.q[0], g_q, params.q.seq, num_queries, params.head_dim);
    };
    auto load_keys = [&](int first_key, int end_key, int stage) {
        const int num_keys = end_key - first_key;
        load_tile<ALIGNED, BLOCK_N, HEAD_DIM, NUM_THREADS>(smem.k[stage][0], g_k + first_key * params.k.seq,
                                                           params.k.seq, num_keys, params.head_dim);
        load_tile<ALIGNED, BLOCK_N, HEAD_DIM_V, NUM_THREADS>(smem.v[stage][0], g_v + first_key * params.v.seq,
                                                             params.v.seq, num_keys, columns.count);
    };
    Stretch stretch = Stretch::own(block, params.chunk_length);
    if (stretch.exists()) load_keys(stretch.last_tile<BLOCK_N>(), stretch.end, 0);
    if constexpr (STEPS) {
        if (block.chunk != 0 && params.rotary_vectors) {
            make_shared_turns<NUM_THREADS>(smem.turns, rotations, params.num_pairs, params.far_position);
        }
    }

    const TileRows<Layout, false, float> no_slopes({0, 0}, 0, 0.0f);
    int stage = 0;
    bool all_at_last = false;  // the queries are turned to the last position, where they are for older keys too
    while (stretch.exists()) {
        if (!all_at_last) {
            const TurnPositions positions(params, block, stretch);
            // SYNC: every warp is done with the queries as they were turned before.
            __syncthreads();
            load_queries();
            cp_async_commit();
            cp_async_wait<0>();
            // SYNC: every thread's part of q has landed, and the rotations that rows share are made.
            __syncthreads();
            turn_queries(smem, params, rotations, block, positions);
            all_at_last = positions.all_at_last();
        }
        const bool own = stretch.end > own_key;
        for (int first_key = stretch.last_tile<BLOCK_N>(); first_key >= stretch.begin; first_key -= BLOCK_N) {
            cp_async_wait<0>();
            // SYNC: every thread's part of this tile has landed, and the queries are turned; every warp is done with
            // the tile before, whose stage the next load overwrites.
            __syncthreads();
            int next_key = first_key - BLOCK_N, next_end = stretch.end;
            if (first_key == stretch.begin) {
                const Stretch older = stretch.older(own_key, params.chunk_length);
                next_key = older.exists() ? older.last_tile<BLOCK_N>() : -1;
                next_end = older.end;
            }
            if (next_key >= 0) load_keys(next_key, next_end, stage ^ 1);
            cp_async_commit();
            const int this_stage = stage;
            stage ^= 1;
            // Nothing that this warp's queries may see?
            if (first_key > last_position) continue;

            Scores scores;
            multiply_abt<HEAD_DIM>(scores, s_q, s_k + this_stage * unsigned(sizeof(smem.k[0])));
            softmax_logits<Layout>(scores, params, params.scale * logit_factor, scale_log2, no_slopes);
            if (first_key + BLOCK_N > (own ? first_position + 1 : stretch.end)) {
                const int lane_end = own ? first_position + frag_acc_row(lane_idx) + 1 : stretch.end;
                const int first_end = lane_end - (first_key + frag_acc_col(lane_idx));
                hide_by_position<Layout>(scores, negative_infinity<float>(), [&](int r) {
                    return Bounds<false>{0, own ? first_end + Layout::row(r) : first_end};
                });
            }
            softmax_step(state.acc_out, state.rows, scores, positive_scale_log2(scale_log2));
            multiply_add(Element(), state.acc_out, scores, s_v + this_stage * unsigned(sizeof(smem.v[0])));
        }
        stretch = stretch.older(own_key, params.chunk_length);
    }

    // SYNC: every warp is done with q, k and v, whose place the output tile takes.
    __syncthreads();
    // Where the result goes is found anew: kept over the loop it would take registers that the loop needs.
    const ColumnBlock out_columns(params.head_dim_v, reread_cta_idx());
    const ChunkBlock out_block =
        chunk_block<BLOCK_M>(params, g_work, g_cu_seqlens_q, g_cu_seqlens_k, out_columns.cta_idx);
    finish_rows(state, params.scale * logit_factor, scale_log2, nullptr, out_block.head_idx);
    Output(*s_out)[V_STRIDE] = smem.out + warp_idx * WARP_M;
    stage_output(state, s_out, INVERSE_P_FACTOR, lane_idx);
    // SYNC: the warp's output rows are in shared memory; only the warp that wrote them reads them.
    __syncwarp();
    const int out_query = out_block.first_query + warp_idx * WARP_M;
    g_out += out_block.batch_idx * params.out.batch + out_block.head_idx * params.out.head +
             (static_cast<long long>(out_block.q_start) + out_query) * params.out.seq + out_columns.first;
    const bool vectors = ((reinterpret_cast<unsigned long long>(g_out) | params.out.seq * sizeof(Output)) & 15) == 0;
    store_tile_by_warp<WARP_M, HEAD_DIM_V>(g_out, params.out.seq, s_out[0], out_block.end_query - out_query,
                                           out_columns.count, vectors, lane_idx);
    if (g_lse != nullptr && out_columns.is_first() && lane_idx % 4 == 0) {
        g_lse += out_block.batch_idx * params.lse_batch + out_block.head_idx * params.lse_head + out_block.q_start;
        const int lane_query = out_query + frag_acc_row(lane_idx);
#pragma unroll
        for (int i = 0; i < 2 * ROW_TILES; i++) {
            const int query_idx = lane_query + i * 8;
            if (query_idx < out_block.end_query) g_lse[query_idx] = state.rows[i / 2][i % 2].lse();
        }
    }
}
