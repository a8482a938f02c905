// The log-sum-exp of a query as the kernels of the backward pass take it, "ready": made by attention_backward_rows.cu.
//
// - A query that sees no key has +inf instead of -inf, so that its probabilities are e^(-inf) = 0.
// - Where logits are base 2 (tensor cores, without options on the logits) so is lse, less LOG2_P_FACTOR, which makes
//   the probabilities that much larger: e^(logit - lse) 2^LOG2_P_FACTOR is one fused multiply-add and exp2.
// - One float says a large lse to 2^-24 of its size only: from LARGE_LSE on that is felt in a probability, and at 10^9
//   a probability of 1 could become 2^64, or 0. Those exponents are taken from natural logits, rounded as the forward
//   rounded them, and end at 0: the probability of a key beside which the others are nothing is 1, and that of no key
//   is more. For them a base-2 row has twice the natural lse, which no other row reaches.
//
// Constants used: Element, by way of probability_factor.cuh.
#pragma once
#include "attention/online_softmax.cuh"
#include "attention/probability_factor.cuh"

template <typename Real>
__device__ __forceinline__ constexpr Real large_lse() {
    return Real(32768);
}

template <typename Real>
__device__ __forceinline__ Real make_ready_lse(Real lse, bool base_2) {
    if (lse == negative_infinity<Real>()) return -lse;
    if (!base_2) return lse;
    const Real shift = fma(lse, log2_e<Real>(), Real(-LOG2_P_FACTOR));
    return fabs(shift) < large_lse<Real>() ? shift : Real(2) * lse;
}

// NaN is not large; the +inf of a query that sees nothing is, and its probabilities are 0 all the same.
template <typename Real>
__device__ __forceinline__ bool is_large(Real ready_lse) {
    return fabs(ready_lse) >= large_lse<Real>();
}
