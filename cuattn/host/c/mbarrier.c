/* mbarrier objects: phases of arrivals and of transaction bytes.
 *
 * A phase completes when no arrival is pending and no byte is expected; then the next one begins with the full count.
 * A wait for parity p succeeds when the phase in progress has the other parity, so a fresh mbarrier passes parity 1.
 * What a token or the object holds is opaque in PTX: state lives in a table of the CTA, a token is phase and pending
 * count. A wait that fails stops the warp until the mbarrier completes a phase: test_wait too, since nothing says how
 * fast a thread runs. When nothing else can run, the waits return false, as a try_wait does after its time limit. */
#include <stdlib.h>
#include <string.h>

enum { MBARRIER_MAX = (1 << 20) - 1 };
enum {
  MBARRIER_WIDE = 8,        /* MEM_WIDE_ADDRESS */
  MBARRIER_EXPECT = 16, MBARRIER_COMPLETE = 32, MBARRIER_ARRIVE = 64, MBARRIER_DROP = 128, MBARRIER_NO_COMPLETE = 256,
  MBARRIER_RELAXED = 512, MBARRIER_CLUSTER = 1024, MBARRIER_TOKEN = 2048, MBARRIER_PARITY = 4096
};

static Mbarrier *mbarrier_find(const Cta *cta, u32 offset) {
  const MbarrierTable *table = &cta->mbarriers;
  if (!table->at || offset % 8) return NULL;
  u32 index = table->at[offset / 8];
  return index && table->items[index - 1].live ? &table->items[index - 1] : NULL;
}

/* The first live mbarrier in a stretch of shared memory, or NULL. */
static Mbarrier *mbarrier_overlap(const Cta *cta, u32 offset, u32 bytes) {
  if (!cta->mbarriers.count) return NULL;
  for (u32 place = offset & ~7u; place < offset + bytes; place += 8) {
    Mbarrier *found = mbarrier_find(cta, place);
    if (found) return found;
  }
  return NULL;
}

static void mbarriers_reset(Cta *cta) {
  MbarrierTable *table = &cta->mbarriers;
  for (u32 i = 0; i < table->count; i++) table->at[table->items[i].offset / 8] = 0;
  table->count = 0;
}

static void mbarriers_free(Cta *cta) {
  free(cta->mbarriers.items);
  free(cta->mbarriers.at);
}

/* The shared byte of an mbarrier operand: own memory, or with MBARRIER_CLUSTER any CTA of the cluster. */
static int mbarrier_place(Warp *warp, const Row *row, int lane, int at, Cta **target, u32 *offset) {
  u64 address = (row->flags & MBARRIER_WIDE ? SLOT(u64, at)[lane] : SLOT(u32, at)[lane]) + (u64)(s64)row->a[at + 1];
  Cta *cta = warp->cta;
  if (MEM_SPACE(row->flags) == SPACE_GENERIC && !(address & GENERIC_SHARED))
    return fail(warp, row, lane, FAULT_MEMORY, address, "an mbarrier at 0x%llx, which is not in shared memory", (unsigned long long)address);
  address &= ~GENERIC_SHARED;
  if (cluster_target(warp, row, lane, address, target, offset)) return FAILED;
  if (*target != cta && !(row->flags & MBARRIER_CLUSTER))
    return fail(warp, row, lane, FAULT_MEMORY, address, "this instruction needs an mbarrier of the own CTA, not of CTA %u of the cluster", (*target)->rank);
  if (*offset % 8) return fail(warp, row, lane, FAULT_MEMORY, address, "an mbarrier at byte %u: not aligned to 8", *offset);
  if (*offset + 8 > cta->launch->smem_bytes)
    return fail(warp, row, lane, FAULT_MEMORY, address, "an mbarrier at byte %u of %u bytes of shared memory", *offset, cta->launch->smem_bytes);
  return STEP;
}

static int mbarrier_at(Warp *warp, const Row *row, int lane, int at, Cta **target, Mbarrier **mbarrier) {
  u32 offset = 0;
  if (mbarrier_place(warp, row, lane, at, target, &offset)) return FAILED;
  *mbarrier = mbarrier_find(*target, offset);
  if (!*mbarrier) return fail(warp, row, lane, FAULT_ASYNC, offset, "there is no mbarrier at byte %u of shared memory: it was not initialised", offset);
  return STEP;
}

