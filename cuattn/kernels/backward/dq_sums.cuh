// dq as sums in memory that CTAs which own keys add to (ADD_DQ): every block of keys has a part in dq, and comes from
// another CTA, in no order, so that float32 sums differ in their last bits from run to run.
//
// The sums are laid out as the accumulators of the tensor cores hold them: [row tile of 16 queries][tile of 8 columns]
// [4][32 lanes], so that a warp adds 128 neighbouring bytes at a time. attention_backward_dq.cu makes dq of them. A
// packed sequence begins at a row tile of its own.
//
// Constants used: ADD_DQ, Element, GradientQK, BLOCK_OWN, BLOCK_OTHER, HEAD_DIM, NUM_WARPS.
#pragma once
#include "backward/backward_tile.cuh"

constexpr int SUMS_PER_TILE = 4 * WARP_SIZE;

template <bool>
struct GradientOfQType {
    using type = GradientQK;
};
template <>
struct GradientOfQType<true> {
    using type = float;
};
using GradientOfQ = GradientOfQType<ADD_DQ>::type;

// dS^T of a tile, [keys][queries], where all warps can read it; nothing at all without ADD_DQ.
template <bool>
struct SharedScoreGradients {
    __device__ __forceinline__ void clear(int, int) {}
    __device__ __forceinline__ void store(const Tile&, int, int) {}
    __device__ __forceinline__ unsigned score_gradients() const { return 0; }
};

template <>
struct SharedScoreGradients<true> {
    Element ds[BLOCK_OWN][TILE_STRIDE<BLOCK_OTHER>];

    __device__ __forceinline__ void store(const Tile& tile, int warp_idx, int lane_idx) {
#pragma unroll
        for (int t = 0; t < ROW_TILES; t++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int row = (warp_idx * ROW_TILES + t) * MMA_M + half * 8 + frag_acc_row(lane_idx);
                Element* s_row = ds[row] + frag_acc_col(lane_idx);
#pragma unroll
                for (int n = 0; n < COL_TILES; n++) {
                    store_pair(s_row + n * MMA_N, tile[t][n][2 * half], tile[t][n][2 * half + 1]);
                }
            }
        }
    }
    __device__ __forceinline__ void clear(int warp_idx, int lane_idx) {
        Tile zeros;
        ::clear(zeros);
        store(zeros, warp_idx, lane_idx);
    }
    __device__ __forceinline__ unsigned score_gradients() const { return smem_address(ds); }
};

// Adds dS K of one tile, [queries x columns], to the sums. A warp takes 16 queries and 32 columns at a time. s_ds: dS^T
// [BLOCK_OWN keys][queries]; s_k: [BLOCK_OWN keys][columns].
__device__ __forceinline__ void add_to_dq(float* g_sums, long long sums_per_row_tile, unsigned s_ds, unsigned s_k,
                                          int num_queries, int head_dim, int warp_idx, int lane_idx) {
    if constexpr (ADD_DQ) {
        constexpr int CHUNK = 32, NUM_CHUNKS = HEAD_DIM / CHUNK;
        s_ds += frag_a_trans_k(lane_idx) * TILE_STRIDE<BLOCK_OTHER> * sizeof(Element) + frag_a_trans_bytes(lane_idx);
        s_k += lane_offset_b<HEAD_DIM>(lane_idx);
#pragma unroll 1
        for (int part = warp_idx; part < BLOCK_OTHER / MMA_M * NUM_CHUNKS; part += NUM_WARPS) {
            const int row_tile = part / NUM_CHUNKS, first_col = part % NUM_CHUNKS * CHUNK;
            if (row_tile * MMA_M >= num_queries || first_col >= head_dim) continue;
            AccTiles<1, CHUNK> acc;
            clear(acc);
            // Unrolled, the kernel with every option would spill at head dim 128.
#pragma unroll 1
            for (int key = 0; key < BLOCK_OWN; key += 16) {
                unsigned frag_ds[4];
                ldmatrix_x4_trans(frag_ds,
                                  s_ds + (key * TILE_STRIDE<BLOCK_OTHER> + row_tile * MMA_M) * sizeof(Element));
#pragma unroll
                for (int n = 0; n < CHUNK / MMA_N; n += 2) {
                    unsigned frag_k[4];
                    ldmatrix_x4_trans(frag_k,
                                      s_k + (key * TILE_STRIDE<HEAD_DIM> + first_col + n * MMA_N) * sizeof(Element));
                    mma(Element(), acc[0][n], frag_ds, frag_k[0], frag_k[1]);
                    mma(Element(), acc[0][n + 1], frag_ds, frag_k[2], frag_k[3]);
                }
            }
            float* g_tile = g_sums + row_tile * sums_per_row_tile + first_col / MMA_N * SUMS_PER_TILE + lane_idx;
#pragma unroll
            for (int n = 0; n < CHUNK / MMA_N; n++) {
                if (first_col + n * MMA_N >= head_dim) break;
#pragma unroll
                for (int i = 0; i < 4; i++) atomicAdd(g_tile + n * SUMS_PER_TILE + i * WARP_SIZE, acc[0][n][i]);
            }
        }
    }
}
