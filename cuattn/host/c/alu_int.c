/* Integer arithmetic: add, sub, mul, mad, div, rem, abs, neg, min, max, sad and the carry chains.
 *
 * b16, b32 and b64 name operations that do not care about the sign. Narrow operands arrive zero extended; a signed
 * one is read through a cast, and a narrow result leaves through (u16). */
#include "alu.h"

#define INT_MIN_OF(a, b) ((a) < (b) ? (a) : (b))
#define INT_MAX_OF(a, b) ((a) > (b) ? (a) : (b))
#define INT_ABS_DIFF(U, a, b) ((a) < (b) ? (U)(b) - (U)(a) : (U)(a) - (U)(b))

#define INT_HALVES(T, OF) ((u16)OF((T)a, (T)b) | (u32)(u16)OF((T)(a >> 16), (T)(b >> 16)) << 16)

static inline s32 int_clamp_s32(s64 x) {
  return x > INT32_MAX ? INT32_MAX : x < INT32_MIN ? INT32_MIN : (s32)x;
}
static inline s32 int_s24(s32 x) { return (s32)((u32)x << 8) >> 8; }
static inline u32 int_u24(u32 x) { return x & 0xffffffu; }

/* NAME, destination type, operand types, expression */
#define INT_OPS1(X)                                              \
  X(neg_b16, u32, u32, (u16)-a)                                  \
  X(neg_b32, u32, u32, -a)                                       \
  X(neg_b64, u64, u64, -a)                                       \
  X(abs_s16, u32, u32, (u16)((s16)a < 0 ? -a : a))               \
  X(abs_s32, u32, u32, (s32)a < 0 ? -a : a)                      \
  X(abs_s64, u64, u64, (s64)a < 0 ? -a : a)
#define INT_OPS2(X)                                                                          \
  X(add_b16, u32, u32, u32, (u16)(a + b))                                                    \
  X(add_b32, u32, u32, u32, a + b)                                                           \
  X(add_b64, u64, u64, u64, a + b)                                                           \
  X(sub_b16, u32, u32, u32, (u16)(a - b))                                                    \
  X(sub_b32, u32, u32, u32, a - b)                                                           \
  X(sub_b64, u64, u64, u64, a - b)                                                           \
  X(add_sat_s32, u32, s32, s32, int_clamp_s32((s64)a + b))                                   \
  X(sub_sat_s32, u32, s32, s32, int_clamp_s32((s64)a - b))                                   \
  X(min_u16x2, u32, u32, u32, INT_HALVES(u16, INT_MIN_OF))                                   \
  X(max_u16x2, u32, u32, u32, INT_HALVES(u16, INT_MAX_OF))                                   \
  X(min_s16x2, u32, u32, u32, INT_HALVES(s16, INT_MIN_OF))                                   \
  X(max_s16x2, u32, u32, u32, INT_HALVES(s16, INT_MAX_OF))                                   \
  X(add_b16x2, u32, u32, u32, (u16)(a + b) | ((a & 0xffff0000u) + (b & 0xffff0000u)))        \
  X(mul_lo_b16, u32, u32, u32, (u16)(a * b))                                                 \
  X(mul_lo_b32, u32, u32, u32, a * b)                                                        \
  X(mul_lo_b64, u64, u64, u64, a * b)                                                        \
  X(mul_hi_s16, u32, u32, u32, (u16)((u32)((s32)(s16)a * (s16)b) >> 16))                     \
  X(mul_hi_u16, u32, u32, u32, (a * b) >> 16)                                                \
  X(mul_hi_s32, u32, s32, s32, (u64)((s64)a * b) >> 32)                                      \
  X(mul_hi_u32, u32, u32, u32, (u64)a * b >> 32)                                             \
  X(mul_hi_s64, u64, s64, s64, (__int128)a * b >> 64)                                        \
  X(mul_hi_u64, u64, u64, u64, (unsigned __int128)a * b >> 64)                               \
  X(mul_wide_s16, u32, u32, u32, (s32)(s16)a * (s16)b)                                       \
  X(mul_wide_u16, u32, u32, u32, a * b)                                                      \
  X(mul_wide_s32, u64, s32, s32, (s64)a * b)                                                 \
  X(mul_wide_u32, u64, u32, u32, (u64)a * b)                                                 \
  X(mul24_lo_s32, u32, s32, s32, (s64)int_s24(a) * int_s24(b))                               \
  X(mul24_lo_u32, u32, u32, u32, int_u24(a) * int_u24(b))                                    \
  X(mul24_hi_s32, u32, s32, s32, ((s64)int_s24(a) * int_s24(b)) >> 16)                       \
  X(mul24_hi_u32, u32, u32, u32, ((u64)int_u24(a) * int_u24(b)) >> 16)                       \
  X(min_s16, u32, u32, u32, (u16)INT_MIN_OF((s16)a, (s16)b))                                 \
  X(max_s16, u32, u32, u32, (u16)INT_MAX_OF((s16)a, (s16)b))                                 \
  X(min_s32, u32, s32, s32, INT_MIN_OF(a, b))                                                \
  X(max_s32, u32, s32, s32, INT_MAX_OF(a, b))                                                \
  X(min_u32, u32, u32, u32, INT_MIN_OF(a, b))                                                \
  X(max_u32, u32, u32, u32, INT_MAX_OF(a, b))                                                \
  X(min_s64, u64, s64, s64, INT_MIN_OF(a, b))                                                \
  X(max_s64, u64, s64, s64, INT_MAX_OF(a, b))                                                \
  X(min_u64, u64, u64, u64, INT_MIN_OF(a, b))                                                \
  X(max_u64, u64, u64, u64, INT_MAX_OF(a, b))