/* a: address, offset, count */
static int op_mbarrier_init(Warp *warp, const Row *row) {
  for (u32 rest = warp->exec; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    Cta *cta = NULL;
    u32 offset = 0, count = SLOT(u32, 2)[lane];
    if (mbarrier_place(warp, row, lane, 0, &cta, &offset)) return FAILED;
    if (count < 1 || count > MBARRIER_MAX) return fail(warp, row, lane, FAULT_ASYNC, offset, "mbarrier.init with a count of %u: allowed is 1 to %d", count, MBARRIER_MAX);
    if (mbarrier_find(cta, offset)) return fail(warp, row, lane, FAULT_ASYNC, offset, "mbarrier.init at byte %u, where an mbarrier lives already (mbarrier.inval is missing)", offset);
    if (cta->races && race_shared(warp, row, lane, offset, 8, ACCESS_WRITE)) return FAILED;
    MbarrierTable *table = &cta->mbarriers;
    if (!table->at) table->at = calloc(cta->launch->smem_bytes / 8 + 1, sizeof *table->at);
    u32 index = table->at[offset / 8];
    if (!index) {
      if (table->count == table->capacity) {
        table->capacity = table->capacity ? 2 * table->capacity : 32;
        table->items = realloc(table->items, table->capacity * sizeof *table->items);
      }
      index = table->at[offset / 8] = (u16)++table->count;
    }
    table->items[index - 1] = (Mbarrier){.offset = offset, .live = 1, .expected = count, .pending = count, .row = row, .thread = warp->id * WARP_SIZE + (u32)lane};
    if (cta->smem_state) memset(cta->smem_state + offset, BYTE_READY, 8);
  }
  return STEP;
}

/* Asynchronous operations know the mbarriers that these lanes of the warp have initialised, or all of the CTA's. */
static void mbarriers_fence(Warp *warp, int only_own) {
  MbarrierTable *table = &warp->cta->mbarriers;
  for (u32 i = 0; i < table->count; i++) {
    Mbarrier *mbarrier = &table->items[i];
    int own = mbarrier->thread / WARP_SIZE == warp->id && warp->exec >> mbarrier->thread % WARP_SIZE & 1;
    if (own || !only_own) mbarrier->fenced = 1;
  }
}

/* fence.mbarrier_init: of the executing threads' own initialisations. */
static int op_mbarrier_fence(Warp *warp, const Row *row) {
  (void)row;
  mbarriers_fence(warp, 1);
  if (warp->cta->races) race_fence(warp);
  return STEP;
}

/* fence.proxy.async: between ordinary accesses, initialisations among them, and those of asynchronous operations. */
static int op_proxy_fence(Warp *warp, const Row *row) {
  (void)row;
  mbarriers_fence(warp, 0);
  if (warp->cta->races) race_proxy_fence(warp);
  return STEP;
}

/* a: address, offset */
static int op_mbarrier_inval(Warp *warp, const Row *row) {
  for (u32 rest = warp->exec; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    Cta *cta = NULL;
    Mbarrier *mbarrier = NULL;
    if (mbarrier_at(warp, row, lane, 0, &cta, &mbarrier)) return FAILED;
    if (cta->races && race_shared(warp, row, lane, mbarrier->offset, 8, ACCESS_WRITE)) return FAILED;
    if (mbarrier->tx_bytes || mbarrier->pending != mbarrier->expected)
      return fail(warp, row, lane, FAULT_ASYNC, mbarrier->offset, "mbarrier.inval in the middle of phase %u: %u of %u arrivals and %lld bytes are pending",
                  mbarrier->phase, mbarrier->pending, mbarrier->expected, (long long)mbarrier->tx_bytes);
    mbarrier->live = 0;
    if (cta->smem_state) memset(cta->smem_state + mbarrier->offset, BYTE_ADDRESSABLE, 8);
  }
  return STEP;
}

/* Complete the phase if nothing is pending. */
static void mbarrier_advance(Cta *cta, Mbarrier *mbarrier) {
  cta->cluster->timeouts = 0;
  if (mbarrier->pending || mbarrier->tx_bytes) return;
  mbarrier->phase++;
  mbarrier->pending = mbarrier->expected;
  if (cta->races) race_mbarrier_complete(cta, mbarrier);
  for (u32 i = 0; i < cta->num_warps; i++)
    if (cta->warps[i].waits >> AT_MBARRIER & 1) wake(&cta->warps[i]);
}

