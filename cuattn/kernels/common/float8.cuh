// 8-bit floats in memory, widened to __half on their way to shared memory. Both formats fit exactly: every e4m3 and
// every e5m2 number, subnormals included, is a __half. Bit operations do it on every architecture.
#pragma once
#include <cuda_fp16.h>

// 1 sign, 4 exponent (bias 7), 3 mantissa bits; no infinities, and S.1111.111 is NaN.
struct Float8E4M3 {
    unsigned char bits;
};

// 1 sign, 5 exponent (bias 15), 2 mantissa bits: the upper byte of a __half.
struct Float8E5M2 {
    unsigned char bits;
};

// Two numbers, each in the upper byte of a half of `spread`, as a pair of __half.
__device__ __forceinline__ unsigned widen_spread(Float8E5M2, unsigned spread) { return spread; }

__device__ __forceinline__ unsigned widen_spread(Float8E4M3, unsigned spread) {
    // Exponent and mantissa one place down, where __half has them; its bias is larger by 8, which the factor puts
    // right.
    const unsigned magnitude = spread >> 1 & 0x3f803f80u;
    // Of a NaN, all seven bits set, the sum carries into the top bit of the exponent: a NaN of __half.
    const unsigned is_nan = magnitude + 0x00800080u & 0x40004000u;
    const unsigned scaled = spread & 0x80008000u | magnitude | is_nan;
    const __half2 widened = __hmul2(*reinterpret_cast<const __half2*>(&scaled), __float2half2_rn(256.0f));
    return *reinterpret_cast<const unsigned*>(&widened);
}

// Two numbers in the low 16 bits of `pair`, the first in the lowest byte, as a pair of __half.
template <typename Storage>
__device__ __forceinline__ unsigned widen_pair(Storage format, unsigned pair) {
    return widen_spread(format, (pair & 0xffu) << 8 | (pair & 0xff00u) << 16);
}

// One number.
__device__ __forceinline__ float to_real(Float8E5M2 x) { return __half2float(__ushort_as_half(widen_pair(x, x.bits))); }
__device__ __forceinline__ float to_real(Float8E4M3 x) { return __half2float(__ushort_as_half(widen_pair(x, x.bits))); }
