/* Comparisons, selections, and moves between registers of different widths. */
#include "alu.h"

/* Integer comparisons need only eq, ne, lt and le: the lowering swaps operands for the others, and an unsigned 16-bit
 * value is its own zero extension. */
#define PREDICATE_OPS2(X)                                          \
  X(setp_eq_b32, u32, u32, u32, a == b)                            \
  X(setp_ne_b32, u32, u32, u32, a != b)                            \
  X(setp_lt_u32, u32, u32, u32, a < b)                             \
  X(setp_le_u32, u32, u32, u32, a <= b)                            \
  X(setp_lt_s32, u32, s32, s32, a < b)                             \
  X(setp_le_s32, u32, s32, s32, a <= b)                            \
  X(setp_lt_s16, u32, u32, u32, (s16)a < (s16)b)                   \
  X(setp_le_s16, u32, u32, u32, (s16)a <= (s16)b)                  \
  X(setp_eq_b64, u32, u64, u64, a == b)                            \
  X(setp_ne_b64, u32, u64, u64, a != b)                            \
  X(setp_lt_u64, u32, u64, u64, a < b)                             \
  X(setp_le_u64, u32, u64, u64, a <= b)                            \
  X(setp_lt_s64, u32, s64, s64, a < b)                             \
  X(setp_le_s64, u32, s64, s64, a <= b)

