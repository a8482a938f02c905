// Attention forward for float32 and float64 without tensor cores: every product is an IEEE fused multiply-add.
//
//     out = softmax(scale * q k^T + mask) v,    lse = log(sum(exp(scale * q k^T + mask)))
//
// One CTA computes BLOCK_M queries of one head with the same online softmax over key tiles as attention_forward.cu. The
// matrix products are tiled in registers: a lane computes 4 rows x BLOCK_N / 16 columns of the scores and 4 rows x
// HEAD_DIM_V / 16 columns of the output, so that each number read from shared memory is used several times.
//
// Accuracy: all arithmetic is in the element type and rounds to nearest. A dot product is summed in blocks of 32 terms,
// which keeps its error near that of pairwise summation; exp2 is within 2 ulp; the output is summed key by key. Nothing
// is flushed to zero.
//
// Grid: x = (batch_idx * num_heads + head_idx) * num_q_blocks + block (query_block.cuh).
// Block: NUM_WARPS warps of 8 query rows each; lane l has rows 4 (l / 16) .. + 3 and columns l % 16, l % 16 + 16, ...
//
// Constants: Element, BLOCK_M, BLOCK_N, HEAD_DIM and HEAD_DIM_V (buckets: the head dims proper are arguments and may be
// smaller), NUM_WARPS, SMEM_BYTES, CAUSAL, ALIGNED (bases and strides of q, k, v are multiples of 16 bytes).
#include "mask.cuh"
#include "online_softmax.cuh"
#include "query_block.cuh"
#include "tiles.cuh"

constexpr int WARP_SIZE = 32;
constexpr int NUM_THREADS = NUM_WARPS * WARP_SIZE;
constexpr int WARP_M = 8;
constexpr int LANES_PER_ROW = 16;
constexpr int LANE_M = WARP_M * LANES_PER_ROW / WARP_SIZE;  // rows a lane computes
constexpr int LANE_N = BLOCK_N / LANES_PER_ROW;             // columns of the scores
constexpr int CHUNK = 16 / sizeof(Element);                 // elements of a 128-bit access
constexpr int DOT_BLOCK = 32;                               // terms of a dot product that are summed on their own
// A lane computes OUT_VECTORS groups of OUT_VECTOR neighbouring output columns.
constexpr int OUT_VECTOR = HEAD_DIM_V % (CHUNK * LANES_PER_ROW) == 0 ? CHUNK : 2;
constexpr int OUT_VECTORS = HEAD_DIM_V / (OUT_VECTOR * LANES_PER_ROW);
constexpr int QK_STRIDE = HEAD_DIM + ROW_PADDING<Element>;
constexpr int V_STRIDE = HEAD_DIM_V + ROW_PADDING<Element>;
constexpr int P_STRIDE = BLOCK_N + ROW_PADDING<Element>;

// Shared memory of a CTA.
struct Smem {
    Element q[BLOCK_M][QK_STRIDE];
    Element k[BLOCK_N][QK_STRIDE];
    Element v[BLOCK_N][V_STRIDE];
    Element p[BLOCK_M][P_STRIDE];  // each warp uses its own rows
};

static_assert(BLOCK_M == NUM_WARPS * WARP_M, "every warp owns eight rows");
static_assert(BLOCK_N % LANES_PER_ROW == 0, "every lane has whole columns");
static_assert(HEAD_DIM % DOT_BLOCK == 0 && HEAD_DIM_V % DOT_BLOCK == 0, "head dims come in buckets");
static_assert(sizeof(Smem) == SMEM_BYTES, "config.py and this file agree on the shared-memory plan");

// N neighbouring elements, read and written in one access.
template <int N>
struct alignas(N * sizeof(Element)) Vector {
    Element x[N];
};
template <int N>
__device__ __forceinline__ Vector<N> load_vector(const Element* pointer) {
    return *reinterpret_cast<const Vector<N>*>(pointer);
}

// What a lane carries from tile to tile.
struct LaneState {
    Element acc_out[LANE_M][OUT_VECTORS][OUT_VECTOR];
    OnlineSoftmaxRow<Element> rows[LANE_M];
};

using Scores = Element[LANE_M][LANE_N];

