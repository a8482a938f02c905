/* f32 arithmetic. Plain forms (round to nearest, subnormals kept) have a vectorised handler each. Every other
 * combination of .ftz, .sat and rounding goes through `f32_modified`, several passes over an array. */
#include "alu.h"

/* Larger and smaller as PTX has it: a NaN loses against a number, -0 is below +0. Equal operands are equal bits or
 * zeros, where & and | of the bits choose the sign. */
static inline u32 float_max(u32 a, u32 b) {
  const float x = as_f32(a), y = as_f32(b);
  u32 r = x > y ? a : x == y ? a & b : b;
  r = y != y ? a : r;
  return alu_f32(as_f32(r));
}
static inline u32 float_min(u32 a, u32 b) {
  const float x = as_f32(a), y = as_f32(b);
  u32 r = x < y ? a : x == y ? a | b : b;
  r = y != y ? a : r;
  return alu_f32(as_f32(r));
}
static inline u32 float_nan_or(u32 a, u32 b, u32 result) {
  return as_f32(a) != as_f32(a) || as_f32(b) != as_f32(b) ? NAN_F32 : result;
}
static inline u32 float_saturate(u32 x) { return as_f32(x) > 0.0f ? (as_f32(x) < 1.0f ? x : 0x3f800000u) : 0; }

/* fmaf of every instruction set is exact; without hardware for it the compiler calls the C library. */
#define FLOAT_OPS1(X)                                                \
  X(neg_f32, u32, u32, a ^ 0x80000000u)                              \
  X(abs_f32, u32, u32, a & 0x7fffffffu)                              \
  X(flush_f32, u32, u32, alu_flush(a))                               \
  X(rcp_f32, u32, u32, alu_f32(1.0f / as_f32(a)))                    \
  X(sqrt_f32, u32, u32, alu_f32(__builtin_sqrtf(as_f32(a))))         \
  X(testp_finite_f32, u32, u32, (a & 0x7f800000u) != 0x7f800000u)    \
  X(testp_infinite_f32, u32, u32, (a & 0x7fffffffu) == 0x7f800000u)  \
  X(testp_number_f32, u32, u32, (a & 0x7fffffffu) <= 0x7f800000u)    \
  X(testp_notanumber_f32, u32, u32, (a & 0x7fffffffu) > 0x7f800000u) \
  X(testp_normal_f32, u32, u32, (a & 0x7f800000u) != 0x7f800000u && ((a & 0x7f800000u) != 0 || (a << 1) == 0)) \
  X(testp_subnormal_f32, u32, u32, (a & 0x7f800000u) == 0 && (a & 0x007fffffu) != 0)
#define FLOAT_OPS2(X)                                                \
  X(add_f32, u32, u32, u32, alu_f32(as_f32(a) + as_f32(b)))          \
  X(sub_f32, u32, u32, u32, alu_f32(as_f32(a) - as_f32(b)))          \
  X(mul_f32, u32, u32, u32, alu_f32(as_f32(a) * as_f32(b)))          \
  X(div_f32, u32, u32, u32, alu_f32(as_f32(a) / as_f32(b)))          \
  X(max_f32, u32, u32, u32, float_max(a, b))                         \
  X(min_f32, u32, u32, u32, float_min(a, b))                         \
  X(copysign_f32, u32, u32, u32, (a & 0x80000000u) | (b & 0x7fffffffu))
#define FLOAT_OPS3(X) \
  X(fma_f32, u32, u32, u32, u32, alu_f32(__builtin_fmaf(as_f32(a), as_f32(b), as_f32(c))))
FLOAT_OPS1(OP1)
FLOAT_OPS2(OP2)
FLOAT_OPS3(OP3)

/* Which operation `f32_modified` carries out, in a[4] (lowering/alu_float.py lists the names in this order). */
enum {
  FLOAT_ADD, FLOAT_SUB, FLOAT_MUL, FLOAT_FMA, FLOAT_DIV, FLOAT_DIV_APPROX, FLOAT_RCP, FLOAT_SQRT, FLOAT_RSQRT,
  FLOAT_MIN, FLOAT_MAX, FLOAT_EX2, FLOAT_LG2, FLOAT_SIN, FLOAT_COS, FLOAT_TANH, FLOAT_ABS, FLOAT_NEG, FLOAT_MOV
};

