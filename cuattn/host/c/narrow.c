/* Narrow floating-point formats: encoding and decoding of one value. Used by convert.c and half.c.
 *
 * The vectorised conversions round to nearest from f32. `narrow_encode` is the general one: any format, any rounding
 * mode, from a double that is either the exact value or rounded to odd (then a second rounding cannot go wrong). */
#include <math.h>

#include "alu.h"

#if defined(__F16C__) && defined(__AVX2__)
#include <immintrin.h>
#endif

/* f16 to f32, exactly; a NaN keeps its payload. Subnormals: the mantissa under an exponent, minus that power of two. */
static inline u32 narrow_f32_of_f16(u32 h) {
  const u32 magnitude = (h & 0x7fff) << 13, exponent = magnitude & 0x0f800000u;
  const u32 normal = magnitude + ((127 - 15) << 23);
  const u32 subnormal = bits_f32(as_f32(magnitude + (113u << 23)) - as_f32(113u << 23));
  const u32 special = normal + ((128 - 16) << 23);
  return (exponent == 0 ? subnormal : exponent == 0x0f800000u ? special : normal) | (h & 0x8000) << 16;
}
static inline u32 narrow_f32_of_bf16(u32 h) { return h << 16; }

/* f32 to f16, to nearest even. A subnormal result comes out of an f32 addition whose last place is 2^-24. */
static inline u32 narrow_f16_of_f32(u32 x) {
  const u32 magnitude = x & 0x7fffffffu;
  const u32 normal = (magnitude - ((127 - 15) << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  const u32 subnormal = bits_f32(as_f32(magnitude) + 0.5f) - 0x3f000000u;
  const u32 finite = magnitude < 0x38800000u ? subnormal : normal;
  const u32 large = magnitude > 0x7f800000u ? 0x7fffu : 0x7c00u; /* 65520 and above, infinity, NaN */
  const u32 sign = magnitude > 0x7f800000u ? 0 : x >> 16 & 0x8000;
  return (magnitude >= 0x477ff000u ? large : finite) | sign;
}
/* The same for 32 lanes. Packing probabilities for the tensor cores makes this one of the hottest conversions, so the
 * processor's instruction is used where there is one; only its NaN differs. */
static inline void narrow_f16_lanes(u32 *restrict result, const u32 *src) {
#if defined(__AVX512BW__)
  for (int i = 0; i < WARP_SIZE; i += 16) {
    const __m512 x = _mm512_loadu_ps((const float *)(src + i));
    const __m512i half = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    _mm512_storeu_si512(result + i, _mm512_mask_blend_epi32(is_nan, half, _mm512_set1_epi32(0x7fff)));
  }
#elif defined(__F16C__) && defined(__AVX2__)
  for (int i = 0; i < WARP_SIZE; i += 8) {
    const __m256 x = _mm256_loadu_ps((const float *)(src + i));
    const __m256i half = _mm256_cvtepu16_epi32(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    _mm256_storeu_si256((__m256i *)(result + i), _mm256_blendv_epi8(half, _mm256_set1_epi32(0x7fff), is_nan));
  }
#else
  IVDEP for (int i = 0; i < WARP_SIZE; i++) result[i] = narrow_f16_of_f32(src[i]);
#endif
}
static inline u32 narrow_bf16_of_f32(u32 x) {
  const u32 rounded = (x + 0x7fff + (x >> 16 & 1)) >> 16;
  return (x & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : rounded;
}

/* tf32 is an f32 register of which 10 mantissa bits count. */
static inline u32 narrow_rna_tf32(u32 x) {
  const u32 magnitude = x & 0x7fffffffu;
  return magnitude > 0x7f800000u ? NAN_F32 : magnitude == 0x7f800000u ? x : (x + 0x1000) & ~0x1fffu;
}

typedef struct {
  s32 mantissa_bits, min_exponent; /* of the smallest normal number */
  u32 max_finite, infinity, nan, sign;
} NarrowFormat;
enum { NARROW_F16, NARROW_BF16, NARROW_TF32, NARROW_F32, NARROW_E4M3, NARROW_E5M2, NUM_NARROW_FORMATS };
/* e4m3 has no infinity: PTX only converts to it with .satfinite. tf32 in units of its last place, 2^13. */
static const NarrowFormat narrow_formats[NUM_NARROW_FORMATS] = {
  {10, -14, 0x7bff, 0x7c00, 0x7fff, 0x8000},
  {7, -126, 0x7f7f, 0x7f80, 0x7fff, 0x8000},
  {10, -126, 0x3fbff, 0x3fc00, 0x3ffff, 0x40000},
  {23, -126, 0x7f7fffff, 0x7f800000, NAN_F32, 0x80000000u},
  {3, -6, 0x7e, 0x7f, 0x7f, 0x80},
  {2, -14, 0x7b, 0x7c, 0x7f, 0x80},
};

static u32 narrow_encode(double x, const NarrowFormat *format, int mode, int satfinite) {
  if (x != x) return format->nan;
  const u32 sign = signbit(x) ? format->sign : 0;
  const double magnitude = fabs(x);
  if (magnitude == 0) return sign;
  if (magnitude == INFINITY) return sign | (satfinite ? format->max_finite : format->infinity);
  int exponent;
  frexp(magnitude, &exponent);
  exponent = exponent - 1 < format->min_exponent ? format->min_exponent : exponent - 1;
  const double scaled = ldexp(magnitude, format->mantissa_bits - exponent);
  const double whole = floor(scaled), rest = scaled - whole;
  int up = 0;
  switch (mode) {
    case ROUND_RN: up = rest > 0.5 || (rest == 0.5 && ((u32)whole & 1)); break;
    case ROUND_RM: up = rest > 0 && sign; break;
    case ROUND_RP: up = rest > 0 && !sign; break;
    case ROUND_RNA: up = rest >= 0.5; break;
  }
  /* `whole` holds the implicit bit of a normal number, which raises the exponent field from 0 to 1. */
  const u64 bits = ((u64)(exponent - format->min_exponent) << format->mantissa_bits) + (u64)whole + (u64)up;
  if (bits <= format->max_finite) return (u32)bits | sign;
  const int nearest = mode == ROUND_RN || mode == ROUND_RNA;
  const int to_infinity = nearest || (mode == ROUND_RM && sign) || (mode == ROUND_RP && !sign);
  return sign | (to_infinity && !satfinite ? format->infinity : format->max_finite);
}

/* fp8 to its value: an e5m2 is the upper half of an f16; an e4m3 has one NaN a sign and no infinity. */
static inline double narrow_of_e5m2(u32 byte) { return as_f32(narrow_f32_of_f16(byte << 8)); }
static inline double narrow_of_e4m3(u32 byte) {
  const int exponent = byte >> 3 & 15, mantissa = byte & 7;
  const double magnitude = exponent == 0 ? mantissa * 0x1p-9 : ldexp(8 + mantissa, exponent - 10);
  return (byte & 0x7f) == 0x7f ? (double)NAN : byte & 0x80 ? -magnitude : magnitude;
}

/* Rounding to odd: the result of an inexact operation, moved so that its last bit says "inexact". From it one more
 * rounding, to a format at least two bits narrower, gives what a single rounding would. */
static inline double narrow_odd_f64(double sum, double error) {
  const u64 bits = bits_f64(sum);
  const int away = (error > 0) == (sum < 0); /* the rounding went away from zero */
  const u64 odd = (bits - (u64)away) | 1;
  return error == 0 || error != error ? sum : as_f64(odd);
}
static inline float narrow_odd_f32(double x) {
  const float rounded = (float)x;
  const u32 bits = bits_f32(rounded);
  const u32 odd = (bits - (__builtin_fabs((double)rounded) > __builtin_fabs(x))) | 1;
  return (double)rounded == x || x != x ? rounded : as_f32(odd);
}
/* x + y to odd; `error` is Knuth's exact error of the sum, NaN when the sum is infinite or NaN. */
static inline double narrow_add_odd(double x, double y) {
  const double sum = x + y, part = sum - x, error = (x - (sum - part)) + (y - part);
  return narrow_odd_f64(sum, error);
}
static inline double narrow_odd_of_u64(u64 x) { /* 53 bits, the last of them sticky */
  return x >> 53 ? (double)(x >> 11 | ((x & 2047) != 0)) * 2048.0 : (double)x;
}
