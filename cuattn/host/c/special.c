/* The approximate functions: ex2, lg2, rcp, rsqrt, sqrt, sin, cos, tanh, div.approx.
 *
 * A GPU has its own tables, so equal bits are not the aim: these are closer to the true value than PTX promises, and
 * they are the same on every host. ex2 runs for every score of an attention kernel and has to vectorise: 2^x =
 * 2^n p(f) with n = round(x), f in [-1/2, 1/2] and p of degree 6 (relative error 2^-29; in all < 1.2 ulp, subnormal
 * results included). The others go through double and are right to 0.51 ulp. */
#include "alu.h"

static inline float special_ex2(float x) {
  /* Beyond these the result is infinity or zero; NaN fails both tests and stays. */
  float z = x < -152.0f ? -152.0f : x;
  z = z > 129.0f ? 129.0f : z;
  const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer, kept in the low bits */
  const float shifted = z + magic;
  const s32 n = (s32)(bits_f32(shifted) - bits_f32(magic));
  const float f = z - (shifted - magic);
  float p = 0x1.41d32ep-13f;
  p = p * f + 0x1.5f456ap-10f;
  p = p * f + 0x1.3b2dbcp-7f;
  p = p * f + 0x1.c6aed4p-5f;
  p = p * f + 0x1.ebfbdap-3f;
  p = p * f + 0x1.62e430p-1f;
  p = p * f + 1.0f;
  /* 2^n in two factors, each of them normal: the product by the first is exact, the one by the second rounds once. */
  const s32 half = n >> 1;
  const float scale1 = as_f32((u32)(half + 127) << 23), scale2 = as_f32((u32)(n - half + 127) << 23);
  return p * scale1 * scale2; /* NaN for NaN: f is one, whatever n has become */
}

/* log2 m for m in [sqrt(1/2), sqrt(2)] is s q(s^2) with s = (m - 1) / (m + 1); relative error 4e-12. */
static inline float special_lg2(float x) {
  const float scaled = bits_f32(x) < 0x00800000u ? x * 0x1p23f : x; /* a positive subnormal becomes normal */
  const u32 bits = bits_f32(scaled);
  const u32 biased = bits - 0x3f3504f3u; /* sqrt(1/2): the exponent counts from there */
  const s32 e = (s32)biased >> 23;
  const double m = as_f32((biased & 0x007fffffu) + 0x3f3504f3u);
  const double s = (m - 1.0) / (m + 1.0), z = s * s;
  double q = 0x1.5ce7ceb3be626p-2;
  q = q * z + 0x1.a58d8fb3e7711p-2;
  q = q * z + 0x1.27777fda7d32cp-1;
  q = q * z + 0x1.ec709d12e1326p-1;
  q = q * z + 0x1.71547652bede6p+1;
  const float result = (float)((double)(e - (scaled != x ? 23 : 0)) + s * q);
  const u32 in = bits_f32(x);
  return (in << 1) == 0 ? -__builtin_inff() : in > 0x7f800000u ? __builtin_nanf("") : in == 0x7f800000u ? x : result;
}

static inline float special_rsqrt(float x) { return (float)(1.0 / __builtin_sqrt((double)x)); }

/* div.approx: a result of zero where 1/b would be subnormal, and inf / such a b is inf * 0. */
static inline float special_div_approx(float a, float b) {
  const float magnitude = __builtin_fabsf(b);
  const int tiny_reciprocal = magnitude > 0x1p126f && magnitude < __builtin_inff();
  return tiny_reciprocal ? a * (0.0f * b) : a / b;
}

static inline float special_sin(float x) { return (float)__builtin_sin((double)x); }
static inline float special_cos(float x) { return (float)__builtin_cos((double)x); }
static inline float special_tanh(float x) { return (float)__builtin_tanh((double)x); }

#define SPECIAL_OPS1(X)                                            \
  X(ex2_f32, u32, u32, alu_f32(special_ex2(as_f32(a))))            \
  X(ex2_ftz_f32, u32, u32, alu_flush(alu_f32(special_ex2(as_f32(a))))) \
  X(lg2_f32, u32, u32, alu_f32(special_lg2(as_f32(a))))            \
  X(rsqrt_f32, u32, u32, alu_f32(special_rsqrt(as_f32(a))))        \
  X(sin_f32, u32, u32, alu_f32(special_sin(as_f32(a))))            \
  X(cos_f32, u32, u32, alu_f32(special_cos(as_f32(a))))            \
  X(tanh_f32, u32, u32, alu_f32(special_tanh(as_f32(a))))
#define SPECIAL_OPS2(X) X(div_approx_f32, u32, u32, u32, alu_f32(special_div_approx(as_f32(a), as_f32(b))))
SPECIAL_OPS1(OP1)
SPECIAL_OPS2(OP2)

static const OpEntry ops_special[] = {SPECIAL_OPS1(ENTRY) SPECIAL_OPS2(ENTRY) {0, 0}};
