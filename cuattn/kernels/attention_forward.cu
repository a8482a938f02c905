// Attention forward for 16-bit elements on the portable tensor-core path (mma.sync, cp.async; sm_80 and newer).
//
//     out = softmax(scale * q k^T + mask) v,    lse = log(sum(exp(scale * q k^T + mask)))
//
// One CTA computes BLOCK_M queries of one head: it walks over the keys in tiles of BLOCK_N and keeps, for each query,
// the running maximum and sum of an online softmax and the output accumulated so far. Neither the logits nor the
// probabilities ever leave the chip (Dao et al., "FlashAttention", 2022; Dao, "FlashAttention-2", 2023; Milakov and
// Gimelshein, "Online normalizer calculation for softmax", 2018).
//
// Grid: x = (batch_idx * num_heads + head_idx) * num_q_blocks + block (query_block.cuh).
// Block: NUM_WARPS warps; warp w owns query rows [w * WARP_M, (w + 1) * WARP_M) of the tile, from q to out.
//
// Constants: Element, BLOCK_M, BLOCK_N, HEAD_DIM and HEAD_DIM_V (buckets: the head dims proper are arguments and may be
// smaller), NUM_WARPS, NUM_STAGES, SMEM_BYTES, CAUSAL, ALIGNED (bases and strides of q, k, v: multiples of 16 bytes).
#include "mask.cuh"
#include "mma.cuh"
#include "online_softmax.cuh"
#include "query_block.cuh"
#include "tiles.cuh"

constexpr int NUM_THREADS = NUM_WARPS * WARP_SIZE;
constexpr int WARP_M = BLOCK_M / NUM_WARPS;
constexpr int ROW_TILES = WARP_M / MMA_M;  // a fragment of k or v, once loaded, serves so many mma
constexpr int QK_STRIDE = HEAD_DIM + ROW_PADDING<Element>;
constexpr int V_STRIDE = HEAD_DIM_V + ROW_PADDING<Element>;

// Shared memory of a CTA. The output tile takes the place of everything else once the last tile is done.
union Smem {
    struct {
        Element q[BLOCK_M][QK_STRIDE];
        Element k[NUM_STAGES][BLOCK_N][QK_STRIDE];
        Element v[NUM_STAGES][BLOCK_N][V_STRIDE];
    };
    Element out[BLOCK_M][V_STRIDE];
};

static_assert(WARP_M % MMA_M == 0 && WARP_M * NUM_WARPS == BLOCK_M, "every warp owns whole mma row tiles");
static_assert(BLOCK_N % MMA_K == 0, "a key tile is whole k steps of the second product");
static_assert(HEAD_DIM % 32 == 0 && HEAD_DIM_V % 32 == 0, "head dims come in buckets");
static_assert(NUM_STAGES >= 2, "the next tile loads while this one is used");
static_assert(sizeof(Element) == 2, "fragments hold 16-bit elements");
static_assert(sizeof(Smem) == SMEM_BYTES, "config.py and this file agree on the shared-memory plan");

// What a warp carries from tile to tile. Accumulator rows: see frag_acc_row; rows[t][1] is eight rows below rows[t][0].
struct WarpState {
    float acc_out[ROW_TILES][HEAD_DIM_V / MMA_N][4];
    OnlineSoftmaxRow<float> rows[ROW_TILES][2];
};

using Scores = float[ROW_TILES][BLOCK_N / MMA_N][4];

// Where this lane's fragment addresses start: the tile's base plus these many bytes.
struct LaneOffsets {
    unsigned q, k, v;
    __device__ __forceinline__ LaneOffsets(int warp_idx, int lane_idx) {
        q = ((warp_idx * WARP_M + frag_a_row(lane_idx)) * QK_STRIDE + frag_a_k(lane_idx)) * sizeof(Element);
        k = (frag_b_n(lane_idx) * QK_STRIDE + frag_b_k(lane_idx)) * sizeof(Element);
        v = (frag_b_trans_k(lane_idx) * V_STRIDE + frag_b_trans_n(lane_idx)) * sizeof(Element);
    }
};

// scores = q k^T for this warp's rows and one key tile. s_q, s_k: fragment addresses of this lane.
__device__ __forceinline__ void compute_scores(Scores& scores, unsigned s_q, unsigned s_k) {
#pragma unroll
    for (int t = 0; t < ROW_TILES; t++) {
#pragma unroll
        for (int n = 0; n < BLOCK_N / MMA_N; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) scores[t][n][i] = 0.0f;
        }
    }
