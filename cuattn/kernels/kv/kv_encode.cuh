// Formats of cached keys and values: from numbers to what is stored, the opposite of kv_decode.cuh. Codes are the
// nearest ones, ties to even, and saturate: what is larger than the largest finite number, infinity included, becomes
// that number. NaN stays NaN in the 8-bit floats; the other formats have none, and 0 stands in for it.
//
// Scales that are made here come from the largest magnitude of the numbers that share them. It is kept as the bits of a
// float without its sign: as integers they have the order of the numbers, with infinity above every number and NaN
// above infinity, so that one integer maximum does it all.
#pragma once
#include "kv/kv_decode.cuh"

constexpr unsigned INFINITY_BITS = 0x7f800000u;
constexpr unsigned LARGEST_FLOAT_BITS = 0x7f7fffffu;

__device__ __forceinline__ unsigned magnitude_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// The magnitude that a scale is made from: an infinite one counts as the largest float, so that the scale is finite.
__device__ __forceinline__ float scaled_magnitude(unsigned bits) {
    return __uint_as_float(bits == INFINITY_BITS ? LARGEST_FLOAT_BITS : bits);
}

// x / scale, and 0 where the scale is: what shares it is too small for it, or nothing but zeros and NaN.
__device__ __forceinline__ float unscaled(float x, float scale) {
    if (scale == 0.0f) return x != x ? x : 0.0f;
    return __fdiv_rn(x, scale);
}

// --- codes -----------------------------------------------------------------------------------------------------------

// The code of a number that the format holds at least nearly: 0 <= magnitude <= its largest.
template <int MANTISSA_BITS, int BIAS>
__device__ __forceinline__ unsigned nearest_code(float magnitude) {
    constexpr int DROPPED_BITS = 23 - MANTISSA_BITS;
    // Below the smallest normal number codes are evenly spaced, and a float of this size has its last place there: the
    // sum is rounded to it.
    const float place = __uint_as_float(static_cast<unsigned>(127 + 24 - BIAS - MANTISSA_BITS) << 23);
    if (magnitude < __uint_as_float(static_cast<unsigned>(128 - BIAS) << 23)) {
        return __float_as_uint(__fadd_rn(magnitude, place)) - __float_as_uint(place);
    }
    const unsigned bits = __float_as_uint(magnitude);
    const unsigned is_odd = bits >> DROPPED_BITS & 1u;
    return (bits + (1u << (DROPPED_BITS - 1)) - 1u + is_odd >> DROPPED_BITS) - ((127 - BIAS) << MANTISSA_BITS);
}

// BITS of a code, the largest number MAX, and whether there is a code for NaN.
template <typename Storage>
struct KvCode;

template <>
struct KvCode<Float8E4M3> {
    static constexpr int BITS = 8;
    static constexpr bool HAS_NAN = true;
    static constexpr float MAX = 448.0f;

    static __device__ __forceinline__ unsigned of(float x) {
        const unsigned sign = __float_as_uint(x) >> 24 & 0x80u;
        return x != x ? sign | 0x7fu : sign | nearest_code<3, 7>(fminf(fabsf(x), MAX));
    }
};

template <>
struct KvCode<Float8E5M2> {
    static constexpr int BITS = 8;
    static constexpr bool HAS_NAN = true;
    static constexpr float MAX = 57344.0f;

    static __device__ __forceinline__ unsigned of(float x) {
        const unsigned sign = __float_as_uint(x) >> 24 & 0x80u;
        return x != x ? sign | 0x7eu : sign | nearest_code<2, 15>(fminf(fabsf(x), MAX));
    }
};

// Symmetric: -128 is never used.
template <>
struct KvCode<Int8> {
    static constexpr int BITS = 8;
    static constexpr bool HAS_NAN = false;
    static constexpr float MAX = 127.0f;

    static __device__ __forceinline__ unsigned of(float x) {
        const int code = x != x ? 0 : __float2int_rn(fminf(fmaxf(x, -MAX), MAX));
        return static_cast<unsigned>(code) & 0xffu;
    }
};

struct E2M1Code {
    static constexpr int BITS = 4;
    static constexpr bool HAS_NAN = false;
    static constexpr float MAX = 6.0f;

    static __device__ __forceinline__ unsigned of(float x) {
        const unsigned sign = __float_as_uint(x) >> 28 & 0x8u;
        return x != x ? 0u : sign | nearest_code<1, 1>(fminf(fabsf(x), MAX));
    }
};
template <>
struct KvCode<NvFp4> : E2M1Code {};
template <>
struct KvCode<MxFp4> : E2M1Code {};

// --- scales ----------------------------------------------------------------------------------------------------------

// What is stored as the scale of a block, on top of the scale of the whole tensor. Rounded to e4m3: a block with its
// largest number just above 6 times that saturates there.
__device__ __forceinline__ unsigned char make_block_scale(NvFp4, unsigned largest_bits, float tensor_scale) {
    const float needed = __fdiv_rn(__fdiv_rn(scaled_magnitude(largest_bits), KvCode<NvFp4>::MAX), tensor_scale);
    return static_cast<unsigned char>(KvCode<Float8E4M3>::of(needed));
}

// The power of two that takes the first digit of the largest number to that of 6, the largest code: 2^2. NaN is 255.
__device__ __forceinline__ unsigned char make_block_scale(MxFp4, unsigned largest_bits, float tensor_scale) {
    const float needed = __fdiv_rn(scaled_magnitude(largest_bits), tensor_scale);
    const unsigned exponent = __float_as_uint(scaled_magnitude(magnitude_bits(needed))) >> 23;
    return static_cast<unsigned char>(exponent == 255u ? 255u : exponent < 2u ? 0u : exponent - 2u);
}
