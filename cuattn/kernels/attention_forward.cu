// Attention forward on the portable tensor-core path (mma.sync, cp.async; sm_80 and newer): 16-bit elements, 8-bit ones
// that become 16-bit ones on chip, and float32 with its products in tf32.
//
//     out = dropout(softmax(logits)) v,    lse = log(sum(exp(logits))),    logits = options(scale * q k^T)
//
// One CTA computes BLOCK_M queries of one head: it walks over the keys in tiles of BLOCK_N and keeps, for each query,
// the running maximum and sum of an online softmax and the output accumulated so far. Neither the logits nor the
// probabilities ever leave the chip (Dao et al., "FlashAttention", 2022; Dao, "FlashAttention-2", 2023; Milakov and
// Gimelshein, "Online normalizer calculation for softmax", 2018).
//
// Grid: one CTA for each block of queries of each head (query_block.cuh), or COLUMN_BLOCKS of them
// (column_block.cuh).
// Block: NUM_WARPS warps; warp w owns query rows [w * WARP_M, (w + 1) * WARP_M) of the tile, from q to out.
//
// Constants: Storage (of q, k, v in memory), Element (of them on chip), Output, BiasElement; BLOCK_M, BLOCK_N, HEAD_DIM
// and HEAD_DIM_V (buckets: the head dims proper are arguments and may be smaller), COLUMN_BLOCKS, NUM_WARPS,
// NUM_STAGES, SMEM_BYTES; ALIGNED (bases and strides of q, k, v: multiples of 16 bytes); the options that are compiled
// in: BOUND_LEFT and BOUND_RIGHT (mask.cuh), SOFTCAP, ALIBI, BIAS, MASK (logits.cuh), DROPOUT (philox.cuh).
// Sinks, packed sequences and offsets of the diagonal cost a few instructions a CTA and are always there. TILE_LIST:
// the tiles of keys are those of a list, and what they do not show is hidden (tile_list.cuh).
#include "attention/column_block.cuh"
#include "attention/key_walk.cuh"
#include "attention/philox.cuh"
#include "attention/query_block.cuh"
#include "attention/score_tile.cuh"
#include "common/tiles.cuh"

constexpr int NUM_THREADS = NUM_WARPS * 32;
constexpr int WARP_M = BLOCK_M / NUM_WARPS;
constexpr int ROW_TILES = WARP_M / MMA_M;
constexpr int QK_STRIDE = TILE_STRIDE<HEAD_DIM>;
constexpr int V_STRIDE = TILE_STRIDE<HEAD_DIM_V>;

// Results of the type of the sums go to memory from registers, others by way of shared memory.
constexpr bool STAGE_OUTPUT = sizeof(Output) == sizeof(Element);

// Shared memory of a CTA. The output tile takes the place of everything else once the last tile is done.
union Smem {
    struct {
        Element q[BLOCK_M][QK_STRIDE];
        Element k[NUM_STAGES][BLOCK_N][QK_STRIDE];
        Element v[NUM_STAGES][BLOCK_N][V_STRIDE];
    };
    Element out[BLOCK_M][V_STRIDE];  // of type Output, with STAGE_OUTPUT
};

static_assert(ROW_TILES * MMA_M * NUM_WARPS == BLOCK_M, "every row belongs to one warp, in whole mma tiles");
static_assert(STAGE_OUTPUT || sizeof(Output) == sizeof(float), "the output tile is laid out like the others");
static_assert(sizeof(Smem) == SMEM_BYTES, "config.py and this file agree on the shared-memory plan");

using Params = AttentionParams<float>;
using Layout = AccLayout<ROW_TILES, BLOCK_N>;
using Scores = Layout::Tile;
using LanePosition = TilePosition<false>;

#include "attention/warp_state.cuh"

