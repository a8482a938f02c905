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

// The scores of one row become probabilities relative to the running maximum, which the tile may raise: `half` says
// which elements of an accumulator belong to the row. Returns the factor for what has been accumulated so far. All of
// them, and so their sum, are 2^LOG2_FACTOR times as large as they would be.
template <int LOG2_FACTOR = 0, int COL_TILES>
__device__ __forceinline__ float softmax_row(SoftmaxRow& row, float (&scores)[COL_TILES][4], int half,
                                             float scale_log2) {
    float tile_max = negative_infinity<float>();
#pragma unroll
    for (int n = 0; n < COL_TILES; n++) {
        tile_max = fmaxf(tile_max, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
    }
    tile_max = quad_max(tile_max);
    const float correction = exp2_approx(row.raise_max(NATURAL_LOGITS ? tile_max : tile_max * scale_log2));
    const float reference = NATURAL_LOGITS ? row.reference() : row.reference() - LOG2_FACTOR;
    row.sum *= correction;  // of this lane's columns only: summed over the quad after the last tile
#pragma unroll
    for (int n = 0; n < COL_TILES; n++) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; i++) {
            float exponent = NATURAL_LOGITS ? SoftmaxRow::exponent(scores[n][i] - reference)
                                            : fmaf(scores[n][i], scale_log2, -reference);
            if (NATURAL_LOGITS && LOG2_FACTOR != 0) exponent += LOG2_FACTOR;
            scores[n][i] = exp2_approx(exponent);
            row.sum += scores[n][i];
        }
    }
    return correction;
}

// The accumulated output of one row follows its maximum.
template <int OUT_TILES>
__device__ __forceinline__ void rescale_row(float (&acc_out)[OUT_TILES][4], int half, float correction) {
#pragma unroll
    for (int e = 0; e < OUT_TILES; e++) {
        acc_out[e][2 * half] *= correction;
        acc_out[e][2 * half + 1] *= correction;
    }
}

// Both for every row of a warp's tile.
template <int ROW_TILES, int COL_TILES, int OUT_TILES>
__device__ __forceinline__ void softmax_step(float (&acc_out)[ROW_TILES][OUT_TILES][4],
                                             SoftmaxRow (&rows)[ROW_TILES][2],
                                             float (&scores)[ROW_TILES][COL_TILES][4], float scale_log2) {
#pragma unroll
    for (int t = 0; t < ROW_TILES; t++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            rescale_row(acc_out[t], half, softmax_row(rows[t][half], scores[t], half, scale_log2));
        }
    }
}

// -inf for the columns outside of [begin, end), counted from the lane's first column, so that the comparisons are with
// constants.
template <bool BOUND_BEGIN, int COL_TILES>
__device__ __forceinline__ void mask_row(float (&scores)[COL_TILES][4], int half, int begin, int end) {
#pragma unroll
    for (int n = 0; n < COL_TILES; n++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int column = n * MMA_N + i;
            if (column >= end || (BOUND_BEGIN && column < begin)) {
                scores[n][2 * half + i] = negative_infinity<float>();
            }
        }
    }
}