// scores = q k^T. s_q: this lane's first row, s_k: this lane's first column. Columns from head_dim on are zero in both.
__device__ __forceinline__ void compute_scores(Scores& scores, const Element* s_q, const Element* s_k, int head_dim) {
#pragma unroll
    for (int i = 0; i < LANE_M; i++) {
#pragma unroll
        for (int j = 0; j < LANE_N; j++) scores[i][j] = 0;
    }
#pragma unroll 1
    for (int block = 0; block < head_dim; block += DOT_BLOCK) {
        Scores partial = {};
#pragma unroll(2)
        for (int d = block; d < block + DOT_BLOCK; d += CHUNK) {
            Vector<CHUNK> q[LANE_M], k[LANE_N];
#pragma unroll
            for (int i = 0; i < LANE_M; i++) q[i] = load_vector<CHUNK>(s_q + i * QK_STRIDE + d);
#pragma unroll
            for (int j = 0; j < LANE_N; j++) k[j] = load_vector<CHUNK>(s_k + j * LANES_PER_ROW * QK_STRIDE + d);
#pragma unroll
            for (int c = 0; c < CHUNK; c++) {
#pragma unroll
                for (int i = 0; i < LANE_M; i++) {
#pragma unroll
                    for (int j = 0; j < LANE_N; j++) partial[i][j] = fma(q[i].x[c], k[j].x[c], partial[i][j]);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < LANE_M; i++) {
#pragma unroll
            for (int j = 0; j < LANE_N; j++) scores[i][j] += partial[i][j];
        }
    }
}

// Scales the scores and sets those to -inf that are not visible. `first_key`, `first_query`: of this lane.
__device__ __forceinline__ void scale_and_mask_scores(Scores& scores, Element scale_log2, bool masked, int first_key,
                                                      int first_query, int seqlen_k, int diagonal_offset) {
#pragma unroll
    for (int i = 0; i < LANE_M; i++) {
        const int num_visible =
            masked ? key_end<CAUSAL>(first_query + i, seqlen_k, diagonal_offset) - first_key : BLOCK_N;
#pragma unroll
        for (int j = 0; j < LANE_N; j++) {
            scores[i][j] *= scale_log2;
            if (j * LANES_PER_ROW >= num_visible) scores[i][j] = negative_infinity<Element>();
        }
    }
}

// Turns scores into probabilities relative to the running maximum, writes them to s_p (this lane's first row and
// column), and lets the accumulated output follow when the maximum rises.
__device__ __forceinline__ void softmax_step(LaneState& state, const Scores& scores, Element* s_p) {
#pragma unroll
    for (int i = 0; i < LANE_M; i++) {
        OnlineSoftmaxRow<Element>& row = state.rows[i];
        Element tile_max = scores[i][0];
#pragma unroll
        for (int j = 1; j < LANE_N; j++) tile_max = fmax(tile_max, scores[i][j]);
#pragma unroll
        for (int lane_mask = 1; lane_mask < LANES_PER_ROW; lane_mask *= 2) {
            tile_max = fmax(tile_max, __shfl_xor_sync(0xffffffff, tile_max, lane_mask));
        }
        const Element correction = exp2(row.raise_max(tile_max));
        const Element reference_log2 = row.reference_log2();
        row.sum *= correction;  // of this lane's columns only: summed over the row after the last tile
#pragma unroll
        for (int j = 0; j < LANE_N; j++) {
            const Element probability = exp2(scores[i][j] - reference_log2);
            row.sum += probability;
            s_p[i * P_STRIDE + j * LANES_PER_ROW] = probability;
        }
#pragma unroll
        for (int e = 0; e < OUT_VECTORS; e++) {
#pragma unroll
            for (int x = 0; x < OUT_VECTOR; x++) state.acc_out[i][e][x] *= correction;
        }
    }
}

// acc_out += p v. s_p: this lane's first row, s_v: this lane's first output column.
__device__ __forceinline__ void accumulate_output(LaneState& state, const Element* s_p, const Element* s_v) {
#pragma unroll(CHUNK / 2)
    for (int n = 0; n < BLOCK_N; n += CHUNK) {
        Vector<CHUNK> p[LANE_M];
#pragma unroll
        for (int i = 0; i < LANE_M; i++) p[i] = load_vector<CHUNK>(s_p + i * P_STRIDE + n);
#pragma unroll
        for (int c = 0; c < CHUNK; c++) {
#pragma unroll
            for (int e = 0; e < OUT_VECTORS; e++) {
                const Vector<OUT_VECTOR> v =
                    load_vector<OUT_VECTOR>(s_v + (n + c) * V_STRIDE + e * LANES_PER_ROW * OUT_VECTOR);
#pragma unroll
                for (int i = 0; i < LANE_M; i++) {
#pragma unroll
                    for (int x = 0; x < OUT_VECTOR; x++) {
                        state.acc_out[i][e][x] = fma(p[i].x[c], v.x[x], state.acc_out[i][e][x]);
                    }
                }
            }
        }
    }
}

// Writes one row's columns of this lane, g_row + e * 16 * OUT_VECTOR. `col`: the lane's first column.
__device__ __forceinline__ void store_row(Element* g_row, const Element (&acc_row)[OUT_VECTORS][OUT_VECTOR],
                                          Element inverse_sum, int col, int head_dim_v, bool vectors) {
#pragma unroll
    for (int e = 0; e < OUT_VECTORS; e++) {
        const int first_col = e * LANES_PER_ROW * OUT_VECTOR;
        Vector<OUT_VECTOR> out;
#pragma unroll
        for (int x = 0; x < OUT_VECTOR; x++) out.x[x] = acc_row[e][x] * inverse_sum;
        if (vectors && col + first_col + OUT_VECTOR <= head_dim_v) {
            *reinterpret_cast<Vector<OUT_VECTOR>*>(g_row + first_col) = out;
        } else {
#pragma unroll
            for (int x = 0; x < OUT_VECTOR; x++) {
                if (col + first_col + x < head_dim_v) g_row[first_col + x] = out.x[x];
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) cuattn_attention_forward_f32(
    const Element* __restrict__ g_q,    // [batch, seqlen_q, num_heads, head_dim], last axis contiguous
    const Element* __restrict__ g_k,    // [batch, seqlen_k, num_kv_heads, head_dim]
    const Element* __restrict__ g_v,    // [batch, seqlen_k, num_kv_heads, head_dim_v]
    Element* __restrict__ g_out,        // [batch, seqlen_q, num_heads, head_dim_v]
    Element* __restrict__ g_lse,        // [batch, num_heads, seqlen_q], contiguous; null: not wanted
    long long q_batch_stride, long long q_seq_stride, long long q_head_stride,        // strides are in elements
    long long k_batch_stride, long long k_seq_stride, long long k_head_stride,
    long long v_batch_stride, long long v_seq_stride, long long v_head_stride,
    long long out_batch_stride, long long out_seq_stride, long long out_head_stride,
    int num_heads, int heads_per_kv_head, int seqlen_q, int seqlen_k, int head_dim, int head_dim_v,
    int diagonal_offset,  // query i is aligned with key i + diagonal_offset; only with CAUSAL
    Element scale_log2)   // scale * log2(e)
{
    extern __shared__ __align__(16) unsigned char s_bytes[];
    Smem& smem = *reinterpret_cast<Smem*>(s_bytes);
    const int lane_idx = threadIdx.x % WARP_SIZE;
    const int lane_row = threadIdx.x / LANES_PER_ROW * LANE_M;  // this lane's first row of the tile, ...
    const int lane_col = lane_idx % LANES_PER_ROW;              // ... and its first column

    const QueryBlock block = query_block<BLOCK_M, CAUSAL>(seqlen_q, num_heads, heads_per_kv_head);
    const int first_query = block.first_query;
    const int num_queries = min(BLOCK_M, seqlen_q - first_query);
    const int warp_query = first_query + threadIdx.x / WARP_SIZE * WARP_M;

    g_q += block.batch_idx * q_batch_stride + block.head_idx * q_head_stride + first_query * q_seq_stride;
    g_k += block.batch_idx * k_batch_stride + block.kv_head_idx * k_head_stride;
    g_v += block.batch_idx * v_batch_stride + block.kv_head_idx * v_head_stride;
    const KeyTiles tiles =
        key_tiles<CAUSAL, BLOCK_N>(first_query, first_query + num_queries - 1, seqlen_k, diagonal_offset);
    const int warp_key_end =
        warp_query < seqlen_q ? key_end<CAUSAL>(min(warp_query + WARP_M, seqlen_q) - 1, seqlen_k, diagonal_offset) : 0;

    LaneState state;
#pragma unroll
    for (int i = 0; i < LANE_M; i++) {
        state.rows[i].reset();
#pragma unroll
        for (int e = 0; e < OUT_VECTORS; e++) {
#pragma unroll
            for (int x = 0; x < OUT_VECTOR; x++) state.acc_out[i][e][x] = 0;
        }
    }

    auto load_k = [&](int tile_idx) {
        const int first_key = tile_idx * BLOCK_N;
        load_tile<ALIGNED, BLOCK_N, HEAD_DIM, NUM_THREADS>(smem.k[0], g_k + first_key * k_seq_stride, k_seq_stride,
                                                           seqlen_k - first_key, head_dim);
        cp_async_commit();
    };
    auto load_v = [&](int tile_idx) {
        const int first_key = tile_idx * BLOCK_N;
        load_tile<ALIGNED, BLOCK_N, HEAD_DIM_V, NUM_THREADS>(smem.v[0], g_v + first_key * v_seq_stride, v_seq_stride,
                                                             seqlen_k - first_key, head_dim_v);
        cp_async_commit();
    };

    if (tiles.num_tiles > 0) {
        load_tile<ALIGNED, BLOCK_M, HEAD_DIM, NUM_THREADS>(smem.q[0], g_q, q_seq_stride, num_queries, head_dim);
        load_k(tiles.num_tiles - 1);
    }
    for (int tile_idx = tiles.num_tiles - 1; tile_idx >= 0; tile_idx--) {
        cp_async_wait<0>();
        // SYNC: this tile's k (and q) has landed for all; every warp is done with the v of the tile before.
        __syncthreads();
        load_v(tile_idx);  // on its way during the first product
        const bool active = tile_idx * BLOCK_N < warp_key_end;
        if (active) {
            Scores scores;
            compute_scores(scores, smem.q[lane_row], smem.k[lane_col], head_dim);
            scale_and_mask_scores(scores, scale_log2, tile_idx >= tiles.num_full_tiles, tile_idx * BLOCK_N + lane_col,
                                  first_query + lane_row, seqlen_k, diagonal_offset);
            softmax_step(state, scores, smem.p[lane_row] + lane_col);
        }
        cp_async_wait<0>();
        // SYNC: v has landed and the probabilities are written; every warp is done with k.
        __syncthreads();
        if (tile_idx > 0) load_k(tile_idx - 1);  // on its way during the second product
        if (active) accumulate_output(state, smem.p[lane_row], smem.v[0] + lane_col * OUT_VECTOR);
    }

    const bool vectors =
        ((reinterpret_cast<unsigned long long>(g_out) | out_batch_stride * sizeof(Element) |
          out_seq_stride * sizeof(Element) | out_head_stride * sizeof(Element)) & 15) == 0;
    g_out += block.batch_idx * out_batch_stride + block.head_idx * out_head_stride + lane_col * OUT_VECTOR;
#pragma unroll
    for (int i = 0; i < LANE_M; i++) {
        OnlineSoftmaxRow<Element>& row = state.rows[i];
#pragma unroll
        for (int lane_mask = 1; lane_mask < LANES_PER_ROW; lane_mask *= 2) {
            row.sum += __shfl_xor_sync(0xffffffff, row.sum, lane_mask);
        }
        const int query_idx = first_query + lane_row + i;
        if (query_idx < seqlen_q) {
            store_row(g_out + query_idx * out_seq_stride, state.acc_out[i], row.inverse_sum(), lane_col * OUT_VECTOR,
                      head_dim_v, vectors);
            if (g_lse != nullptr && lane_col == 0) {
                g_lse[static_cast<long long>(block.head) * seqlen_q + query_idx] = row_lse(row);
            }
        }
    }
}
