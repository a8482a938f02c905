/* mma.sync: warp-wide matrix multiply-accumulate.
 *
 * The fragments stay in lane order. With g = lane / 4 and t = lane % 4, accumulator 0 of a lane is C[g][2t], 1 is
 * C[g][2t+1], 2 and 3 are rows g + 8. One step adds the products of four k, one for each t: A[g][k(t')] is a
 * broadcast inside the quad, B[k(t')][2t] repeats in every quad. Products of 16-bit and tf32 values are exact in
 * fp32; sums round after every product, in order of k. (A GPU adds several products before it rounds, in an order and
 * with a truncation that no document fixes, so results agree within an interval and not bit for bit.) */
#include <string.h>
#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
enum { VEC_LANES = 16 };
#else
enum { VEC_LANES = 8 };
#endif
enum { NUM_VECS = WARP_SIZE / VEC_LANES };
typedef float Vec __attribute__((vector_size(VEC_LANES * 4)));
typedef s32 VecIndex __attribute__((vector_size(VEC_LANES * 4)));

static inline Vec vec_fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

/* Four values, repeated. */
static inline Vec vec_repeat(const float *p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_broadcast_f32x4(_mm_loadu_ps(p));
#elif defined(__FMA__)
  return (Vec)_mm256_broadcast_ps((const __m128 *)p);
#else
  return (Vec){p[0], p[1], p[2], p[3], p[0], p[1], p[2], p[3]};
#endif
}

/* Value `t` of every group of four, in all four places. */
#if defined(__AVX512F__)
#define QUAD(t) ((VecIndex){t, t, t, t, 4 + t, 4 + t, 4 + t, 4 + t, 8 + t, 8 + t, 8 + t, 8 + t, 12 + t, 12 + t, 12 + t, 12 + t})
#else
#define QUAD(t) ((VecIndex){t, t, t, t, 4 + t, 4 + t, 4 + t, 4 + t})
#endif

/* table[t][parity][half] = b[4 * (2 * half + parity) + t]: the even and the odd columns of each of the four k. */
static inline void columns_of(const float *b, float table[4][2][4]) {
#if defined(__AVX512F__)
  Vec low, high;
  memcpy(&low, b, sizeof low);
  memcpy(&high, b + VEC_LANES, sizeof high);
  Vec first = __builtin_shuffle(low, high, ((VecIndex){0, 8, 16, 24, 4, 12, 20, 28, 1, 9, 17, 25, 5, 13, 21, 29}));
  Vec second = __builtin_shuffle(low, high, ((VecIndex){2, 10, 18, 26, 6, 14, 22, 30, 3, 11, 19, 27, 7, 15, 23, 31}));
  memcpy(table[0], &first, sizeof first);
  memcpy(table[2], &second, sizeof second);
#else
  for (int n = 0; n < 8; n++)
    for (int t = 0; t < 4; t++) table[t][n & 1][n >> 1] = b[4 * n + t];
#endif
}

/* Four k of the product: a_top[lane] = A[g][k(t)], a_bottom = A[g+8][k(t)], b[lane] = B[k(t)][g]. */
static inline __attribute__((always_inline)) void
mma_step(Vec acc[4][NUM_VECS], const float *a_top, const float *a_bottom, const float *b) {
  float table[4][2][4] __attribute__((aligned(64)));
  columns_of(b, table);
#define STEP_OF_QUAD(t)                                                       \
  {                                                                           \
    Vec even = vec_repeat(table[t][0]), odd = vec_repeat(table[t][1]);        \
    for (int v = 0; v < NUM_VECS; v++) {                                      \
      Vec top, bottom;                                                        \
      memcpy(&top, a_top + v * VEC_LANES, sizeof top);                        \
      memcpy(&bottom, a_bottom + v * VEC_LANES, sizeof bottom);               \
      top = __builtin_shuffle(top, QUAD(t));                                  \
      bottom = __builtin_shuffle(bottom, QUAD(t));                            \
      acc[0][v] = vec_fma(top, even, acc[0][v]);                              \
      acc[1][v] = vec_fma(top, odd, acc[1][v]);                               \
      acc[2][v] = vec_fma(bottom, even, acc[2][v]);                           \
      acc[3][v] = vec_fma(bottom, odd, acc[3][v]);                            \
    }                                                                         \
  }
  STEP_OF_QUAD(0) STEP_OF_QUAD(1) STEP_OF_QUAD(2) STEP_OF_QUAD(3)
#undef STEP_OF_QUAD
}

