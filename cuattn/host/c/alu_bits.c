/* Bits: logic, shifts, fields, permutations, counts and small integer dot products. */
#include "alu.h"

static inline u32 bits_low_mask32(u32 len) { return len > 31 ? ~0u : (1u << (len & 31)) - 1; }
static inline u64 bits_low_mask64(u32 len) { return len > 63 ? ~(u64)0 : ((u64)1 << (len & 63)) - 1; }

static inline u64 bits_brev64(u64 x) {
  x = (x >> 1 & 0x5555555555555555u) | (x & 0x5555555555555555u) << 1;
  x = (x >> 2 & 0x3333333333333333u) | (x & 0x3333333333333333u) << 2;
  x = (x >> 4 & 0x0f0f0f0f0f0f0f0fu) | (x & 0x0f0f0f0f0f0f0f0fu) << 4;
  return __builtin_bswap64(x);
}
static inline u32 bits_clz64(u64 x) { return x ? (u32)__builtin_clzll(x) : 64; }
static inline u32 bits_popc64(u64 x) { return (u32)__builtin_popcountll(x); }

/* bfind: position of the highest bit that differs from the sign, all ones if there is none; with .shiftamt the
 * distance of that bit from the top. */
static inline u64 bits_unsign(s64 x) { return (u64)(x < 0 ? ~x : x); }
static inline u32 bits_find(u64 x) { return 63 - bits_clz64(x); }
static inline u32 bits_find_shift(u64 x, u32 msb) { return x ? msb - bits_find(x) : ~0u; }

/* bfe: bits above the field, or above the register, are copies of the field's sign bit (signed) or zero. */
static inline u64 bits_extract(u64 a, u32 pos, u32 len, u32 msb, int is_signed) {
  u32 sign_pos = pos + len - 1 < msb ? pos + len - 1 : msb;
  u64 fill = is_signed && len && (a >> (sign_pos & 63) & 1) ? ~(u64)0 : 0;
  u32 have = pos > msb ? 0 : msb + 1 - pos;
  u64 mask = bits_low_mask64(len < have ? len : have);
  return (a >> (pos & 63) & mask) | (fill & ~mask);
}
static inline u32 bits_insert32(u32 a, u32 b, u32 pos, u32 len) {
  u32 mask = pos > 31 ? 0 : bits_low_mask32(len) << (pos & 31);
  return (b & ~mask) | (a << (pos & 31) & mask);
}
static inline u64 bits_insert64(u64 a, u64 b, u32 pos, u32 len) {
  u64 mask = pos > 63 ? 0 : bits_low_mask64(len) << (pos & 63);
  return (b & ~mask) | (a << (pos & 63) & mask);
}
static inline u64 bits_concat(u32 high, u32 low) { return (u64)high << 32 | low; }

/* prmt: three bits of a selector choose a byte, the fourth replicates its sign bit. */
static inline u32 bits_pick(u64 bytes, u32 selector) {
  u32 byte = (u32)(bytes >> (8 * (selector & 7))) & 0xff;
  return selector & 8 ? (byte >> 7) * 0xff : byte;
}
static inline u32 bits_prmt(u64 bytes, u32 s0, u32 s1, u32 s2, u32 s3) {
  return bits_pick(bytes, s0) | bits_pick(bytes, s1) << 8 | bits_pick(bytes, s2) << 16 | bits_pick(bytes, s3) << 24;
}
#define BITS_EDGE_LEFT(k, n) ((n) > (k) ? (n) : (k))
#define BITS_EDGE_RIGHT(k, n) ((n) < (k) ? (n) : (k))

static inline u32 bits_dot4(u32 a, u32 b, int a_signed, int b_signed) {
  s32 sum = 0;
  for (int k = 0; k < 32; k += 8) {
    s32 x = a_signed ? (s8)(a >> k) : (u8)(a >> k), y = b_signed ? (s8)(b >> k) : (u8)(b >> k);
    sum += x * y;
  }
  return (u32)sum;
}
static inline u32 bits_dot2(u32 a, u32 b, int a_signed, int b_signed) { /* two halves of a, the low bytes of b */
  s32 sum = 0;
  for (int k = 0; k < 2; k++) {
    s32 x = a_signed ? (s16)(a >> 16 * k) : (u16)(a >> 16 * k), y = b_signed ? (s8)(b >> 8 * k) : (u8)(b >> 8 * k);
    sum += x * y;
  }
  return (u32)sum;
}

