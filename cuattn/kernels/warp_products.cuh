// The two matrix products of attention for one warp, on tensor cores: scores = q k^T and out += p v.
//
// A warp owns WARP_M rows of the query tile. Elements lie row by row in shared memory, rows QK_STRIDE and V_STRIDE
// elements apart. 16-bit elements are multiplied by mma.m16n8k16; floats are rounded to tf32 (10 bits of mantissa) on
// their way into mma.m16n8k8. Both accumulate in float, and have the same accumulator layout.
//
// Constants used: Element, HEAD_DIM, HEAD_DIM_V, BLOCK_N; WARP_M, QK_STRIDE, V_STRIDE of the including kernel.
#pragma once
#include "mma.cuh"

constexpr int ROW_TILES = WARP_M / MMA_M;  // a fragment of k or v, once loaded, serves so many mma
constexpr bool TF32 = sizeof(Element) == 4;

static_assert(WARP_M % MMA_M == 0, "a warp owns whole mma row tiles");
static_assert(BLOCK_N % 16 == 0, "a key tile is whole k steps of the second product");
static_assert(HEAD_DIM % 32 == 0 && HEAD_DIM_V % 32 == 0, "head dims come in buckets");
static_assert(sizeof(Element) == 2 || sizeof(Element) == 4, "fragments hold 16-bit elements or tf32");

using Scores = float[ROW_TILES][BLOCK_N / MMA_N][4];
using OutputTiles = float[ROW_TILES][HEAD_DIM_V / MMA_N][4];

// Where this lane's fragment addresses start: the tile's base plus these many bytes. A 16-byte row of the matrices that
// ldmatrix fetches holds eight 16-bit elements or four floats, so that q and k of both kinds are fetched alike.
struct LaneOffsets {
    unsigned q, k, v;
    __device__ __forceinline__ LaneOffsets(int warp_idx, int lane_idx) {
        q = (warp_idx * WARP_M + frag_a_row(lane_idx)) * QK_STRIDE * sizeof(Element) + frag_a_bytes(lane_idx);
        k = frag_b_n(lane_idx) * QK_STRIDE * sizeof(Element) + frag_b_bytes(lane_idx);
        v = TF32 ? (frag_acc_col(lane_idx) * V_STRIDE + frag_acc_row(lane_idx)) * sizeof(Element)
                 : frag_b_trans_k(lane_idx) * V_STRIDE * sizeof(Element) + frag_b_trans_bytes(lane_idx);
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
    for (int d = 0; d < HEAD_DIM; d += MMA_STEP_BYTES / sizeof(Element)) {
        unsigned frag_q[ROW_TILES][4];
#pragma unroll
        for (int t = 0; t < ROW_TILES; t++) {
            ldmatrix_x4(frag_q[t], s_q + (t * MMA_M * QK_STRIDE + d) * sizeof(Element));
            round_fragment(Element(), frag_q[t]);
        }
#pragma unroll
        for (int n = 0; n < BLOCK_N; n += 2 * MMA_N) {
            unsigned frag_k[4];
            ldmatrix_x4(frag_k, s_k + (n * QK_STRIDE + d) * sizeof(Element));
            round_fragment(Element(), frag_k);
#pragma unroll
            for (int t = 0; t < ROW_TILES; t++) {
                mma(Element(), scores[t][n / MMA_N], frag_q[t], frag_k[0], frag_k[1]);
                mma(Element(), scores[t][n / MMA_N + 1], frag_q[t], frag_k[2], frag_k[3]);
            }
        }
    }
}

// acc_out += probabilities v. s_v: fragment address of this lane. The tag is a 16-bit element type here ...
template <typename Element>
__device__ __forceinline__ void accumulate_output(Element tag, OutputTiles& acc_out, const Scores& probabilities,
                                                  unsigned s_v) {
#pragma unroll
    for (int n = 0; n < BLOCK_N; n += 16) {
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
                mma(tag, acc_out[t][e / MMA_N], frag_p[t], frag_v[0], frag_v[1]);
                mma(tag, acc_out[t][e / MMA_N + 1], frag_p[t], frag_v[2], frag_v[3]);
            }
        }
    }
}

// ... and float, for tf32, here. A lane of the accumulator holds columns 2 c and 2 c + 1, and a lane of the left
// operand columns c and c + 4: the sum over keys has no order, so key 2 c takes the place of c, and 2 c + 1 that of c
// + 4, in p and v.
__device__ __forceinline__ void accumulate_output(float tag, OutputTiles& acc_out, const Scores& probabilities,
                                                  unsigned s_v) {
#pragma unroll
    for (int n = 0; n < BLOCK_N; n += MMA_N) {
        unsigned frag_p[ROW_TILES][4];
#pragma unroll
        for (int t = 0; t < ROW_TILES; t++) {
            const float(&acc)[4] = probabilities[t][n / MMA_N];
#pragma unroll
            for (int i = 0; i < 4; i++) frag_p[t][i] = round_to_tf32(acc[i % 2 * 2 + i / 2]);
        }
#pragma unroll
        for (int e = 0; e < HEAD_DIM_V; e += MMA_N) {
            const unsigned s_frag = s_v + (n * V_STRIDE + e) * sizeof(float);
            const unsigned b0 = round_to_tf32(load_shared_float(s_frag));
            const unsigned b1 = round_to_tf32(load_shared_float(s_frag + V_STRIDE * sizeof(float)));
#pragma unroll
            for (int t = 0; t < ROW_TILES; t++) mma(tag, acc_out[t][e / MMA_N], frag_p[t], b0, b1);
        }
    }
}