/* ---- operand formats: a register of two 16-bit values, or one tf32 value */

static inline u32 half_to_f32_bits(u32 half) {
  u32 magnitude = (half & 0x7fff) << 13;
  float scaled = as_f32(magnitude) * as_f32(0x77800000); /* 2^112 corrects the exponent, of denormals too */
  u32 bits = magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : bits_f32(scaled);
  return bits | (half & 0x8000) << 16;
}

static inline u32 half_from_f32(float value) {
  u32 bits = bits_f32(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;
  if (magnitude < 0x38800000) return sign | (bits_f32(as_f32(magnitude) + 0.5f) - 0x3f000000);
  return sign | ((magnitude + 0xfff + (magnitude >> 13 & 1)) - 0x38000000) >> 13;
}

static inline void unpack_half(const u32 *packed, float *low, float *high) {
  IVDEP for (int i = 0; i < WARP_SIZE; i++) {
    ((u32 *)low)[i] = half_to_f32_bits(packed[i] & 0xffff);
    ((u32 *)high)[i] = half_to_f32_bits(packed[i] >> 16);
  }
}

static inline void unpack_bfloat(const u32 *packed, float *low, float *high) {
  IVDEP for (int i = 0; i < WARP_SIZE; i++) {
    ((u32 *)low)[i] = packed[i] << 16;
    ((u32 *)high)[i] = packed[i] & 0xffff0000;
  }
}

static inline void unpack_tf32(const u32 *bits, float *out) {
  IVDEP for (int i = 0; i < WARP_SIZE; i++) ((u32 *)out)[i] = bits[i] & 0xffffe000;
}

static inline void load_acc(const Warp *warp, const s32 *slots, Vec acc[4][NUM_VECS]) {
  for (int r = 0; r < 4; r++) memcpy(acc[r], warp->regs + slots[r], sizeof acc[r]);
}

static inline void store_acc(Warp *warp, const s32 *slots, Vec acc[4][NUM_VECS]) {
  for (int r = 0; r < 4; r++) {
    u32 *dst = (u32 *)(warp->regs + slots[r]);
    const float *src = (const float *)acc[r];
    IVDEP for (int i = 0; i < WARP_SIZE; i++) dst[i] = src[i] == src[i] ? bits_f32(src[i]) : 0x7fffffff;
  }
}

#define MMA_PROLOGUE                                                          \
  REQUIRE_LANES(warp, row, ALL_LANES);                                        \
  if (warp->exec != ALL_LANES)                                                \
    return fail(warp, row, -1, FAULT_DIVERGENCE, 0, "mma.sync needs all 32 lanes; %08x take part", warp->exec); \
  if (warp->cta->races) race_warp_sync(warp, ALL_LANES)

typedef void (*Unpack)(const u32 *, float *, float *);

/* k16: a registers {top k0-7, bottom k0-7, top k8-15, bottom k8-15}, b registers {k0-7, k8-15}; k8: the first half */
static inline __attribute__((always_inline)) void mma_16bit(Warp *warp, Vec acc[4][NUM_VECS], const s32 *a, const s32 *b, int blocks, Unpack unpack) {
  for (int block = 0; block < blocks; block++) {
    float top[2][WARP_SIZE], bottom[2][WARP_SIZE], right[2][WARP_SIZE];
    unpack((const u32 *)(warp->regs + a[2 * block]), top[0], top[1]);
    unpack((const u32 *)(warp->regs + a[2 * block + 1]), bottom[0], bottom[1]);
    unpack((const u32 *)(warp->regs + b[block]), right[0], right[1]);
    for (int e = 0; e < 2; e++) mma_step(acc, top[e], bottom[e], right[e]);
  }
}

/* a: d0-3, a, b, c0-3; `blocks` of eight k */
#define MMA_F32(name, blocks, unpack)                                         \
  static int op_##name(Warp *warp, const Row *row) {                          \
    MMA_PROLOGUE;                                                             \
    Vec acc[4][NUM_VECS];                                                     \
    load_acc(warp, row->a + 4 + 3 * blocks, acc);                             \
    mma_16bit(warp, acc, row->a + 4, row->a + 4 + 2 * blocks, blocks, unpack); \
    store_acc(warp, row->a, acc);                                             \
    return STEP;                                                              \
  }
