/* cvt. The conversions that kernels use all the time have a vectorised handler each; `convert` does all others one
 * value at a time: source to double (exact, or rounded to odd), modifiers, double to destination. */
#include "alu.h"

/* Integer to integer: the lowering reduces it to a shift up and back (sign extension), or to a mask; a[2] is the
 * shift and a[3] the bits of the destination register. */
static int op_cvt_extend_b32(Warp *warp, const Row *row) {
  const s32 *src = SLOT(s32, 1);
  const int shift = row->a[2];
  const u32 mask = (u32)row->a[3];
  EACH_LANE(u32, (u32)((s32)((u32)src[i] << shift) >> shift) & mask);
}
static int op_cvt_extend_b64_b32(Warp *warp, const Row *row) {
  const s32 *src = SLOT(s32, 1);
  const int shift = row->a[2];
  EACH_LANE(u64, (s64)((s32)((u32)src[i] << shift) >> shift));
}

/* Float to int: out of range clamps. NaN is 0 when neither side has 64 bits. */
static inline double convert_clamp(double x, double low, double high) {
  return x != x ? 0 : x < low ? low : x > high ? high : x;
}
#define CONVERT_S32(x) (u32)(s32)convert_clamp(x, -2147483648.0, 2147483647.0)
#define CONVERT_U32(x) (u32)(s64)convert_clamp(x, 0.0, 4294967295.0)

#define CONVERT_OPS1(X)                                                                     \
  X(cvt_b64_u32, u64, u32, a)                                                               \
  X(cvt_b64_s32, u64, s32, (s64)a)                                                          \
  X(cvt_b32_b64, u32, u64, (u32)a)                                                          \
  X(cvt_rn_f32_s32, u32, s32, bits_f32((float)a))                                           \
  X(cvt_rn_f32_u32, u32, u32, bits_f32((float)a))                                           \
  X(cvt_rn_f32_s64, u32, s64, bits_f32((float)a))                                           \
  X(cvt_rn_f32_u64, u32, u64, bits_f32((float)a))                                           \
  X(cvt_rn_f64_s32, u64, s32, bits_f64((double)a))                                          \
  X(cvt_rn_f64_u32, u64, u32, bits_f64((double)a))                                          \
  X(cvt_rn_f64_s64, u64, s64, bits_f64((double)a))                                          \
  X(cvt_rn_f64_u64, u64, u64, bits_f64((double)a))                                          \
  X(cvt_rni_s32_f32, u32, u32, CONVERT_S32(__builtin_rintf(as_f32(a))))                     \
  X(cvt_rzi_s32_f32, u32, u32, CONVERT_S32(__builtin_truncf(as_f32(a))))                    \
  X(cvt_rmi_s32_f32, u32, u32, CONVERT_S32(__builtin_floorf(as_f32(a))))                    \
  X(cvt_rpi_s32_f32, u32, u32, CONVERT_S32(__builtin_ceilf(as_f32(a))))                     \
  X(cvt_rni_u32_f32, u32, u32, CONVERT_U32(__builtin_rintf(as_f32(a))))                     \
  X(cvt_rzi_u32_f32, u32, u32, CONVERT_U32(__builtin_truncf(as_f32(a))))                    \
  X(cvt_rni_f32_f32, u32, u32, alu_f32(__builtin_rintf(as_f32(a))))                         \
  X(cvt_rzi_f32_f32, u32, u32, alu_f32(__builtin_truncf(as_f32(a))))                        \
  X(cvt_rmi_f32_f32, u32, u32, alu_f32(__builtin_floorf(as_f32(a))))                        \
  X(cvt_rpi_f32_f32, u32, u32, alu_f32(__builtin_ceilf(as_f32(a))))                         \
  X(cvt_f64_f32, u64, u32, bits_f64((double)as_f32(a)))                                     \
  X(cvt_rn_f32_f64, u32, u64, alu_f32((float)as_f64(a)))                                    \
  X(cvt_f32_f16, u32, u32, alu_f32(as_f32(narrow_f32_of_f16(a))))                           \
  X(cvt_f32_bf16, u32, u32, narrow_f32_of_bf16(a))                                          \
  X(cvt_rn_bf16_f32, u32, u32, narrow_bf16_of_f32(a))                                       \
  X(cvt_rna_tf32_f32, u32, u32, narrow_rna_tf32(a))
#define CONVERT_OPS2(X) X(cvt_rn_bf16x2_f32, u32, u32, u32, narrow_bf16_of_f32(a) << 16 | narrow_bf16_of_f32(b))
CONVERT_OPS1(OP1)
CONVERT_OPS2(OP2)

