// Attention forward for float32 and float64 without tensor cores: every product is an IEEE fused multiply-add.
//
//     out = dropout(softmax(logits)) v,    lse = log(sum(exp(logits))),    logits = options(scale * q k^T)
//
// One CTA computes BLOCK_M queries of one head with the same online softmax over key tiles as attention_forward.cu. The
// matrix products are tiled in registers: a lane computes LANE_M rows x BLOCK_N / 16 columns of the scores and LANE_M
// rows x HEAD_DIM_V / 16 columns of the output, so that each number read from shared memory is used several times.
//
// Accuracy: all arithmetic is in the element type and rounds to nearest. A dot product is summed in blocks of 32 terms,
// which keeps its error near that of pairwise summation; exp2 is within 2 ulp; the output is summed key by key. Nothing
// is flushed to zero.
//
// Grid: one CTA for each block of queries of each head (query_block.cuh), or COLUMN_BLOCKS of them
// (column_block.cuh).
// Block: NUM_WARPS warps of WARP_M = 8 query rows each (4 where the registers hold no more); lane l has the rows
// LANE_M (l / 16) .. + LANE_M - 1, half of the warp's, and columns l % 16, l % 16 + 16, ...
//
// Constants: Element (float or double; Storage, Output and Accumulator are the same type), BiasElement; BLOCK_M,
// BLOCK_N, HEAD_DIM and HEAD_DIM_V (buckets: the head dims proper are arguments and may be smaller), COLUMN_BLOCKS,
// ONE_PLACE (k and v take turns), NUM_WARPS, SMEM_BYTES; ALIGNED (bases and strides of q, k, v: multiples of 16 bytes);
// the options that are compiled in: BOUND_LEFT and BOUND_RIGHT (mask.cuh), SOFTCAP, ALIBI, BIAS, MASK
// (logits.cuh), DROPOUT (philox.cuh). Sinks, packed sequences and offsets of the diagonal cost a few
// instructions a CTA and are always there. TILE_LIST: the tiles of keys are those of a list, and what they
// do not show is hidden (tile_list.cuh).
#include "attention/column_block.cuh"
#include "attention/key_walk.cuh"
#include "common/elements.cuh"
#include "attention/logits.cuh"
#include "attention/online_softmax.cuh"
#include "attention/philox.cuh"
#include "attention/query_block.cuh"
#include "common/tiles.cuh"

constexpr int WARP_SIZE = 32;
constexpr int NUM_THREADS = NUM_WARPS * WARP_SIZE;
constexpr int WARP_M = BLOCK_M / NUM_WARPS;
constexpr int LANE_M = WARP_M / 2;    // rows a lane computes: a half-warp has half of the warp's
constexpr int LANE_N = BLOCK_N / 16;  // columns of the scores

#include "attention/lane_products.cuh"
#include "attention/lane_smem.cuh"

using Params = AttentionParams<Element>;
using SoftmaxRow = OnlineSoftmaxRow<Element>;
using LanePosition = TilePosition<false>;

#include "attention/lane_state.cuh"
#include "attention/lane_walk.cuh"

