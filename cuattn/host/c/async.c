/* cp.async: copies that land when the schedule says so, as late as the program's own waits allow.
 *
 * A copy is queued with the lanes that issued it and the commit group of each. Until it lands its destination holds
 * poison, counts as never written, and belongs to the copy. Its source is read at landing. An arrival at an mbarrier
 * (cp.async.mbarrier.arrive) is queued too and takes place when the earlier copies of its lane have landed. */
#include <string.h>

enum { CP_ASYNC_NOINC = 16 };

typedef struct {
  const Row *row;
  u32 lanes;                /* still in flight */
  u32 bytes;                /* 0: an arrival at the mbarrier at dst */
  u32 dst[WARP_SIZE];       /* byte of shared memory */
  u32 src_bytes[WARP_SIZE];
  u64 src[WARP_SIZE];
  u32 group[WARP_SIZE];
} AsyncCopy;

struct AsyncQueue {
  AsyncCopy *copies;
  u32 count, capacity;
  u32 committed[WARP_SIZE]; /* groups that each lane has committed */
};

static void copy_now(Warp *warp, u32 dst, u64 src, u32 bytes, u32 src_bytes) {
  u8 *to = warp->cta->smem + dst;
  memcpy(to, (const void *)src, src_bytes);
  memset(to + src_bytes, 0, bytes - src_bytes);
}

/* A lane's copies have landed: it arrives at its mbarrier. */
static int arrive_landed(Warp *warp, const Row *row, int lane, u32 offset) {
  Cta *cta = warp->cta;
  Mbarrier *mbarrier = mbarrier_find(cta, offset);
  if (!mbarrier) return fail(warp, row, lane, FAULT_ASYNC, offset, "copies arrive at an mbarrier at byte %u of shared memory, where none lives", offset);
  if (cta->races) race_mbarrier_arrive(warp, 1u << lane, cta, mbarrier);
  return mbarrier_arrive(warp, row, lane, cta, mbarrier, 1, 0);
}

/* Land the given lanes of a queued copy. */
static int land(Warp *warp, AsyncCopy *copy, u32 lanes) {
  Cta *cta = warp->cta;
  copy->lanes &= ~lanes;
  for (u32 rest = lanes; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    if (!copy->bytes) {
      if (arrive_landed(warp, copy->row, lane, copy->dst[lane])) return FAILED;
      continue;
    }
    u32 src_bytes = copy->src_bytes[lane];
    Region *region = src_bytes && cta->races ? find_region(cta->launch, copy->src[lane], src_bytes) : NULL;
    if (region && race_global(warp, copy->row, lane, region, copy->src[lane], src_bytes, ACCESS_READ)) return FAILED;
    copy_now(warp, copy->dst[lane], copy->src[lane], copy->bytes, src_bytes);
    if (cta->smem_state) memset(cta->smem_state + copy->dst[lane], BYTE_READY, copy->bytes);
    if (cta->races) race_async(warp, copy->row, lane, copy->dst[lane], copy->bytes, 0);
  }
  return STEP;
}

/* After copies have landed: arrivals that are due take place, and the queue closes up. */
static int settle(Warp *warp) {
  AsyncQueue *queue = warp->async;
  u32 kept = 0, busy = 0;
  for (u32 i = 0; i < queue->count; i++) {
    AsyncCopy *entry = &queue->copies[i];
    if (!entry->bytes && entry->lanes & ~busy && land(warp, entry, entry->lanes & ~busy)) return FAILED;
    if (entry->bytes) busy |= entry->lanes;
  }
  for (u32 i = 0; i < queue->count; i++) {
    if (!queue->copies[i].lanes) continue;
    if (kept != i) queue->copies[kept] = queue->copies[i];
    kept++;
  }
  queue->count = kept;
  return STEP;
}

