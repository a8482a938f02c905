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
#include "common/elements.cuh"
#include "common/float8.cuh"

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

// The numbers of four stored bytes, as pairs of __half that go to x[i] and x[i + DISTANCE].
template <typename Storage>
struct WidenWord {  // 8-bit floats
    static constexpr int NUMBERS = 4, DISTANCE = 1;
    static __device__ __forceinline__ int first(int pair) { return 2 * pair; }
    static __device__ __forceinline__ unsigned widen(unsigned word, int pair) {
        return widen_spread(Storage(), __byte_perm(word, 0, pair == 0 ? 0x1404 : 0x3424));
    }
};
struct WidenE2M1 {  // see e2m1_to_float
    static constexpr int NUMBERS = 8, DISTANCE = 4;
    static __device__ __forceinline__ int first(int pair) { return pair; }
    static __device__ __forceinline__ unsigned widen(unsigned word, int pair) {
        const unsigned spread = word << (12 - 4 * pair);
        const unsigned bits = spread & 0x80008000u | spread >> 3 & 0x0e000e00u;
        const __half2 scaled = __hmul2(*reinterpret_cast<const __half2*>(&bits), __float2half2_rn(16384.0f));
        return *reinterpret_cast<const unsigned*>(&scaled);
    }
};
template <>
struct WidenWord<NvFp4> : WidenE2M1 {};
template <>
struct WidenWord<MxFp4> : WidenE2M1 {};

template <typename Storage>
constexpr bool IS_INT8 = false;
template <>
constexpr bool IS_INT8<Int8> = true;

// Numbers of stored items, without scales. Four bytes and more lie at a multiple of four.
template <typename Storage, int ITEMS, typename Real>
__device__ __forceinline__ void widen(Real (&x)[ITEMS * KvFormat<Storage>::PER_ITEM], const Storage (&items)[ITEMS]) {
    if constexpr (sizeof(Storage) == 1 && !IS_INT8<Storage> && ITEMS % 4 == 0) {
        using Word = WidenWord<Storage>;
#pragma unroll
        for (int w = 0; w < ITEMS / 4; w++) {
            const unsigned word = reinterpret_cast<const unsigned*>(items)[w];
#pragma unroll
            for (int pair = 0; pair < Word::NUMBERS / 2; pair++) {
                const unsigned widened = Word::widen(word, pair);
                const float2 numbers = __half22float2(*reinterpret_cast<const __half2*>(&widened));
                const int first = w * Word::NUMBERS + Word::first(pair);
                x[first] = numbers.x;
                x[first + Word::DISTANCE] = numbers.y;
            }
        }
        return;
    }
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
