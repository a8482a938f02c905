// The state of a softmax row whose logits arrive tile by tile (Milakov and Gimelshein, 2018).
//
//     m' = max(m, max x)    d' = d 2^(m - m') + sum 2^(x - m')    with x = logit * log2(e)
//
// Logits are kept in base 2, because the hardware has exp2 and no exp: scale * log2(e) is one factor, and x - m' is one
// fused multiply-add. The caller scales what it has accumulated so far by the same 2^(m - m').
#pragma once

constexpr float LOG2_E = 1.44269504088896340736f;

template <typename Real>
__device__ __forceinline__ Real negative_infinity() {
    return static_cast<Real>(-__int_as_float(0x7f800000));
}

template <typename Real>
struct OnlineSoftmaxRow {
    Real max_log2;  // running maximum m, base 2; -inf while the row has seen nothing
    Real sum;       // running sum d

    __device__ __forceinline__ void reset() {
        max_log2 = negative_infinity<Real>();
        sum = 0;
    }

    // What to subtract from the logits. -inf - (-inf) would be NaN, so a row without a visible key subtracts 0 instead:
    // its logits are all -inf, and 2^(-inf) is the 0 that is wanted. A row with a +inf stays inf - inf = NaN.
    __device__ __forceinline__ Real reference_log2() const {
        return max_log2 == negative_infinity<Real>() ? Real(0) : max_log2;
    }

    // Takes the maximum of the next tile and returns m - m', the base-2 logarithm of the correction factor.
    __device__ __forceinline__ Real raise_max(Real tile_max_log2) {
        const Real old_max_log2 = max_log2;
        max_log2 = max(max_log2, tile_max_log2);
        return old_max_log2 - reference_log2();
    }

    // Factor that turns accumulated sums of 2^(x - m) v into the weighted mean; 0 for a row that saw nothing.
    __device__ __forceinline__ Real inverse_sum() const { return sum == Real(0) ? Real(0) : Real(1) / sum; }
};

// Natural-log sum-exp of a row. ln 2 in two parts: the product with a large maximum keeps its last bits.
__device__ __forceinline__ float row_lse(const OnlineSoftmaxRow<float>& row) {
    constexpr float LN_2 = 0.693147182464599609375f;
    constexpr float LN_2_REST = -1.904654323148236e-09f;
    if (row.max_log2 == negative_infinity<float>() && row.sum == 0.0f) return row.max_log2;
    return fmaf(row.max_log2, LN_2, fmaf(row.max_log2, LN_2_REST, logf(row.sum)));
}

__device__ __forceinline__ double row_lse(const OnlineSoftmaxRow<double>& row) {
    constexpr double LN_2 = 0.693147180559945286227;
    constexpr double LN_2_REST = 2.319046813846299558e-17;
    if (row.max_log2 == negative_infinity<double>() && row.sum == 0.0) return row.max_log2;
    return fma(row.max_log2, LN_2, fma(row.max_log2, LN_2_REST, log(row.sum)));
}