/* In random mode some copies land before anybody waits for them. */
static int land_some(Warp *warp) {
  AsyncQueue *queue = warp->async;
  while (queue->count && next_random(&warp->cta->random) % 3 == 0) {
    AsyncCopy *copy = &queue->copies[next_random(&warp->cta->random) % queue->count];
    if (copy->bytes && land(warp, copy, copy->lanes)) return FAILED;
    if (settle(warp)) return FAILED;
  }
  return STEP;
}

/* Nothing can run: land the copies that some arrival at an mbarrier waits for. Returns how many, or -1 after a fault. */
static int async_land_stuck(Cta *cta) {
  for (u32 w = 0; w < cta->num_warps; w++) {
    Warp *warp = &cta->warps[w];
    AsyncQueue *queue = warp->async;
    for (u32 last = 0; last < queue->count; last++) {
      u32 lanes = queue->copies[last].bytes ? 0 : queue->copies[last].lanes;
      if (!lanes) continue;
      for (u32 i = 0; i < last; i++) {
        AsyncCopy *copy = &queue->copies[i];
        if (copy->bytes && copy->lanes & lanes && land(warp, copy, copy->lanes & lanes)) return -1;
      }
      return settle(warp) ? -1 : 1;
    }
  }
  return 0;
}

static AsyncCopy *new_copy(AsyncQueue *queue) {
  if (queue->count == queue->capacity) {
    queue->capacity = queue->capacity ? 2 * queue->capacity : 16;
    queue->copies = realloc(queue->copies, queue->capacity * sizeof *queue->copies);
  }
  return &queue->copies[queue->count++];
}

/* The source of a copy at its issue. Races are looked at when it is read: at landing, or at once. */
static int check_source(Warp *warp, const Row *row, int lane, u64 src, u32 bytes, u32 src_bytes, int at_once) {
  const Launch *launch = warp->cta->launch;
  if (launch->check_mem && src & (GENERIC_SHARED | GENERIC_LOCAL))
    return fail(warp, row, lane, FAULT_MEMORY, src, "the source of cp.async is no global address");
  if (launch->check_mem && src % bytes) return fail(warp, row, lane, FAULT_MEMORY, src, "misaligned source of a %u-byte cp.async", bytes);
  if (!(launch->check_mem | launch->check_init | launch->check_race)) return STEP;
  Region *region;
  if (src_bytes < bytes) { /* a partial copy has no natural alignment of its own: byte by byte */
    for (u32 i = 0; i < src_bytes; i++)
      if (global_region(warp, row, lane, src + i, 1, ACCESS_READ, &region)) return FAILED;
  } else if (global_region(warp, row, lane, src, bytes, ACCESS_READ, &region)) {
    return FAILED;
  }
  return at_once && region && region->writes ? race_global(warp, row, lane, region, src, src_bytes, ACCESS_READ) : STEP;
}

/* a: shared address, offset, global address, offset, copy size, source size slot or -1, ignore-source predicate or -1.
 * flags: MEM_WIDE_ADDRESS for the shared address */
