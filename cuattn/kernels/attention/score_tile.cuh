// A warp's tile of scores between the two products, in accumulator layout (mma.cuh): the step of an online softmax, and
// what it takes. The accumulators of rows t * MMA_M + frag_acc_row and eight below it belong to rows[t][0] and [1].
#pragma once
#include "attention/logits.cuh"
#include "attention/online_softmax.cuh"
#include "attention/probability_factor.cuh"
#include "attention/warp_products.cuh"

// Until the last tile max_logit is in the units of the scores, which are products q k^T where NATURAL_LOGITS is false,
// and sums are 2^LOG2_P_FACTOR times as large as they will be: finish_softmax.
using SoftmaxRow = OnlineSoftmaxRow<float>;

// What the softmax multiplies scores with. It takes the maximum before it multiplies, and masks with -inf, so its
// factor must be positive: a negative scale leaves its sign, and 0 leaves the whole factor, in the scores
// (softmax_logits).
__device__ __forceinline__ float positive_scale_log2(float scale_log2) {
    return scale_log2 == 0.0f ? LOG2_E : fabsf(scale_log2);
}

// Scores become what the softmax takes, before bias and masks. rows: natural_logits.
template <typename Layout, typename Rows>
__device__ __forceinline__ void softmax_logits(typename Layout::Tile& scores, const AttentionParams<float>& params,
                                               float scale, float scale_log2, const Rows& rows) {
    if (NATURAL_LOGITS) {
        natural_logits<Layout>(scores, params, scale, rows);
    } else if (scale_log2 <= 0.0f) {
        const float sign = scale_log2 < 0.0f ? -1.0f : 0.0f;
        each_logit<Layout>(scores, [&](float& score) { score *= sign; });
    }
}

// From here on the rounding of a maximum, once it is multiplied with its factor, would be felt in an exponent: it is
// 2^-10 at most below.
constexpr float LARGE_SHIFT = 16384.0f;

// The scores of one row become probabilities relative to the running maximum, which the tile may raise, times
// 2^LOG2_P_FACTOR: `half` says which elements of an accumulator belong to the row. Returns the factor for what has been
// accumulated so far.
//
// A score s becomes exp2(s c - m c) with the maximum m and the factor c = scale_log2: one fused multiply-add, from
// which the rounded product m c is subtracted. It is rounded up, so that no exponent is above 0; but of 10^9 the
// rounding is 64, and every probability would be 0. A row whose product is large takes the differences s - m first,
// which are exact beside their own size; a warp without one passes over that.
template <int COL_TILES>
__device__ __forceinline__ float softmax_row(SoftmaxRow& row, float (&scores)[COL_TILES][4], int half,
                                             float scale_log2) {
    constexpr float LOG2_FACTOR = LOG2_P_FACTOR;
    float tile_max = negative_infinity<float>();
#pragma unroll
    for (int n = 0; n < COL_TILES; n++) {
        tile_max = fmaxf(tile_max, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
    }
    tile_max = quad_max(tile_max);
    float shift, correction;
    if (NATURAL_LOGITS) {
        correction = row.raise_max(tile_max);
        shift = row.reference();
    } else {
        const float old_max = row.max_logit;
        row.max_logit = fmaxf(row.max_logit, tile_max);
        shift = __fmaf_ru(row.reference(), scale_log2, -LOG2_FACTOR);
        correction = __fmaf_ru(old_max, scale_log2, -LOG2_FACTOR) - shift;
        const bool large = fabsf(shift) >= LARGE_SHIFT;
        if (__any_sync(0xffffffff, large)) {
            const float reference = large ? row.reference() : 0.0f;
#pragma unroll
            for (int n = 0; n < COL_TILES; n++) {
                scores[n][2 * half] -= reference;
                scores[n][2 * half + 1] -= reference;
            }
            if (large) {
                shift = -LOG2_FACTOR;
                correction = (old_max - reference) * scale_log2;
            }
        }
    }
    correction = exp2_approx(correction);
    row.sum *= correction;  // of this lane's columns only: summed over the quad after the last tile
#pragma unroll
    for (int n = 0; n < COL_TILES; n++) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; i++) {
            float exponent = NATURAL_LOGITS ? SoftmaxRow::exponent(scores[n][i] - shift)
                                            : fmaf(scores[n][i], scale_log2, -shift);
            if (NATURAL_LOGITS && LOG2_P_FACTOR != 0) exponent += LOG2_FACTOR;
            scores[n][i] = exp2_approx(exponent);
            row.sum += scores[n][i];
        }
    }
    return correction;
}

// After the last tile: the sum over the quad and without its factor, and a natural maximum. That is what has been
// subtracted, to the last bit, or it would be missed in lse. scale and scale_log2: those of the scores.
__device__ __forceinline__ void finish_softmax(SoftmaxRow& row, float scale, float scale_log2) {
    constexpr float LN_2 = 0.69314718055994530942f;
    row.sum = quad_sum(row.sum) * INVERSE_P_FACTOR;
    if (NATURAL_LOGITS || row.max_logit == negative_infinity<float>()) return;
    const float shift = __fmaf_ru(row.max_logit, positive_scale_log2(scale_log2), -float(LOG2_P_FACTOR));
    const float positive_scale = scale_log2 == 0.0f ? 1.0f : fabsf(scale);
    row.max_logit = fabsf(shift) < LARGE_SHIFT ? (shift + LOG2_P_FACTOR) * LN_2 : row.max_logit * positive_scale;
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
