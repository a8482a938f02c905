// What probabilities are multiplied with before they are rounded to elements for their product with v (or dout): a
// power of two that takes the largest one near the end of the format. It leaves with the sum, to the bit.
//
// float16 ends at 65504 and at 2^-24: a probability of 1 becomes 2^15, and what is lost lies below 2^-40. e4m3 ends at
// 448 and at 2^-9. bfloat16, tf32 and wider types have the exponents of float, and need none.
//
// Constant used: Element.
#pragma once
#include "common/float8.cuh"
#include "common/ptx.cuh"

template <typename Element>
constexpr int LOG2_P_FACTOR_OF = 0;
template <>
constexpr int LOG2_P_FACTOR_OF<__half> = 15;
template <>
constexpr int LOG2_P_FACTOR_OF<Float8E4M3> = 8;

constexpr int LOG2_P_FACTOR = LOG2_P_FACTOR_OF<Element>;
constexpr float INVERSE_P_FACTOR = 1.0f / (1 << LOG2_P_FACTOR);
