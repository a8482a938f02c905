/* Loads and stores: addresses of the executing lanes, then the bytes. */

/* Host pointers of all executing lanes, `bytes` each. a[address_at] is the address slot, a[address_at + 1] the offset. */
static int resolve(Warp *warp, const Row *row, int address_at, u32 bytes, Access access, u8 **pointers) {
  const Launch *launch = warp->cta->launch;
  int space = MEM_SPACE(row->flags), is_wide = row->flags & MEM_WIDE_ADDRESS;
  u64 offset = (u64)(s64)row->a[address_at + 1], addresses[WARP_SIZE];
  const u64 *wide = (const u64 *)(warp->regs + row->a[address_at]);
  const u32 *narrow = (const u32 *)wide;
  if (launch->count_bytes)
    __atomic_fetch_add(&launch->count_bytes[row - launch->rows], (u64)__builtin_popcount(warp->exec) * bytes, __ATOMIC_RELAXED);
  if (is_wide) IVDEP for (int i = 0; i < WARP_SIZE; i++) addresses[i] = wide[i] + offset;
  else IVDEP for (int i = 0; i < WARP_SIZE; i++) addresses[i] = narrow[i] + offset;
  if (space == SPACE_SHARED) {
    IVDEP for (int i = 0; i < WARP_SIZE; i++) addresses[i] = (u32)addresses[i];
    return shared_pointers(warp, row, addresses, warp->exec, bytes, access, pointers);
  }
  if (space == SPACE_GLOBAL) return global_pointers(warp, row, addresses, warp->exec, bytes, access, pointers);
  for (u32 rest = warp->exec; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    if (lane_pointer(warp, row, lane, space, addresses[lane], bytes, access, &pointers[lane])) return FAILED;
  }
  return STEP;
}

/* ---- ld and st: destinations or sources (MEM_COUNT of them) stand beside the address and its offset */

#define LOAD_LANES(T, R)                                                      \
  for (int v = 0; v < count; v++) {                                           \
    R *dst = (R *)(warp->regs + row->a[v]);                                   \
    T value;                                                                  \
    EXECUTING_LANES(memcpy(&value, pointers[lane] + v * (int)sizeof(T), sizeof(T)); dst[lane] = (R)value); \
  }

/* Four words a lane, as vectors: four lanes at a time are a matrix that is transposed. A third of the time of LOAD_LANES. */
typedef u32 Words __attribute__((vector_size(16), may_alias));

static void load_quads(Warp *warp, const Row *row, u8 *const *pointers) {
  for (int lane = 0; lane < WARP_SIZE; lane += 4) {
    Words x[4], low[2], high[2];
    for (int i = 0; i < 4; i++) memcpy(&x[i], pointers[lane + i], sizeof x[i]);
    for (int i = 0; i < 2; i++) {
      low[i] = __builtin_shuffle(x[2 * i], x[2 * i + 1], (Words){0, 4, 1, 5});
      high[i] = __builtin_shuffle(x[2 * i], x[2 * i + 1], (Words){2, 6, 3, 7});
    }
    *(Words *)(SLOT(u32, 0) + lane) = __builtin_shuffle(low[0], low[1], (Words){0, 1, 4, 5});
    *(Words *)(SLOT(u32, 1) + lane) = __builtin_shuffle(low[0], low[1], (Words){2, 3, 6, 7});
    *(Words *)(SLOT(u32, 2) + lane) = __builtin_shuffle(high[0], high[1], (Words){0, 1, 4, 5});
    *(Words *)(SLOT(u32, 3) + lane) = __builtin_shuffle(high[0], high[1], (Words){2, 3, 6, 7});
  }
}

