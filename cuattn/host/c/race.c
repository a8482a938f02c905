/* The race checker: two accesses to one location by different threads, at least one a write, with nothing between
 * them that orders them.
 *
 * After FastTrack (Flanagan and Freund, 2009), with one vector clock a warp instead of one a thread. A warp's clock
 * counts its synchronisations; an access is recorded with the clock of its time, its lane and its row. Another warp's
 * access happened before now if its clock is below vc[that warp]. Inside a warp a synchronisation of all lanes orders
 * everything before it (lockstep orders nothing); one of some lanes orders those lanes.
 *
 * Shared memory keeps the last write, and of each warp the last read, for every granule (the smallest shared access
 * of the kernel). Global memory keeps the last write and the last reader, which may be "several warps of one CTA" or
 * "several CTAs"; CTAs are ordered only by atomics with a fence before. */
#include <stdlib.h>
#include <string.h>

/* Who accessed, when and where: clock 28 | row 22 | warp 6 | pending 1 | atomic 1 | lane 6. Zero: nobody. */
typedef u64 Stamp;
#define STAMP_CLOCK(stamp) ((u32)((stamp) >> 36))
#define STAMP_ROW(stamp) ((s32)((stamp) >> 14 & 0x3fffff))
#define STAMP_WARP(stamp) ((u32)((stamp) >> 8 & 63))
#define STAMP_PENDING 0x80u
#define STAMP_ATOMIC 0x40u
#define STAMP_LANE(stamp) ((u32)((stamp) & 63))
#define SEVERAL_LANES 32u

struct CtaRaces {
  Stamp *writes;          /* [granules] */
  Stamp *reads;           /* [granules][warps] */
  u32 **foreign;          /* [CTAs of the grid] vector clocks of other CTAs that this one has synchronised with */
};

/* Global memory: the same stamp with the CTA; `kind` tells how much a reader's stamp says. */
typedef struct {
  Stamp stamp;
  u32 cta;                /* linear index */
  u32 kind_epoch;         /* readers only: 0 one thread, SEVERAL_CTAS, or 1 + the barrier epoch: several warps of `cta` */
} GlobalStamp;
#define SEVERAL_CTAS 0xffffffffu

static inline Stamp make_stamp(const Warp *warp, const Row *row, u32 lane) {
  return (u64)warp->clock << 36 | (u64)(row - warp->cta->launch->rows) << 14 | (u64)warp->id << 8 | lane;
}

/* Whether an access of this warp by lane `other` at `clock` is ordered before what `lane` does now. */
static inline int ordered_in_warp(const Warp *warp, u32 other, u32 clock, int lane) {
  if (other == (u32)lane || clock < warp->full_sync) return 1;
  return warp->pair && other < WARP_SIZE && clock < warp->pair[other * WARP_SIZE + (u32)lane];
}

static inline int ordered(const Warp *warp, Stamp stamp, int lane) {
  u32 other = STAMP_WARP(stamp);
  if (other == warp->id) return ordered_in_warp(warp, STAMP_LANE(stamp), STAMP_CLOCK(stamp), lane);
  return STAMP_CLOCK(stamp) < warp->vc[other];
}

static int report_race(Warp *warp, const Row *row, int lane, u64 address, const char *space, Stamp other, const u32 *other_cta,
                       const char *mine, const char *theirs) {
  const Launch *launch = warp->cta->launch;
  char who[96];
  u32 tid[3];
  if (STAMP_LANE(other) == SEVERAL_LANES) {
    snprintf(who, sizeof who, "several threads of warp %u", STAMP_WARP(other));
  } else {
    thread_position(warp->cta, STAMP_WARP(other) * WARP_SIZE + STAMP_LANE(other), tid);
    snprintf(who, sizeof who, "thread (%u, %u, %u)", tid[0], tid[1], tid[2]);
  }
  char where[64] = "";
  if (other_cta && *other_cta != warp->cta->index) {
    u32 x = *other_cta % launch->grid[0], y = *other_cta / launch->grid[0] % launch->grid[1];
    snprintf(where, sizeof where, " of CTA (%u, %u, %u)", x, y, *other_cta / launch->grid[0] / launch->grid[1]);
  }
  return fail_pair(warp, row, lane, other & STAMP_PENDING ? FAULT_ASYNC : FAULT_RACE, address, STAMP_ROW(other),
                   "%s of %s memory (address 0x%llx) races with %s by %s%s: nothing orders the two", mine, space,
                   (unsigned long long)address, theirs, who, where);
}

/* ---- shared memory */

