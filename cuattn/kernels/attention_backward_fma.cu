// Attention backward for float32 and float64 without tensor cores: every product is an IEEE fused multiply-add.
//
//     P = exp(logits - lse)                       the probabilities again, from the saved lse
//     dV = (P Z)^T dout                           Z: 0 or 1 / (1 - dropout_p)
//     dS = P (Z (dout V^T) - delta)               delta: attention_backward_rows.cu
//     dQ = scale dS K,    dK = scale dS^T Q       dS times 1 - tanh^2 before, if the logits were capped
//
// The same walk as in attention_backward.cu: a CTA owns BLOCK_OWN rows of one side and visits the other side in tiles
// of BLOCK_OTHER rows. It owns queries and walks over their keys: that gives dq. Or (OWN_KEYS) it owns keys of a
// key/value head and walks over the queries of every query head that reads it: that gives dk and dv. A row's gradient
// is summed by one half-warp, in registers, in a fixed order. P and dS change their lanes by way of shared memory.
//
// Accuracy: all arithmetic is in the element type and rounds to nearest. Dot products are summed in blocks
// (lane_products.cuh), gradients row by row of the other side; exp2 and the derivative of the softcap are within a few
// ulp. Nothing is flushed to zero.
//
// Grid: one CTA for each block of queries of each head, or of keys of each key/value head (query_block.cuh).
// Block: NUM_WARPS warps of WARP_ROWS = 8 owned rows each (4 or 2 where the registers hold no more); lane l has the
// rows LANE_M (l / 16) .. + LANE_M - 1, half of the warp's, and columns l % 16, l % 16 + 16, ...
//
// Constants: OWN_KEYS; Element (float or double; Storage, Output and Accumulator are the same type), BiasElement;
// BLOCK_OWN, BLOCK_OTHER, HEAD_DIM and HEAD_DIM_V (buckets: the head dims proper are arguments and may be smaller),
// NUM_WARPS, SMEM_BYTES; ALIGNED (bases and strides of q, k, v, dout: multiples of 16 bytes); the options that are
// compiled in: BOUND_LEFT and BOUND_RIGHT (mask.cuh), SOFTCAP, ALIBI, BIAS, MASK (logits.cuh), DROPOUT
// (philox.cuh). GRAD_QK is always true, GRAD_V is OWN_KEYS. TILE_LIST: the tiles of the walk are those of a list, and
// what they do not show is hidden (attention/tile_list.cuh).
#include "backward/attention_backward_params.cuh"
#include "attention/query_block.cuh"

constexpr int WARP_SIZE = 32;
constexpr int NUM_THREADS = NUM_WARPS * WARP_SIZE;
constexpr int WARP_ROWS = BLOCK_OWN / NUM_WARPS;
constexpr int LANE_M = WARP_ROWS / 2;     // rows a lane computes: a half-warp has half of the warp's
constexpr int LANE_N = BLOCK_OTHER / 16;  // columns of the scores
constexpr int BLOCK_QUERIES = OWN_KEYS ? BLOCK_OTHER : BLOCK_OWN;

#include "backward/lane_tile.cuh"
#include "backward/listed_walk.cuh"

// Shared memory of a CTA. `qk` is the operand of q k^T, `v` that of dout v^T: q and dout of queries, k and v of keys.
struct Smem {
    Element own_qk[BLOCK_OWN][TILE_STRIDE<HEAD_DIM>];
    Element own_v[BLOCK_OWN][TILE_STRIDE<HEAD_DIM_V>];
    Element other_qk[BLOCK_OTHER][TILE_STRIDE<HEAD_DIM>];
    Element other_v[BLOCK_OTHER][TILE_STRIDE<HEAD_DIM_V>];
    Element weights[BLOCK_OWN][TILE_STRIDE<BLOCK_OTHER>];  // P, then dS; each warp uses its own rows
    Element lse[BLOCK_QUERIES];
    Element delta[BLOCK_QUERIES];
};

static_assert(BLOCK_OWN == NUM_WARPS * WARP_ROWS && WARP_ROWS % 2 == 0, "every lane has whole rows");
static_assert(BLOCK_OTHER % LANES_PER_ROW == 0, "every lane has whole columns");
static_assert(NUM_THREADS >= BLOCK_QUERIES, "a thread loads the terms of one query");
static_assert(GRAD_QK && GRAD_V == OWN_KEYS, "registers hold the gradients of k and v together");
static_assert(sizeof(Smem) == SMEM_BYTES, "backward/config.py and this file agree on the shared-memory plan");

