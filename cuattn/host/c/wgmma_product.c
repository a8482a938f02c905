/* The matrix product of wgmma: tile += A B in f32, for as many consecutive operations as fit.
 *
 * Each element is summed in order of k, one fused multiply-add after the other, whatever the width of the vectors. A
 * product of two operands is exact in f32 unless it leaves f32's range, so a machine without fused multiply-add gets
 * the same sums. (A GPU adds several products before it rounds: results agree within an interval, not bit for bit.) */

#if defined(__AVX512F__)
enum { BLOCK_ROWS = 8 };
#else
enum { BLOCK_ROWS = 4 };
#endif
enum { BLOCK_VECS = 3 };

/* BLOCK_ROWS rows and `vecs` vectors of columns. */
static inline __attribute__((always_inline)) void
product_block(float *tile, const float *a, u32 lda, const float *panel, u32 depth, const int vecs) {
  Vec sum[BLOCK_ROWS][BLOCK_VECS];
  for (int r = 0; r < BLOCK_ROWS; r++)
    for (int v = 0; v < vecs; v++) memcpy(&sum[r][v], tile + r * TILE_LD + v * VEC_LANES, sizeof(Vec));
  for (u32 k = 0; k < depth; k++) {
    Vec b[BLOCK_VECS];
    for (int v = 0; v < vecs; v++) memcpy(&b[v], panel + k * PANEL + v * VEC_LANES, sizeof(Vec));
#pragma GCC unroll 8
    for (int r = 0; r < BLOCK_ROWS; r++) {
      Vec left = a[(size_t)r * lda + k] - (Vec){0};
#pragma GCC unroll 3
      for (int v = 0; v < vecs; v++) sum[r][v] = vec_fma(left, b[v], sum[r][v]);
    }
  }
  for (int r = 0; r < BLOCK_ROWS; r++)
    for (int v = 0; v < vecs; v++) memcpy(tile + r * TILE_LD + v * VEC_LANES, &sum[r][v], sizeof(Vec));
}

static void wgmma_product(float *tile, const float *a, const float *panels, u32 n, u32 depth) {
  for (u32 column = 0; column < n; column += PANEL) {
    const u32 vecs = ((n - column < PANEL ? n - column : PANEL) + VEC_LANES - 1) / VEC_LANES;
    const float *panel = panels + (size_t)column * depth;
    for (u32 row = 0; row < WGMMA_M; row += BLOCK_ROWS)
      for (u32 v = 0; v < vecs; v += BLOCK_VECS) {
        float *to = tile + row * TILE_LD + column + v * VEC_LANES;
        const float *left = a + row * depth, *right = panel + v * VEC_LANES;
        switch (vecs - v < BLOCK_VECS ? vecs - v : BLOCK_VECS) {
          case 1: product_block(to, left, depth, right, depth, 1); break;
          case 2: product_block(to, left, depth, right, depth, 2); break;
          default: product_block(to, left, depth, right, depth, 3);
        }
      }
  }
}

static void zero_tile(u32 *tile, u32 n) {
  for (u32 row = 0; row < WGMMA_M; row++) memset(tile + row * TILE_LD, 0, n * sizeof *tile);
}

/* s32 accumulators: `sums` are exact integers. */
static void add_integers(u32 *tile, const float *sums, u32 n, int saturate) {
  for (u32 row = 0; row < WGMMA_M; row++)
    for (u32 i = row * TILE_LD; i < row * TILE_LD + n; i++) {
      s64 sum = (s64)(s32)tile[i] + (s32)sums[i];
      if (saturate) sum = sum > INT32_MAX ? INT32_MAX : sum < INT32_MIN ? INT32_MIN : sum;
      tile[i] = (u32)sum;
    }
}

/* f16 accumulators are rounded after every operation. */
static void round_to_half(u32 *tile, u32 n) {
  for (u32 row = 0; row < WGMMA_M; row++)
    for (u32 i = row * TILE_LD; i < row * TILE_LD + n; i++) tile[i] = half_to_f32_bits(half_from_f32(as_f32(tile[i])));
}

enum {
  PACKED_A = WGMMA_M * MAX_K,
  PACKED_B = (WGMMA_MAX_N + PANEL - 1) / PANEL * PANEL * MAX_K,
  PACKED_SUMS = WGMMA_M * TILE_LD
};

/* Carry out `count` operations on one chain, of which only the first may have scale-d = 0. */
static int wgmma_run(Warp *warp, WgmmaOp *const *ops, u32 count, float *packed) {
  const int flags = ops[0]->row->flags, type_d = WGMMA_TYPE_D(flags);
  const u32 n = WGMMA_N(flags), k = 2 * CHUNK / wgmma_element_bytes(WGMMA_TYPE_A(flags)), depth = count * k;
  float *a = packed, *b = packed + PACKED_A, *sums = b + PACKED_B;
  u32 *tile = ops[0]->chain->tile;
  for (u32 i = 0; i < count; i++)
    if (wgmma_pack_a(warp, ops[i], a, i * k, depth) || wgmma_pack_b(warp, ops[i], b, i * k, depth)) return FAILED;
  if (!ops[0]->scale_d) zero_tile(tile, n);
  if (type_d == WGMMA_TO_S32) {
    zero_tile((u32 *)sums, n);
    wgmma_product(sums, a, b, n, depth);
    add_integers(tile, sums, n, flags & WGMMA_SATURATE);
  } else {
    wgmma_product((float *)tile, a, b, n, depth);
    if (type_d == WGMMA_TO_F16) round_to_half(tile, n);
  }
  return STEP;
}
