// The state of a softmax row whose logits arrive tile by tile (Milakov and Gimelshein, 2018).
//
//     m' = max(m, max x)    d' = d e^(m - m') + sum e^(x - m')
//
// Logits are natural. The hardware has exp2 and no exp, so that every exponent needs the factor log2(e): it multiplies
// the difference x - m', which cannot overflow where a bias of -3e38 stands for "never", and is 0 for the maximum
// itself, however large. (The tensor-core kernels fold the factor into a fused multiply-add: score_tile.cuh.)
#pragma once

constexpr float LOG2_E = 1.44269504088896340736f;

template <typename Real>
__device__ __forceinline__ constexpr Real log2_e() {
    return static_cast<Real>(1.44269504088896340736);
}

template <typename Real>
__device__ __forceinline__ Real negative_infinity() {
    return static_cast<Real>(-__int_as_float(0x7f800000));
}

template <typename Real>
struct OnlineSoftmaxRow {
    Real max_logit;  // running maximum m; -inf while the row has seen nothing
    Real sum;        // running sum d

    __device__ __forceinline__ void reset() {
        max_logit = negative_infinity<Real>();
        sum = 0;
    }

    // What to subtract from the logits. -inf - (-inf) would be NaN, so a row without a visible key subtracts 0 instead:
    // its logits are all -inf, and e^(-inf) is the 0 that is wanted. A row with a +inf stays inf - inf = NaN.
    __device__ __forceinline__ Real reference() const {
        return max_logit == negative_infinity<Real>() ? Real(0) : max_logit;
    }

    // The base-2 exponent that a difference of logits stands for.
    static __device__ __forceinline__ Real exponent(Real difference) { return difference * log2_e<Real>(); }

    // Takes the maximum of the next tile and returns the base-2 logarithm of the correction factor, m - m'.
    __device__ __forceinline__ Real raise_max(Real tile_max) {
        const Real old_max = max_logit;
        max_logit = max(max_logit, tile_max);
        return exponent(old_max - reference());
    }

    // One more logit in the denominator, whose value is nowhere. The base-2 logarithms of the factor for what has been
    // summed so far, and of the new term; the caller has exp2, multiplies and adds.
    __device__ __forceinline__ void sink_exponents(Real sink, Real& correction_log2, Real& term_log2) {
        correction_log2 = raise_max(sink);
        term_log2 = exponent(sink - reference());
    }

    // Factor that turns accumulated sums of e^(x - m) v into the weighted mean; 0 for a row that saw nothing.
    __device__ __forceinline__ Real inverse_sum() const { return sum == Real(0) ? Real(0) : Real(1) / sum; }

    // Natural-log sum-exp; -inf for a row that saw nothing.
    __device__ __forceinline__ Real lse() const { return max_logit + log(sum); }
};
