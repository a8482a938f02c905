/* The instructions cp.async.bulk, cp.reduce.async.bulk and their tensor forms. flags, all rows: */
enum {
  BULK_WIDE_DST = 1, BULK_WIDE_SRC = 2, BULK_WIDE_MBARRIER = 4, /* 64-bit address registers */
  BULK_OWN_SHARED = 8,                                          /* the destination is .shared::cta */
  BULK_REDUCES = 16
};
#define BULK_REDUCTION(flags) ((flags) & BULK_REDUCES ? (flags) >> 8 & 15 : NO_REDUCTION)
#define BULK_TYPE(flags) ((u32)((flags) >> 12 & 15))
enum { BULK_ALIGNMENT = 16, TILE_ALIGNMENT = 128, MAP_ALIGNMENT = 64 };

static u64 bulk_address(const Warp *warp, const Row *row, int at, int wide, int lane) {
  return (row->flags & wide ? SLOT(u64, at)[lane] : SLOT(u32, at)[lane]) + (u64)(s64)row->a[at + 1];
}

/* A stretch of shared memory of some CTA of the cluster. */
static int bulk_shared(Warp *warp, const Row *row, int lane, u64 address, u64 bytes, u32 alignment, int own, Cta **cta, u32 *offset) {
  if (cluster_target(warp, row, lane, address, cta, offset)) return FAILED;
  if (own && *cta != warp->cta)
    return fail(warp, row, lane, FAULT_MEMORY, address, "an address of another CTA of the cluster where one of the own CTA is needed");
  u32 size = warp->cta->launch->smem_bytes;
  if (*offset > size || bytes > size - *offset)
    return fail(warp, row, lane, FAULT_MEMORY, address, "a bulk copy of %llu bytes at shared byte %u of %u", (unsigned long long)bytes, *offset, size);
  if (*offset % alignment)
    return fail(warp, row, lane, FAULT_MEMORY, address, "a bulk copy at shared byte %u, which is not a multiple of %u", *offset, alignment);
  return STEP;
}

static int bulk_global(Warp *warp, const Row *row, int lane, u64 address) {
  if (address & (GENERIC_SHARED | GENERIC_LOCAL) || address < 4096)
    return fail(warp, row, lane, FAULT_MEMORY, address, "a bulk copy at 0x%llx, which is no global address", (unsigned long long)address);
  if (address % BULK_ALIGNMENT)
    return fail(warp, row, lane, FAULT_MEMORY, address, "a bulk copy at global address 0x%llx, which is not a multiple of %d", (unsigned long long)address, BULK_ALIGNMENT);
  return STEP;
}

static int bulk_size(Warp *warp, const Row *row, int lane, u32 bytes) {
  if (bytes % BULK_ALIGNMENT) return fail(warp, row, lane, FAULT_MEMORY, 0, "a bulk copy of %u bytes, not a multiple of %d", bytes, BULK_ALIGNMENT);
  return STEP;
}

static void bulk_count(const Warp *warp, const Row *row, u64 bytes) {
  const Launch *launch = warp->cta->launch;
  if (launch->count_bytes) __atomic_fetch_add(&launch->count_bytes[row - launch->rows], bytes, __ATOMIC_RELAXED);
}

/* ---- tensor maps */

/* The tensor map at an address, or NULL after a fault. */
static const TensorMap *bulk_map(Warp *warp, const Row *row, int lane, u64 address, int rank) {
  if (address & (GENERIC_SHARED | GENERIC_LOCAL) || address < 4096 || address % MAP_ALIGNMENT) {
    fail(warp, row, lane, FAULT_MEMORY, address,
         "0x%llx is not the address of a tensor map: a multiple of %d in parameter, constant or global memory", (unsigned long long)address, MAP_ALIGNMENT);
    return NULL;
  }
  if (warp->cta->launch->check_mem && !find_region(warp->cta->launch, address, sizeof(TensorMap))) {
    global_outside(warp, row, lane, address, sizeof(TensorMap), ACCESS_READ);
    return NULL;
  }
  const TensorMap *map = (const TensorMap *)address;
  if (map->magic != MAP_MAGIC) {
    fail(warp, row, lane, FAULT_MEMORY, address, "there is no tensor map at 0x%llx (made by cuattn.tensor_map for NumPy arrays)", (unsigned long long)address);
    return NULL;
  }
  if (rank && map->rank != rank) {
    fail(warp, row, lane, FAULT_MEMORY, address, "%d coordinates for a tensor map of %d dimensions", rank, map->rank);
    return NULL;
  }
  return map;
}