#define FLOAT_CASE(OPERATION, EXPR)                                                       \
  case OPERATION:                                                                         \
    IVDEP for (int i = 0; i < WARP_SIZE; i++) {                                           \
      const float a = as_f32(x[0][i]), b = as_f32(x[1][i]), c = as_f32(x[2][i]);          \
      (void)b, (void)c;                                                                   \
      r[i] = bits_f32(EXPR);                                                              \
    }                                                                                     \
    break;

static void float_operation(int operation, u32 (*restrict x)[WARP_SIZE], u32 *restrict r) {
  switch (operation) {
    FLOAT_CASE(FLOAT_ADD, a + b)
    FLOAT_CASE(FLOAT_SUB, a - b)
    FLOAT_CASE(FLOAT_MUL, a * b)
    FLOAT_CASE(FLOAT_FMA, __builtin_fmaf(a, b, c))
    FLOAT_CASE(FLOAT_DIV, a / b)
    FLOAT_CASE(FLOAT_DIV_APPROX, special_div_approx(a, b))
    FLOAT_CASE(FLOAT_RCP, 1.0f / a)
    FLOAT_CASE(FLOAT_SQRT, __builtin_sqrtf(a))
    FLOAT_CASE(FLOAT_RSQRT, special_rsqrt(a))
    FLOAT_CASE(FLOAT_MIN, as_f32(float_min(bits_f32(a), bits_f32(b))))
    FLOAT_CASE(FLOAT_MAX, as_f32(float_max(bits_f32(a), bits_f32(b))))
    FLOAT_CASE(FLOAT_EX2, special_ex2(a))
    FLOAT_CASE(FLOAT_LG2, special_lg2(a))
    FLOAT_CASE(FLOAT_SIN, special_sin(a))
    FLOAT_CASE(FLOAT_COS, special_cos(a))
    FLOAT_CASE(FLOAT_TANH, special_tanh(a))
    FLOAT_CASE(FLOAT_ABS, __builtin_fabsf(a))
    FLOAT_CASE(FLOAT_NEG, -a)
    FLOAT_CASE(FLOAT_MOV, a)
  }
}

/* Three sources, the operation in a[4], the rounding mode in a[5]; flags FTZ, SAT, and NAN and XORSIGN for min, max.
 * .ftz flushes the rounded result. */
static int op_f32_modified(Warp *warp, const Row *row) {
  const int operation = row->a[4], mode = row->a[5], flags = row->flags;
  u32 x[3][WARP_SIZE], sign[WARP_SIZE], r[WARP_SIZE];
  for (int k = 0; k < 3; k++) {
    const u32 *src = SLOT(u32, 1 + k);
    if (flags & ALU_FTZ) {
      IVDEP for (int i = 0; i < WARP_SIZE; i++) x[k][i] = alu_flush(src[i]);
    } else {
      IVDEP for (int i = 0; i < WARP_SIZE; i++) x[k][i] = src[i];
    }
  }
  if (flags & ALU_XORSIGN)
    IVDEP for (int i = 0; i < WARP_SIZE; i++) {
      sign[i] = (x[0][i] ^ x[1][i]) & 0x80000000u;
      x[0][i] &= 0x7fffffffu;
      x[1][i] &= 0x7fffffffu;
    }
  if (mode != ROUND_RN) {
    alu_set_rounding(mode);
    ALU_BARRIER(x);
    float_operation(operation, x, r);
    ALU_BARRIER(r);
    alu_set_rounding(ROUND_RN);
  } else {
    float_operation(operation, x, r);
  }
  if (flags & ALU_XORSIGN)
    IVDEP for (int i = 0; i < WARP_SIZE; i++) r[i] |= sign[i];
  if (flags & ALU_NAN)
    IVDEP for (int i = 0; i < WARP_SIZE; i++) r[i] = float_nan_or(x[0][i], x[1][i], r[i]);
  IVDEP for (int i = 0; i < WARP_SIZE; i++) r[i] = alu_f32(as_f32(r[i]));
  if (flags & ALU_FTZ)
    IVDEP for (int i = 0; i < WARP_SIZE; i++) r[i] = alu_flush(r[i]);
  if (flags & ALU_SAT)
    IVDEP for (int i = 0; i < WARP_SIZE; i++) r[i] = float_saturate(r[i]);
  alu_put32(warp, row, 0, r);
  return STEP;
}

static const OpEntry ops_alu_float[] = {
  FLOAT_OPS1(ENTRY) FLOAT_OPS2(ENTRY) FLOAT_OPS3(ENTRY) {"f32_modified", op_f32_modified}, {0, 0}
};