static int mbarrier_add_bytes(Warp *warp, const Row *row, int lane, Mbarrier *mbarrier, s64 bytes) {
  mbarrier->tx_bytes += bytes;
  if (mbarrier->tx_bytes <= MBARRIER_MAX && mbarrier->tx_bytes >= -MBARRIER_MAX) return STEP;
  return fail(warp, row, lane, FAULT_ASYNC, mbarrier->offset, "the pending bytes of the mbarrier at byte %u leave their range: %lld, allowed is -%d to %d",
              mbarrier->offset, (long long)mbarrier->tx_bytes, MBARRIER_MAX, MBARRIER_MAX);
}

static int mbarrier_arrive(Warp *warp, const Row *row, int lane, Cta *target, Mbarrier *mbarrier, u32 count, int flags) {
  if (count < 1 || count > MBARRIER_MAX) return fail(warp, row, lane, FAULT_ASYNC, mbarrier->offset, "an arrival with a count of %u", count);
  if (count > mbarrier->pending)
    return fail(warp, row, lane, FAULT_ASYNC, mbarrier->offset, "%u arrivals at the mbarrier at byte %u, whose phase %u needs only %u more (of %u)",
                count, mbarrier->offset, mbarrier->phase, mbarrier->pending, mbarrier->expected);
  if (flags & MBARRIER_NO_COMPLETE && count == mbarrier->pending && !mbarrier->tx_bytes)
    return fail(warp, row, lane, FAULT_ASYNC, mbarrier->offset, "mbarrier.arrive.noComplete completes phase %u", mbarrier->phase);
  mbarrier->pending -= count;
  if (flags & MBARRIER_DROP) mbarrier->expected -= count;
  mbarrier_advance(target, mbarrier);
  return STEP;
}

/* The executing lanes from `lane` on that use the same mbarrier. */
static u32 mbarrier_alike(const Warp *warp, const Row *row, int lane, int at) {
  u32 same = 0;
  for (u32 rest = warp->exec >> lane << lane; rest; rest &= rest - 1) {
    int other = __builtin_ctz(rest);
    int equal = row->flags & MBARRIER_WIDE ? SLOT(u64, at)[other] == SLOT(u64, at)[lane] : SLOT(u32, at)[other] == SLOT(u32, at)[lane];
    same |= (u32)equal << other;
  }
  return same;
}

/* a: [token], address, offset, count, bytes. flags: MBARRIER_* */
static int op_mbarrier_arrive(Warp *warp, const Row *row) {
  int flags = row->flags, at = (flags & MBARRIER_TOKEN) != 0;
  u32 released = flags & MBARRIER_ARRIVE && !(flags & MBARRIER_RELAXED) ? 0 : ALL_LANES;
  for (u32 rest = warp->exec; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    Cta *target = NULL;
    Mbarrier *mbarrier = NULL;
    if (mbarrier_at(warp, row, lane, at, &target, &mbarrier)) return FAILED;
    if (target->races && race_mbarrier_access(warp, row, lane, target, mbarrier)) return FAILED;
    if (target->races && !(released >> lane & 1)) {
      u32 same = mbarrier_alike(warp, row, lane, at);
      race_mbarrier_arrive(warp, same, target, mbarrier);
      released |= same;
    }
    u64 token = (u64)mbarrier->phase << 32 | mbarrier->pending;
    s64 bytes = SLOT(u32, at + 3)[lane];
    if (flags & (MBARRIER_EXPECT | MBARRIER_COMPLETE)) {
      if (bytes > MBARRIER_MAX) return fail(warp, row, lane, FAULT_ASYNC, mbarrier->offset, "a transaction of %lld bytes: at most %d", (long long)bytes, MBARRIER_MAX);
      if (mbarrier_add_bytes(warp, row, lane, mbarrier, flags & MBARRIER_EXPECT ? bytes : -bytes)) return FAILED;
      if (!(flags & MBARRIER_ARRIVE)) mbarrier_advance(target, mbarrier);
    }
    if (flags & MBARRIER_ARRIVE && mbarrier_arrive(warp, row, lane, target, mbarrier, SLOT(u32, at + 2)[lane], flags)) return FAILED;
    if (flags & MBARRIER_TOKEN) SLOT(u64, 0)[lane] = token;
  }
  return STEP;
}

