// A warp's tile of scores between the two products, in accumulator layout (mma.cuh): scaling, softcap, and the step of
// an online softmax. The accumulators of rows t * MMA_M + frag_acc_row and eight below it belong to rows[t][0] and [1].
#pragma once
#include "online_softmax.cuh"
#include "score_options.cuh"
#include "warp_products.cuh"

using SoftmaxRow = OnlineSoftmaxRow<float, !NATURAL_LOGITS>;

// What the softmax multiplies scores with. It takes the maximum before it multiplies, and masks with -inf, so its
// factor must be positive: a negative scale leaves its sign, and 0 leaves the whole factor, in the scores
// (multiply_scores).
__device__ __forceinline__ float positive_scale_log2(float scale_log2) {
    return scale_log2 == 0.0f ? LOG2_E : fabsf(scale_log2);
}

template <int ROW_TILES, int COL_TILES>
__device__ __forceinline__ void multiply_scores(float (&scores)[ROW_TILES][COL_TILES][4], float factor) {
#pragma unroll
    for (int t = 0; t < ROW_TILES; t++) {
#pragma unroll
        for (int n = 0; n < COL_TILES; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) scores[t][n][i] *= factor;
        }
    }
}

template <int ROW_TILES, int COL_TILES>
__device__ __forceinline__ void cap_scores(float (&scores)[ROW_TILES][COL_TILES][4], float softcap) {
    const float inverse_softcap = 1.0f / softcap;
#pragma unroll
    for (int t = 0; t < ROW_TILES; t++) {
#pragma unroll
        for (int n = 0; n < COL_TILES; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) scores[t][n][i] = softcap * tanh_fast(scores[t][n][i] * inverse_softcap);
        }
    }
}

// scores become probabilities relative to the running maximum; the accumulated output follows when the maximum rises.
template <int ROW_TILES, int COL_TILES, int OUT_TILES>
__device__ __forceinline__ void softmax_step(float (&acc_out)[ROW_TILES][OUT_TILES][4],
                                             SoftmaxRow (&rows)[ROW_TILES][2],
                                             float (&scores)[ROW_TILES][COL_TILES][4], float scale_log2) {
#pragma unroll
    for (int t = 0; t < ROW_TILES; t++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            SoftmaxRow& row = rows[t][half];
            float tile_max = negative_infinity<float>();
#pragma unroll
            for (int n = 0; n < COL_TILES; n++) {
                tile_max = fmaxf(tile_max, fmaxf(scores[t][n][2 * half], scores[t][n][2 * half + 1]));
            }
            tile_max = quad_max(tile_max);
            const float correction = exp2_approx(row.raise_max(NATURAL_LOGITS ? tile_max : tile_max * scale_log2));
            const float reference = row.reference();
            row.sum *= correction;  // of this lane's columns only: summed over the quad after the last tile
#pragma unroll
            for (int n = 0; n < COL_TILES; n++) {
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; i++) {
                    const float exponent = NATURAL_LOGITS ? SoftmaxRow::exponent(scores[t][n][i] - reference)
                                                          : fmaf(scores[t][n][i], scale_log2, -reference);
                    scores[t][n][i] = exp2_approx(exponent);
                    row.sum += scores[t][n][i];
                }
            }
#pragma unroll
            for (int e = 0; e < OUT_TILES; e++) {
                acc_out[t][e][2 * half] *= correction;
                acc_out[t][e][2 * half + 1] *= correction;
            }
        }
    }
}