static int op_cvt_rn_f16_f32(Warp *warp, const Row *row) {
  u32 half[WARP_SIZE];
  narrow_f16_lanes(half, SLOT(u32, 1));
  alu_put32(warp, row, 0, half);
  return STEP;
}
/* A pair: the first operand goes to the upper half, here and in bf16x2. */
static int op_cvt_rn_f16x2_f32(Warp *warp, const Row *row) {
  u32 high[WARP_SIZE], low[WARP_SIZE];
  narrow_f16_lanes(high, SLOT(u32, 1));
  narrow_f16_lanes(low, SLOT(u32, 2));
  EACH_LANE(u32, high[i] << 16 | low[i]);
}

/* The types of `convert`; lowering/convert.py has the same order. f16 to e5m2 are numbered like narrow_formats. */
enum {
  CONVERT_F16, CONVERT_BF16, CONVERT_TF32, CONVERT_F32, CONVERT_E4M3, CONVERT_E5M2, CONVERT_F64,
  CONVERT_U8, CONVERT_S8, CONVERT_U16, CONVERT_S16, CONVERT_U32, CONVERT_S32, CONVERT_U64, CONVERT_S64
};

/* Lane values of a source, `shift` bits up in its register. */
static void convert_load(double *x, const void *slot, int type, int shift, int flags) {
  const u32 *narrow = slot;
  const u64 *wide = slot;
  for (int i = 0; i < WARP_SIZE; i++) {
    switch (type) {
      case CONVERT_F16: x[i] = as_f32(narrow_f32_of_f16(narrow[i] >> shift & 0xffff)); break;
      case CONVERT_BF16: x[i] = as_f32(narrow_f32_of_bf16(narrow[i] >> shift & 0xffff)); break;
      case CONVERT_F32: x[i] = as_f32(flags & ALU_FTZ ? alu_flush(narrow[i]) : narrow[i]); break;
      case CONVERT_E4M3: x[i] = narrow_of_e4m3(narrow[i] >> shift & 0xff); break;
      case CONVERT_E5M2: x[i] = narrow_of_e5m2(narrow[i] >> shift & 0xff); break;
      case CONVERT_F64: x[i] = as_f64(wide[i]); break;
      case CONVERT_U8: x[i] = (u8)narrow[i]; break;
      case CONVERT_S8: x[i] = (s8)narrow[i]; break;
      case CONVERT_U16: x[i] = (u16)narrow[i]; break;
      case CONVERT_S16: x[i] = (s16)narrow[i]; break;
      case CONVERT_U32: x[i] = narrow[i]; break;
      case CONVERT_S32: x[i] = (s32)narrow[i]; break;
      case CONVERT_U64: x[i] = narrow_odd_of_u64(wide[i]); break;
      case CONVERT_S64: x[i] = (s64)wide[i] < 0 ? -narrow_odd_of_u64(-wide[i]) : narrow_odd_of_u64(wide[i]); break;
    }
  }
}

/* Rounding to an integer, and .sat and .relu, which no later rounding disturbs (0 and 1 exist in every format). */
static void convert_modify(double *x, int integer_mode, int flags) {
  for (int i = 0; i < WARP_SIZE; i++) {
    switch (integer_mode) {
      case ROUND_RN: x[i] = rint(x[i]); break;
      case ROUND_RZ: x[i] = trunc(x[i]); break;
      case ROUND_RM: x[i] = floor(x[i]); break;
      case ROUND_RP: x[i] = ceil(x[i]); break;
    }
    if (flags & ALU_SAT) x[i] = x[i] > 0 ? (x[i] < 1 ? x[i] : 1) : 0;
    if (flags & ALU_RELU) x[i] = x[i] != x[i] || x[i] > 0 ? x[i] : 0;
  }
}

static u64 convert_to_int(double x, int type, int wide_source) {
  static const double low[] = {0, -128, 0, -32768, 0, -2147483648.0};
  static const double high[] = {255, 127, 65535, 32767, 4294967295.0, 2147483647.0};
  static const int sign_bit[] = {7, 7, 15, 15, 31, 31, 63, 63};
  if (x != x && (wide_source || type >= CONVERT_U64)) return (u64)1 << sign_bit[type - CONVERT_U8];
  if (type == CONVERT_U64) return x >= 0x1p64 ? ~(u64)0 : x > 0 ? (u64)x : 0;
  if (type == CONVERT_S64) return x >= 0x1p63 ? INT64_MAX : x < -0x1p63 ? (u64)1 << 63 : (u64)(s64)x;
  return (u64)(s64)convert_clamp(x, low[type - CONVERT_U8], high[type - CONVERT_U8]);
}

/* a: destination, sources; then count of values (1, or 2: packed), source type, destination type, rounding mode,
 * rounding mode to an integer or -1, mask of the destination register. Two values come from two f32 registers, the
 * upper one first (second source), or from the halves of one register (both sources are that register). */