// LISTED: as TILE_LIST says; the parameters are those of the kernel.
template <bool LISTED>
__device__ __forceinline__ void attention_forward(
    const Element* __restrict__ g_q, const Element* __restrict__ g_k, const Element* __restrict__ g_v,
    Element* __restrict__ g_out, Element* __restrict__ g_lse, const BiasElement* __restrict__ g_bias,
    const unsigned char* __restrict__ g_mask, const unsigned char* __restrict__ g_tile_class,
    const Element* __restrict__ g_alibi_slopes, const Element* __restrict__ g_sinks,
    const Element* __restrict__ g_q_descale, const Element* __restrict__ g_k_descale,
    const Element* __restrict__ g_v_descale, const int* __restrict__ g_diagonal_offsets,
    const int* __restrict__ g_cu_seqlens_q, const int* __restrict__ g_cu_seqlens_k, const int* __restrict__ g_work,
    const int* __restrict__ g_tile_list, const Params& params)
{
    extern __shared__ __align__(16) unsigned char s_bytes[];
    Smem& smem = *reinterpret_cast<Smem*>(s_bytes);
    const int lane_idx = threadIdx.x % WARP_SIZE;
    const int lane_row = threadIdx.x / LANES_PER_ROW * LANE_M;  // this lane's first row of the tile, ...
    const int lane_col = lane_idx % LANES_PER_ROW;              // ... its first column, and that of the output
    const int out_col = lane_col * RowPart<HEAD_DIM_V>::VECTOR;

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
    const ScoreOptions<Element> options(params, g_bias, g_mask, g_tile_class, g_alibi_slopes, block.batch_idx,
                                        block.head_idx, first_query / BLOCK_M);
    const int warp_query = first_query + threadIdx.x / WARP_SIZE * WARP_M;
    const int last_warp_query = min(warp_query + WARP_M, block.seqlen_q) - 1;
    const KeyBand::RowBounds warp_keys =
        warp_query < block.seqlen_q ? band.rows(warp_query, last_warp_query) : KeyBand::RowBounds{0, 0};

    LaneState state;
    clear<HEAD_DIM_V>(state.acc_out);
#pragma unroll
    for (int i = 0; i < LANE_M; i++) state.rows[i].reset();

    const auto walk =
        key_walk<LISTED, LaneLayout>(params, options, block, band, tiles, g_tile_list, num_queries,
                                     first_query + lane_row);
    // Tiles are taken from the last to the first, as in attention_forward.cu; hidden tiles are passed over.
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
    auto load_k = [&](auto tile) {
        if constexpr (LISTED) {
            load_listed_tile<ALIGNED, BLOCK_N, HEAD_DIM, NUM_THREADS>(smem.k(), g_k, params.k.seq, keys_end,
                                                                      params.head_dim, walk.list, tile.entry);
        } else {
            const int first_key = tile * BLOCK_N;
            load_tile<ALIGNED, BLOCK_N, HEAD_DIM, NUM_THREADS>(smem.k(), g_k + first_key * params.k.seq, params.k.seq,
                                                               keys_end - first_key, params.head_dim);
        }
        cp_async_commit();
    };
    auto load_v = [&](auto tile) {
        if constexpr (LISTED) {
            load_listed_tile<ALIGNED, BLOCK_N, HEAD_DIM_V, NUM_THREADS>(smem.v(), g_v, params.v.seq, keys_end,
                                                                        columns.count, walk.list, tile.entry);
        } else {
            const int first_key = tile * BLOCK_N;
            load_tile<ALIGNED, BLOCK_N, HEAD_DIM_V, NUM_THREADS>(smem.v(), g_v + first_key * params.v.seq, params.v.seq,
                                                                 keys_end - first_key, columns.count);
        }
        cp_async_commit();
    };
    auto first_key_of = [&](const auto& tile) {
        if constexpr (LISTED) {
            return tile.entry.first();
        } else {
            return tile * BLOCK_N;
        }
    };
    // Whether this warp's queries may see any key of a tile.
    auto sees = [&](const auto& tile) {
        if constexpr (LISTED) {
            return walk.sees(warp_keys, tile);
        } else {
            return warp_keys.meet(tile * BLOCK_N, BLOCK_N);
        }
    };

    // The tile's probabilities, if this warp's queries see any key of it.
    auto weigh = [&](const auto& tile) {
        const bool active = sees(tile);
        if (active) {
            const LanePosition lane{first_query + lane_row, first_key_of(tile) + lane_col};
            Weights scores;
            multiply_abt<HEAD_DIM>(scores, smem.q[lane_row], smem.k() + lane_col * TILE_STRIDE<HEAD_DIM>,
                                   params.head_dim);
            if constexpr (LISTED) {
                walk.logits(scores, walk.place(tile, lane), [&](auto layout, auto& part, const auto& alibi_rows) {
                    natural_logits<decltype(layout)>(part, params, params.scale, alibi_rows);
                });
            } else {
                const TileRows<LaneLayout, false, Element> alibi_rows(lane, block.diagonal_offset, options.slope);
                natural_logits<LaneLayout>(scores, params, params.scale, alibi_rows);
                if (TILE_CLASSES && options.tile_class(params, tile) == TILE_MIXED) {
                    add_bias_and_mask<LaneLayout>(scores, params, options, lane, block.seqlen_q, block.seqlen_k);
                }
                if (!tiles.in_full(tile)) {
                    hide_by_position<LaneLayout>(scores, negative_infinity<Element>(), band, lane);
                }
            }
            softmax_step(state, scores);
            if (DROPOUT && params.use_dropout) {
                const unsigned head = dropout_head(params.dropout, params.num_heads, block.batch_idx, block.head_idx);
                if constexpr (LISTED) {
                    drop_probabilities(scores, params.dropout, head, walk.place(tile, lane));
                } else {
                    drop_probabilities(scores, params.dropout, head, lane);
                }
            }
            store_weights(scores, smem.p[lane_row] + lane_col);
        }
        return active;
    };

    auto tile = before(walk.end);
    if (exists(tile)) {
        load_tile<ALIGNED, BLOCK_M, HEAD_DIM, NUM_THREADS>(smem.q[0], g_q, params.q.seq, num_queries, params.head_dim);
        load_k(tile);
    }
    walk_tiles(state, tile, exists, before, load_k, load_v, weigh, smem.p[lane_row], smem.v() + out_col);
    store_rows(state, params, block, columns, g_out, g_lse, g_sinks, first_query + lane_row, block.seqlen_q, out_col);
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) cuattn_attention_forward_fma(
    const Element* __restrict__ g_q,     // [batch, seqlen_q, num_heads, head_dim], last axis contiguous
    const Element* __restrict__ g_k,     // [batch, seqlen_k, num_kv_heads, head_dim]
    const Element* __restrict__ g_v,     // [batch, seqlen_k, num_kv_heads, head_dim_v]
    Element* __restrict__ g_out,         // [batch, seqlen_q, num_heads, head_dim_v]
    Element* __restrict__ g_lse,         // [batch, num_heads, seqlen_q], last axis contiguous; this and below: or null
    const BiasElement* __restrict__ g_bias,         // broadcast to [batch, num_heads, seqlen_q, seqlen_k]
    const unsigned char* __restrict__ g_mask,       // likewise; 0 hides a key
    const unsigned char* __restrict__ g_tile_class, // of the bias and the mask, broadcast likewise: score_options.cuh
    const Element* __restrict__ g_alibi_slopes,     // [batch or 1, num_heads]
    const Element* __restrict__ g_sinks,            // [num_heads]
    const Element* __restrict__ g_q_descale,        // for 8-bit elements: not used here
    const Element* __restrict__ g_k_descale,        // likewise
    const Element* __restrict__ g_v_descale,        // likewise
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