/* Floating point: eq, ne, lt, le are false for NaN; the u forms are true. */
#define PREDICATE_FLOAT(X, SUFFIX, U, AS)                          \
  X(setp_eq_##SUFFIX, u32, U, U, AS(a) == AS(b))                   \
  X(setp_ne_##SUFFIX, u32, U, U, AS(a) < AS(b) || AS(a) > AS(b))   \
  X(setp_lt_##SUFFIX, u32, U, U, AS(a) < AS(b))                    \
  X(setp_le_##SUFFIX, u32, U, U, AS(a) <= AS(b))                   \
  X(setp_equ_##SUFFIX, u32, U, U, !(AS(a) < AS(b) || AS(a) > AS(b))) \
  X(setp_neu_##SUFFIX, u32, U, U, AS(a) != AS(b))                  \
  X(setp_ltu_##SUFFIX, u32, U, U, !(AS(a) >= AS(b)))               \
  X(setp_leu_##SUFFIX, u32, U, U, !(AS(a) > AS(b)))                \
  X(setp_num_##SUFFIX, u32, U, U, AS(a) == AS(a) && AS(b) == AS(b)) \
  X(setp_nan_##SUFFIX, u32, U, U, AS(a) != AS(a) || AS(b) != AS(b))
#define PREDICATE_F32(X) PREDICATE_FLOAT(X, f32, u32, as_f32)
#define PREDICATE_F64(X) PREDICATE_FLOAT(X, f64, u64, as_f64)

#define PREDICATE_OPS1(X)            \
  X(mov_b32, u32, u32, a)            \
  X(mov_b64, u64, u64, a)

#define PREDICATE_OPS3(X)                                                  \
  X(selp_b32, u32, u32, u32, u32, c ? a : b)                               \
  X(selp_b64, u64, u64, u64, u32, c ? a : b)                               \
  X(slct_b32_s32, u32, u32, u32, s32, c >= 0 ? a : b)                      \
  X(slct_b64_s32, u64, u64, u64, s32, c >= 0 ? a : b)                      \
  X(slct_b32_f32, u32, u32, u32, u32, as_f32(c) >= 0 ? a : b)              \
  X(slct_b64_f32, u64, u64, u64, u32, as_f32(c) >= 0 ? a : b)
PREDICATE_OPS1(OP1)
PREDICATE_OPS2(OP2)
PREDICATE_F32(OP2)
PREDICATE_F64(OP2)
PREDICATE_OPS3(OP3)

/* The second half of setp with two destinations or a boolean operand: p = t OP c, q = !t OP c, where t is the
 * comparison. a[4] is the operation (0 and, 1 or, 2 xor), a[5] is 1 for !c. */
static int op_setp_combine(Warp *warp, const Row *row) {
  const u32 *test = SLOT(u32, 2), *operand = SLOT(u32, 3);
  const u32 flip = (u32)row->a[5];
  u32 p[WARP_SIZE], q[WARP_SIZE];
  IVDEP for (int i = 0; i < WARP_SIZE; i++) {
    const u32 t = test[i], c = operand[i] ^ flip;
    p[i] = row->a[4] == 0 ? t & c : row->a[4] == 1 ? t | c : t ^ c;
    q[i] = row->a[4] == 0 ? (t ^ 1) & c : row->a[4] == 1 ? (t ^ 1) | c : (t ^ 1) ^ c;
  }
  alu_put32(warp, row, 0, p);
  alu_put32(warp, row, 1, q);
  return STEP;
}

/* mov between a register and a vector of narrower ones; the first element is the lowest part. */
#define PREDICATE_PACK2(X)                                        \
  X(pack_2x8, u32, u32, u32, a | b << 8)                          \
  X(pack_2x16, u32, u32, u32, a | b << 16)                        \
  X(pack_2x32, u64, u32, u32, a | (u64)b << 32)
PREDICATE_PACK2(OP2)

static int op_pack_4x8(Warp *warp, const Row *row) {
  const u32 *a = SLOT(u32, 1), *b = SLOT(u32, 2), *c = SLOT(u32, 3), *d = SLOT(u32, 4);
  EACH_LANE(u32, a[i] | b[i] << 8 | c[i] << 16 | d[i] << 24);
}
static int op_pack_4x16(Warp *warp, const Row *row) {
  const u32 *a = SLOT(u32, 1), *b = SLOT(u32, 2), *c = SLOT(u32, 3), *d = SLOT(u32, 4);
  EACH_LANE(u64, a[i] | b[i] << 16 | (u64)c[i] << 32 | (u64)d[i] << 48);
}

/* COUNT destinations, BITS wide each, from a register with lanes of type T. All parts are computed before one is
 * stored: a destination may be the source's own slot. */
#define PREDICATE_UNPACK(NAME, T, COUNT, BITS)                                                        \
  static int op_##NAME(Warp *warp, const Row *row) {                                                  \
    const T *src = SLOT(T, COUNT);                                                                    \
    u32 parts[COUNT][WARP_SIZE];                                                                      \
    for (int k = 0; k < COUNT; k++)                                                                   \
      IVDEP for (int i = 0; i < WARP_SIZE; i++)                                                       \
        parts[k][i] = (u32)(src[i] >> (BITS * k)) & (u32)(((u64)1 << BITS) - 1);                      \
    for (int k = 0; k < COUNT; k++) alu_put32(warp, row, k, parts[k]);                                \
    return STEP;                                                                                      \
  }
#define PREDICATE_UNPACKS(X)      \
  X(unpack_2x8, u32, 2, 8)        \
  X(unpack_4x8, u32, 4, 8)        \
  X(unpack_2x16, u32, 2, 16)      \
  X(unpack_4x16, u64, 4, 16)      \
  X(unpack_2x32, u64, 2, 32)
PREDICATE_UNPACKS(PREDICATE_UNPACK)

static const OpEntry ops_predicate[] = {
  PREDICATE_OPS1(ENTRY) PREDICATE_OPS2(ENTRY) PREDICATE_F32(ENTRY) PREDICATE_F64(ENTRY) PREDICATE_OPS3(ENTRY)
  PREDICATE_PACK2(ENTRY) PREDICATE_UNPACKS(ENTRY)
  {"setp_combine", op_setp_combine}, {"pack_4x8", op_pack_4x8}, {"pack_4x16", op_pack_4x16}, {0, 0}
};
