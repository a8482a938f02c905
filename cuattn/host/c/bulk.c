/* cp.async.bulk: copies by the TMA, which land when the schedule says so.
 *
 * A cluster keeps its copies in one queue. A copy into shared memory counts its bytes on an mbarrier when it lands; until
 * then its destination holds poison and counts as never written, and its source is read only then. A copy into global
 * memory belongs to a bulk group of the lane that issued it. It goes in two steps, as late as the kernel's waits allow:
 * wait_group.read makes it read its source, wait_group makes it write. What races is looked at when it is issued: it
 * reads and writes as an actor of its own, with whom whoever waits for it is ordered. */
#include <string.h>

#include "bulk_tile.c"
#include "bulk_reduce.c"

typedef struct {
  Tile tile;
  Warp *issuer;
  const Row *row;
  s32 lane;
  s32 reduction;                /* ATOM_*, or NO_REDUCTION */
  Cta *from, *to;               /* whose shared memory it reads and writes; NULL: global memory */
  u32 from_offset, to_offset;
  u32 mbarrier;                 /* in `to` */
  u32 actor;                    /* of the mbarrier; of a group's reads, with that of its writes after it */
  u32 group;
  u8 *data;                     /* what a copy into global memory has read and not yet written */
} BulkOp;

struct BulkQueue {
  BulkOp *ops;
  u32 count, capacity;
  u32 *committed;               /* groups that each lane of the cluster has committed */
  u32 *clocks;                  /* [lanes of the cluster][GROUP_CLOCKS] its warp's actor after each of the latest commits */
};
enum { GROUP_CLOCKS = 32 };     /* more groups in flight than this are not told apart by the race checker */

static size_t bulk_num_lanes(const Cluster *cluster) { return (size_t)cluster->size * cluster->ctas[0]->num_warps * WARP_SIZE; }

/* A cluster starts. */
static void bulk_reset(Cluster *cluster) {
  if (!cluster->bulk) {
    cluster->bulk = calloc(1, sizeof *cluster->bulk);
    cluster->bulk->committed = malloc(bulk_num_lanes(cluster) * sizeof(u32));
    if (cluster->launch->check_race) cluster->bulk->clocks = malloc(bulk_num_lanes(cluster) * GROUP_CLOCKS * sizeof(u32));
  }
  BulkQueue *queue = cluster->bulk;
  for (u32 i = 0; i < queue->count; i++) free(queue->ops[i].data);
  queue->count = 0;
  memset(queue->committed, 0, bulk_num_lanes(cluster) * sizeof *queue->committed);
}

static void bulk_free(Cluster *cluster) {
  if (!cluster->bulk) return;
  bulk_reset(cluster);
  free(cluster->bulk->ops);
  free(cluster->bulk->committed);
  free(cluster->bulk->clocks);
  free(cluster->bulk);
}

static size_t bulk_first_lane(const Warp *warp) { return ((size_t)warp->cta->rank * warp->cta->num_warps + warp->id) * WARP_SIZE; }
static u32 *bulk_committed(const Warp *warp) { return warp->cta->cluster->bulk->committed + bulk_first_lane(warp); }
static u32 *bulk_clock(const Warp *warp, int lane, u32 group) {
  return warp->cta->cluster->bulk->clocks + (bulk_first_lane(warp) + (size_t)lane) * GROUP_CLOCKS + group % GROUP_CLOCKS;
}

/* ---- checks at issue */

static int global_piece(void *context, u32 shared, u64 global, u32 bytes, int inside) {
  const BulkOp *op = context;
  Warp *warp = op->issuer;
  (void)shared;
  if (!inside) return STEP;
  Access access = !op->to ? op->reduction == NO_REDUCTION ? ACCESS_WRITE : ACCESS_UPDATE : ACCESS_READ;
  const Launch *launch = warp->cta->launch;
  if (check_read_only(warp, op->row, op->lane, global, bytes, access)) return FAILED;
  Region *region = find_region(launch, global, bytes);
  if (!region) return launch->check_mem ? global_outside(warp, op->row, op->lane, global, bytes, access) : STEP;
  if (region->state && check_states(warp, op->row, op->lane, region->state + (global - region->base), global, bytes, access, "global"))
    return FAILED;
  if (!region->writes) return STEP;
  return race_async_global(warp, op->row, op->lane, region, global, bytes, access, op->actor + !op->to);
}

static int shared_source_piece(void *context, u32 shared, u64 global, u32 bytes, int inside) {
  const BulkOp *op = context;
  (void)global;
  return inside ? check_states(op->issuer, op->row, op->lane, op->from->smem_state + shared, shared, bytes, ACCESS_READ, "shared") : STEP;
}