static int op_cp_async(Warp *warp, const Row *row) {
  Cta *cta = warp->cta;
  Launch *launch = cta->launch;
  u32 bytes = (u32)row->a[4];
  AsyncCopy *copy = launch->async_mode == ASYNC_EAGER ? NULL : new_copy(warp->async);
  if (copy) *copy = (AsyncCopy){.row = row, .bytes = bytes, .lanes = warp->exec};
  u64 counted = 0;
  for (u32 rest = warp->exec; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    u64 dst = (row->flags & MEM_WIDE_ADDRESS ? SLOT(u64, 0)[lane] : SLOT(u32, 0)[lane]) + (u64)(s64)row->a[1];
    u64 src = SLOT(u64, 2)[lane] + (u64)(s64)row->a[3];
    u32 src_bytes = row->a[5] < 0 ? bytes : SLOT(u32, 5)[lane];
    if (row->a[6] >= 0 && SLOT(u32, 6)[lane]) src_bytes = 0;
    if (src_bytes > bytes) return fail(warp, row, lane, FAULT_MEMORY, src, "cp.async of %u bytes into %u", src_bytes, bytes);
    u8 *to = NULL;
    if (shared_pointer(warp, row, lane, dst, bytes, ACCESS_WRITE, &to)) return FAILED;
    if (src_bytes && check_source(warp, row, lane, src, bytes, src_bytes, !copy)) return FAILED;
    u32 place = (u32)(dst - SHARED_BASE);
    counted += src_bytes;
    if (!copy) {
      copy_now(warp, place, src, bytes, src_bytes);
      continue;
    }
    copy->dst[lane] = place;
    copy->src[lane] = src;
    copy->src_bytes[lane] = src_bytes;
    copy->group[lane] = warp->async->committed[lane];
    memset(to, 0xff, bytes);
    if (cta->smem_state) memset(cta->smem_state + place, BYTE_ADDRESSABLE, bytes);
    if (cta->races) race_async(warp, row, lane, place, bytes, 1);
  }
  if (launch->count_bytes) __atomic_fetch_add(&launch->count_bytes[row - launch->rows], counted, __ATOMIC_RELAXED);
  return launch->async_mode == ASYNC_RANDOM ? land_some(warp) : STEP;
}

static int op_cp_async_commit(Warp *warp, const Row *row) {
  (void)row;
  for (u32 rest = warp->exec; rest; rest &= rest - 1) warp->async->committed[__builtin_ctz(rest)]++;
  return STEP;
}

/* a: how many of the latest groups may stay in flight; flags 1: wait for everything, committed or not */
static int op_cp_async_wait(Warp *warp, const Row *row) {
  AsyncQueue *queue = warp->async;
  for (u32 i = 0; i < queue->count; i++) {
    AsyncCopy *copy = &queue->copies[i];
    u32 due = 0;
    for (u32 rest = copy->lanes & warp->exec; rest; rest &= rest - 1) {
      int lane = __builtin_ctz(rest);
      u32 complete = row->flags & 1 ? UINT32_MAX : queue->committed[lane] < (u32)row->a[0] ? 0 : queue->committed[lane] - (u32)row->a[0];
      if (copy->group[lane] < complete) due |= 1u << lane;
    }
    if (copy->bytes && due && land(warp, copy, due)) return FAILED;
  }
  if (settle(warp)) return FAILED;
  return warp->cta->launch->async_mode == ASYNC_RANDOM ? land_some(warp) : STEP;
}

/* cp.async.mbarrier.arrive: a: address, offset. flags: MEM_WIDE_ADDRESS, 16: noinc (the count includes this arrival) */
static int op_cp_async_arrive(Warp *warp, const Row *row) {
  Cta *cta = warp->cta;
  AsyncCopy entry = {.row = row, .lanes = warp->exec};
  for (u32 rest = warp->exec; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    Mbarrier *mbarrier = NULL;
    if (mbarrier_at(warp, row, lane, 0, &cta, &mbarrier)) return FAILED;
    entry.dst[lane] = mbarrier->offset;
    if (!(row->flags & CP_ASYNC_NOINC) && ++mbarrier->pending > MBARRIER_MAX)
      return fail(warp, row, lane, FAULT_ASYNC, mbarrier->offset, "more than %d arrivals are pending at the mbarrier at byte %u", MBARRIER_MAX, mbarrier->offset);
  }
  *new_copy(warp->async) = entry;
  return cta->launch->async_mode == ASYNC_EAGER ? settle(warp) : cta->launch->async_mode == ASYNC_RANDOM ? land_some(warp) : STEP;
}

static const OpEntry ops_async[] = {
  {"cp_async_arrive", op_cp_async_arrive},
  {"cp_async", op_cp_async}, {"cp_async_commit", op_cp_async_commit}, {"cp_async_wait", op_cp_async_wait}, {0, 0},
};
