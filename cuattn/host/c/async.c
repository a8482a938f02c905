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
  if (bytes == 16 && src_bytes == 16) { /* as almost all are: without a call */
    memcpy(to, (const void *)src, 16);
    return;
  }
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
  GlobalAccess global = global_access(warp, copy->row);
  Stamp landed = cta->races ? make_stamp(warp, copy->row, 0) : 0;
  copy->lanes &= ~lanes;
  for (u32 rest = lanes; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    if (!copy->bytes) {
      if (arrive_landed(warp, copy->row, lane, copy->dst[lane])) return FAILED;
      continue;
    }
    u32 src_bytes = copy->src_bytes[lane], dst = copy->dst[lane];
    u64 src = copy->src[lane];
    Region *region = src_bytes && cta->races ? region_of(&global, src, src_bytes) : NULL;
    int aligned = !(src_bytes & (src_bytes - 1)) && !(src & (src_bytes - 1));
    if (region && !(aligned && quick_global_race(&global, region, src, src_bytes, (u32)lane, ACCESS_READ))) {
      hold_stripe(&global, NULL);
      if (race_global(warp, copy->row, lane, region, src, src_bytes, ACCESS_READ)) return FAILED;
    }
    copy_now(warp, dst, src, copy->bytes, src_bytes);
    if (cta->smem_state) set_bytes(cta->smem_state + dst, BYTE_READY, copy->bytes);
    if (cta->races) set_stamps(cta, cta->races->writes, dst, dst + copy->bytes, landed | (u32)lane);
  }
  hold_stripe(&global, NULL);
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
static int check_source(GlobalAccess *global, Warp *warp, const Row *row, int lane, u64 src, u32 bytes, u32 src_bytes, int at_once) {
  const Launch *launch = warp->cta->launch;
  if (launch->check_mem && src & (GENERIC_SHARED | GENERIC_LOCAL))
    return fail(warp, row, lane, FAULT_MEMORY, src, "the source of cp.async is no global address");
  if (launch->check_mem && src % bytes) return fail(warp, row, lane, FAULT_MEMORY, src, "misaligned source of a %u-byte cp.async", bytes);
  if (!(launch->check_mem | launch->check_init | launch->check_race)) return STEP;
  Region *region = src_bytes == bytes ? region_of(global, src, bytes) : NULL;
  if (region && !region->state) { /* all of it has been written: the usual source */
  } else if (src_bytes < bytes) { /* a partial copy has no natural alignment of its own: byte by byte */
    for (u32 i = 0; i < src_bytes; i++)
      if (global_region(warp, row, lane, src + i, 1, ACCESS_READ, &region)) return FAILED;
  } else if (global_region(warp, row, lane, src, bytes, ACCESS_READ, &region)) {
    return FAILED;
  }
  return at_once && region && region->writes ? race_global(warp, row, lane, region, src, src_bytes, ACCESS_READ) : STEP;
}

/* A place of shared memory that a copy in flight owns: poison, and in nobody's hands. */
static void await_copy(Cta *cta, u32 place, u32 bytes, Stamp in_flight) {
  set_bytes(cta->smem + place, 0xff, bytes);
  if (cta->smem_state) set_bytes(cta->smem_state + place, BYTE_ADDRESSABLE, bytes);
  if (cta->races) set_stamps(cta, cta->races->writes, place, place + bytes, in_flight);
}

/* a: shared address, offset, global address, offset, copy size, source size slot or -1, ignore-source predicate or -1.
 * flags: MEM_WIDE_ADDRESS for the shared address */
static int op_cp_async(Warp *warp, const Row *row) {
  Cta *cta = warp->cta;
  Launch *launch = cta->launch;
  u32 bytes = (u32)row->a[4];
  AsyncCopy *copy = launch->async_mode == ASYNC_EAGER ? NULL : new_copy(warp->async);
  if (copy) copy->row = row, copy->bytes = bytes, copy->lanes = warp->exec;
  GlobalAccess global = global_access(warp, row);
  SharedAccess shared;
  if (cta->races) shared = shared_access(warp, row, ACCESS_WRITE);
  const int unchecked = shared_is_unchecked(cta);
  u64 counted = 0;
  for (u32 rest = warp->exec; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    u64 dst = (row->flags & MEM_WIDE_ADDRESS ? SLOT(u64, 0)[lane] : SLOT(u32, 0)[lane]) + (u64)(s64)row->a[1], place = dst - SHARED_BASE;
    u64 src = SLOT(u64, 2)[lane] + (u64)(s64)row->a[3];
    u32 src_bytes = row->a[5] < 0 ? bytes : SLOT(u32, 5)[lane];
    if (row->a[6] >= 0 && SLOT(u32, 6)[lane]) src_bytes = 0;
    if (src_bytes > bytes) return fail(warp, row, lane, FAULT_MEMORY, src, "cp.async of %u bytes into %u", src_bytes, bytes);
    u8 *to = NULL;
    int in_bounds = place < launch->smem_bytes && place + bytes <= launch->smem_bytes && !(place & (bytes - 1));
    int right = in_bounds && (cta->races ? quick_shared(&shared, (u32)place, bytes, (u32)lane, ACCESS_WRITE) : unchecked);
    if (!right && shared_pointer(warp, row, lane, dst, bytes, ACCESS_WRITE, &to)) return FAILED;
    if (src_bytes && check_source(&global, warp, row, lane, src, bytes, src_bytes, !copy)) return FAILED;
    counted += src_bytes;
    if (!copy) {
      copy_now(warp, (u32)place, src, bytes, src_bytes);
      continue;
    }
    copy->dst[lane] = (u32)place;
    copy->src[lane] = src;
    copy->src_bytes[lane] = src_bytes;
    copy->group[lane] = warp->async->committed[lane];
    await_copy(cta, (u32)place, bytes, cta->races ? shared.quick.mine | (u32)lane | STAMP_PENDING : 0);
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