#pragma unroll
    for (int d = 0; d < HEAD_DIM; d += MMA_K) {
        unsigned frag_q[ROW_TILES][4];
#pragma unroll
        for (int t = 0; t < ROW_TILES; t++) ldmatrix_x4(frag_q[t], s_q + (t * MMA_M * QK_STRIDE + d) * sizeof(Element));
#pragma unroll
        for (int n = 0; n < BLOCK_N; n += 2 * MMA_N) {
            unsigned frag_k[4];
            ldmatrix_x4(frag_k, s_k + (n * QK_STRIDE + d) * sizeof(Element));
#pragma unroll
            for (int t = 0; t < ROW_TILES; t++) {
                mma_m16n8k16(Element(), scores[t][n / MMA_N], frag_q[t], frag_k[0], frag_k[1]);
                mma_m16n8k16(Element(), scores[t][n / MMA_N + 1], frag_q[t], frag_k[2], frag_k[3]);
            }
        }
    }
}

// The softmax below takes the maximum before it scales, and masks with -inf, so its factor must be positive: a negative
// one leaves its sign, and 0 leaves the whole factor, in the scores.
__device__ __forceinline__ void apply_sign(Scores& scores, float scale) {
    const float sign = scale < 0.0f ? -1.0f : 0.0f;
#pragma unroll
    for (int t = 0; t < ROW_TILES; t++) {
#pragma unroll
        for (int n = 0; n < BLOCK_N / MMA_N; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) scores[t][n][i] *= sign;
        }
    }
}

// -inf where a key is not visible. `first_key`, `first_query`: position of the tile and of this lane's first row in it.
__device__ __forceinline__ void mask_scores(Scores& scores, int first_key, int first_query, int seqlen_k,
                                            int diagonal_offset, int lane_idx) {
#pragma unroll
    for (int t = 0; t < ROW_TILES; t++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int query_idx = first_query + t * MMA_M + half * 8;
            // Counted from this lane's first column, so that the comparisons below are with constants.
            const int num_visible =
                key_end<CAUSAL>(query_idx, seqlen_k, diagonal_offset) - first_key - frag_acc_col(lane_idx);
#pragma unroll
            for (int n = 0; n < BLOCK_N / MMA_N; n++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    if (n * MMA_N + i >= num_visible) scores[t][n][2 * half + i] = negative_infinity<float>();
                }
            }
        }
    }
}

// scores become probabilities relative to the running maximum; the accumulated output follows when the maximum rises.
__device__ __forceinline__ void softmax_step(WarpState& state, Scores& scores, float scale_log2) {
#pragma unroll
    for (int t = 0; t < ROW_TILES; t++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            OnlineSoftmaxRow<float>& row = state.rows[t][half];
            float tile_max = negative_infinity<float>();
#pragma unroll
            for (int n = 0; n < BLOCK_N / MMA_N; n++) {
                tile_max = fmaxf(tile_max, fmaxf(scores[t][n][2 * half], scores[t][n][2 * half + 1]));
            }
            const float correction = exp2_approx(row.raise_max(quad_max(tile_max) * scale_log2));
            const float reference_log2 = row.reference_log2();
            row.sum *= correction;  // of this lane's columns only: summed over the quad after the last tile
#pragma unroll
            for (int n = 0; n < BLOCK_N / MMA_N; n++) {
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; i++) {
                    scores[t][n][i] = exp2_approx(fmaf(scores[t][n][i], scale_log2, -reference_log2));
                    row.sum += scores[t][n][i];
                }
            }
#pragma unroll
            for (int e = 0; e < HEAD_DIM_V / MMA_N; e++) {
                state.acc_out[t][e][2 * half] *= correction;
                state.acc_out[t][e][2 * half + 1] *= correction;
            }
        }
    }
}