static int bulk_tensor(Warp *warp, const Row *row, int lane, u64 address, int rank, int coordinates_at, Tile *tile, s32 *coordinates) {
  const TensorMap *map = bulk_map(warp, row, lane, address, rank);
  if (!map) return FAILED;
  for (int k = 0; k < rank; k++) coordinates[k] = SLOT(s32, coordinates_at + k)[lane];
  *tile = tensor_tile(map, coordinates);
  bulk_count(warp, row, tile_bytes(tile));
  return STEP;
}

/* ---- into shared memory */

/* To the destination, or to the same place of every CTA that the mask names, each with its own mbarrier. */
static int bulk_deliver(BulkOp op, u64 address, u64 mbarrier, u32 alignment, int mask_at) {
  Warp *warp = op.issuer;
  Cluster *cluster = warp->cta->cluster;
  Cta *owner;
  if (bulk_shared(warp, op.row, op.lane, address, tile_bytes(&op.tile), alignment, op.row->flags & BULK_OWN_SHARED, &op.to, &op.to_offset)) return FAILED;
  if (op.to == op.from)
    return fail(warp, op.row, op.lane, FAULT_MEMORY, address, "a bulk copy from shared memory to that of the same CTA: PTX has only those to another CTA");
  if (bulk_shared(warp, op.row, op.lane, mbarrier, 8, 8, 0, &owner, &op.mbarrier)) return FAILED;
  if (owner != op.to)
    return fail(warp, op.row, op.lane, FAULT_MEMORY, mbarrier, "the mbarrier of a bulk copy is in CTA %u of the cluster, its destination in CTA %u", owner->rank, op.to->rank);
  u32 mask = mask_at < 0 ? 1u << op.to->rank : *(const u32 *)(warp->regs + op.row->a[mask_at] + 4 * (size_t)op.lane) & 0xffff;
  if (mask >> cluster->size)
    return fail(warp, op.row, op.lane, FAULT_MEMORY, address, "multicast to CTAs 0x%x of a cluster of %u", mask, cluster->size);
  for (; mask; mask &= mask - 1) {
    op.to = cluster->ctas[__builtin_ctz(mask)];
    const Mbarrier *found = mbarrier_find(op.to, op.mbarrier);
    if (!found)
      return fail(warp, op.row, op.lane, FAULT_ASYNC, mbarrier, "there is no mbarrier at byte %u of CTA %u: it was not initialised", op.mbarrier, op.to->rank);
    if (!found->fenced)
      return fail_pair(warp, op.row, op.lane, FAULT_ASYNC, mbarrier, (s32)(found->row - warp->cta->launch->rows),
                       "a bulk copy completes on the mbarrier at byte %u of CTA %u, whose initialisation it may not see: no fence.mbarrier_init by the thread "
                       "that initialised it, nor a fence.proxy.async, lies between the two", op.mbarrier, op.to->rank);
    u32 bytes = (u32)tile_bytes(&op.tile);
    if (warp->cta->launch->check_mem && mbarrier_overlap(op.to, op.to_offset, bytes))
      return fail(warp, op.row, op.lane, FAULT_MEMORY, address, "a bulk copy of %u bytes to shared byte %u, over a live mbarrier", bytes, op.to_offset);
    op.actor = op.to->races ? actor_of_mbarrier(op.to, op.mbarrier) : 0;
    if (bulk_start(op)) return FAILED;
  }
  return STEP;
}