using Params = AttentionBackwardParams<Element>;

// A tile of the walk: of one of the query heads that read the key/value head, in order. Where queries are owned there
// is one head.
struct WalkPosition {
    int head, tile_idx;
};

// Starts copying numbers of COUNT queries; those from num_valid on become zero.
template <int COUNT>
__device__ __forceinline__ void load_terms(Element* s_terms, const Element* g_terms, int num_valid) {
    const int idx = threadIdx.x;
    if (idx >= COUNT) return;
    const int src_bytes = idx < num_valid ? sizeof(Element) : 0;
    if constexpr (sizeof(Element) == 4) {
        cp_async_4(smem_address(s_terms + idx), g_terms + idx, src_bytes);
    } else {
        cp_async_8(smem_address(s_terms + idx), g_terms + idx, src_bytes);
    }
}

// The same for the queries of a listed tile, of which num_queries exist.
template <int COUNT>
__device__ __forceinline__ void load_terms(Element* s_terms, const Element* g_terms, int num_queries,
                                           const TileList<COUNT>& list, const ListedTile& tile) {
    const int idx = threadIdx.x;
    if (idx >= COUNT) return;
    const int query = list.column(tile, idx / GRANULE) + idx % GRANULE;
    const int src_bytes = query < num_queries ? sizeof(Element) : 0;
    if constexpr (sizeof(Element) == 4) {
        cp_async_4(smem_address(s_terms + idx), g_terms + query, src_bytes);
    } else {
        cp_async_8(smem_address(s_terms + idx), g_terms + query, src_bytes);
    }
}

// Writes this lane's part of its rows of a gradient, where g_rows is the first of them and num_rows exist.
template <int WIDTH>
__device__ __forceinline__ void store_gradient(Element* g_rows, long long g_stride, const RowParts<WIDTH>& acc,
                                               Element factor, int col, int num_cols, int num_rows) {
    const bool vectors = ((reinterpret_cast<unsigned long long>(g_rows) | g_stride * sizeof(Element)) & 15) == 0;
#pragma unroll
    for (int i = 0; i < LANE_M; i++) {
        if (i < num_rows) store_row(g_rows + i * g_stride + col, acc[i], factor, col, num_cols, vectors);
    }
}