// acc_out += probabilities v. s_v: fragment address of this lane.
__device__ __forceinline__ void accumulate_output(WarpState& state, const Scores& probabilities, unsigned s_v) {
#pragma unroll
    for (int n = 0; n < BLOCK_N; n += MMA_K) {
        unsigned frag_p[ROW_TILES][4];
#pragma unroll
        for (int t = 0; t < ROW_TILES; t++) {
            frag_a_from_acc<Element>(frag_p[t], probabilities[t][n / MMA_N], probabilities[t][n / MMA_N + 1]);
        }
#pragma unroll
        for (int e = 0; e < HEAD_DIM_V; e += 2 * MMA_N) {
            unsigned frag_v[4];
            ldmatrix_x4_trans(frag_v, s_v + (n * V_STRIDE + e) * sizeof(Element));
#pragma unroll
            for (int t = 0; t < ROW_TILES; t++) {
                mma_m16n8k16(Element(), state.acc_out[t][e / MMA_N], frag_p[t], frag_v[0], frag_v[1]);
                mma_m16n8k16(Element(), state.acc_out[t][e / MMA_N + 1], frag_p[t], frag_v[2], frag_v[3]);
            }
        }
    }
}

// Divides by the row sums, rounds, and writes this warp's rows to its part of the shared output tile.
__device__ __forceinline__ void stage_output(WarpState& state, Element (*s_out)[V_STRIDE], int lane_idx) {
#pragma unroll
    for (int t = 0; t < ROW_TILES; t++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            state.rows[t][half].sum = quad_sum(state.rows[t][half].sum);
            const float inverse_sum = state.rows[t][half].inverse_sum();
            Element* s_row = s_out[t * MMA_M + half * 8 + frag_acc_row(lane_idx)] + frag_acc_col(lane_idx);
#pragma unroll
            for (int e = 0; e < HEAD_DIM_V / MMA_N; e++) {
                *reinterpret_cast<unsigned*>(s_row + e * MMA_N) =
                    pack_pair(Element(), state.acc_out[t][e][2 * half] * inverse_sum,
                              state.acc_out[t][e][2 * half + 1] * inverse_sum);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) cuattn_attention_forward(
    const Element* __restrict__ g_q,    // [batch, seqlen_q, num_heads, head_dim], last axis contiguous
    const Element* __restrict__ g_k,    // [batch, seqlen_k, num_kv_heads, head_dim]
    const Element* __restrict__ g_v,    // [batch, seqlen_k, num_kv_heads, head_dim_v]
    Element* __restrict__ g_out,        // [batch, seqlen_q, num_heads, head_dim_v]
    float* __restrict__ g_lse,          // [batch, num_heads, seqlen_q], contiguous; null: not wanted
    long long q_batch_stride, long long q_seq_stride, long long q_head_stride,        // strides are in elements
    long long k_batch_stride, long long k_seq_stride, long long k_head_stride,
    long long v_batch_stride, long long v_seq_stride, long long v_head_stride,
    long long out_batch_stride, long long out_seq_stride, long long out_head_stride,
    int num_heads, int heads_per_kv_head, int seqlen_q, int seqlen_k, int head_dim, int head_dim_v,
    int diagonal_offset,  // query i is aligned with key i + diagonal_offset; only with CAUSAL
    float scale_log2)     // scale * log2(e)
{
    extern __shared__ __align__(16) unsigned char s_bytes[];
    Smem& smem = *reinterpret_cast<Smem*>(s_bytes);
    const int warp_idx = threadIdx.x / WARP_SIZE;
    const int lane_idx = threadIdx.x % WARP_SIZE;

    const QueryBlock block = query_block<BLOCK_M, CAUSAL>(seqlen_q, num_heads, heads_per_kv_head);
    const int first_query = block.first_query;
    const int num_queries = min(BLOCK_M, seqlen_q - first_query);

    g_q += block.batch_idx * q_batch_stride + block.head_idx * q_head_stride + first_query * q_seq_stride;
    g_k += block.batch_idx * k_batch_stride + block.kv_head_idx * k_head_stride;
    g_v += block.batch_idx * v_batch_stride + block.kv_head_idx * v_head_stride;
    const KeyTiles tiles =
        key_tiles<CAUSAL, BLOCK_N>(first_query, first_query + num_queries - 1, seqlen_k, diagonal_offset);

    const float positive_scale_log2 = scale_log2 == 0.0f ? LOG2_E : fabsf(scale_log2);

    WarpState state;
#pragma unroll
    for (int t = 0; t < ROW_TILES; t++) {
        state.rows[t][0].reset();
        state.rows[t][1].reset();
#pragma unroll
        for (int e = 0; e < HEAD_DIM_V / MMA_N; e++) {
#pragma unroll
            for (int i = 0; i < 4; i++) state.acc_out[t][e][i] = 0.0f;
        }
    }

    // Tiles are taken from the last to the first, so that the masked ones come first. Tile t lies in stage
    // t % NUM_STAGES.
    auto load_keys = [&](int tile_idx) {
        const int first_key = tile_idx * BLOCK_N;
        const int num_keys = seqlen_k - first_key;
        const int stage = tile_idx % NUM_STAGES;
        load_tile<ALIGNED, BLOCK_N, HEAD_DIM, NUM_THREADS>(smem.k[stage][0], g_k + first_key * k_seq_stride,
                                                           k_seq_stride, num_keys, head_dim);
        load_tile<ALIGNED, BLOCK_N, HEAD_DIM_V, NUM_THREADS>(smem.v[stage][0], g_v + first_key * v_seq_stride,
                                                             v_seq_stride, num_keys, head_dim_v);
    };
    const LaneOffsets offsets(warp_idx, lane_idx);
    const unsigned s_q = smem_address(smem.q) + offsets.q;
    const int warp_query = first_query + warp_idx * WARP_M;
    const int lane_query = warp_query + frag_acc_row(lane_idx);
    const int warp_key_end =
        warp_query < seqlen_q ? key_end<CAUSAL>(min(warp_query + WARP_M, seqlen_q) - 1, seqlen_k, diagonal_offset) : 0;

    if (tiles.num_tiles > 0) {
        load_tile<ALIGNED, BLOCK_M, HEAD_DIM, NUM_THREADS>(smem.q[0], g_q, q_seq_stride, num_queries, head_dim);
    }
#pragma unroll
    for (int i = 0; i < NUM_STAGES - 1; i++) {
        if (tiles.num_tiles > i) load_keys(tiles.num_tiles - 1 - i);
        cp_async_commit();
    }

    for (int tile_idx = tiles.num_tiles - 1; tile_idx >= 0; tile_idx--) {
        cp_async_wait<NUM_STAGES - 2>();
        // SYNC: every thread's part of this tile (and of q) has landed; and every warp is done with the tile before,
        // whose stage the next load overwrites.
        __syncthreads();
        if (tile_idx >= NUM_STAGES - 1) load_keys(tile_idx - (NUM_STAGES - 1));
        cp_async_commit();  // an empty group at the end keeps the count that cp_async_wait relies on
        if (tile_idx * BLOCK_N >= warp_key_end) continue;  // nothing that this warp's queries may see
        const int stage = tile_idx % NUM_STAGES;
        Scores scores;
        compute_scores(scores, s_q, smem_address(smem.k[stage]) + offsets.k);
        if (scale_log2 <= 0.0f) apply_sign(scores, scale_log2);
        if (tile_idx >= tiles.num_full_tiles) {
            mask_scores(scores, tile_idx * BLOCK_N, lane_query, seqlen_k, diagonal_offset, lane_idx);
        }
        softmax_step(state, scores, positive_scale_log2);
        accumulate_output(state, scores, smem_address(smem.v[stage]) + offsets.v);
    }

    // SYNC: every warp is done with q, k and v, whose place the output tile takes.
    __syncthreads();
    Element(*s_out)[V_STRIDE] = smem.out + warp_idx * WARP_M;
    stage_output(state, s_out, lane_idx);
    // SYNC: the warp's output rows are in shared memory; only the warp that wrote them reads them.
    __syncwarp();
    g_out += block.batch_idx * out_batch_stride + block.head_idx * out_head_stride + warp_query * out_seq_stride;
    const bool vectors = ((reinterpret_cast<unsigned long long>(g_out) | out_seq_stride * sizeof(Element)) & 15) == 0;
    store_tile_by_warp<WARP_M, HEAD_DIM_V>(g_out, out_seq_stride, s_out[0], seqlen_q - warp_query, head_dim_v, vectors,
                                           lane_idx);
    if (g_lse != nullptr && lane_idx % 4 == 0) {
        g_lse += static_cast<long long>(block.head) * seqlen_q;
#pragma unroll
        for (int i = 0; i < 2 * ROW_TILES; i++) {
            const int query_idx = lane_query + i * 8;
            if (query_idx < seqlen_q) g_lse[query_idx] = row_lse(state.rows[i / 2][i % 2]);
        }
    }
}
