// Eight stored numbers as four pairs of 16-bit elements, the first of a pair in the low half: what kv_decode.cuh says,
// without a detour over float where there is a shorter way. All of it is exact.
//
// A GPU that streams narrow numbers at full bandwidth has a few instructions to spare for each of them, so that the
// ways below move bytes (__byte_perm) to where the element has them, or look them up, and put exponents right by one
// product.
#pragma once
#include "kv/kv_decode.cuh"
#include "common/ptx.cuh"

// 32-bit words that hold eight numbers.
template <typename Storage>
constexpr int STORED_WORDS = 8 / KvFormat<Storage>::PER_ITEM / 4;

__device__ __forceinline__ unsigned multiply_pair(__half, unsigned a, unsigned b) {
    const __half2 product = __hmul2(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b));
    return *reinterpret_cast<const unsigned*>(&product);
}
__device__ __forceinline__ unsigned multiply_pair(__nv_bfloat16, unsigned a, unsigned b) {
    const __nv_bfloat162 product =
        __hmul2(*reinterpret_cast<const __nv_bfloat162*>(&a), *reinterpret_cast<const __nv_bfloat162*>(&b));
    return *reinterpret_cast<const unsigned*>(&product);
}

// The product in float, rounded once.
__device__ __forceinline__ unsigned scale_pair(__half tag, unsigned pair, float scale) {
    const float2 x = __half22float2(*reinterpret_cast<const __half2*>(&pair));
    return pack_pair(tag, x.x * scale, x.y * scale);
}
__device__ __forceinline__ unsigned scale_pair(__nv_bfloat16 tag, unsigned pair, float scale) {
    const float low = __uint_as_float(pair << 16), high = __uint_as_float(pair & 0xffff0000u);
    return pack_pair(tag, low * scale, high * scale);
}

// A pair of __half as a pair of another type, exactly if it can be.
__device__ __forceinline__ unsigned from_half_pair(__half, unsigned pair) { return pair; }
__device__ __forceinline__ unsigned from_half_pair(__nv_bfloat16 tag, unsigned pair) {
    const float2 x = __half22float2(*reinterpret_cast<const __half2*>(&pair));
    return pack_pair(tag, x.x, x.y);
}

// Bytes 0 and 1, or 2 and 3, of `bytes` become the upper bytes of a pair of halves.
__device__ __forceinline__ unsigned upper_bytes(unsigned bytes, int pair) {
    return __byte_perm(bytes, 0, pair == 0 ? 0x1404 : 0x3424);
}

template <typename Element>
__device__ __forceinline__ void widen_pairs(Element tag, Float8E5M2, unsigned (&pairs)[4], const unsigned (&words)[2]) {
#pragma unroll
    for (int i = 0; i < 4; i++) pairs[i] = from_half_pair(tag, upper_bytes(words[i / 2], i % 2));
}

// e4m3 has no infinity, and one NaN, 0x7f: exponent and mantissa go where __half has them, and the product puts the
// exponent right; only then does a NaN have to be told from the largest numbers, if there is one.
template <typename Element>
__device__ __forceinline__ void widen_pairs(Element tag, Float8E4M3, unsigned (&pairs)[4], const unsigned (&words)[2]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const unsigned spread = upper_bytes(words[i / 2], i % 2);
        const unsigned scaled = (spread & 0x80008000u) | (spread >> 1 & 0x3f803f80u);
        pairs[i] = multiply_pair(__half(), scaled, 0x5c005c00u);  // 256
    }
    const unsigned nans = ((words[0] & 0x7f7f7f7fu) + 0x01010101u) | ((words[1] & 0x7f7f7f7fu) + 0x01010101u);
    if (nans & 0x80808080u) {
#pragma unroll
        for (int i = 0; i < 4; i++) pairs[i] = widen_pair(Float8E4M3(), words[i / 2] >> i % 2 * 16 & 0xffffu);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) pairs[i] = from_half_pair(tag, pairs[i]);
}

// Bytes that count from -128 are the last bits of a __half near 1024, or of a float near 2^23.
__device__ __forceinline__ void widen_pairs(__half, Int8, unsigned (&pairs)[4], const unsigned (&words)[2]) {
    const __half2 offset = __float2half2_rn(1152.0f);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const unsigned bits = __byte_perm(words[i / 2] ^ 0x80808080u, 0x64646464u, i % 2 == 0 ? 0x4140 : 0x4342);
        const __half2 pair = __hsub2(*reinterpret_cast<const __half2*>(&bits), offset);
        pairs[i] = *reinterpret_cast<const unsigned*>(&pair);
    }
}
__device__ __forceinline__ void widen_pairs(__nv_bfloat16 tag, Int8, unsigned (&pairs)[4],
                                            const unsigned (&words)[2]) {
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const unsigned bits = __byte_perm(words[i / 4] ^ 0x80808080u, 0x4b000000u, 0x7440 + i % 4);
        x[i] = __uint_as_float(bits) - 8388736.0f;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) pairs[i] = pack_pair(tag, x[2 * i], x[2 * i + 1]);
}

// The bytes of e2m1 magnitudes as elements, four codes of four bits at a time: 0, 0.5, 1, 1.5, 2, 3, 4, 6.
__device__ __forceinline__ unsigned e2m1_upper_bytes(__half, unsigned codes) {
    return __byte_perm(0x3e3c3800u, 0x46444240u, codes);
}
__device__ __forceinline__ unsigned e2m1_upper_bytes(__nv_bfloat16, unsigned codes) {
    return __byte_perm(0x3f3f3f00u, 0x40404040u, codes);
}
__device__ __forceinline__ unsigned e2m1_lower_bytes(__half, unsigned) { return 0; }
__device__ __forceinline__ unsigned e2m1_lower_bytes(__nv_bfloat16, unsigned codes) {
    return __byte_perm(0xc0800000u, 0xc0804000u, codes);
}

template <typename Element>
__device__ __forceinline__ void widen_e2m1(Element tag, unsigned (&pairs)[4], unsigned word) {
    const unsigned even_signs = (word & 0x08080808u) << 4, odd_signs = word & 0x80808080u;  // in the top bits of bytes
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const unsigned codes = (word & 0x77777777u) >> 16 * half;
        const unsigned signs = __byte_perm(even_signs, odd_signs, half == 0 ? 0x5140 : 0x7362);
        const unsigned upper = e2m1_upper_bytes(tag, codes) | signs, lower = e2m1_lower_bytes(tag, codes);
        pairs[2 * half] = __byte_perm(lower, upper, 0x5140);
        pairs[2 * half + 1] = __byte_perm(lower, upper, 0x7362);
    }
}
template <typename Element>
__device__ __forceinline__ void widen_pairs(Element tag, NvFp4, unsigned (&pairs)[4], const unsigned (&words)[1]) {
    widen_e2m1(tag, pairs, words[0]);
}
template <typename Element>
__device__ __forceinline__ void widen_pairs(Element tag, MxFp4, unsigned (&pairs)[4], const unsigned (&words)[1]) {
    widen_e2m1(tag, pairs, words[0]);
}

// The scale of a block, twice; exact but for those of MxFp4 that __half does not reach.
template <typename Element, typename Storage>
__device__ __forceinline__ unsigned block_scale_pair(Element tag, Storage storage, unsigned char bits) {
    const float scale = block_scale(storage, bits);
    return pack_pair(tag, scale, scale);
}
