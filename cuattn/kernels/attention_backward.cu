// Attention backward on the portable tensor-core path (mma.sync, cp.async; sm_80 and newer): 16-bit elements, and
// float32 with its products in tf32.
//
//     P = exp(logits - lse)                       the probabilities again, from the saved lse
//     dV = (P Z)^T dout                           Z: 0 or 1 / (1 - dropout_p)
//     dS = P (Z (dout V^T) - delta)               delta: attention_backward_rows.cu
//     dQ = scale dS K,    dK = scale dS^T Q       dS times 1 - tanh^2 before, if the logits were capped
//
// A CTA owns BLOCK_OWN rows of one side and walks over the other side in tiles of BLOCK_OTHER rows. It owns queries
// and walks over their keys: that gives dq. Or (OWN_KEYS) it owns keys of a key/value head and walks over the queries
// of every query head that reads it: that gives dk and dv. Either way a row's gradient is summed by one warp, in
// registers, in a fixed order: no atomics, and the same bits every time. The price is that scores and dP are computed
// twice. With ADD_DQ they are not: the CTA that owns keys adds their part of dq to sums in memory, in whatever order
// CTAs come (docs/kernels/attention_backward.md has the costs of both). Dao et al., "FlashAttention", 2022; Dao,
// "FlashAttention-2", 2023.
//
// Owned rows are rows of the accumulators: P and dS never leave the registers, because an accumulator is laid out like
// the left operand of the next product. Where keys are owned a tile is therefore the transposed one, S^T = K Q^T.
//
// Grid: one CTA for each block of queries of each head, or of keys of each key/value head (query_block.cuh).
// Block: NUM_WARPS warps; warp w owns rows [w * WARP_ROWS, (w + 1) * WARP_ROWS) of the block.
//
// Constants: OWN_KEYS; GRAD_QK (computes dq or dk), GRAD_V (computes dv; with OWN_KEYS only), ADD_DQ (with OWN_KEYS and
// GRAD_QK, 16-bit elements only: dq_sums.cuh); Element, BiasElement; GradientQK (of dq and dk) and GradientV: Element,
// or float; BLOCK_OWN, BLOCK_OTHER, HEAD_DIM and HEAD_DIM_V (buckets: the head dims proper are arguments and may be
// smaller), NUM_WARPS, NUM_STAGES, SMEM_BYTES; ALIGNED (bases and strides of q, k, v, dout: multiples of 16 bytes); the
// options that are compiled in: BOUND_LEFT and BOUND_RIGHT (mask.cuh), SOFTCAP, ALIBI, BIAS, MASK (logits.cuh), DROPOUT
// (philox.cuh). TILE_LIST: the tiles of the walk are those of a list, and what they do not show is hidden
// (attention/tile_list.cuh).
#include "backward/attention_backward_params.cuh"
#include "common/mma.cuh"

constexpr int NUM_THREADS = NUM_WARPS * 32;
constexpr int WARP_ROWS = BLOCK_OWN / NUM_WARPS;
constexpr int ROW_TILES = WARP_ROWS / MMA_M;

#include "backward/backward_tile.cuh"
#include "backward/dq_sums.cuh"
#include "backward/gradient_rows.cuh"
#include "backward/listed_walk.cuh"

constexpr int QK_STRIDE = TILE_STRIDE<HEAD_DIM>;
constexpr int V_STRIDE = TILE_STRIDE<HEAD_DIM_V>;

// Shared memory of a CTA. `qk` is the operand of q k^T, `v` that of dout v^T: q and dout of queries, k and v of keys.
// The owned operands give their place to the gradients once the last tile is done.
struct Smem : SharedScoreGradients<ADD_DQ> {
    Element own_qk[BLOCK_OWN][QK_STRIDE];
    Element own_v[BLOCK_OWN][V_STRIDE];
    Element other_qk[NUM_STAGES][BLOCK_OTHER][QK_STRIDE];
    Element other_v[NUM_STAGES][BLOCK_OTHER][V_STRIDE];
    float lse[NUM_STAGES][BLOCK_OTHER];  // this and delta: where the other side are queries
    float delta[NUM_STAGES][BLOCK_OTHER];
};

