/* Arithmetic on f16, f16x2, bf16 and bf16x2.
 *
 * Values go through f32 and are rounded to 16 bits from there. For one sum or product the second rounding is innocent:
 * f32 has at least twice the bits of f16 and bf16 plus two, and a bf16 product that f32 cannot hold (below 2^-134) is
 * zero in bf16 anyway. A product plus a third operand goes through double instead, with odd rounding down to f32. */
#include "alu.h"

enum { HALF_ADD, HALF_SUB, HALF_MUL, HALF_FMA, HALF_MIN, HALF_MAX, HALF_EX2, HALF_TANH };

#define HALF_INLINE static inline __attribute__((always_inline)) /* format and operation become constants */

HALF_INLINE void half_load(float *restrict x, const u32 *src, int shift, int is_bf16, int ftz) {
  for (int i = 0; i < WARP_SIZE; i++) {
    const u32 bits = src[i] >> shift & 0xffff;
    x[i] = as_f32(is_bf16 ? narrow_f32_of_bf16(bits) : narrow_f32_of_f16(bits));
  }
  const float smallest_normal = is_bf16 ? 0x1p-126f : 0x1p-14f;
  if (ftz)
    for (int i = 0; i < WARP_SIZE; i++) x[i] = __builtin_fabsf(x[i]) < smallest_normal ? x[i] * 0.0f : x[i];
}

#define HALF_LANES(EXPR)                            \
  for (int i = 0; i < WARP_SIZE; i++) {             \
    const float a = x[0][i], b = x[1][i], c = x[2][i]; \
    (void)a, (void)b, (void)c;                      \
    r[i] = (EXPR);                                  \
  }                                                 \
  break;

/* Flags X2, FTZ, SAT, RELU, NAN, XORSIGN. The lowering gives as many sources as the operation has. */
HALF_INLINE int half_run(Warp *warp, const Row *row, int operation, int is_bf16) {
  const int flags = row->flags, halves = flags & ALU_X2 ? 2 : 1;
  const int is_minmax = operation == HALF_MIN || operation == HALF_MAX;
  const int num_sources = operation == HALF_FMA ? 3 : operation >= HALF_EX2 ? 1 : 2;
  u32 packed[WARP_SIZE] = {0};
  for (int half = 0; half < halves; half++) {
    float x[3][WARP_SIZE], r[WARP_SIZE];
    u32 sign[WARP_SIZE];
    for (int k = 0; k < num_sources; k++) half_load(x[k], SLOT(u32, 1 + k), 16 * half, is_bf16, flags & ALU_FTZ);
    if (is_minmax && flags & ALU_XORSIGN)
      for (int i = 0; i < WARP_SIZE; i++) {
        sign[i] = (bits_f32(x[0][i]) ^ bits_f32(x[1][i])) >> 16 & 0x8000;
        x[0][i] = __builtin_fabsf(x[0][i]);
        x[1][i] = __builtin_fabsf(x[1][i]);
      }
    switch (operation) {
      case HALF_ADD: HALF_LANES(a + b)
      case HALF_SUB: HALF_LANES(a - b)
      case HALF_MUL: HALF_LANES(a * b)
      case HALF_FMA: HALF_LANES(narrow_odd_f32(narrow_add_odd((double)a * b, (double)c)))
      case HALF_MIN: HALF_LANES(as_f32(float_min(bits_f32(a), bits_f32(b))))
      case HALF_MAX: HALF_LANES(as_f32(float_max(bits_f32(a), bits_f32(b))))
      case HALF_EX2: HALF_LANES(special_ex2(a))
      case HALF_TANH: HALF_LANES(special_tanh(a))
    }
    if (is_minmax && flags & ALU_NAN)
      for (int i = 0; i < WARP_SIZE; i++) r[i] = x[0][i] != x[0][i] || x[1][i] != x[1][i] ? as_f32(NAN_F32) : r[i];
    if (flags & ALU_SAT)
      for (int i = 0; i < WARP_SIZE; i++) r[i] = as_f32(float_saturate(bits_f32(r[i])));
    if (flags & ALU_RELU)
      for (int i = 0; i < WARP_SIZE; i++) r[i] = r[i] < 0.0f || r[i] == 0.0f ? 0.0f : r[i];
    u32 bits[WARP_SIZE];
    for (int i = 0; i < WARP_SIZE; i++) {
      const u32 wide = bits_f32(r[i]);
      bits[i] = is_bf16 ? narrow_bf16_of_f32(wide) : narrow_f16_of_f32(wide);
    }
    const u32 exponent = is_bf16 ? 0x7f80 : 0x7c00;
    if (flags & ALU_FTZ)
      for (int i = 0; i < WARP_SIZE; i++) bits[i] = (bits[i] & exponent) == 0 ? bits[i] & 0x8000 : bits[i];
    if (is_minmax && flags & ALU_XORSIGN)
      for (int i = 0; i < WARP_SIZE; i++) bits[i] = bits[i] == 0x7fff ? bits[i] : bits[i] | sign[i];
    for (int i = 0; i < WARP_SIZE; i++) packed[i] |= bits[i] << (16 * half);
  }
  alu_put32(warp, row, 0, packed);
  return STEP;
}

#define HALF_OP(NAME, OPERATION, IS_BF16) \
  static int op_##NAME(Warp *warp, const Row *row) { return half_run(warp, row, OPERATION, IS_BF16); }
#define HALF_OPS(X)              \
  X(add_f16, HALF_ADD, 0)        \
  X(add_bf16, HALF_ADD, 1)       \
  X(sub_f16, HALF_SUB, 0)        \
  X(sub_bf16, HALF_SUB, 1)       \
  X(mul_f16, HALF_MUL, 0)        \
  X(mul_bf16, HALF_MUL, 1)       \
  X(fma_f16, HALF_FMA, 0)        \
  X(fma_bf16, HALF_FMA, 1)       \
  X(min_f16, HALF_MIN, 0)        \
  X(min_bf16, HALF_MIN, 1)       \
  X(max_f16, HALF_MAX, 0)        \
  X(max_bf16, HALF_MAX, 1)       \
  X(ex2_f16, HALF_EX2, 0)        \
  X(ex2_bf16, HALF_EX2, 1)       \
  X(tanh_f16, HALF_TANH, 0)      \
  X(tanh_bf16, HALF_TANH, 1)
HALF_OPS(HALF_OP)

static const OpEntry ops_half[] = {HALF_OPS(ENTRY) {0, 0}};