// LISTED: as TILE_LIST says; the parameters are those of the kernel.
template <bool LISTED>
__device__ __forceinline__ void attention_forward(
    const Storage* __restrict__ g_q, const Storage* __restrict__ g_k, const Storage* __restrict__ g_v,
    Output* __restrict__ g_out, float* __restrict__ g_lse, const BiasElement* __restrict__ g_bias,
    const unsigned char* __restrict__ g_mask, const unsigned char* __restrict__ g_tile_class,
    const float* __restrict__ g_alibi_slopes, const float* __restrict__ g_sinks,
    const float* __restrict__ g_q_descale, const float* __restrict__ g_k_descale,
    const float* __restrict__ g_v_descale, const int* __restrict__ g_diagonal_offsets,
    const int* __restrict__ g_cu_seqlens_q, const int* __restrict__ g_cu_seqlens_k, const int* __restrict__ g_work,
    const int* __restrict__ g_tile_list, const Params& params)
{
    extern __shared__ __align__(16) unsigned char s_bytes[];
    Smem& smem = *reinterpret_cast<Smem*>(s_bytes);
    const int warp_idx = threadIdx.x / WARP_SIZE;
    const int lane_idx = threadIdx.x % WARP_SIZE;

    const ColumnBlock columns(params.head_dim_v);
    const QueryBlock block = query_block<BLOCK_M, BOUND_RIGHT>(params, g_work, g_cu_seqlens_q, g_cu_seqlens_k,
                                                               g_diagonal_offsets, columns.cta_idx);
    if (!block.has_work()) return;
    const int first_query = block.first_query;
    const int num_queries = min(BLOCK_M, block.seqlen_q - first_query);

    g_q += block.batch_idx * params.q.batch + block.head_idx * params.q.head +
           (static_cast<long long>(block.q_start) + first_query) * params.q.seq;
    g_k += block.batch_idx * params.k.batch + block.kv_head_idx * params.k.head + block.k_start * params.k.seq;
    g_v += block.batch_idx * params.v.batch + block.kv_head_idx * params.v.head + block.k_start * params.v.seq +
           columns.first;
    const KeyBand band(params, block);
    const KeyTiles tiles(band, BLOCK_N, first_query, first_query + num_queries - 1);
    const int keys_end = band.end(first_query + num_queries - 1);  // keys behind are not read, whatever they hold
    const ScoreOptions<float> options(params, g_bias, g_mask, g_tile_class, g_alibi_slopes, block.batch_idx,
                                      block.head_idx, first_query / BLOCK_M);

    float scale = params.scale, scale_log2 = params.scale_log2, out_factor = params.keep_scale * INVERSE_P_FACTOR;
    if constexpr (sizeof(Storage) == 1) {
        const int kv_idx = block.batch_idx * (params.num_heads / params.heads_per_kv_head) + block.kv_head_idx;
        const float descale = (g_q_descale == nullptr ? 1.0f : g_q_descale[kv_idx]) *
                              (g_k_descale == nullptr ? 1.0f : g_k_descale[kv_idx]);
        scale *= descale;
        scale_log2 *= descale;
        if (g_v_descale != nullptr) out_factor *= g_v_descale[kv_idx];
    }

    WarpState state;
#pragma unroll
    for (int t = 0; t < ROW_TILES; t++) {
        state.rows[t][0].reset();
        state.rows[t][1].reset();
    }
    clear(state.acc_out);

    const unsigned s_q = smem_address(smem.q) + lane_offset_a<HEAD_DIM>(warp_idx * WARP_M, lane_idx);
    const unsigned k_offset = lane_offset_bt<HEAD_DIM>(lane_idx), v_offset = lane_offset_b<HEAD_DIM_V>(lane_idx);
    const int warp_query = first_query + warp_idx * WARP_M;
    const auto walk = key_walk<LISTED, Layout>(params, options, block, band, tiles, g_tile_list, num_queries,
                                               warp_query + frag_acc_row(lane_idx));
    // Whether this warp's queries may see any key of a tile.
    auto sees = [&](const auto& tile) {
        const int last_query = min(warp_query + WARP_M, block.seqlen_q) - 1;
        if constexpr (LISTED) {
            return warp_query < block.seqlen_q && walk.sees(band.rows(warp_query, last_query), tile);
        } else {
            return warp_query < block.seqlen_q && band.rows(warp_query, last_query).meet(tile * BLOCK_N, BLOCK_N);
        }
    };
    auto first_key_of = [&](const auto& tile) {
        if constexpr (LISTED) {
            return tile.entry.first();
        } else {
            return tile * BLOCK_N;
        }
    };

    // Tiles are taken from the last to the first, so that the masked ones come first; hidden ones are passed over.
    auto before = [&](const auto& tile) {
        if constexpr (LISTED) {
            return walk.before(tile);
        } else {
            return options.visible_tile(params, tiles.begin, tile - 1);
        }
    };
    auto exists = [&](const auto& tile) {
        if constexpr (LISTED) {
            return walk.has(tile);
        } else {
            return tile >= tiles.begin;
        }
    };
    auto load_keys = [&](auto tile, int stage) {
        if constexpr (LISTED) {
            load_listed_tile<ALIGNED, BLOCK_N, HEAD_DIM, NUM_THREADS>(smem.k[stage][0], g_k, params.k.seq, keys_end,
                                                                      params.head_dim, walk.list, tile.entry);
            load_listed_tile<ALIGNED, BLOCK_N, HEAD_DIM_V, NUM_THREADS>(smem.v[stage][0], g_v, params.v.seq, keys_end,
                                                                        columns.count, walk.list, tile.entry);
        } else {
            const int first_key = tile * BLOCK_N;
            const int num_keys = keys_end - first_key;
            load_tile<ALIGNED, BLOCK_N, HEAD_DIM, NUM_THREADS>(smem.k[stage][0], g_k + first_key * params.k.seq,
                                                               params.k.seq, num_keys, params.head_dim);
            load_tile<ALIGNED, BLOCK_N, HEAD_DIM_V, NUM_THREADS>(smem.v[stage][0], g_v + first_key * params.v.seq,
                                                                 params.v.seq, num_keys, columns.count);
        }
    };
    // `loading` runs NUM_STAGES - 1 tiles ahead of `next`.
    auto next = before(walk.end);
    auto loading = next;
    if (exists(next)) {
        load_tile<ALIGNED, BLOCK_M, HEAD_DIM, NUM_THREADS>(smem.q[0], g_q, params.q.seq, num_queries, params.head_dim);
    }
#pragma unroll
    for (int stage = 0; stage < NUM_STAGES - 1; stage++) {
        if (exists(loading)) {
            load_keys(loading, stage);
            loading = before(loading);
        }
        cp_async_commit();
    }

    for (int stage = 0; exists(next); stage = (stage + 1) % NUM_STAGES) {
        cp_async_wait<(NUM_STAGES > 1 ? NUM_STAGES - 2 : 0)>();
        // SYNC: every thread's part of this tile (and of q) has landed; and every warp is done with the tile before,
        // whose stage the next load overwrites.
        __syncthreads();
        if (exists(loading)) {
            load_keys(loading, (stage + NUM_STAGES - 1) % NUM_STAGES);
            loading = before(loading);
        }
        cp_async_commit();  // an empty group at the end keeps the count that cp_async_wait relies on
        if constexpr (NUM_STAGES == 1) {
            cp_async_wait<0>();
            // SYNC: every thread's part of this tile (and of q) has landed: there was no room to load it ahead.
            __syncthreads();
        }
        const auto tile = next;
        const int first_key = first_key_of(tile);
        bool in_full = false, mixed = false;
        if constexpr (!LISTED) {
            in_full = tiles.in_full(tile);
            mixed = TILE_CLASSES && options.tile_class(params, tile) == TILE_MIXED;
        }
        next = before(tile);
        if (!sees(tile)) continue;

        const LanePosition lane{warp_query + frag_acc_row(lane_idx), first_key + frag_acc_col(lane_idx)};
        Scores scores;
        multiply_abt<HEAD_DIM>(scores, s_q, smem_address(smem.k[stage]) + k_offset);
        if constexpr (LISTED) {
            walk.logits(scores, walk.place(tile, lane), [&](auto layout, auto& part, const auto& alibi_rows) {
                softmax_logits<decltype(layout)>(part, params, scale, scale_log2, alibi_rows);
            });
        } else {
            const TileRows<Layout, false, float> alibi_rows(lane, block.diagonal_offset, options.slope);
            softmax_logits<Layout>(scores, params, scale, scale_log2, alibi_rows);
            if (mixed) add_bias_and_mask<Layout>(scores, params, options, lane, block.seqlen_q, block.seqlen_k);
            if (!in_full) hide_by_position<Layout>(scores, negative_infinity<float>(), band, lane);
        }
        softmax_step(state.acc_out, state.rows, scores, positive_scale_log2(scale_log2));
        if (DROPOUT && params.use_dropout) {
            const unsigned head = dropout_head(params.dropout, params.num_heads, block.batch_idx, block.head_idx);
            if constexpr (LISTED) {
                drop_probabilities(scores, params.dropout, head, walk.place(tile, lane));
            } else {
                drop_probabilities(scores, params.dropout, head, lane);
            }
        }
        multiply_add(Element(), state.acc_out, scores, smem_address(smem.v[stage]) + v_offset);
    }

    // SYNC: every warp is done with q, k and v, whose place the output tile takes.
    __syncthreads();
    // Where the result goes is found anew: kept over the loop it would take registers that the loop needs.
    const ColumnBlock out_columns(params.head_dim_v, reread_cta_idx());
    const QueryBlock out_block = query_block<BLOCK_M, BOUND_RIGHT>(params, g_work, g_cu_seqlens_q, g_cu_seqlens_k,
                                                                   g_diagonal_offsets, out_columns.cta_idx);
    finish_rows(state, scale, scale_log2, g_sinks, out_block.head_idx);
    Output(*s_out)[V_STRIDE] = reinterpret_cast<Output(*)[V_STRIDE]>(smem.out) + warp_idx * WARP_M;
    if constexpr (STAGE_OUTPUT) {
        stage_output(state, s_out, out_factor, lane_idx);
        // SYNC: the warp's output rows are in shared memory; only the warp that wrote them reads them.
        __syncwarp();
    }
    const int out_query = out_block.first_query + warp_idx * WARP_M;
    g_out += out_block.batch_idx * params.out.batch + out_block.head_idx * params.out.head +
             (static_cast<long long>(out_block.q_start) + out_query) * params.out.seq + out_columns.first;
    constexpr int ALIGNMENT = STAGE_OUTPUT ? 16 : 2 * sizeof(Output);
    const bool vectors =
        ((reinterpret_cast<unsigned long long>(g_out) | params.out.seq * sizeof(Output)) & (ALIGNMENT - 1)) == 0;
    if constexpr (STAGE_OUTPUT) {
        store_tile_by_warp<WARP_M, HEAD_DIM_V>(g_out, params.out.seq, s_out[0], out_block.seqlen_q - out_query,
                                               out_columns.count, vectors, lane_idx);
    } else {
        store_output(state, reinterpret_cast<float*>(g_out), params.out.seq, out_factor,
                     out_block.seqlen_q - out_query, out_columns.count, vectors, lane_idx);
    }
    if (g_lse != nullptr && out_columns.is_first() && lane_idx % 4 == 0) {
        g_lse += out_block.batch_idx * params.lse_batch + out_block.head_idx * params.lse_head + out_block.q_start;
        const int lane_query = out_query + frag_acc_row(lane_idx);
#pragma unroll
        for (int i = 0; i < 2 * ROW_TILES; i++) {
            const int query_idx = lane_query + i * 8;
            if (query_idx < out_block.seqlen_q) g_lse[query_idx] = state.rows[i / 2][i % 2].lse();
        }
    }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) cuattn_attention_forward(

    const Storage* __restrict__ g_q,     // [batch, seqlen_q, num_heads, head_dim], last axis contiguous
    const Storage* __restrict__ g_k,     // [batch, seqlen_k, num_kv_heads, head_dim]
    const Storage* __restrict__ g_v,     // [batch, seqlen_k, num_kv_heads, head_dim_v]
    Output* __restrict__ g_out,          // [batch, seqlen_q, num_heads, head_dim_v]
    // From here on, null is what a call does not use.
    float* __restrict__ g_lse,                      // [batch, num_heads, seqlen_q], contiguous
    const BiasElement* __restrict__ g_bias,         // broadcast to [batch, num_heads, seqlen_q, seqlen_k]
    const unsigned char* __restrict__ g_mask,       // likewise; 0 hides a key
    const unsigned char* __restrict__ g_tile_class, // of the bias and the mask, broadcast likewise: score_options.cuh
    const float* __restrict__ g_alibi_slopes,       // [batch or 1, num_heads]
    const float* __restrict__ g_sinks,              // [num_heads]
    const float* __restrict__ g_q_descale,          // [batch, num_kv_heads]
    const float* __restrict__ g_k_descale,          // likewise
    const float* __restrict__ g_v_descale,          // likewise
    const int* __restrict__ g_diagonal_offsets,     // [batch]
    const int* __restrict__ g_cu_seqlens_q,         // [batch + 1]: q and out are packed, [tokens, num_heads, ...], lse
    const int* __restrict__ g_cu_seqlens_k,         // [num_heads, tokens], k and v [tokens, num_kv_heads, ...]
    const int* __restrict__ g_work,                 // [num_work, 2]: query_block.cuh; with these two or g_tile_list
    const Params params,
    const int* __restrict__ g_tile_list)            // tile_list.cuh; with TILE_LIST
{
    attention_forward<TILE_LIST>(g_q, g_k, g_v, g_out, g_lse, g_bias, g_mask, g_tile_class, g_alibi_slopes, g_sinks,
                                 g_q_descale, g_k_descale, g_v_descale, g_diagonal_offsets, g_cu_seqlens_q,
                                 g_cu_seqlens_k, g_work, g_tile_list, params);
}