/* a: destination, offset, source, offset, mbarrier, offset, size, CTA mask or -1 */
static int op_bulk_load(Warp *warp, const Row *row) {
  for (u32 rest = warp->exec; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    u32 bytes = SLOT(u32, 6)[lane];
    u64 source = bulk_address(warp, row, 2, BULK_WIDE_SRC, lane);
    if (bulk_size(warp, row, lane, bytes) || bulk_global(warp, row, lane, source)) return FAILED;
    bulk_count(warp, row, bytes);
    BulkOp op = {.tile = linear_tile(source, bytes), .issuer = warp, .row = row, .lane = lane, .reduction = NO_REDUCTION};
    if (bulk_deliver(op, bulk_address(warp, row, 0, BULK_WIDE_DST, lane), bulk_address(warp, row, 4, BULK_WIDE_MBARRIER, lane), BULK_ALIGNMENT, row->a[7] < 0 ? -1 : 7))
      return FAILED;
  }
  return STEP;
}

/* Shared memory to shared memory of another CTA. a: destination, offset, source, offset, mbarrier, offset, size */
static int op_bulk_copy(Warp *warp, const Row *row) {
  for (u32 rest = warp->exec; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    u32 bytes = SLOT(u32, 6)[lane];
    BulkOp op = {.tile = linear_tile(0, bytes), .issuer = warp, .row = row, .lane = lane, .reduction = BULK_REDUCTION(row->flags)};
    op.tile.data_type = BULK_TYPE(row->flags);
    u64 source = bulk_address(warp, row, 2, BULK_WIDE_SRC, lane);
    if (bulk_size(warp, row, lane, bytes) || bulk_shared(warp, row, lane, source, bytes, BULK_ALIGNMENT, 1, &op.from, &op.from_offset)) return FAILED;
    bulk_count(warp, row, bytes);
    if (bulk_deliver(op, bulk_address(warp, row, 0, BULK_WIDE_DST, lane), bulk_address(warp, row, 4, BULK_WIDE_MBARRIER, lane), BULK_ALIGNMENT, -1)) return FAILED;
  }
  return STEP;
}

/* a: destination, offset, map, offset, mbarrier, offset, CTA mask or -1, rank, coordinates */
static int op_bulk_tensor_load(Warp *warp, const Row *row) {
  s32 coordinates[MAP_MAX_RANK];
  for (u32 rest = warp->exec; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    BulkOp op = {.issuer = warp, .row = row, .lane = lane, .reduction = NO_REDUCTION};
    if (bulk_tensor(warp, row, lane, bulk_address(warp, row, 2, BULK_WIDE_SRC, lane), row->a[7], 8, &op.tile, coordinates)) return FAILED;
    if (bulk_deliver(op, bulk_address(warp, row, 0, BULK_WIDE_DST, lane), bulk_address(warp, row, 4, BULK_WIDE_MBARRIER, lane), TILE_ALIGNMENT, row->a[6] < 0 ? -1 : 6))
      return FAILED;
  }
  return STEP;
}

/* ---- into global memory */

static int bulk_send(BulkOp op, u64 source, u32 alignment) {
  Warp *warp = op.issuer;
  op.group = bulk_committed(warp)[op.lane];
  op.actor = warp->cta->races ? actor_of_bulk_group(warp, op.lane) : 0;
  if (bulk_shared(warp, op.row, op.lane, source, tile_bytes(&op.tile), alignment, 1, &op.from, &op.from_offset)) return FAILED;
  return bulk_start(op);
}

/* a: destination, offset, source, offset, size */
static int op_bulk_store(Warp *warp, const Row *row) {
  for (u32 rest = warp->exec; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    u32 bytes = SLOT(u32, 4)[lane];
    u64 destination = bulk_address(warp, row, 0, BULK_WIDE_DST, lane);
    if (bulk_size(warp, row, lane, bytes) || bulk_global(warp, row, lane, destination)) return FAILED;
    bulk_count(warp, row, bytes);
    BulkOp op = {.tile = linear_tile(destination, bytes), .issuer = warp, .row = row, .lane = lane, .reduction = BULK_REDUCTION(row->flags)};
    op.tile.data_type = BULK_TYPE(row->flags);
    if (bulk_send(op, bulk_address(warp, row, 2, BULK_WIDE_SRC, lane), BULK_ALIGNMENT)) return FAILED;
  }
  return STEP;
}