MMA_F32(mma_k16_f16, 2, unpack_half)
MMA_F32(mma_k8_f16, 1, unpack_half)
MMA_F32(mma_k16_bf16, 2, unpack_bfloat)
MMA_F32(mma_k8_bf16, 1, unpack_bfloat)

/* f16 accumulators: a: d0-1, a, b, c0-1, each register two columns of one row */
#define MMA_F16(name, blocks)                                                 \
  static int op_##name(Warp *warp, const Row *row) {                          \
    MMA_PROLOGUE;                                                             \
    Vec acc[4][NUM_VECS];                                                     \
    for (int r = 0; r < 2; r++)                                               \
      unpack_half(SLOT(u32, 2 + 3 * blocks + r), (float *)acc[2 * r], (float *)acc[2 * r + 1]); \
    mma_16bit(warp, acc, row->a + 2, row->a + 2 + 2 * blocks, blocks, unpack_half); \
    for (int r = 0; r < 2; r++) {                                             \
      const float *low = (const float *)acc[2 * r], *high = (const float *)acc[2 * r + 1]; \
      u32 *dst = SLOT(u32, r);                                                \
      for (int i = 0; i < WARP_SIZE; i++) dst[i] = half_from_f32(low[i]) | half_from_f32(high[i]) << 16; \
    }                                                                         \
    return STEP;                                                              \
  }
MMA_F16(mma_k16_f16_f16, 2)
MMA_F16(mma_k8_f16_f16, 1)

/* tf32: a registers {top k0-3, bottom k0-3, top k4-7, bottom k4-7}, b {k0-3, k4-7} */
#define MMA_TF32(name, blocks)                                                \
  static int op_##name(Warp *warp, const Row *row) {                          \
    MMA_PROLOGUE;                                                             \
    Vec acc[4][NUM_VECS];                                                     \
    load_acc(warp, row->a + 4 + 3 * blocks, acc);                             \
    for (int block = 0; block < blocks; block++) {                            \
      float top[WARP_SIZE], bottom[WARP_SIZE], right[WARP_SIZE];              \
      unpack_tf32(SLOT(u32, 4 + 2 * block), top);                             \
      unpack_tf32(SLOT(u32, 5 + 2 * block), bottom);                          \
      unpack_tf32(SLOT(u32, 4 + 2 * blocks + block), right);                  \
      mma_step(acc, top, bottom, right);                                      \
    }                                                                         \
    store_acc(warp, row->a, acc);                                             \
    return STEP;                                                              \
  }
MMA_TF32(mma_k8_tf32, 2)
MMA_TF32(mma_k4_tf32, 1)

/* m8n8k4 f64: a: d0-1, a (row g, k t), b (k t, column g), c0-1 (row g, columns 2t and 2t+1) */
static int op_mma_f64(Warp *warp, const Row *row) {
  MMA_PROLOGUE;
  const double *a = SLOT(double, 2), *b = SLOT(double, 3), *c0 = SLOT(double, 4), *c1 = SLOT(double, 5);
  double sums[2][WARP_SIZE];
  for (int i = 0; i < WARP_SIZE; i++) {
    int g = i / 4, t = i % 4;
    sums[0][i] = c0[i];
    sums[1][i] = c1[i];
    for (int k = 0; k < 4; k++) {
      sums[0][i] = __builtin_fma(a[4 * g + k], b[4 * (2 * t) + k], sums[0][i]);
      sums[1][i] = __builtin_fma(a[4 * g + k], b[4 * (2 * t + 1) + k], sums[1][i]);
    }
  }
  memcpy(SLOT(double, 0), sums[0], sizeof sums[0]);
  memcpy(SLOT(double, 1), sums[1], sizeof sums[1]);
  return STEP;
}

static const OpEntry ops_mma[] = {
  {"mma_k16_f16", op_mma_k16_f16}, {"mma_k8_f16", op_mma_k8_f16}, {"mma_k16_bf16", op_mma_k16_bf16},
  {"mma_k8_bf16", op_mma_k8_bf16}, {"mma_k16_f16_f16", op_mma_k16_f16_f16}, {"mma_k8_f16_f16", op_mma_k8_f16_f16},
  {"mma_k8_tf32", op_mma_k8_tf32}, {"mma_k4_tf32", op_mma_k4_tf32}, {"mma_f64", op_mma_f64}, {0, 0},
};
