/* Operands of wgmma as f32, in the order in which the matrix product reads them.
 *
 * A: rows of k. B: panels of PANEL columns, in each panel one row for every k. Every type's values are exact in f32. */

typedef u16 Half8 __attribute__((vector_size(16)));
typedef s16 HalfIndex __attribute__((vector_size(16)));
typedef u32 Word8 __attribute__((vector_size(32)));
typedef float Float8 __attribute__((vector_size(32)));

static inline u32 wgmma_element_bytes(int type) { return type <= WGMMA_BF16 ? 2 : type == WGMMA_TF32 ? 4 : 1; }

/* Values of the 8-bit types. */
static float byte_values[4][256];
static int byte_values_ready;

static void wgmma_fill_tables(void) {
  if (__atomic_load_n(&byte_values_ready, __ATOMIC_ACQUIRE)) return;
  for (u32 i = 0; i < 256; i++) {
    u32 magnitude = i & 0x7f, exponent = magnitude >> 3, mantissa = i & 7;
    float e4m3 = exponent ? as_f32((exponent + 120) << 23 | mantissa << 20) : (float)mantissa * 0x1p-9f;
    if (magnitude == 0x7f) e4m3 = as_f32(0x7fffffff);
    byte_values[0][i] = i & 0x80 ? -e4m3 : e4m3;
    byte_values[1][i] = as_f32(half_to_f32_bits(i << 8));
    byte_values[2][i] = (float)(s8)i;
    byte_values[3][i] = (float)i;
  }
  __atomic_store_n(&byte_values_ready, 1, __ATOMIC_RELEASE);
}

static inline Float8 widen_half(Half8 packed, int is_bfloat) {
  if (is_bfloat) return (Float8)(__builtin_convertvector(packed, Word8) << 16);
#if defined(__F16C__)
  return (Float8)_mm256_cvtph_ps((__m128i)packed);
#else
  Float8 wide;
  for (int i = 0; i < 8; i++) wide[i] = as_f32(half_to_f32_bits(packed[i]));
  return wide;
#endif
}

static inline void widen_halves(const u8 *chunk, int type, float *out) {
  Half8 packed;
  memcpy(&packed, chunk, sizeof packed);
  Float8 wide = widen_half(packed, type == WGMMA_BF16);
  memcpy(out, &wide, sizeof wide);
}

/* The elements of one chunk, in order. */
static inline void widen_chunk(const u8 *chunk, int type, float *out) {
  if (type <= WGMMA_BF16) {
    widen_halves(chunk, type, out);
  } else if (type == WGMMA_TF32) {
    u32 words[4];
    memcpy(words, chunk, sizeof words);
    for (int i = 0; i < 4; i++) out[i] = as_f32(words[i] & 0xffffe000);
  } else {
    for (int i = 0; i < CHUNK; i++) out[i] = byte_values[type - WGMMA_E4M3][chunk[i]];
  }
}

#define PAIRS(a, b, first) __builtin_shuffle(a, b, first ? ((HalfIndex){4, 12, 5, 13, 6, 14, 7, 15}) : ((HalfIndex){0, 8, 1, 9, 2, 10, 3, 11}))

/* Eight lines of eight 16-bit elements → eight rows (one for each k) of eight columns. */
static inline void transpose_halves(const u8 *const *lines, int is_bfloat, float *out) {
  Half8 in[8], a[8], b[8];
  for (int i = 0; i < 8; i++) memcpy(&in[i], lines[i], sizeof in[i]);
  for (int i = 0; i < 4; i++) { /* three rounds of interleaving a line with the one four further on */
    a[2 * i] = PAIRS(in[i], in[i + 4], 0);
    a[2 * i + 1] = PAIRS(in[i], in[i + 4], 1);
  }
  for (int i = 0; i < 4; i++) {
    b[2 * i] = PAIRS(a[i], a[i + 4], 0);
    b[2 * i + 1] = PAIRS(a[i], a[i + 4], 1);
  }
  for (int i = 0; i < 4; i++) {
    a[2 * i] = PAIRS(b[i], b[i + 4], 0);
    a[2 * i + 1] = PAIRS(b[i], b[i + 4], 1);
  }
  for (int i = 0; i < 8; i++) {
    Float8 wide = widen_half(a[i], is_bfloat);
    memcpy(out + i * PANEL, &wide, sizeof wide);
  }
}