static_assert(ROW_TILES * MMA_M * NUM_WARPS == BLOCK_OWN, "every row belongs to one warp, in whole mma tiles");
static_assert(NUM_STAGES >= 2, "the next tile loads while this one is used");
static_assert(sizeof(Smem) == SMEM_BYTES, "backward/config.py and this file agree on the shared-memory plan");
static_assert(GRAD_QK || (GRAD_V && OWN_KEYS), "there is a gradient to compute");
static_assert(!ADD_DQ || (GRAD_QK && OWN_KEYS), "dq is added to where dS is computed and keys are owned");
static_assert(!(ADD_DQ && TILE_LIST), "sums of dq are of 16 queries side by side; gathered ones are not");
static_assert(NUM_THREADS >= BLOCK_OTHER, "a thread loads the terms of one query");

using Params = AttentionBackwardParams<float>;

// A tile of the walk: of one of the query heads that read the key/value head, in order. Where queries are owned there
// is one head.
struct WalkPosition {
    int head, tile_idx;
};

// LISTED: as TILE_LIST says; the parameters are those of the kernel.
template <bool LISTED>
__device__ __forceinline__ void attention_backward(
    const Element* __restrict__ g_dout, const Element* __restrict__ g_q, const Element* __restrict__ g_k,
    const Element* __restrict__ g_v, const float* __restrict__ g_lse, const float* __restrict__ g_delta,
    GradientOfQ* __restrict__ g_dq, GradientQK* __restrict__ g_dk, GradientV* __restrict__ g_dv,
    const BiasElement* __restrict__ g_bias, const unsigned char* __restrict__ g_mask,
    const unsigned char* __restrict__ g_tile_class, const float* __restrict__ g_alibi_slopes,
    const int* __restrict__ g_diagonal_offsets, const int* __restrict__ g_cu_seqlens_q,
    const int* __restrict__ g_cu_seqlens_k, const int* __restrict__ g_work, const int* __restrict__ g_tile_list,
    const Params& params)
{
    extern __shared__ __align__(16) unsigned char s_bytes[];
    Smem& smem = *reinterpret_cast<Smem*>(s_bytes);
    const int warp_idx = threadIdx.x / WARP_SIZE;
    const int lane_idx = threadIdx.x % WARP_SIZE;

    // Under a causal mask the last queries and the first keys have the most to visit: they get the first CTAs.
    const OwnedBlock block = owned_block<OWN_KEYS, BLOCK_OWN, !OWN_KEYS && BOUND_RIGHT>(
        params, g_work, g_cu_seqlens_q, g_cu_seqlens_k, g_diagonal_offsets);
    const int num_own = OWN_KEYS ? block.seqlen_k : block.seqlen_q;
    const int num_other = OWN_KEYS ? block.seqlen_q : block.seqlen_k;
    if (block.batch_idx < 0 || block.first_row >= num_own) return;
    const int last_row = min(block.first_row + BLOCK_OWN, num_own) - 1;
    const bool own_whole = !OWN_KEYS || block.first_row + BLOCK_OWN <= num_own;  // every owned key exists
    const int kv_head_idx = OWN_KEYS ? block.head_idx : block.head_idx / params.heads_per_kv_head;
    const int first_head = OWN_KEYS ? block.head_idx * params.heads_per_kv_head : block.head_idx;
    const int num_heads = OWN_KEYS ? params.heads_per_kv_head : 1;

    // Each array from the first row of this sequence on, at the first head of the walk.
    g_q += block.batch_idx * params.q.batch + block.q_start * params.q.seq + first_head * params.q.head;
    g_dout += block.batch_idx * params.dout.batch + block.q_start * params.dout.seq + first_head * params.dout.head;
    g_k += block.batch_idx * params.k.batch + block.k_start * params.k.seq + kv_head_idx * params.k.head;
    g_v += block.batch_idx * params.v.batch + block.k_start * params.v.seq + kv_head_idx * params.v.head;
    const long long first_term =
        block.batch_idx * params.lse_batch + first_head * params.lse_head + static_cast<long long>(block.q_start);
    g_lse += first_term;
    g_delta += first_term;

    const auto band = owned_band<OWN_KEYS>(params, block);
    const KeyTiles tiles(band, BLOCK_OTHER, block.first_row, last_row);

    auto tile_class = [&](WalkPosition at) {
        const int own_tile = block.first_row / BLOCK_OWN;
        return tile_class_at(params, g_tile_class, block.batch_idx, first_head + at.head,
                             OWN_KEYS ? at.tile_idx : own_tile, OWN_KEYS ? own_tile : at.tile_idx);
    };
    const int warp_row = block.first_row + warp_idx * WARP_ROWS;
    const auto walk = owned_walk<LISTED, Layout>(block, band, tiles, g_tile_list, first_head, num_heads, last_row,
                                                 num_own, warp_row + frag_acc_row(lane_idx));
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
    auto before_first = [&] {
        if constexpr (LISTED) {
            return walk.before_first();
        } else {
            return WalkPosition{0, tiles.begin - 1};
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
        if (!GRAD_QK) return;  // P alone needs no dP
        load_tile<ALIGNED, BLOCK_OWN, HEAD_DIM_V, NUM_THREADS>(
            smem.own_v[0], (OWN_KEYS ? g_v : g_dout) + block.first_row * v.seq, v.seq, num_rows, params.head_dim_v);
    };
    auto load_other = [&](auto at, int stage) {
        const RowStrides& qk = OWN_KEYS ? params.q : params.k;
        const RowStrides& v = OWN_KEYS ? params.dout : params.v;
        if constexpr (LISTED) {
            load_listed_tile<ALIGNED, BLOCK_OTHER, HEAD_DIM, NUM_THREADS>(
                smem.other_qk[stage][0], (OWN_KEYS ? g_q : g_k) + at.head * qk.head, qk.seq, num_other, params.head_dim,
                walk.list, at.entry);
            load_listed_tile<ALIGNED, BLOCK_OTHER, HEAD_DIM_V, NUM_THREADS>(
                smem.other_v[stage][0], (OWN_KEYS ? g_dout : g_v) + at.head * v.head, v.seq, num_other,
                params.head_dim_v, walk.list, at.entry);
            if (OWN_KEYS && threadIdx.x < BLOCK_OTHER) {
                const int row = walk.list.column(at.entry, threadIdx.x / GRANULE) + threadIdx.x % GRANULE;
                const long long term = at.head * params.lse_head + row;
                const int src_bytes = row < num_other ? sizeof(float) : 0;
                cp_async_4(smem_address(&smem.lse[stage][threadIdx.x]), g_lse + term, src_bytes);
                cp_async_4(smem_address(&smem.delta[stage][threadIdx.x]), g_delta + term, src_bytes);
            }
            return;
        } else {
            const int first_row = at.tile_idx * BLOCK_OTHER;
            const int num_rows = num_other - first_row;
            load_tile<ALIGNED, BLOCK_OTHER, HEAD_DIM, NUM_THREADS>(
                smem.other_qk[stage][0], (OWN_KEYS ? g_q : g_k) + at.head * qk.head + first_row * qk.seq, qk.seq,
                num_rows, params.head_dim);
            load_tile<ALIGNED, BLOCK_OTHER, HEAD_DIM_V, NUM_THREADS>(
                smem.other_v[stage][0], (OWN_KEYS ? g_dout : g_v) + at.head * v.head + first_row * v.seq, v.seq,
                num_rows, params.head_dim_v);
            const int row = threadIdx.x;
            if (OWN_KEYS && row < BLOCK_OTHER) {
                const long long term = at.head * params.lse_head + first_row + row;
                const int src_bytes = row < num_rows ? sizeof(float) : 0;
                cp_async_4(smem_address(&smem.lse[stage][row]), g_lse + term, src_bytes);
                cp_async_4(smem_address(&smem.delta[stage][row]), g_delta + term, src_bytes);
            }
        }
    };

    const auto warp_bounds = band.rows(warp_row, min(warp_row + WARP_ROWS - 1, last_row));
    const bool has_rows = warp_row <= last_row;
    auto concerns = [&](const auto& at) {
        if constexpr (LISTED) {
            return walk.concerns(warp_bounds, at.entry);
        } else {
            return warp_bounds.meet(at.tile_idx * BLOCK_OTHER, BLOCK_OTHER);
        }
    };
    const unsigned s_own_qk = smem_address(smem.own_qk) + lane_offset_a<HEAD_DIM>(warp_idx * WARP_ROWS, lane_idx);
    const unsigned s_own_v = smem_address(smem.own_v) + lane_offset_a<HEAD_DIM_V>(warp_idx * WARP_ROWS, lane_idx);

    QueryTerms lse, delta;
    if (!OWN_KEYS) {
#pragma unroll
        for (int i = 0; i < 2 * ROW_TILES; i++) {
            const int row = warp_row + i * 8 + frag_acc_row(lane_idx);
            // +inf: a row that does not exist has probabilities 0.
            lse.rows[i / 2][i % 2] = row <= last_row ? g_lse[row] : -negative_infinity<float>();
            delta.rows[i / 2][i % 2] = row <= last_row ? g_delta[row] : 0.0f;
        }
    }
    AccTiles<ROW_TILES, HEAD_DIM> acc_qk;   // of dq or dk, if GRAD_QK
    AccTiles<ROW_TILES, HEAD_DIM_V> acc_v;  // of dv, if GRAD_V
    clear(acc_qk);
    clear(acc_v);

    // `loading` runs NUM_STAGES - 1 tiles ahead of `at`.
    auto at = before_first();
    advance(at);
    auto loading = at;
    if (at.head < num_heads) load_own();
#pragma unroll
    for (int stage = 0; stage < NUM_STAGES - 1; stage++) {
        if (loading.head < num_heads) {
            load_other(loading, stage);
            advance(loading);
        }
        cp_async_commit();
    }

    for (int stage = 0; at.head < num_heads; stage = (stage + 1) % NUM_STAGES) {
        cp_async_wait<NUM_STAGES - 2>();
        // SYNC: every thread's part of this tile (and of the owned rows) has landed; and every warp is done with the
        // tile before, whose stage the next load overwrites.
        __syncthreads();
        if (loading.head < num_heads) {
            load_other(loading, (stage + NUM_STAGES - 1) % NUM_STAGES);
            advance(loading);
        }
        cp_async_commit();  // an empty group at the end keeps the count that cp_async_wait relies on
        const auto tile = at;
        const int first_column = first_column_of(tile);
        const int head_idx = first_head + tile.head;
        bool in_full = false, mixed = false;
        if constexpr (!LISTED) {
            in_full = own_whole && tiles.in_full(tile.tile_idx);
            mixed = TILE_CLASSES && tile_class(tile) == TILE_MIXED;
        }
        advance(at);
        // Anything that this warp's rows have to do with?
        const bool active = has_rows && concerns(tile);
        if (ADD_DQ && !active) smem.clear(warp_idx, lane_idx);
        if (active) {
            const Position lane{warp_row + frag_acc_row(lane_idx), first_column + frag_acc_col(lane_idx)};
            lse.s_columns = smem.lse[stage] + frag_acc_col(lane_idx);
            delta.s_columns = smem.delta[stage] + frag_acc_col(lane_idx);
            const unsigned s_other_qk = smem_address(smem.other_qk[stage]);
            const unsigned s_other_v = smem_address(smem.other_v[stage]);

            Tile probabilities, slopes;
            multiply_abt<HEAD_DIM>(probabilities, s_own_qk, s_other_qk + lane_offset_bt<HEAD_DIM>(lane_idx));
            if (NATURAL_LOGITS || TILE_CLASSES) {
                const ScoreOptions<float> options(params, g_bias, g_mask, nullptr, g_alibi_slopes, block.batch_idx,
                                                  head_idx, 0);
                if constexpr (LISTED) {
                    walk.logits(probabilities, slopes, params, options, walk.place(tile, lane), num_other);
                } else if (NATURAL_LOGITS) {
                    const AlibiRows alibi_rows(lane, block.diagonal_offset, options.slope);
                    natural_logits<Layout>(probabilities, slopes, params, params.scale, alibi_rows);
                }
                if (mixed) add_bias_and_mask<Layout>(probabilities, params, options, lane, num_own, num_other);
            }
            const bool large = lse.any_large(smem.lse[stage], lane_idx);
            probabilities_from_logits(probabilities, lse, large, params.scale, params.scale_log2);
            // Keys that do not exist are rows of zeros, whose probabilities e^(0 - lse) have no bound. (A query that
            // does not exist has lse +inf.)
            if constexpr (LISTED) {
                walk.hide(probabilities, 0.0f, walk.place(tile, lane));
            } else if (!in_full) {
                hide_by_position<Layout>(probabilities, 0.0f, band, lane, num_own);
            }
            if (DROPOUT && params.use_dropout) {
                const unsigned head = dropout_head(params.dropout, params.num_heads, block.batch_idx, head_idx);
                if constexpr (LISTED) {
                    mark_dropped(probabilities, params.dropout, head, walk.place(tile, lane));
                } else {
                    mark_dropped(probabilities, params.dropout, head, lane);
                }
            }
            if (GRAD_V) {
                Tile kept;
                kept_probabilities(kept, probabilities);
                multiply_add(Element(), acc_v, kept, s_other_v + lane_offset_b<HEAD_DIM_V>(lane_idx));
            }
            if (GRAD_QK) {
                // dS is P times what follows, and so is its way through the softcap: P takes the slopes now, which then
                // need no registers.
                multiply_by_slopes<Layout>(probabilities, slopes);
                Tile ds;
                multiply_abt<HEAD_DIM_V>(ds, s_own_v, s_other_v + lane_offset_bt<HEAD_DIM_V>(lane_idx));
                score_gradients(ds, probabilities, delta, params.keep_scale);
                if (ADD_DQ) smem.store(ds, warp_idx, lane_idx);
                multiply_add(Element(), acc_qk, ds, s_other_qk + lane_offset_b<HEAD_DIM>(lane_idx));
            }
        }
        if (ADD_DQ) {
            // SYNC: dS of all owned keys is in shared memory. The barrier of the next tile keeps it there until it is
            // read.
            __syncthreads();
            long long row_tile = first_column / MMA_M;
            if (g_cu_seqlens_q != nullptr) row_tile += packed_row_tile(block.q_start, block.batch_idx);
            float* g_sums = reinterpret_cast<float*>(g_dq) + block.batch_idx * params.dq.batch +
                            head_idx * params.dq.head + row_tile * params.dq.seq;
            add_to_dq(g_sums, params.dq.seq, smem.score_gradients(), smem_address(smem.own_qk),
                      num_other - first_column, params.head_dim, warp_idx, lane_idx);
        }
    }

    if (ADD_DQ) {
        // SYNC: every warp is done with the keys of all the others, whose place their gradients take.
        __syncthreads();
    }
    const long long own_row = OWN_KEYS ? block.k_start + static_cast<long long>(warp_row)
                                       : block.q_start + static_cast<long long>(warp_row);
    if (GRAD_QK) {
        const RowStrides& strides = OWN_KEYS ? params.dk : params.dq;
        GradientQK* g_rows = (OWN_KEYS ? g_dk : reinterpret_cast<GradientQK*>(g_dq)) +
                             block.batch_idx * strides.batch + block.head_idx * strides.head + own_row * strides.seq;
        store_gradient<HEAD_DIM>(g_rows, strides.seq, smem.own_qk[warp_idx * WARP_ROWS], acc_qk, params.scale,
                                 num_own - warp_row, params.head_dim, lane_idx);
    }
    if (GRAD_V) {
        GradientV* g_rows = g_dv + block.batch_idx * params.dv.batch + block.head_idx * params.dv.head +
                            own_row * params.dv.seq;
        store_gradient<HEAD_DIM_V>(g_rows, params.dv.seq, smem.own_v[warp_idx * WARP_ROWS], acc_v,
                                   params.keep_scale * INVERSE_P_FACTOR, num_own - warp_row, params.head_dim_v,
                                   lane_idx);
    }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) cuattn_attention_backward(
    const Element* __restrict__ g_dout,  // [batch, seqlen_q, num_heads, head_dim_v], last axis contiguous
    const Element* __restrict__ g_q,     // [batch, seqlen_q, num_heads, head_dim]
    const Element* __restrict__ g_k,     // [batch, seqlen_k, num_kv_heads, head_dim]
    const Element* __restrict__ g_v,     // [batch, seqlen_k, num_kv_heads, head_dim_v]
    const float* __restrict__ g_lse,     // [batch, num_heads, seqlen_q], contiguous; ready: attention_backward_rows.cu
    const float* __restrict__ g_delta,   // likewise
    // From here on, null is what a call does not use.
    GradientOfQ* __restrict__ g_dq,                  // like q; with ADD_DQ sums: dq_sums.cuh
    GradientQK* __restrict__ g_dk,                   // like k
    GradientV* __restrict__ g_dv,                    // like v
    const BiasElement* __restrict__ g_bias,          // broadcast to [batch, num_heads, seqlen_q, seqlen_k]
    const unsigned char* __restrict__ g_mask,        // likewise; 0 hides a key
    const unsigned char* __restrict__ g_tile_class,  // of the bias and the mask, broadcast likewise: score_options.cuh
    const float* __restrict__ g_alibi_slopes,        // [batch or 1, num_heads]
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