/* Bytes of an asynchronous operation have arrived. With the race checker, `actor` wrote or read them. */
static int mbarrier_complete_tx(Cta *target, Warp *issuer, const Row *row, int lane, u32 offset, u32 bytes, u32 actor) {
  Mbarrier *mbarrier = mbarrier_find(target, offset);
  if (!mbarrier) return fail(issuer, row, lane, FAULT_ASYNC, offset, "bytes arrive for an mbarrier at byte %u of shared memory, where none lives", offset);
  if (mbarrier_add_bytes(issuer, row, lane, mbarrier, -(s64)bytes)) return FAILED;
  if (target->races) race_mbarrier_complete_tx(target, mbarrier, actor);
  mbarrier_advance(target, mbarrier);
  return STEP;
}

/* Whether a wait with this operand is over; -1 when the token is too old to tell. */
static int mbarrier_test(const Warp *warp, const Mbarrier *mbarrier, const Row *row, int lane) {
  if (row->flags & MBARRIER_PARITY) return (mbarrier->phase & 1) != (SLOT(u32, 3)[lane] & 1);
  u32 behind = mbarrier->phase - (u32)(SLOT(u64, 3)[lane] >> 32);
  return behind <= 1 ? (int)behind : -1;
}

/* a: predicate, address, offset, token or parity. flags: MBARRIER_PARITY, MBARRIER_RELAXED */
static int op_mbarrier_wait(Warp *warp, const Row *row) {
  Cta *cta = warp->cta;
  u32 passed = 0;
  Mbarrier *mbarriers[WARP_SIZE];
  for (u32 rest = warp->exec; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    if (mbarrier_at(warp, row, lane, 1, &cta, &mbarriers[lane])) return FAILED;
    int result = mbarrier_test(warp, mbarriers[lane], row, lane);
    if (result < 0)
      return fail(warp, row, lane, FAULT_ASYNC, mbarriers[lane]->offset, "a wait for phase %u of an mbarrier that is in phase %u: only the last two can be waited for",
                  (u32)(SLOT(u64, 3)[lane] >> 32), mbarriers[lane]->phase);
    passed |= (u32)result << lane;
  }
  if (!passed) {
    int gives_up = (warp->exec & ~warp->timed_out) == 0 || (cta->launch->random_schedule && next_random(&cta->random) % 8 == 0);
    if (!gives_up) return block_warp(warp, row, AT_MBARRIER);
    warp->timed_out &= ~warp->exec;
  }
  u32 *dst = SLOT(u32, 0);
  for (u32 rest = warp->exec; rest; rest &= rest - 1) dst[__builtin_ctz(rest)] = passed >> __builtin_ctz(rest) & 1;
  return cta->races ? race_mbarrier_wait(warp, row, passed, mbarriers, !(row->flags & MBARRIER_RELAXED)) : STEP;
}

/* a: dst, token */
static int op_mbarrier_pending_count(Warp *warp, const Row *row) {
  const u64 *token = SLOT(u64, 1);
  EACH_LANE(u32, ((u32)token[i]));
}

/* A CTA has ended: every mbarrier must be between phases. */
static int mbarriers_check_exit(Cta *cta) {
  for (u32 i = 0; i < cta->mbarriers.count; i++) {
    const Mbarrier *mbarrier = &cta->mbarriers.items[i];
    if (!mbarrier->live || (!mbarrier->tx_bytes && mbarrier->pending == mbarrier->expected)) continue;
    return fail(&cta->warps[0], mbarrier->row, 0, FAULT_ASYNC, mbarrier->offset,
                "the CTA ends in the middle of phase %u of the mbarrier at byte %u: %u of %u arrivals and %lld bytes are still pending",
                mbarrier->phase, mbarrier->offset, mbarrier->pending, mbarrier->expected, (long long)mbarrier->tx_bytes);
  }
  return STEP;
}

static const OpEntry ops_mbarrier[] = {
  {"mbarrier_init", op_mbarrier_init}, {"mbarrier_fence", op_mbarrier_fence}, {"proxy_fence", op_proxy_fence}, {"mbarrier_inval", op_mbarrier_inval}, {"mbarrier_arrive", op_mbarrier_arrive},
  {"mbarrier_wait", op_mbarrier_wait}, {"mbarrier_pending_count", op_mbarrier_pending_count}, {0, 0},
};