#define BITS_OPS1(X)                                                       \
  X(not_b16, u32, u32, (u16)~a)                                            \
  X(not_b32, u32, u32, ~a)                                                 \
  X(not_b64, u64, u64, ~a)                                                 \
  X(not_pred, u32, u32, a ^ 1)                                             \
  X(cnot_b32, u32, u32, a == 0)                                            \
  X(cnot_b64, u64, u64, a == 0)                                            \
  X(popc_b32, u32, u32, bits_popc64(a))                                    \
  X(popc_b64, u32, u64, bits_popc64(a))                                    \
  X(clz_b32, u32, u32, bits_clz64(a) - 32)                                 \
  X(clz_b64, u32, u64, bits_clz64(a))                                      \
  X(brev_b32, u32, u32, bits_brev64(a) >> 32)                              \
  X(brev_b64, u64, u64, bits_brev64(a))                                    \
  X(bfind_u32, u32, u32, bits_find(a))                                     \
  X(bfind_s32, u32, s32, bits_find(bits_unsign(a)))                        \
  X(bfind_u64, u32, u64, bits_find(a))                                     \
  X(bfind_s64, u32, s64, bits_find(bits_unsign(a)))                        \
  X(bfind_shiftamt_u32, u32, u32, bits_find_shift(a, 31))                  \
  X(bfind_shiftamt_s32, u32, s32, bits_find_shift(bits_unsign(a), 31))     \
  X(bfind_shiftamt_u64, u32, u64, bits_find_shift(a, 63))                  \
  X(bfind_shiftamt_s64, u32, s64, bits_find_shift(bits_unsign(a), 63))
#define BITS_OPS2(X)                                                       \
  X(and_b32, u32, u32, u32, a & b)                                         \
  X(and_b64, u64, u64, u64, a & b)                                         \
  X(or_b32, u32, u32, u32, a | b)                                          \
  X(or_b64, u64, u64, u64, a | b)                                          \
  X(xor_b32, u32, u32, u32, a ^ b)                                         \
  X(xor_b64, u64, u64, u64, a ^ b)                                         \
  X(shl_b16, u32, u32, u32, b > 15 ? 0 : (u16)(a << (b & 15)))             \
  X(shl_b32, u32, u32, u32, b > 31 ? 0 : a << (b & 31))                    \
  X(shl_b64, u64, u64, u32, b > 63 ? 0 : a << (b & 63))                    \
  X(shr_u32, u32, u32, u32, b > 31 ? 0 : a >> (b & 31))                    \
  X(shr_u64, u64, u64, u32, b > 63 ? 0 : a >> (b & 63))                    \
  X(shr_s16, u32, u32, u32, (u16)((s16)a >> (b > 15 ? 15 : b)))            \
  X(shr_s32, u32, s32, u32, a >> (b > 31 ? 31 : b))                        \
  X(shr_s64, u64, s64, u32, a >> (b > 63 ? 63 : b))                        \
  X(prmt_5410, u32, u32, u32, (a & 0xffffu) | b << 16)                     \
  X(prmt_7632, u32, u32, u32, a >> 16 | (b & 0xffff0000u))