/* B of one operation: rows k_at.. of `panels`, which hold `depth` rows each. Fails on an address outside. */
static int wgmma_pack_b(Warp *warp, const WgmmaOp *op, float *panels, u32 k_at, u32 depth) {
  const int type = WGMMA_TYPE_B(op->row->flags), mn_major = (op->row->flags & WGMMA_B_MN_MAJOR) != 0;
  const WgmmaMatrix matrix = wgmma_matrix(op->b);
  const u32 n = WGMMA_N(op->row->flags), per_chunk = CHUNK / wgmma_element_bytes(type);
  for (u32 column = 0; column < n; column += 8) {
    float *panel = panels + (size_t)(column / PANEL) * PANEL * depth + k_at * PANEL + column % PANEL;
    for (u32 k = 0; mn_major && k < 16; k++) {
      u32 address = chunk_address(&matrix, 1, k, column / 8);
      const u8 *chunk = chunk_pointer(warp->cta, address);
      if (!chunk) return chunk_outside(warp, op->row, address, 'B');
      widen_halves(chunk, type, panel + k * PANEL);
    }
    for (u32 half = 0; !mn_major && half < 2; half++) {
      const u8 *lines[8];
      for (u32 i = 0; i < 8; i++) {
        u32 address = chunk_address(&matrix, 0, column + i, half);
        lines[i] = chunk_pointer(warp->cta, address);
        if (!lines[i]) return chunk_outside(warp, op->row, address, 'B');
      }
      float *out = panel + half * per_chunk * PANEL;
      if (type <= WGMMA_BF16) {
        transpose_halves(lines, type == WGMMA_BF16, out);
        continue;
      }
      for (u32 i = 0; i < 8; i++) {
        float values[CHUNK];
        widen_chunk(lines[i], type, values);
        for (u32 k = 0; k < per_chunk; k++) out[k * PANEL + i] = values[k];
      }
    }
  }
  return STEP;
}

/* A of one operation: columns k_at.. of `rows`, which are `depth` long. */
static int wgmma_pack_a(Warp *warp, const WgmmaOp *op, float *rows, u32 k_at, u32 depth) {
  const int flags = op->row->flags, type = WGMMA_TYPE_A(flags);
  const u32 per_chunk = CHUNK / wgmma_element_bytes(type);
  const WgmmaMatrix matrix = wgmma_matrix(op->a);
  if (flags & WGMMA_A_MN_MAJOR) {
    for (u32 k = 0; k < 16; k++)
      for (u32 m = 0; m < WGMMA_M; m += 8) {
        u32 address = chunk_address(&matrix, 1, k, m / 8);
        const u8 *chunk = chunk_pointer(warp->cta, address);
        if (!chunk) return chunk_outside(warp, op->row, address, 'A');
        float values[8];
        widen_halves(chunk, type, values);
        for (u32 i = 0; i < 8; i++) rows[(m + i) * depth + k_at + k] = values[i];
      }
  } else {
    for (u32 m = 0; m < WGMMA_M; m++)
      for (u32 half = 0; half < 2; half++) {
        const u8 *chunk = op->fragments[m][half];
        if (!(flags & WGMMA_A_REGISTERS)) {
          u32 address = chunk_address(&matrix, 0, m, half);
          chunk = chunk_pointer(warp->cta, address);
          if (!chunk) return chunk_outside(warp, op->row, address, 'A');
        }
        widen_chunk(chunk, type, rows + m * depth + k_at + half * per_chunk);
      }
  }
  if (flags & WGMMA_NEGATIVE)
    for (u32 m = 0; m < WGMMA_M; m++)
      for (u32 k = 0; k < 2 * per_chunk; k++) rows[m * depth + k_at + k] = -rows[m * depth + k_at + k];
  return STEP;
}
