// The end of a row of a difference: its norm, its weight and the factor.
#pragma once
#include "attention/score_tile.cuh"
#include "differential/differential_params.cuh"
#include "differential/row_norm.cuh"

// A row in accumulator layout is divided by the root of its mean square, multiplied with its weights, and scaled.
template <int OUT_TILES>
__device__ __forceinline__ void finish_row(float (&acc)[OUT_TILES][4], int half,
                                           const DifferentialParams<float>& params, const float* g_norm_weight,
                                           int lane_idx) {
    float factor = params.output_scale;
    if (params.norm) {
        auto sum_of_squares = [&](float by) {
            float sum = 0.0f;
#pragma unroll
            for (int e = 0; e < OUT_TILES; e++) {
                const float left = acc[e][2 * half] * by, right = acc[e][2 * half + 1] * by;
                sum = fmaf(left, left, fmaf(right, right, sum));
            }
            return quad_sum(sum);
        };
        const RowNorm<float> norm(sum_of_squares, params.head_dim_v, params.eps);
        rescale_row(acc, half, norm.factor);
        factor *= norm.inverse;
    }
    rescale_row(acc, half, factor);
    if (g_norm_weight == nullptr) return;
#pragma unroll
    for (int e = 0; e < OUT_TILES; e++) {
        const int column = e * MMA_N + frag_acc_col(lane_idx);
        if (column < params.head_dim_v) acc[e][2 * half] *= g_norm_weight[column];
        if (column + 1 < params.head_dim_v) acc[e][2 * half + 1] *= g_norm_weight[column + 1];
    }
}
