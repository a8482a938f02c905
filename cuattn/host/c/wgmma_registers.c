/* Accumulators between a warp's registers and its sixteen rows of the tile, and A's fragments.
 *
 * Lane 4 g + t holds, of rows g and g + 8, columns 8 j + 2 t and the next: in registers 4 j (row g), 4 j + 1, 4 j + 2
 * (row g + 8), 4 j + 3; as f16 in 2 j and 2 j + 1, two columns each. */

typedef float Float4 __attribute__((vector_size(16)));
typedef u32 Word4 __attribute__((vector_size(16)));
typedef s32 Index4 __attribute__((vector_size(16)));

static float *warp_rows(const WgmmaChain *chain, const Warp *warp) {
  return (float *)chain->tile + (warp->id % WARPGROUP) * WARP_ROWS * TILE_LD;
}

/* What registers hold while they are in flight: a NaN of every floating-point type. */
static void poison_accumulators(Warp *warp, const WgmmaChain *chain) {
  for (u32 i = 0; i < chain->num_slots; i++) memset(warp->regs + chain->slots[i], 0xff, WARP_SIZE * sizeof(u32));
}

static void load_accumulators(const Warp *warp, const WgmmaChain *chain) {
  float *rows = warp_rows(chain, warp);
  if (WGMMA_TYPE_D(chain->shape) == WGMMA_TO_F16) {
    for (u32 i = 0; i < chain->num_slots; i++) {
      const u32 *packed = (const u32 *)(warp->regs + chain->slots[i]);
      for (u32 lane = 0; lane < WARP_SIZE; lane++) {
        float *to = rows + (8 * (i % 2) + lane / 4) * TILE_LD + 8 * (i / 2) + 2 * (lane % 4);
        to[0] = as_f32(half_to_f32_bits(packed[lane] & 0xffff));
        to[1] = as_f32(half_to_f32_bits(packed[lane] >> 16));
      }
    }
    return;
  }
  for (u32 i = 0; i < chain->num_slots; i += 2) {
    const float *even = (const float *)(warp->regs + chain->slots[i]), *odd = (const float *)(warp->regs + chain->slots[i + 1]);
    float *to = rows + 8 * (i / 2 % 2) * TILE_LD + 8 * (i / 4);
    for (u32 g = 0; g < 8; g++, to += TILE_LD) {
      Float4 x, y;
      memcpy(&x, even + 4 * g, sizeof x);
      memcpy(&y, odd + 4 * g, sizeof y);
      Float4 low = __builtin_shuffle(x, y, ((Index4){0, 4, 1, 5})), high = __builtin_shuffle(x, y, ((Index4){2, 6, 3, 7}));
      memcpy(to, &low, sizeof low);
      memcpy(to + 4, &high, sizeof high);
    }
  }
}

static inline Word4 one_nan(Float4 x) { return ((Word4)(x == x) & (Word4)x) | (~(Word4)(x == x) & 0x7fffffff); }

static void store_accumulators(Warp *warp, const WgmmaChain *chain) {
  const float *rows = warp_rows(chain, warp);
  const int type_d = WGMMA_TYPE_D(chain->shape);
  if (type_d == WGMMA_TO_F16) {
    for (u32 i = 0; i < chain->num_slots; i++) {
      u32 *packed = (u32 *)(warp->regs + chain->slots[i]);
      for (u32 lane = 0; lane < WARP_SIZE; lane++) {
        const float *from = rows + (8 * (i % 2) + lane / 4) * TILE_LD + 8 * (i / 2) + 2 * (lane % 4);
        packed[lane] = half_from_f32(from[0]) | half_from_f32(from[1]) << 16;
      }
    }
    return;
  }
  for (u32 i = 0; i < chain->num_slots; i += 2) {
    u32 *even = (u32 *)(warp->regs + chain->slots[i]), *odd = (u32 *)(warp->regs + chain->slots[i + 1]);
    const float *from = rows + 8 * (i / 2 % 2) * TILE_LD + 8 * (i / 4);
    for (u32 g = 0; g < 8; g++, from += TILE_LD) {
      Float4 low, high;
      memcpy(&low, from, sizeof low);
      memcpy(&high, from + 4, sizeof high);
      Float4 x = __builtin_shuffle(low, high, ((Index4){0, 2, 4, 6})), y = __builtin_shuffle(low, high, ((Index4){1, 3, 5, 7}));
      Word4 first = (Word4)x, second = (Word4)y;
      if (type_d == WGMMA_TO_F32) first = one_nan(x), second = one_nan(y);
      memcpy(even + 4 * g, &first, sizeof first);
      memcpy(odd + 4 * g, &second, sizeof second);
    }
  }
}

/* A from registers: register e of lanes 4 g .. 4 g + 3 is chunk e / 2 of row g (e even) or g + 8, whatever the type. */
static void copy_fragments(const Warp *warp, const Row *row, WgmmaOp *op) {
  for (u32 e = 0; e < 4; e++) {
    const u32 *from = (const u32 *)(warp->regs + row->a[WGMMA_AT_A + e]);
    for (u32 g = 0; g < 8; g++)
      memcpy(op->fragments[(warp->id % WARPGROUP) * WARP_ROWS + 8 * (e % 2) + g][e / 2], from + 4 * g, CHUNK);
  }
}