static int bulk_check(BulkOp *op) {
  const Launch *launch = op->issuer->cta->launch;
  u32 bytes = (u32)tile_bytes(&op->tile);
  if (!global_is_checked(launch, op->to ? ACCESS_READ : ACCESS_WRITE)) return STEP;
  if (!op->from || !op->to) {
    Tile rows = op->tile; /* in global memory a row is contiguous */
    rows.swizzle_mask = 0;
    if (visit_tile(&rows, 0, global_piece, op)) return FAILED;
  }
  if (op->from && op->from->smem_state && visit_tile(&op->tile, op->from_offset, shared_source_piece, op)) return FAILED;
  if (op->from && bytes) {
    AsyncReads reads = race_async_reads(op->issuer, op->row, op->lane, op->from, op->actor);
    if (race_async_read(&reads, op->from_offset, bytes)) return FAILED;
  }
  return op->to ? race_async_issue_write(op->issuer, op->row, op->lane, op->to, op->to_offset, bytes, op->actor) : STEP;
}

/* ---- destinations in flight */

static int mark_piece(const BulkOp *op, u64 global, u32 bytes, int state) {
  Region *region = find_region(op->issuer->cta->launch, global, bytes);
  if (region && region->state) memset(region->state + (global - region->base), state, bytes);
  return STEP;
}

static int poison_piece(void *context, u32 shared, u64 global, u32 bytes, int inside) {
  (void)shared;
  if (!inside) return STEP;
  memset((void *)global, 0xff, bytes);
  return mark_piece(context, global, bytes, BYTE_ADDRESSABLE);
}

static int ready_piece(void *context, u32 shared, u64 global, u32 bytes, int inside) {
  (void)shared;
  return inside ? mark_piece(context, global, bytes, BYTE_READY) : STEP;
}

static void mark_global(BulkOp *op, PieceVisitor visit) {
  Tile rows = op->tile;
  rows.swizzle_mask = 0;
  visit_tile(&rows, 0, visit, op);
}

static void bulk_poison(BulkOp *op) {
  if (op->reduction != NO_REDUCTION) return; /* the old values are needed */
  if (!op->to) {
    mark_global(op, poison_piece);
    return;
  }
  u32 bytes = (u32)tile_bytes(&op->tile);
  memset(op->to->smem + op->to_offset, 0xff, bytes);
  if (op->to->smem_state) memset(op->to->smem_state + op->to_offset, BYTE_ADDRESSABLE, bytes);
}

/* ---- landing */

/* A copy into shared memory. */
static int land_in_shared(BulkOp *op) {
  Cta *to = op->to;
  u32 bytes = (u32)tile_bytes(&op->tile);
  if (!op->from) load_tile(&op->tile, to->smem, op->to_offset);
  else if (op->reduction == NO_REDUCTION) memcpy(to->smem + op->to_offset, op->from->smem + op->from_offset, bytes);
  else reduce_elements(op->reduction, op->tile.data_type, to->smem + op->to_offset, op->from->smem + op->from_offset, bytes);
  if (to->smem_state) memset(to->smem_state + op->to_offset, BYTE_READY, bytes);
  if (race_async_land_write(to, op->row, op->issuer, op->lane, op->to_offset, bytes, op->actor)) return FAILED;
  return mbarrier_complete_tx(to, op->issuer, op->row, op->lane, op->mbarrier, bytes, op->actor);
}

/* The two steps of a copy into global memory. */
static void read_source(BulkOp *op) {
  if (op->data) return;
  size_t bytes = tile_bytes(&op->tile);
  op->data = malloc(bytes + 1);
  memcpy(op->data, op->from->smem + op->from_offset, bytes);
}

static void write_global(BulkOp *op) {
  read_source(op);
  u8 *memory = op->data - op->from_offset;
  if (op->reduction != NO_REDUCTION) {
    reduce_tile(&op->tile, memory, op->from_offset, op->reduction);
  } else {
    store_tile(&op->tile, memory, op->from_offset);
    if (op->issuer->cta->launch->num_regions) mark_global(op, ready_piece);
  }
  free(op->data);
  op->data = NULL;
}

static int bulk_finish(BulkOp *op) {
  if (op->to) return land_in_shared(op);
  write_global(op);
  return STEP;
}

static void bulk_remove(BulkQueue *queue, u32 index) {
  queue->count--;
  memmove(queue->ops + index, queue->ops + index + 1, (queue->count - index) * sizeof *queue->ops);
}

/* Start a copy: check it, then queue it, or carry it out if asynchrony is off. */
static int bulk_start(BulkOp op) {
  if (bulk_check(&op)) return FAILED;
  BulkQueue *queue = op.issuer->cta->cluster->bulk;
  if (op.issuer->cta->launch->async_mode == ASYNC_EAGER || !op.tile.rows) return bulk_finish(&op);
  bulk_poison(&op);
  if (queue->count == queue->capacity) {
    queue->capacity = queue->capacity ? 2 * queue->capacity : 16;
    queue->ops = realloc(queue->ops, queue->capacity * sizeof *queue->ops);
  }
  queue->ops[queue->count++] = op;
  return STEP;
}

/* One step of one copy. Returns 1, or -1 after a fault. */
static int land_one(BulkQueue *queue, u32 index, int halfway) {
  BulkOp op = queue->ops[index];
  if (halfway && !op.to && !op.data) {
    read_source(&queue->ops[index]);
    return 1;
  }
  bulk_remove(queue, index);
  return bulk_finish(&op) ? -1 : 1;
}

