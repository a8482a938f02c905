// Formats of cached keys and values: from what is stored to numbers. Every stored number is exact in float; in __half
// as well but for block scales of MxFp4, whose range is that of float.
//
// The 16-, 32- and 64-bit float types are stored as they are. Of the others:
//
//   Float8E4M3, Float8E5M2   float8.cuh
//   Int8                     -128 to 127
//   NvFp4, MxFp4             two e2m1 numbers a byte, the first in the low nibble: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their
//                            negatives; times a scale for each block of 16 numbers (e4m3), or of 32 (e8m0: a power
//                            of 2)
//
// (Open Compute Project, "Microscaling formats specification", 2023.)
#pragma once
#include "elements.cuh"
#include "float8.cuh"

struct Int8 {
    signed char bits;
};
struct NvFp4 {
    unsigned char bits;
};
struct MxFp4 {
    unsigned char bits;
};

// Numbers in a stored item, and numbers that share a block scale (0: no such scales).
template <typename Storage>
struct KvFormat {
    static constexpr int PER_ITEM = 1, BLOCK = 0;
};
template <>
struct KvFormat<NvFp4> {
    static constexpr int PER_ITEM = 2, BLOCK = 16;
};
template <>
struct KvFormat<MxFp4> {
    static constexpr int PER_ITEM = 2, BLOCK = 32;
};

__device__ __forceinline__ float to_real(Int8 x) { return static_cast<float>(x.bits); }

// One e2m1 number from the low four bits: they are the top bits of a __half but for its exponent, which the factor puts
// right.
__device__ __forceinline__ float e2m1_to_float(unsigned nibble) {
    const unsigned bits = (nibble & 8u) << 12 | (nibble & 7u) << 9;
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits))) * 16384.0f;
}

__device__ __forceinline__ float block_scale(NvFp4, unsigned char scale) { return to_real(Float8E4M3{scale}); }
// 2^(scale - 127); the smallest is a subnormal float, 255 is NaN.
__device__ __forceinline__ float block_scale(MxFp4, unsigned char scale) {
    return __int_as_float(scale == 255 ? 0x7fffffff : scale == 0 ? 0x00400000 : scale << 23);
}

// Numbers of stored items, without scales.
template <typename Storage, int ITEMS, typename Real>
__device__ __forceinline__ void widen(Real (&x)[ITEMS * KvFormat<Storage>::PER_ITEM], const Storage (&items)[ITEMS]) {
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        if constexpr (KvFormat<Storage>::PER_ITEM == 2) {
            x[2 * i] = e2m1_to_float(items[i].bits & 15u);
            x[2 * i + 1] = e2m1_to_float(items[i].bits >> 4);
        } else {
            x[i] = to_real(items[i]);
        }
    }
}