// LISTED: as TILE_LIST says; the parameters are those of the kernel.
template <bool LISTED>
__device__ __forceinline__ void attention_backward(
    const Element* __restrict__ g_dout, const Element* __restrict__ g_q, const Element* __restrict__ g_k,
    const Element* __restrict__ g_v, const Element* __restrict__ g_lse, const Element* __restrict__ g_delta,
    Element* __restrict__ g_dq, Element* __restrict__ g_dk, Element* __restrict__ g_dv,
    const BiasElement* __restrict__ g_bias, const unsigned char* __restrict__ g_mask,
    const unsigned char* __restrict__ g_tile_class, const Element* __restrict__ g_alibi_slopes,
    const int* __restrict__ g_diagonal_offsets, const int* __restrict__ g_cu_seqlens_q,
    const int* __restrict__ g_cu_seqlens_k, const int* __restrict__ g_work, const int* __restrict__ g_tile_list,
    const Params& params)
{
    extern __shared__ __align__(16) unsigned char s_bytes[];
    Smem& smem = *reinterpret_cast<Smem*>(s_bytes);
    const int lane_row = threadIdx.x / LANES_PER_ROW * LANE_M;  // this lane's first owned row of the block, ...
    const int lane_col = threadIdx.x % LANES_PER_ROW;           // ... its first column, and those of the gradients
    const int qk_col = lane_col * RowPart<HEAD_DIM>::VECTOR, v_col = lane_col * RowPart<HEAD_DIM_V>::VECTOR;

    // Under a causal mask the last queries and the first keys have the most to visit: they get the first CTAs.
    const OwnedBlock block = owned_block<OWN_KEYS, BLOCK_OWN, !OWN_KEYS && BOUND_RIGHT>(
        params, g_work, g_cu_seqlens_q, g_cu_seqlens_k, g_diagonal_offsets);
    const int num_own = OWN_KEYS ? block.seqlen_k : block.seqlen_q;
    const int num_other = OWN_KEYS ? block.seqlen_q : block.seqlen_k;
    if (block.batch_idx < 0 || block.first_row >= num_own) return;
    const int last_row = min(block.first_row + BLOCK_OWN, num_own) - 1;
    const int kv_head_idx = OWN_KEYS ? block.head_idx : block.head_idx / params.heads_per_kv_head;
    const int first_head = OWN_KEYS ? block.head_idx * params.heads_per_kv_head : block.head_idx;
    const int num_heads = OWN_KEYS ? params.heads_per_kv_head : 1;

    // Each array from the first row of this sequence on, at the first head of the walk.
    g_q += block.batch_idx * params.q.batch + block.q_start * params.q.seq + first_head * params.q.head;
    g_dout += block.batch_idx * params.dout.batch + block.q_start * params.dout.seq + first_head * params.dout.head;
    g_k += block.batch_idx * params.k.batch + block.k_start * params.k.seq + kv_head_idx * params.k.head;
    g_v += block.batch_idx * params.v.batch + block.k_start * params.v.seq + kv_head_idx * params.v.head;
    const long long first_term = block.batch_idx * params.lse_batch + first_head * params.lse_head + block.q_start;
    g_lse += first_term;
    g_delta += first_term;

    const auto band = owned_band<OWN_KEYS>(params, block);
    const KeyTiles tiles(band, BLOCK_OTHER, block.first_row, last_row);

    auto tile_class = [&](WalkPosition at) {
        const int own_tile = block.first_row / BLOCK_OWN;
        return tile_class_at(params, g_tile_class, block.batch_idx, first_head + at.head,
                             OWN_KEYS ? at.tile_idx : own_tile, OWN_KEYS ? own_tile : at.tile_idx);
    };
    const auto walk = owned_walk<LISTED, LaneLayout>(block, band, tiles, g_tile_list, first_head, num_heads, last_row,
                                                     num_own, block.first_row + lane_row);
    auto before_first = [&] {
        if constexpr (LISTED) {
            return walk.before_first();
        } else {
            return WalkPosition{0, tiles.begin - 1};
        }
    };
    // To the next tile that is not hidden; head == num_heads when there is none.
    auto advance = [&](auto& at) {
        if constexpr (LISTED) {
            walk.advance(at);
        } else {
            for (at.tile_idx++; at.head < num_heads; at.head++, at.tile_idx = tiles.begin) {
                for (; at.tile_idx < tiles.end; at.tile_idx++) {
                    if (!TILE_CLASSES || tile_class(at) != TILE_HIDDEN) return;
                }
            }
        }
    };
    auto first_column_of = [&](const auto& at) {
        if constexpr (LISTED) {
            return at.entry.first();
        } else {
            return at.tile_idx * BLOCK_OTHER;
        }
    };
    auto load_own = [&] {
        const RowStrides& qk = OWN_KEYS ? params.k : params.q;
        const RowStrides& v = OWN_KEYS ? params.v : params.dout;
        const int num_rows = num_own - block.first_row;
        load_tile<ALIGNED, BLOCK_OWN, HEAD_DIM, NUM_THREADS>(
            smem.own_qk[0], (OWN_KEYS ? g_k : g_q) + block.first_row * qk.seq, qk.seq, num_rows, params.head_dim);
        load_tile<ALIGNED, BLOCK_OWN, HEAD_DIM_V, NUM_THREADS>(
            smem.own_v[0], (OWN_KEYS ? g_v : g_dout) + block.first_row * v.seq, v.seq, num_rows, params.head_dim_v);
        if (!OWN_KEYS) {
            load_terms<BLOCK_OWN>(smem.lse, g_lse + block.first_row, num_rows);
            load_terms<BLOCK_OWN>(smem.delta, g_delta + block.first_row, num_rows);
        }
    };
    // The operand of q k^T, and the terms of queries where these are the other side.
    auto load_qk = [&](auto at) {
        const RowStrides& qk = OWN_KEYS ? params.q : params.k;
        if constexpr (LISTED) {
            load_listed_tile<ALIGNED, BLOCK_OTHER, HEAD_DIM, NUM_THREADS>(
                smem.other_qk[0], (OWN_KEYS ? g_q : g_k) + at.head * qk.head, qk.seq, num_other, params.head_dim,
                walk.list, at.entry);
            if (OWN_KEYS) {
                const long long first_term = at.head * params.lse_head;
                load_terms(smem.lse, g_lse + first_term, num_other, walk.list, at.entry);
                load_terms(smem.delta, g_delta + first_term, num_other, walk.list, at.entry);
            }
        } else {
            const int first_row = at.tile_idx * BLOCK_OTHER;
            const int num_rows = num_other - first_row;
            load_tile<ALIGNED, BLOCK_OTHER, HEAD_DIM, NUM_THREADS>(
                smem.other_qk[0], (OWN_KEYS ? g_q : g_k) + at.head * qk.head + first_row * qk.seq, qk.seq, num_rows,
                params.head_dim);
            if (OWN_KEYS) {
                const long long first_term = at.head * params.lse_head + first_row;
                load_terms<BLOCK_OTHER>(smem.lse, g_lse + first_term, num_rows);
                load_terms<BLOCK_OTHER>(smem.delta, g_delta + first_term, num_rows);
            }
        }
        cp_async_commit();
    };
    auto load_v = [&](auto at) {
        const RowStrides& v = OWN_KEYS ? params.dout : params.v;
        if constexpr (LISTED) {
            load_listed_tile<ALIGNED, BLOCK_OTHER, HEAD_DIM_V, NUM_THREADS>(
                smem.other_v[0], (OWN_KEYS ? g_dout : g_v) + at.head * v.head, v.seq, num_other, params.head_dim_v,
                walk.list, at.entry);
        } else {
            const int first_row = at.tile_idx * BLOCK_OTHER;
            load_tile<ALIGNED, BLOCK_OTHER, HEAD_DIM_V, NUM_THREADS>(
                smem.other_v[0], (OWN_KEYS ? g_dout : g_v) + at.head * v.head + first_row * v.seq, v.seq,
                num_other - first_row, params.head_dim_v);
        }
        cp_async_commit();
    };

    const int warp_row = block.first_row + threadIdx.x / WARP_SIZE * WARP_ROWS;
    const auto warp_bounds = band.rows(warp_row, min(warp_row + WARP_ROWS - 1, last_row));
    const bool has_rows = warp_row <= last_row;
    auto concerns = [&](const auto& at) {
        if constexpr (LISTED) {
            return walk.concerns(warp_bounds, at.entry);
        } else {
            return warp_bounds.meet(at.tile_idx * BLOCK_OTHER, BLOCK_OTHER);
        }
    };
    Element* s_weights = smem.weights[lane_row];
    const int lane_query = OWN_KEYS ? lane_col : lane_row;

    RowParts<HEAD_DIM> acc_qk;   // of dq or dk
    RowParts<HEAD_DIM_V> acc_v;  // of dv
    clear<HEAD_DIM>(acc_qk);
    clear<HEAD_DIM_V>(acc_v);

    auto at = before_first();
    advance(at);
    if (at.head < num_heads) {
        load_own();
        load_v(at);
    }
    while (at.head < num_heads) {
        const int first_column = first_column_of(at);
        // Anything that this warp's rows have to do with?
        const bool active = has_rows && concerns(at);
        Weights scores, dp;

        cp_async_wait<0>();
        // SYNC: other_v of this tile (and the owned rows) have landed for all; every warp is done with other_qk of the
        // tile before.
        __syncthreads();
        load_qk(at);  // on its way during the first product
        if (active) {
            multiply_abt<HEAD_DIM_V>(dp, smem.own_v[lane_row], smem.other_v[lane_col], params.head_dim_v);
        }
        cp_async_wait<0>();
        // SYNC: other_qk has landed for all; where queries are owned, every warp is done with other_v.
        __syncthreads();
        if (active) {
            const Position lane{block.first_row + lane_row, first_column + lane_col};
            const int head_idx = first_head + at.head;
            multiply_abt<HEAD_DIM>(scores, smem.own_qk[lane_row], smem.other_qk[lane_col], params.head_dim);
            const ScoreOptions<Element> options(params, g_bias, g_mask, nullptr, g_alibi_slopes, block.batch_idx,
                                                head_idx, 0);
            const unsigned head = dropout_head(params.dropout, params.num_heads, block.batch_idx, head_idx);
            Weights slopes;
            if constexpr (LISTED) {
                const auto place = walk.place(at, lane);
                walk.logits(scores, slopes, params, options, place, num_other);
                walk.hide(scores, negative_infinity<Element>(), place);
                differentiate(scores, dp, params, smem.lse + lane_query, smem.delta + lane_query, head, place);
            } else {
                const AlibiRows alibi_rows(lane, block.diagonal_offset, options.slope);
                natural_logits<LaneLayout>(scores, slopes, params, params.scale, alibi_rows);
                if (TILE_CLASSES && tile_class(at) == TILE_MIXED) {
                    add_bias_and_mask<LaneLayout>(scores, params, options, lane, num_own, num_other);
                }
                if (!tiles.in_full(at.tile_idx)) {
                    hide_by_position<LaneLayout>(scores, negative_infinity<Element>(), band, lane);
                }
                differentiate(scores, dp, params, smem.lse + lane_query, smem.delta + lane_query, head, lane);
            }
            multiply_by_slopes<LaneLayout>(dp, slopes);
            if (GRAD_V) {
                store_weights(scores, s_weights + lane_col);
                // SYNC: the warp's rows of P are written; no other warp reads them.
                __syncwarp();
                multiply_add<HEAD_DIM_V>(acc_v, s_weights, smem.other_v[0] + v_col);
            }
        }
        advance(at);
        if (GRAD_V) {
            // SYNC: every warp is done with other_v, and the lanes of each with its rows of P.
            __syncthreads();
        }
        if (at.head < num_heads) load_v(at);  // on its way during the last product
        if (active) {
            store_weights(dp, s_weights + lane_col);
            // SYNC: the warp's rows of dS are written; no other warp reads them.
            __syncwarp();
            multiply_add<HEAD_DIM>(acc_qk, s_weights, smem.other_qk[0] + qk_col);
        }
    }

    const int first_row = block.first_row + lane_row;
    const long long array_row = static_cast<long long>(OWN_KEYS ? block.k_start : block.q_start) + first_row;
    const RowStrides& strides = OWN_KEYS ? params.dk : params.dq;
    store_gradient((OWN_KEYS ? g_dk : g_dq) + block.batch_idx * strides.batch + block.head_idx * strides.head +
                       array_row * strides.seq,
                   strides.seq, acc_qk, params.scale, qk_col, params.head_dim, num_own - first_row);
    if (GRAD_V) {
        store_gradient(g_dv + block.batch_idx * params.dv.batch + block.head_idx * params.dv.head +
                           array_row * params.dv.seq,
                       params.dv.seq, acc_v, params.keep_scale, v_col, params.head_dim_v, num_own - first_row);
    }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) cuattn_attention_backward_fma(
    const Element* __restrict__ g_dout,   // [batch, seqlen_q, num_heads, head_dim_v], last axis contiguous
    const Element* __restrict__ g_q,      // [batch, seqlen_q, num_heads, head_dim]
    const Element* __restrict__ g_k,      // [batch, seqlen_k, num_kv_heads, head_dim]
    const Element* __restrict__ g_v,      // [batch, seqlen_k, num_kv_heads, head_dim_v]
    const Element* __restrict__ g_lse,    // [batch, num_heads, seqlen_q], contiguous; ready: attention_backward_rows.cu
    const Element* __restrict__ g_delta,  // likewise
    // From here on, null is what a call does not use.
    Element* __restrict__ g_dq,                      // like q
    Element* __restrict__ g_dk,                      // like k
    Element* __restrict__ g_dv,                      // like v
    const BiasElement* __restrict__ g_bias,          // broadcast to [batch, num_heads, seqlen_q, seqlen_k]
    const unsigned char* __restrict__ g_mask,        // likewise; 0 hides a key
    const unsigned char* __restrict__ g_tile_class,  // of the bias and the mask, broadcast likewise: score_options.cuh
    const Element* __restrict__ g_alibi_slopes,      // [batch or 1, num_heads]
    const int* __restrict__ g_diagonal_offsets,      // [batch]
    const int* __restrict__ g_cu_seqlens_q,          // [batch + 1]: q, dout, dq are packed, [tokens, num_heads, ...],
    const int* __restrict__ g_cu_seqlens_k,          // lse [num_heads, tokens], k and v [tokens, num_kv_heads, ...]
    const int* __restrict__ g_work,                  // [num_work, 2]: query_block.cuh; with these two or g_tile_list
    const Params params,
    const int* __restrict__ g_tile_list)             // attention/tile_list.cuh; with TILE_LIST
{
    attention_backward<TILE_LIST>(g_dout, g_q, g_k, g_v, g_lse, g_delta, g_dq, g_dk, g_dv, g_bias, g_mask,
                                  g_tile_class, g_alibi_slopes, g_diagonal_offsets, g_cu_seqlens_q, g_cu_seqlens_k,
                                  g_work, g_tile_list, params);
}