/* Whether a warp of the CTA stands at this mbarrier. */
static int mbarrier_awaited(const Cta *cta, u32 offset) {
  for (u32 i = 0; i < cta->num_warps; i++) {
    const Warp *warp = &cta->warps[i];
    if (!(warp->waits >> AT_MBARRIER & 1)) continue;
    int lane = __builtin_ctz(warp->stalled ? warp->stalled : warp->live);
    const Row *row = cta->launch->rows + (warp->stalled ? warp->pc[lane] : warp->next);
    u64 address = (row->flags & MBARRIER_WIDE ? SLOT(u64, 1)[lane] : SLOT(u32, 1)[lane]) + (u64)(s64)row->a[2];
    if (((u32)address & CLUSTER_OFFSET_MASK) - SHARED_BASE == offset) return 1;
  }
  return 0;
}

/* The scheduler's call: land something. Returns how many steps were taken, or -1 after a fault. */
static int bulk_land(Cluster *cluster, int why) {
  BulkQueue *queue = cluster->bulk;
  if (!queue->count) return 0;
  if (why == LAND_RANDOM)
    return next_random(&cluster->random) % 3 ? 0 : land_one(queue, next_random(&cluster->random) % queue->count, 1);
  /* Nothing can run. The newest copy that somebody waits for comes first: nothing promises an order. */
  for (u32 i = queue->count; i-- > 0;) {
    const BulkOp *op = &queue->ops[i];
    if (op->to && mbarrier_awaited(op->to, op->mbarrier)) return land_one(queue, i, 0);
  }
  return land_one(queue, queue->count - 1, 0);
}

/* A CTA has ended. Copies into global memory that have read their source go on without it. */
static int bulk_check_exit(Cta *cta) {
  BulkQueue *queue = cta->cluster->bulk;
  for (u32 i = 0; i < queue->count; i++) {
    BulkOp *op = &queue->ops[i];
    u32 bytes = (u32)tile_bytes(&op->tile);
    if (op->to == cta)
      return fail(op->issuer, op->row, op->lane, FAULT_ASYNC, op->to_offset,
                  "a CTA has ended while a bulk copy of %u bytes into its shared memory (byte %u) was in flight: wait for the mbarrier at byte %u first",
                  bytes, op->to_offset, op->mbarrier);
    if (op->from == cta && !op->data)
      return fail(op->issuer, op->row, op->lane, FAULT_ASYNC, op->from_offset,
                  "a CTA has ended while a bulk copy had %u bytes of its shared memory (byte %u) yet to read: %s first", bytes, op->from_offset,
                  op->to ? "wait for its mbarrier" : "commit it and wait with cp.async.bulk.wait_group.read");
    if (op->from != cta) continue;
    write_global(op);
    bulk_remove(queue, i--);
  }
  return STEP;
}

/* ---- groups */

static int op_bulk_commit(Warp *warp, const Row *row) {
  u32 *committed = bulk_committed(warp), actor = 0;
  (void)row;
  if (warp->races) {
    actor = actor_of_bulk_group(warp, 0);
    race_actor_tick(warp->cta, actor);
    race_actor_tick(warp->cta, actor + 1);
  }
  for (u32 rest = warp->exec; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    if (warp->races) *bulk_clock(warp, lane, committed[lane]) = *actor_clock(warp->cta, actor);
    committed[lane]++;
  }
  return STEP;
}

/* The groups before `due` of a lane are complete, or have read their sources. */
static void bulk_acquire(Warp *warp, int lane, u32 due, int only_reads) {
  if (due == 0 || bulk_committed(warp)[lane] - due >= GROUP_CLOCKS) return;
  u32 actor = actor_of_bulk_group(warp, lane), clock = *bulk_clock(warp, lane, due - 1);
  race_acquire_actor_until(warp, lane, actor, clock);
  if (!only_reads) race_acquire_actor_until(warp, lane, actor + 1, clock);
}

/* a: how many of the latest groups may stay in flight; flags 1: wait for the reads of their sources only */
static int op_bulk_wait(Warp *warp, const Row *row) {
  BulkQueue *queue = warp->cta->cluster->bulk;
  const u32 *committed = bulk_committed(warp);
  int only_reads = row->flags & 1;
  for (u32 i = 0; i < queue->count; i++) {
    BulkOp *op = &queue->ops[i];
    if (op->to || op->issuer != warp || !(warp->exec >> op->lane & 1)) continue;
    if ((u64)op->group + (u32)row->a[0] >= committed[op->lane]) continue;
    read_source(op);
    if (only_reads) continue;
    write_global(op);
    bulk_remove(queue, i--);
  }
  for (u32 rest = warp->races ? warp->exec : 0; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    bulk_acquire(warp, lane, committed[lane] < (u32)row->a[0] ? 0 : committed[lane] - (u32)row->a[0], only_reads);
  }
  return STEP;
}

#include "bulk_ops.c"
