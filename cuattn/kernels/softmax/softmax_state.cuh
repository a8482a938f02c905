// The state of a softmax row, and how states are combined.
//
// A row is summarised by (row_max, row_sum): row_max = max x, row_sum = sum of e^(x - row_max). Milakov and Gimelshein,
// "Online normalizer calculation for softmax" (2018): the states of any two parts of a row combine into that of both.
//
// Conventions, so that no special case is needed elsewhere:
// - an empty part is (-inf, 0); a part that is all -inf has the same state;
// - fmax ignores NaN, so row_max is never NaN; a NaN element, and a +inf one (inf - inf), turn row_sum into NaN
//   instead, and NaN sums stay NaN.
//
// Needs from the constants: Element.
#pragma once

template <typename T>
struct AccumulatorOf {
    using type = float;
};
template <>
struct AccumulatorOf<double> {
    using type = double;
};
using Accumulator = AccumulatorOf<Element>::type;

constexpr int WARP_SIZE = 32;
constexpr unsigned FULL_WARP = 0xffffffffu;

// Aligned so that a state moves as one 8- or 16-byte access.
struct alignas(2 * sizeof(Accumulator)) RowState {
    Accumulator row_max;
    Accumulator row_sum;
};

__device__ __forceinline__ Accumulator infinity() { return static_cast<Accumulator>(__int_as_float(0x7f800000)); }

__device__ __forceinline__ RowState empty_state() { return {-infinity(), Accumulator(0)}; }

// expf, not exp2f(x * log2e): rounding that product costs |x| / 2 ulp. expf is ex2 too, with log2e in two parts: a few
// more FMAs, hidden by the memory traffic.
__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }
__device__ __forceinline__ float maximum(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double maximum(double a, double b) { return fmax(a, b); }

// What to subtract in the exponent: -inf - -inf would be NaN; e^(-inf - 0) is the 0 that an all -inf part must give.
__device__ __forceinline__ Accumulator exponent_shift(Accumulator row_max) {
    return row_max == -infinity() ? Accumulator(0) : row_max;
}

// The sum of `state` as it counts under a larger maximum.
__device__ __forceinline__ Accumulator rescaled_sum(RowState state, Accumulator row_max) {
    return state.row_sum * exponential(state.row_max - exponent_shift(row_max));
}

// The state of two parts together. Only the part with the smaller maximum is rescaled, so that the result has the same
// bits in either order.
__device__ __forceinline__ RowState merge(RowState a, RowState b) {
    const bool a_is_larger = a.row_max >= b.row_max;
    const RowState larger = a_is_larger ? a : b;
    const RowState smaller = a_is_larger ? b : a;
    return {larger.row_max, larger.row_sum + rescaled_sum(smaller, larger.row_max)};
}

// log(sum of e^x), natural: -inf for an empty part.
__device__ __forceinline__ Accumulator logsumexp(RowState state) {
    return exponent_shift(state.row_max) + logarithm(state.row_sum);
}