static int race_shared(Warp *warp, const Row *row, int lane, u32 offset, u32 bytes, Access access) {
  Cta *cta = warp->cta;
  u32 shift = (u32)cta->launch->smem_granule_log2, num_warps = cta->num_warps;
  u32 first = offset >> shift, last = (offset + bytes - 1) >> shift;
  int is_atomic = access_is_strong(access), is_write = access_writes(access);
  Stamp mine = make_stamp(warp, row, (u32)lane) | (is_atomic ? STAMP_ATOMIC : 0);
  for (u32 granule = first; granule <= last; granule++) {
    Stamp write = cta->races->writes[granule];
    if (write && !(is_atomic && write & STAMP_ATOMIC) && (write & STAMP_PENDING || !ordered(warp, write, lane)))
      return report_race(warp, row, lane, granule << shift, "shared", write, NULL, is_write ? "a write" : "a read",
                         write & STAMP_PENDING ? "an asynchronous copy that is still in flight, issued" : "a write");
    Stamp *reads = cta->races->reads + (size_t)granule * num_warps;
    if (!is_write) {
      Stamp old = reads[warp->id];
      int several = old && STAMP_CLOCK(old) == warp->clock && STAMP_LANE(old) != (u32)lane;
      reads[warp->id] = several ? (mine & ~63ull) | SEVERAL_LANES : mine;
      continue;
    }
    for (u32 other = 0; other < num_warps; other++) {
      Stamp read = reads[other];
      if (read && !(is_atomic && read & STAMP_ATOMIC) && !ordered(warp, read, lane))
        return report_race(warp, row, lane, granule << shift, "shared", read, NULL, "a write", "a read");
    }
    cta->races->writes[granule] = mine;
  }
  return STEP;
}

/* An asynchronous copy into shared memory: in flight until its issuer has waited for it. */
static void race_async(Warp *warp, const Row *row, int lane, u32 offset, u32 bytes, int in_flight) {
  Cta *cta = warp->cta;
  u32 shift = (u32)cta->launch->smem_granule_log2;
  Stamp stamp = make_stamp(warp, row, (u32)lane) | (in_flight ? STAMP_PENDING : 0);
  for (u32 granule = offset >> shift; granule <= (offset + bytes - 1) >> shift; granule++) cta->races->writes[granule] = stamp;
}

/* ---- synchronisation inside the CTA */

static inline void next_clock(Warp *warp) { warp->vc[warp->id] = ++warp->clock; }

static void race_warp_sync(Warp *warp, u32 mask) {
  next_clock(warp);
  if ((mask & warp->live) == warp->live) {
    warp->full_sync = warp->clock;
    return;
  }
  if (!warp->pair) warp->pair = calloc(WARP_SIZE * WARP_SIZE, sizeof(u32));
  for (u32 a = 0; a < WARP_SIZE; a++)
    for (u32 b = 0; b < WARP_SIZE; b++)
      if (mask >> a & mask >> b & 1) warp->pair[a * WARP_SIZE + b] = warp->clock;
}

static void race_release_barrier(Warp *warp, Barrier *barrier) {
  race_warp_sync(warp, ALL_LANES);
  for (u32 i = 0; i < warp->cta->num_warps; i++)
    if (warp->vc[i] > barrier->vc[i]) barrier->vc[i] = warp->vc[i];
  next_clock(warp);
}

static void race_acquire_barrier(Warp *warp, const Barrier *barrier) {
  for (u32 i = 0; i < warp->cta->num_warps; i++)
    if (i != warp->id && barrier->vc[i] > warp->vc[i]) warp->vc[i] = barrier->vc[i];
  warp->full_sync = warp->clock;
}

/* ---- global memory */

enum { NUM_STRIPES = 1024 };
static volatile char stripes[NUM_STRIPES];

static inline volatile char *stripe_of(u64 address) { return &stripes[(address >> 8) * 0x9e3779b97f4a7c15ull >> 54]; }

static int ordered_global(const Warp *warp, const GlobalStamp *other, int lane) {
  const Cta *cta = warp->cta;
  if (other->cta == cta->index) return ordered(warp, other->stamp, lane);
  const u32 *known = cta->races->foreign ? cta->races->foreign[other->cta] : NULL;
  return known && STAMP_CLOCK(other->stamp) < known[STAMP_WARP(other->stamp)];
}

static int readers_ordered(const Warp *warp, const GlobalStamp *reader, int lane) {
  if (reader->kind_epoch == 0) return ordered_global(warp, reader, lane);
  if (reader->kind_epoch == SEVERAL_CTAS) return 0;
  return reader->cta == warp->cta->index && reader->kind_epoch - 1 < warp->cta->barrier_epoch;
}

static void note_reader(Warp *warp, GlobalStamp *reader, Stamp mine, int lane) {
  const Cta *cta = warp->cta;
  if (!reader->stamp || (reader->kind_epoch == 0 && ordered_global(warp, reader, lane))) {
    *reader = (GlobalStamp){mine, cta->index, 0};
  } else if (reader->cta == cta->index && reader->kind_epoch != SEVERAL_CTAS) {
    *reader = (GlobalStamp){mine, cta->index, cta->barrier_epoch + 1};
  } else {
    *reader = (GlobalStamp){mine, cta->index, SEVERAL_CTAS};
  }
}