#define BITS_OPS3(X)                                                                               \
  X(shf_l_clamp, u32, u32, u32, u32, bits_concat(b, a) << (c > 31 ? 32 : c) >> 32)                 \
  X(shf_l_wrap, u32, u32, u32, u32, bits_concat(b, a) << (c & 31) >> 32)                           \
  X(shf_r_clamp, u32, u32, u32, u32, bits_concat(b, a) >> (c > 31 ? 32 : c))                       \
  X(shf_r_wrap, u32, u32, u32, u32, bits_concat(b, a) >> (c & 31))                                 \
  X(bfe_u32, u32, u32, u32, u32, bits_extract(a, b & 0xff, c & 0xff, 31, 0))                       \
  X(bfe_s32, u32, u32, u32, u32, bits_extract(a, b & 0xff, c & 0xff, 31, 1))                       \
  X(bfe_u64, u64, u64, u32, u32, bits_extract(a, b & 0xff, c & 0xff, 63, 0))                       \
  X(bfe_s64, u64, u64, u32, u32, bits_extract(a, b & 0xff, c & 0xff, 63, 1))                       \
  X(prmt, u32, u32, u32, u32, bits_prmt(bits_concat(b, a), c, c >> 4, c >> 8, c >> 12))            \
  X(prmt_f4e, u32, u32, u32, u32, bits_concat(b, a) >> 8 * (c & 3))                                \
  X(prmt_b4e, u32, u32, u32, u32, ({                                                               \
      u32 n = c & 3; bits_prmt(bits_concat(b, a), n, (n - 1) & 7, (n - 2) & 7, (n - 3) & 7); }))   \
  X(prmt_rc8, u32, u32, u32, u32, (a >> 8 * (c & 3) & 0xff) * 0x01010101u)                         \
  X(prmt_ecl, u32, u32, u32, u32, ({                                                               \
      u32 n = c & 3; bits_prmt(a, n, BITS_EDGE_LEFT(1, n), BITS_EDGE_LEFT(2, n), 3); }))           \
  X(prmt_ecr, u32, u32, u32, u32, ({                                                               \
      u32 n = c & 3; bits_prmt(a, 0, BITS_EDGE_RIGHT(1, n), BITS_EDGE_RIGHT(2, n), n); }))         \
  X(prmt_rc16, u32, u32, u32, u32, (a >> 16 * (c & 1) & 0xffff) * 0x00010001u)                     \
  X(dp4a_s32_s32, u32, u32, u32, u32, c + bits_dot4(a, b, 1, 1))                                   \
  X(dp4a_s32_u32, u32, u32, u32, u32, c + bits_dot4(a, b, 1, 0))                                   \
  X(dp4a_u32_s32, u32, u32, u32, u32, c + bits_dot4(a, b, 0, 1))                                   \
  X(dp4a_u32_u32, u32, u32, u32, u32, c + bits_dot4(a, b, 0, 0))                                   \
  X(dp2a_lo_s32_s32, u32, u32, u32, u32, c + bits_dot2(a, b, 1, 1))                                \
  X(dp2a_lo_s32_u32, u32, u32, u32, u32, c + bits_dot2(a, b, 1, 0))                                \
  X(dp2a_lo_u32_s32, u32, u32, u32, u32, c + bits_dot2(a, b, 0, 1))                                \
  X(dp2a_lo_u32_u32, u32, u32, u32, u32, c + bits_dot2(a, b, 0, 0))                                \
  X(dp2a_hi_s32_s32, u32, u32, u32, u32, c + bits_dot2(a, b >> 16, 1, 1))                          \
  X(dp2a_hi_s32_u32, u32, u32, u32, u32, c + bits_dot2(a, b >> 16, 1, 0))                          \
  X(dp2a_hi_u32_s32, u32, u32, u32, u32, c + bits_dot2(a, b >> 16, 0, 1))                          \
  X(dp2a_hi_u32_u32, u32, u32, u32, u32, c + bits_dot2(a, b >> 16, 0, 0))
BITS_OPS1(OP1)
BITS_OPS2(OP2)
BITS_OPS3(OP3)

/* lop3: the number in a[4] is the truth table; its eight minterms are masks that do not change over the lanes. */
static int op_lop3_b32(Warp *warp, const Row *row) {
  const u32 *src_a = SLOT(u32, 1), *src_b = SLOT(u32, 2), *src_c = SLOT(u32, 3);
  u32 m[8];
  for (int k = 0; k < 8; k++) m[k] = row->a[4] >> k & 1 ? ~0u : 0;
  EACH_LANE(u32, ({
    const u32 a = src_a[i], b = src_b[i], c = src_c[i];
    (~a & ((~b & ((~c & m[0]) | (c & m[1]))) | (b & ((~c & m[2]) | (c & m[3]))))) |
      (a & ((~b & ((~c & m[4]) | (c & m[5]))) | (b & ((~c & m[6]) | (c & m[7])))));
  }));
}

static int op_bfi_b32(Warp *warp, const Row *row) {
  const u32 *a = SLOT(u32, 1), *b = SLOT(u32, 2), *pos = SLOT(u32, 3), *len = SLOT(u32, 4);
  EACH_LANE(u32, bits_insert32(a[i], b[i], pos[i] & 0xff, len[i] & 0xff));
}
static int op_bfi_b64(Warp *warp, const Row *row) {
  const u64 *a = SLOT(u64, 1), *b = SLOT(u64, 2);
  const u32 *pos = SLOT(u32, 3), *len = SLOT(u32, 4);
  EACH_LANE(u64, bits_insert64(a[i], b[i], pos[i] & 0xff, len[i] & 0xff));
}

static const OpEntry ops_alu_bits[] = {
  BITS_OPS1(ENTRY) BITS_OPS2(ENTRY) BITS_OPS3(ENTRY)
  {"lop3_b32", op_lop3_b32}, {"bfi_b32", op_bfi_b32}, {"bfi_b64", op_bfi_b64}, {0, 0}
};