#define INT_OPS3(X)                                                                                     \
  X(mad_lo_b16, u32, u32, u32, u32, (u16)(a * b + c))                                                   \
  X(mad_lo_b32, u32, u32, u32, u32, a * b + c)                                                          \
  X(mad_lo_b64, u64, u64, u64, u64, a * b + c)                                                          \
  X(mad_hi_s16, u32, u32, u32, u32, (u16)(((u32)((s32)(s16)a * (s16)b) >> 16) + c))                     \
  X(mad_hi_u16, u32, u32, u32, u32, (u16)((a * b >> 16) + c))                                           \
  X(mad_hi_s32, u32, s32, s32, u32, (u32)((u64)((s64)a * b) >> 32) + c)                                 \
  X(mad_hi_u32, u32, u32, u32, u32, (u32)((u64)a * b >> 32) + c)                                        \
  X(mad_hi_s64, u64, s64, s64, u64, (u64)((__int128)a * b >> 64) + c)                                   \
  X(mad_hi_u64, u64, u64, u64, u64, (u64)((unsigned __int128)a * b >> 64) + c)                          \
  X(mad_hi_sat_s32, u32, s32, s32, s32, int_clamp_s32(((s64)a * b >> 32) + c))                          \
  X(mad_wide_s16, u32, u32, u32, u32, (u32)((s32)(s16)a * (s16)b) + c)                                  \
  X(mad_wide_u16, u32, u32, u32, u32, a * b + c)                                                        \
  X(mad_wide_s32, u64, s32, s32, u64, (u64)((s64)a * b) + c)                                            \
  X(mad_wide_u32, u64, u32, u32, u64, (u64)a * b + c)                                                   \
  X(sad_s16, u32, u32, u32, u32, (u16)(c + INT_ABS_DIFF(u32, (s16)a, (s16)b)))                          \
  X(sad_u16, u32, u32, u32, u32, (u16)(c + INT_ABS_DIFF(u32, a, b)))                                    \
  X(sad_s32, u32, s32, s32, u32, c + INT_ABS_DIFF(u32, a, b))                                           \
  X(sad_u32, u32, u32, u32, u32, c + INT_ABS_DIFF(u32, a, b))                                           \
  X(sad_s64, u64, s64, s64, u64, c + INT_ABS_DIFF(u64, a, b))                                           \
  X(sad_u64, u64, u64, u64, u64, c + INT_ABS_DIFF(u64, a, b))