static int race_global(Warp *warp, const Row *row, int lane, Region *region, u64 address, u32 bytes, Access access) {
  u64 first = (address - region->base) >> region->granule_log2, last = (address + bytes - 1 - region->base) >> region->granule_log2;
  int is_atomic = access_is_strong(access), is_write = access_writes(access);
  Stamp mine = make_stamp(warp, row, (u32)lane) | (is_atomic ? STAMP_ATOMIC : 0);
  volatile char *stripe = stripe_of(address);
  int result = STEP;
  lock(stripe);
  for (u64 granule = first; granule <= last && result == STEP; granule++) {
    GlobalStamp *write = (GlobalStamp *)region->writes + granule, *reader = (GlobalStamp *)region->reads + granule;
    u64 place = region->base + (granule << region->granule_log2);
    if (write->stamp && !(is_atomic && write->stamp & STAMP_ATOMIC) && !ordered_global(warp, write, lane)) {
      result = report_race(warp, row, lane, place, "global", write->stamp, &write->cta, is_write ? "a write" : "a read", "a write");
    } else if (is_write) {
      if (reader->stamp && !(is_atomic && reader->stamp & STAMP_ATOMIC) && !readers_ordered(warp, reader, lane))
        result = report_race(warp, row, lane, place, "global", reader->stamp, &reader->cta, "a write", "a read");
      *write = (GlobalStamp){mine, warp->cta->index, 0};
    } else {
      note_reader(warp, reader, mine, lane);
    }
  }
  unlock(stripe);
  return result;
}

/* ---- order between CTAs: a location that atomics meet at, with a vector clock for every CTA that released there */

typedef struct SyncObject {
  u64 address;
  u32 **clocks;           /* [CTAs][warps], NULL where that CTA never released here */
  struct SyncObject *next;
} SyncObject;

enum { NUM_SYNC_BUCKETS = 256 };
static SyncObject *sync_objects[NUM_SYNC_BUCKETS];
static volatile char sync_lock;

static u32 num_ctas(const Launch *launch) { return launch->grid[0] * launch->grid[1] * launch->grid[2]; }

static SyncObject *sync_object(const Launch *launch, u64 address, int create) {
  SyncObject **bucket = &sync_objects[(address >> 2) % NUM_SYNC_BUCKETS];
  for (SyncObject *object = *bucket; object; object = object->next)
    if (object->address == address) return object;
  if (!create) return NULL;
  SyncObject *object = calloc(1, sizeof *object);
  object->address = address;
  object->clocks = calloc(num_ctas(launch), sizeof *object->clocks);
  object->next = *bucket;
  return *bucket = object;
}

static void join_clocks(u32 **into, const u32 *from, u32 num_warps) {
  if (!*into) *into = calloc(num_warps, sizeof **into);
  for (u32 i = 0; i < num_warps; i++)
    if (from[i] > (*into)[i]) (*into)[i] = from[i];
}

/* An atomic publishes what the last fence of this warp covered, */
static void race_release(Warp *warp, u8 **pointers, int space) {
  Cta *cta = warp->cta;
  if (space == SPACE_SHARED || !warp->fence_clock) return;
  lock(&sync_lock);
  for (u32 rest = warp->exec; rest; rest &= rest - 1) {
    SyncObject *object = sync_object(cta->launch, (u64)(uintptr_t)pointers[__builtin_ctz(rest)], 1);
    join_clocks(&object->clocks[cta->index], warp->vc, cta->num_warps);
    object->clocks[cta->index][warp->id] = warp->fence_clock;
  }
  unlock(&sync_lock);
}

/* and takes over what others published there (at once: a missing fence on this side is not seen). */
static void race_acquire(Warp *warp, u8 **pointers, int space) {
  Cta *cta = warp->cta;
  if (space == SPACE_SHARED) return;
  u32 total = num_ctas(cta->launch);
  lock(&sync_lock);
  for (u32 rest = warp->exec; rest; rest &= rest - 1) {
    SyncObject *object = sync_object(cta->launch, (u64)(uintptr_t)pointers[__builtin_ctz(rest)], 0);
    if (!object) continue;
    if (!cta->races->foreign) cta->races->foreign = calloc(total, sizeof *cta->races->foreign);
    for (u32 other = 0; other < total; other++)
      if (object->clocks[other] && other != cta->index) join_clocks(&cta->races->foreign[other], object->clocks[other], cta->num_warps);
  }
  unlock(&sync_lock);
}

static void race_fence(Warp *warp) {
  next_clock(warp);
  warp->fence_clock = warp->clock;
}

/* ---- life of the records */

static void races_reset_cta(Cta *cta) {
  CtaRaces *races = cta->races;
  Launch *launch = cta->launch;
  u32 granules = (launch->smem_bytes >> launch->smem_granule_log2) + 1;
  memset(races->writes, 0, granules * sizeof *races->writes);
  memset(races->reads, 0, (size_t)granules * cta->num_warps * sizeof *races->reads);
  if (races->foreign) {
    for (u32 i = 0; i < num_ctas(launch); i++) free(races->foreign[i]);
    free(races->foreign);
    races->foreign = NULL;
  }
}

static void races_reset_launch(const Launch *launch) {
  for (int bucket = 0; bucket < NUM_SYNC_BUCKETS; bucket++) {
    for (SyncObject *object = sync_objects[bucket], *next; object; object = next) {
      next = object->next;
      for (u32 i = 0; i < num_ctas(launch); i++) free(object->clocks[i]);
      free(object->clocks);
      free(object);
    }
    sync_objects[bucket] = NULL;
  }
}