static int op_convert(Warp *warp, const Row *row) {
  const int count = row->a[3], source = row->a[4], target = row->a[5], mode = row->a[6], flags = row->flags;
  const u32 mask = (u32)row->a[8];
  u32 r[WARP_SIZE] = {0};
  u64 wide[WARP_SIZE];
  for (int k = 0; k < count; k++) {
    const int packed = count == 2 && source != CONVERT_F32;
    const int bits = source == CONVERT_E4M3 || source == CONVERT_E5M2 ? 8 : 16;
    double x[WARP_SIZE];
    convert_load(x, SLOT(u8, k == count - 1 ? 1 : 2), source, packed ? k * bits : 0, flags);
    convert_modify(x, row->a[7], flags);
    if (target == CONVERT_F64) {
      for (int i = 0; i < WARP_SIZE; i++) wide[i] = bits_f64(x[i]);
    } else if (target >= CONVERT_U8) {
      for (int i = 0; i < WARP_SIZE; i++) wide[i] = convert_to_int(x[i], target, source == CONVERT_F64);
      for (int i = 0; i < WARP_SIZE; i++) r[i] = (u32)wide[i] & mask;
    } else {
      const int shift = k * (target == CONVERT_E4M3 || target == CONVERT_E5M2 ? 8 : 16);
      for (int i = 0; i < WARP_SIZE; i++) {
        u32 value = narrow_encode(x[i], &narrow_formats[target], mode, flags & ALU_SATFINITE);
        if (target == CONVERT_TF32) value = value == narrow_formats[CONVERT_TF32].nan ? NAN_F32 : value << 13;
        if (target == CONVERT_F32 && flags & ALU_FTZ) value = alu_flush(value);
        r[i] |= value << shift;
      }
    }
  }
  if (target == CONVERT_F64 || target == CONVERT_U64 || target == CONVERT_S64) alu_put64(warp, row, 0, wide);
  else alu_put32(warp, row, 0, r);
  return STEP;
}

/* 64-bit integers to f64 in a directed mode a[2]; a[3] is 1 for a signed source. */
static int op_cvt_f64_int64_rounded(Warp *warp, const Row *row) {
  const u64 *src = SLOT(u64, 1);
  u64 x[WARP_SIZE], r[WARP_SIZE];
  for (int i = 0; i < WARP_SIZE; i++) x[i] = src[i];
  alu_set_rounding(row->a[2]);
  ALU_BARRIER(x);
  for (int i = 0; i < WARP_SIZE; i++) r[i] = bits_f64(row->a[3] ? (double)(s64)x[i] : (double)x[i]);
  ALU_BARRIER(r);
  alu_set_rounding(ROUND_RN);
  alu_put64(warp, row, 0, r);
  return STEP;
}

/* cvt.sat between integers: source type in a[2], destination type in a[3], mask of the destination register in a[4]. */
static int op_cvt_sat_int(Warp *warp, const Row *row) {
  static const s64 low[] = {0, -128, 0, -32768, 0, INT32_MIN, 0, INT64_MIN};
  static const u64 high[] = {255, 127, 65535, 32767, UINT32_MAX, INT32_MAX, UINT64_MAX, INT64_MAX};
  const int source = row->a[2], target = row->a[3] - CONVERT_U8;
  const u32 *narrow = SLOT(u32, 1);
  const u64 *wide = SLOT(u64, 1);
  u64 r[WARP_SIZE];
  u32 narrow_result[WARP_SIZE];
  for (int i = 0; i < WARP_SIZE; i++) {
    s64 x = 0;
    switch (source) {
      case CONVERT_U8: x = (u8)narrow[i]; break;
      case CONVERT_S8: x = (s8)narrow[i]; break;
      case CONVERT_U16: x = (u16)narrow[i]; break;
      case CONVERT_S16: x = (s16)narrow[i]; break;
      case CONVERT_U32: x = narrow[i]; break;
      case CONVERT_S32: x = (s32)narrow[i]; break;
      default: x = (s64)wide[i];
    }
    const int negative = source != CONVERT_U64 && x < 0;
    r[i] = negative ? (u64)(x < low[target] ? low[target] : x) : (u64)x > high[target] ? high[target] : (u64)x;
    narrow_result[i] = (u32)r[i] & (u32)row->a[4];
  }
  if (row->a[3] >= CONVERT_U64) alu_put64(warp, row, 0, r);
  else alu_put32(warp, row, 0, narrow_result);
  return STEP;
}

static const OpEntry ops_convert[] = {
  CONVERT_OPS1(ENTRY) CONVERT_OPS2(ENTRY)
  {"cvt_rn_f16_f32", op_cvt_rn_f16_f32}, {"cvt_rn_f16x2_f32", op_cvt_rn_f16x2_f32},
  {"cvt_extend_b32", op_cvt_extend_b32}, {"cvt_extend_b64_b32", op_cvt_extend_b64_b32}, {"convert", op_convert},
  {"cvt_f64_int64_rounded", op_cvt_f64_int64_rounded}, {"cvt_sat_int", op_cvt_sat_int}, {0, 0}
};
