// Runs of neighbouring elements: loaded, stored, and converted to the type that arithmetic is done in.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/ptx.cuh"

// float for the 16-bit types and float, double for double.
template <typename Element>
struct RealOf {
    using type = float;
};
template <>
struct RealOf<double> {
    using type = double;
};

__device__ __forceinline__ float to_real(float x) { return x; }
__device__ __forceinline__ double to_real(double x) { return x; }
__device__ __forceinline__ float to_real(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_real(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ __forceinline__ void from_real(float x, float& to) { to = x; }
__device__ __forceinline__ void from_real(double x, double& to) { to = x; }
__device__ __forceinline__ void from_real(float x, __half& to) { to = __float2half_rn(x); }
__device__ __forceinline__ void from_real(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }

// The widest access that moves a run of `BYTES` in whole.
template <int BYTES>
struct WordOf {
    using type = uint4;
};
template <>
struct WordOf<8> {
    using type = uint2;
};
template <>
struct WordOf<4> {
    using type = unsigned;
};
template <>
struct WordOf<2> {
    using type = unsigned short;
};
template <>
struct WordOf<1> {
    using type = unsigned char;
};

// COUNT neighbouring elements, moved 16 bytes at a time or all at once if they are fewer: their address is a multiple
// of that.
template <typename Element, int COUNT>
struct Run {
    static constexpr int BYTES = COUNT * sizeof(Element);
    using Word = typename WordOf<(BYTES < 16 ? BYTES : 16)>::type;
    static constexpr int NUM_WORDS = BYTES / sizeof(Word);
    static_assert(BYTES % sizeof(Word) == 0, "a run is whole words");
    using Real = typename RealOf<Element>::type;

    union {
        Word word[NUM_WORDS];
        Element element[COUNT];
    };

    __device__ __forceinline__ Run() {}

    // All bits 0: zeros.
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < NUM_WORDS; ++i) word[i] = Word();
    }

    __device__ __forceinline__ void load(const Element* pointer) {
#pragma unroll
        for (int i = 0; i < NUM_WORDS; ++i) word[i] = reinterpret_cast<const Word*>(pointer)[i];
    }

    __device__ __forceinline__ void store(Element* pointer) const {
#pragma unroll
        for (int i = 0; i < NUM_WORDS; ++i) reinterpret_cast<Word*>(pointer)[i] = word[i];
    }

    __device__ __forceinline__ Real get(int i) const { return to_real(element[i]); }
    __device__ __forceinline__ void set(int i, Real x) { from_real(x, element[i]); }
    // All elements; 16-bit ones are rounded two at a time where the run is long enough.
    __device__ __forceinline__ void set_all(const Real (&x)[COUNT]) {
        if constexpr (BYTES == 16 && sizeof(Element) == 2) {
            const Element tag = {};
            word[0] = make_uint4(pack_pair(tag, x[0], x[1]), pack_pair(tag, x[2], x[3]), pack_pair(tag, x[4], x[5]),
                                 pack_pair(tag, x[6], x[7]));
        } else {
#pragma unroll
            for (int i = 0; i < COUNT; ++i) set(i, x[i]);
        }
    }
};