/* a: map, offset, source, offset, rank, coordinates */
static int op_bulk_tensor_store(Warp *warp, const Row *row) {
  s32 coordinates[MAP_MAX_RANK];
  for (u32 rest = warp->exec; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    BulkOp op = {.issuer = warp, .row = row, .lane = lane, .reduction = BULK_REDUCTION(row->flags)};
    u64 map = bulk_address(warp, row, 0, BULK_WIDE_DST, lane);
    if (bulk_tensor(warp, row, lane, map, row->a[4], 5, &op.tile, coordinates)) return FAILED;
    for (int k = 0; k < row->a[4]; k++)
      if (coordinates[k] < 0)
        return fail(warp, row, lane, FAULT_MEMORY, map, "coordinate %d of a tensor store is %d: stores start at 0 or above", k, coordinates[k]);
    if (op.reduction != NO_REDUCTION && !reduction_exists(op.reduction, op.tile.data_type))
      return fail(warp, row, lane, FAULT_MEMORY, map, "the element type of the tensor map (CUtensorMapDataType %u) has no such reduction", op.tile.data_type);
    if (bulk_send(op, bulk_address(warp, row, 2, BULK_WIDE_SRC, lane), TILE_ALIGNMENT)) return FAILED;
  }
  return STEP;
}

/* ---- hints */

/* A cache policy: a word that createpolicy makes (lowering/bulk.py); the hardware reads no other. a: policy */
static int op_cache_policy(Warp *warp, const Row *row) {
  const u64 *policy = SLOT(u64, 0);
  for (u32 rest = warp->exec; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    u32 kind = (u32)(policy[lane] >> 56);
    if (policy[lane] << 8 != 0xf0ull << 56 || (kind != 0x10 && kind != 0x12 && kind != 0x14 && kind != 0x16))
      return fail(warp, row, lane, FAULT_MEMORY, policy[lane], "0x%llx is no cache policy: createpolicy makes them", (unsigned long long)policy[lane]);
  }
  return STEP;
}

/* A prefetch of global memory into L2. a: address, offset, size */
static int op_bulk_prefetch(Warp *warp, const Row *row) {
  for (u32 rest = warp->exec; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    u32 bytes = SLOT(u32, 2)[lane];
    u64 address = bulk_address(warp, row, 0, BULK_WIDE_SRC, lane);
    if (bulk_size(warp, row, lane, bytes) || bulk_global(warp, row, lane, address)) return FAILED;
    if (bytes && warp->cta->launch->check_mem && !find_region(warp->cta->launch, address, bytes)) return global_outside(warp, row, lane, address, bytes, ACCESS_READ);
  }
  return STEP;
}

/* a: map, offset, rank (0: any) */
static int op_bulk_prefetch_map(Warp *warp, const Row *row) {
  for (u32 rest = warp->exec; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    if (!bulk_map(warp, row, lane, bulk_address(warp, row, 0, BULK_WIDE_DST, lane), row->a[2])) return FAILED;
  }
  return STEP;
}

static const OpEntry ops_bulk[] = {
  {"bulk_load", op_bulk_load}, {"bulk_copy", op_bulk_copy}, {"bulk_store", op_bulk_store}, {"bulk_tensor_load", op_bulk_tensor_load},
  {"bulk_tensor_store", op_bulk_tensor_store}, {"bulk_prefetch", op_bulk_prefetch}, {"bulk_prefetch_map", op_bulk_prefetch_map}, {"cache_policy", op_cache_policy}, {"bulk_commit", op_bulk_commit},
  {"bulk_wait", op_bulk_wait}, {0, 0},
};
