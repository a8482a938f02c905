/* f64 arithmetic. A NaN result keeps the payload that the host gives it: PTX promises no particular NaN here. */
#include "alu.h"

#define DOUBLE_SIGN ((u64)1 << 63)
#define DOUBLE_EXPONENT ((u64)0x7ff << 52)
#define DOUBLE_MANTISSA (((u64)1 << 52) - 1)

static inline u64 double_max(u64 a, u64 b) {
  const double x = as_f64(a), y = as_f64(b);
  const u64 r = x > y ? a : x == y ? a & b : b;
  return y != y ? a : r;
}
static inline u64 double_min(u64 a, u64 b) {
  const double x = as_f64(a), y = as_f64(b);
  const u64 r = x < y ? a : x == y ? a | b : b;
  return y != y ? a : r;
}
static inline int double_subnormal(u64 a) { return (a & DOUBLE_EXPONENT) == 0 && (a & DOUBLE_MANTISSA) != 0; }
/* rcp.approx.ftz.f64 reads and writes the upper 32 bits only; subnormals flush to zeros of their sign. */
static inline u64 double_rcp_approx_ftz(u64 a) {
  const u64 upper = ~(u64)0xffffffff;
  const u64 x = a & (double_subnormal(a) ? DOUBLE_SIGN : upper);
  const u64 r = bits_f64(1.0 / as_f64(x)) & upper;
  const u64 flushed = r & (double_subnormal(r) ? DOUBLE_SIGN : upper);
  return as_f64(a) != as_f64(a) ? a : flushed;
}

/* rcp and rsqrt .approx.ftz are seeds for an iteration: they see the upper 32 bits of the operand, subnormals as
 * zeros, and return the upper 32 bits of the result. */
static inline u64 double_upper(u64 a) { return a & DOUBLE_EXPONENT ? a & ~(u64)0xffffffffu : a & DOUBLE_SIGN; }

#define DOUBLE_OPS1(X)                                                                 \
  X(neg_f64, u64, u64, a ^ DOUBLE_SIGN)                                                \
  X(abs_f64, u64, u64, a & ~DOUBLE_SIGN)                                               \
  X(rcp_f64, u64, u64, bits_f64(1.0 / as_f64(a)))                                      \
  X(rcp_approx_ftz_f64, u64, u64, double_rcp_approx_ftz(a))                            \
  X(sqrt_f64, u64, u64, bits_f64(__builtin_sqrt(as_f64(a))))                           \
  X(rsqrt_f64, u64, u64, bits_f64(1.0 / __builtin_sqrt(as_f64(a))))                    \
  X(rcp_seed_f64, u64, u64, double_upper(bits_f64(1.0 / as_f64(double_upper(a)))))     \
  X(rsqrt_seed_f64, u64, u64, double_upper(bits_f64(1.0 / __builtin_sqrt(as_f64(double_upper(a)))))) \
  X(testp_finite_f64, u32, u64, (a & DOUBLE_EXPONENT) != DOUBLE_EXPONENT)              \
  X(testp_infinite_f64, u32, u64, (a & ~DOUBLE_SIGN) == DOUBLE_EXPONENT)               \
  X(testp_number_f64, u32, u64, (a & ~DOUBLE_SIGN) <= DOUBLE_EXPONENT)                 \
  X(testp_notanumber_f64, u32, u64, (a & ~DOUBLE_SIGN) > DOUBLE_EXPONENT)              \
  X(testp_normal_f64, u32, u64, (a & DOUBLE_EXPONENT) != DOUBLE_EXPONENT && !double_subnormal(a)) \
  X(testp_subnormal_f64, u32, u64, double_subnormal(a))
#define DOUBLE_OPS2(X)                                                                 \
  X(add_f64, u64, u64, u64, bits_f64(as_f64(a) + as_f64(b)))                           \
  X(sub_f64, u64, u64, u64, bits_f64(as_f64(a) - as_f64(b)))                           \
  X(mul_f64, u64, u64, u64, bits_f64(as_f64(a) * as_f64(b)))                           \
  X(div_f64, u64, u64, u64, bits_f64(as_f64(a) / as_f64(b)))                           \
  X(max_f64, u64, u64, u64, double_max(a, b))                                          \
  X(min_f64, u64, u64, u64, double_min(a, b))                                          \
  X(copysign_f64, u64, u64, u64, (a & DOUBLE_SIGN) | (b & ~DOUBLE_SIGN))
#define DOUBLE_OPS3(X) \
  X(fma_f64, u64, u64, u64, u64, bits_f64(__builtin_fma(as_f64(a), as_f64(b), as_f64(c))))
DOUBLE_OPS1(OP1)
DOUBLE_OPS2(OP2)
DOUBLE_OPS3(OP3)

/* Directed rounding: three sources, the operation in a[4] (as in alu_float.c), the mode in a[5]. */
#define DOUBLE_CASE(OPERATION, EXPR)                                          \
  case OPERATION:                                                             \
    for (int i = 0; i < WARP_SIZE; i++) {                                     \
      const double a = x[0][i], b = x[1][i], c = x[2][i];                     \
      (void)b, (void)c;                                                       \
      r[i] = bits_f64(EXPR);                                                  \
    }                                                                         \
    break;

static int op_f64_rounded(Warp *warp, const Row *row) {
  double x[3][WARP_SIZE];
  u64 r[WARP_SIZE];
  for (int k = 0; k < 3; k++) {
    const u64 *src = SLOT(u64, 1 + k);
    for (int i = 0; i < WARP_SIZE; i++) x[k][i] = as_f64(src[i]);
  }
  alu_set_rounding(row->a[5]);
  ALU_BARRIER(x);
  switch (row->a[4]) {
    DOUBLE_CASE(FLOAT_ADD, a + b)
    DOUBLE_CASE(FLOAT_SUB, a - b)
    DOUBLE_CASE(FLOAT_MUL, a * b)
    DOUBLE_CASE(FLOAT_FMA, __builtin_fma(a, b, c))
    DOUBLE_CASE(FLOAT_DIV, a / b)
    DOUBLE_CASE(FLOAT_RCP, 1.0 / a)
    DOUBLE_CASE(FLOAT_SQRT, __builtin_sqrt(a))
  }
  ALU_BARRIER(r);
  alu_set_rounding(ROUND_RN);
  alu_put64(warp, row, 0, r);
  return STEP;
}

static const OpEntry ops_alu_double[] = {
  DOUBLE_OPS1(ENTRY) DOUBLE_OPS2(ENTRY) DOUBLE_OPS3(ENTRY) {"f64_rounded", op_f64_rounded}, {0, 0}
};