static int op_ld(Warp *warp, const Row *row) {
  u8 *pointers[WARP_SIZE];
  int flags = row->flags, count = MEM_COUNT(flags);
  Access access = flags & MEM_STRONG ? ACCESS_STRONG_READ : ACCESS_READ;
  if (resolve(warp, row, count, (u32)count << MEM_SIZE_LOG2(flags), access, pointers)) return FAILED;
  int is_signed = flags & MEM_SIGNED, wide = flags & MEM_WIDE_REGISTER;
  switch (MEM_SIZE_LOG2(flags) | (is_signed ? 4 : 0) | (wide ? 8 : 0)) {
    case 0: LOAD_LANES(u8, u32) break;
    case 1: LOAD_LANES(u16, u32) break;
    case 2: case 6:
      if (count == 4 && warp->exec == ALL_LANES) load_quads(warp, row, pointers);
      else LOAD_LANES(u32, u32)
      break;
    case 4: LOAD_LANES(s8, s32) break;
    case 5: LOAD_LANES(s16, s32) break;
    case 8: LOAD_LANES(u8, u64) break;
    case 9: LOAD_LANES(u16, u64) break;
    case 10: LOAD_LANES(u32, u64) break;
    case 11: case 15: LOAD_LANES(u64, u64) break;
    case 12: LOAD_LANES(s8, s64) break;
    case 13: LOAD_LANES(s16, s64) break;
    case 14: LOAD_LANES(s32, s64) break;
    default: return fail(warp, row, -1, FAULT_INTERNAL, 0, "load of unknown size");
  }
  if (flags & MEM_ACQUIRE && warp->cta->races) race_acquire(warp, pointers, MEM_SPACE(flags));
  return STEP;
}

#define STORE_LANES(T)                                                        \
  for (int v = 0; v < count; v++) {                                           \
    const int stride = row->flags & MEM_WIDE_REGISTER ? 8 : 4;                \
    const u8 *src = warp->regs + row->a[2 + v];                               \
    EXECUTING_LANES(memcpy(pointers[lane] + v * (int)sizeof(T), src + lane * stride, sizeof(T))); \
  }

static int op_st(Warp *warp, const Row *row) {
  u8 *pointers[WARP_SIZE];
  int flags = row->flags, count = MEM_COUNT(flags);
  Access access = flags & MEM_STRONG ? ACCESS_STRONG_WRITE : ACCESS_WRITE;
  if (resolve(warp, row, 0, (u32)count << MEM_SIZE_LOG2(flags), access, pointers)) return FAILED;
  if (flags & MEM_RELEASE && warp->cta->races) {
    race_fence(warp);
    race_release(warp, pointers, MEM_SPACE(flags));
  }
  switch (MEM_SIZE_LOG2(flags)) {
    case 0: STORE_LANES(u8) break;
    case 1: STORE_LANES(u16) break;
    case 2: STORE_LANES(u32) break;
    default: STORE_LANES(u64) break;
  }
  return STEP;
}

/* Kernel parameters: the same bytes for every lane unless the address is computed. a: dst..., address slot, offset */
static int op_ld_param(Warp *warp, const Row *row) {
  int count = MEM_COUNT(row->flags), size = 1 << MEM_SIZE_LOG2(row->flags);
  for (int v = 0; v < count; v++) {
    const u8 *src = warp->cta->launch->params + row->a[count] + v * size;
    s64 value = 0;
    memcpy(&value, src, (size_t)size);
    if (row->flags & MEM_SIGNED) value = (s64)((u64)value << (64 - 8 * size)) >> (64 - 8 * size);
    if (row->flags & MEM_WIDE_REGISTER) {
      u64 *dst = SLOT(u64, v);
      EXECUTING_LANES(dst[lane] = (u64)value);
    } else {
      u32 *dst = SLOT(u32, v);
      EXECUTING_LANES(dst[lane] = (u32)value);
    }
  }
  return STEP;
}

/* Address of a parameter in this launch, for mov and cvta.param. */
static int op_param_address(Warp *warp, const Row *row) {
  u64 address = (u64)(uintptr_t)(warp->cta->launch->params + row->a[1]);
  EACH_LANE(u64, (address + 0 * (u64)i));
}

/* isspacep: which window a generic address lies in. flags: SPACE_* */
static int op_isspacep(Warp *warp, const Row *row) {
  const u64 *address = SLOT(u64, 1);
  u64 window = row->flags == SPACE_SHARED || row->flags == SPACE_CLUSTER ? GENERIC_SHARED : row->flags == SPACE_LOCAL ? GENERIC_LOCAL : 0;
  u64 mask = GENERIC_SHARED | GENERIC_LOCAL, own = (u64)(warp->cta->rank + 1) << CLUSTER_RANK_SHIFT;
  u64 rank = row->flags == SPACE_SHARED ? 0xffull << CLUSTER_RANK_SHIFT : 0; /* the window of the own CTA only */
  EACH_LANE(u32, ((address[i] & mask) == window && ((address[i] & rank) == 0 || (address[i] & rank) == own)));
}

static const OpEntry ops_load_store[] = {
  {"ld", op_ld}, {"st", op_st}, {"ld_param", op_ld_param}, {"param_address", op_param_address}, {"isspacep", op_isspacep}, {0, 0},
};