INT_OPS1(OP1)
INT_OPS2(OP2)
INT_OPS3(OP3)

/* 32-bit quotients through doubles, which vectorise: a / b of two 32-bit integers is never so close below an integer
 * that 53 bits round it up. PTX leaves division by zero open; b = 0 is only kept from trapping or overflowing. The
 * quotient stays inside 33 signed bits, so the conversion is the one to s64. */
static inline s64 int_quotient(s64 a, s64 b) { return (s64)((double)a / (double)(b ? b : 1)); }
#define INT_DIV32(X)                                                                          \
  X(div_s16, u32, u32, u32, (u16)int_quotient((s16)a, (s16)b))                                \
  X(div_s32, u32, s32, s32, int_quotient(a, b))                                               \
  X(div_u32, u32, u32, u32, int_quotient(a, b))                                               \
  X(rem_s16, u32, u32, u32, (u16)((s16)a - (s32)int_quotient((s16)a, (s16)b) * (s16)b))       \
  X(rem_s32, u32, s32, s32, (u32)a - (u32)int_quotient(a, b) * (u32)b)                        \
  X(rem_u32, u32, u32, u32, a - (u32)int_quotient(a, b) * b)
INT_DIV32(OP2)

/* 64-bit division traps on the host for x / 0 and INT64_MIN / -1: both are defined here. */
static inline u64 int_div_u64(u64 a, u64 b) { return b ? a / b : ~(u64)0; }
static inline u64 int_div_s64(u64 a, u64 b) { return b == 0 ? ~(u64)0 : b == ~(u64)0 ? -a : (u64)((s64)a / (s64)b); }
#define INT_DIV64(X)                                                \
  X(div_s64, u64, u64, u64, int_div_s64(a, b))                      \
  X(div_u64, u64, u64, u64, int_div_u64(a, b))                      \
  X(rem_s64, u64, u64, u64, a - int_div_s64(a, b) * b)              \
  X(rem_u64, u64, u64, u64, a - int_div_u64(a, b) * b)
INT_DIV64(OP2)

/* Carry chains: the carry register is a predicate slot, destination 1 and the last source. A subtraction adds the
 * complement, as the hardware does: its carry is 0 when it borrows. W is a type twice as wide, whose bit above the
 * result is the carry. */
#define INT_CARRY(NAME, T, W, PUT, EXPR)                                     \
  static int op_##NAME(Warp *warp, const Row *row) {                         \
    const T *src_a = SLOT(T, 2), *src_b = SLOT(T, 3);                        \
    const u32 *carry_in = SLOT(u32, 4);                                      \
    T result[WARP_SIZE];                                                     \
    u32 carry_out[WARP_SIZE];                                                \
    IVDEP for (int i = 0; i < WARP_SIZE; i++) {                              \
      const W a = src_a[i], b = src_b[i], carry = carry_in[i], sum = (EXPR); \
      result[i] = (T)sum;                                                    \
      carry_out[i] = (u32)(sum >> (8 * sizeof(T))) & 1;                      \
    }                                                                        \
    PUT(warp, row, 0, result);                                               \
    alu_put32(warp, row, 1, carry_out);                                      \
    return STEP;                                                             \
  }
#define INT_CARRIES(X)                                             \
  X(addc_b32, u32, u64, alu_put32, a + b + carry)                  \
  X(addc_b64, u64, unsigned __int128, alu_put64, a + b + carry)    \
  X(subc_b32, u32, u64, alu_put32, a + (u32)~b + carry)                  \
  X(subc_b64, u64, unsigned __int128, alu_put64, a + (u64)~b + carry)
INT_CARRIES(INT_CARRY)

static const OpEntry ops_alu_int[] = {
  INT_OPS1(ENTRY) INT_OPS2(ENTRY) INT_OPS3(ENTRY) INT_DIV32(ENTRY) INT_DIV64(ENTRY) INT_CARRIES(ENTRY) {0, 0}
};
