/* How the arithmetic handlers are written: templates for X-macro lists, so that an operation is one line.
 *
 * OP1, OP2 and OP3 take NAME, the type of the destination's lanes, the types of the operands' lanes and an expression
 * of the operand values a, b, c. A list of such lines is expanded twice: into handlers, and with ENTRY into the
 * table of names. The expression runs for all 32 lanes, active or not (see EACH_LANE). */
#ifndef CUATTN_ALU_H
#define CUATTN_ALU_H

#include <fenv.h>

#include "executor.h"

#define ALU_READ(T, x) const T x __attribute__((unused)) = src_##x[i];
#define OP1(NAME, D, A, EXPR)                                  \
  static int op_##NAME(Warp *warp, const Row *row) {           \
    const A *src_a = SLOT(A, 1);                               \
    EACH_LANE(D, ({ ALU_READ(A, a) (EXPR); }));         \
  }
#define OP2(NAME, D, A, B, EXPR)                                                    \
  static int op_##NAME(Warp *warp, const Row *row) {                                \
    const A *src_a = SLOT(A, 1);                                                    \
    const B *src_b = SLOT(B, 2);                                                    \
    EACH_LANE(D, ({ ALU_READ(A, a) ALU_READ(B, b) (EXPR); }));        \
  }
#define OP3(NAME, D, A, B, C, EXPR)                                                                        \
  static int op_##NAME(Warp *warp, const Row *row) {                                                       \
    const A *src_a = SLOT(A, 1);                                                                           \
    const B *src_b = SLOT(B, 2);                                                                           \
    const C *src_c = SLOT(C, 3);                                                                           \
    EACH_LANE(D, ({ ALU_READ(A, a) ALU_READ(B, b) ALU_READ(C, c) (EXPR); }));         \
  }
#define ENTRY(NAME, ...) {#NAME, op_##NAME},

/* Results kept in an array, for handlers with several destinations or several passes: active lanes of slot `k`. */
static inline void alu_put32(Warp *warp, const Row *row, int k, const u32 *restrict result) {
  u32 *dst = SLOT(u32, k);
  if (warp->exec == ALL_LANES) {
    IVDEP for (int i = 0; i < WARP_SIZE; i++) dst[i] = result[i];
  } else {
    const u32 *lanes = warp->exec_lanes;
    IVDEP for (int i = 0; i < WARP_SIZE; i++) dst[i] = lanes[i] ? result[i] : dst[i];
  }
}
static inline void alu_put64(Warp *warp, const Row *row, int k, const u64 *restrict result) {
  u64 *dst = SLOT(u64, k);
  if (warp->exec == ALL_LANES) {
    IVDEP for (int i = 0; i < WARP_SIZE; i++) dst[i] = result[i];
  } else {
    const u32 *lanes = warp->exec_lanes;
    IVDEP for (int i = 0; i < WARP_SIZE; i++) dst[i] = lanes[i] ? result[i] : dst[i];
  }
}

/* Row.flags of the arithmetic handlers that read them (lowering/modifiers.py has the same numbers). */
enum {
  ALU_FTZ = 1,       /* subnormal f32 inputs and results become zeros of their sign */
  ALU_SAT = 2,       /* clamp to [0, 1], NaN to +0 */
  ALU_RELU = 4,      /* negative results become +0, NaN the canonical NaN */
  ALU_NAN = 8,       /* min, max: NaN if any operand is */
  ALU_XORSIGN = 16,  /* min, max .xorsign.abs */
  ALU_X2 = 32,       /* two 16-bit values in a register */
  ALU_SATFINITE = 64 /* conversions to fp8: the largest finite value instead of infinity and NaN */
};
/* Rounding modes, in Row.a as numbers. The last one rounds ties away from zero. */
enum { ROUND_RN = 0, ROUND_RZ = 1, ROUND_RM = 2, ROUND_RP = 3, ROUND_RNA = 4 };

/* Directed rounding: the host's own, switched on around a loop. The barrier on both sides of the loop names its arrays,
 * so that the compiler cannot move arithmetic past the switch. */
static inline void alu_set_rounding(int mode) {
  static const int host_mode[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD, FE_TONEAREST};
  fesetround(host_mode[mode]);
}
#define ALU_BARRIER(ARRAY) __asm__ volatile("" : : "r"(ARRAY) : "memory")

#define NAN_F32 0x7fffffffu /* the NaN of every NVIDIA f32 instruction */

/* An f32 result: whatever NaN the host made becomes the GPU's. */
static inline u32 alu_f32(float x) { return x != x ? NAN_F32 : bits_f32(x); }
static inline u32 alu_flush(u32 bits) { return (bits & 0x7f800000u) == 0 ? bits & 0x80000000u : bits; }

#endif
