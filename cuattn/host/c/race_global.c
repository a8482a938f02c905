/* Races in global memory, and the order between CTAs.
 *
 * A location keeps the last write and the last reader, which may be "several warps of one CTA" or "several CTAs". CTAs
 * that are not of one cluster are ordered only by atomics with a fence before. */
#include <stdlib.h>

enum { NUM_STRIPES = 1024, STRIPE_LOG2 = 8 };
static volatile char stripes[NUM_STRIPES];

static inline volatile char *stripe_of(u64 address) { return &stripes[(address >> STRIPE_LOG2) * 0x9e3779b97f4a7c15ull >> 54]; }

static Cta *cluster_member(const Cta *cta, u32 index) {
  if (index == cta->index) return cta->cluster->ctas[cta->rank];
  for (u32 rank = 0; rank < cta->cluster->size; rank++)
    if (cta->cluster->ctas[rank]->index == index) return cta->cluster->ctas[rank];
  return NULL;
}

static int ordered_global(const Warp *warp, const GlobalStamp *other, int lane) {
  const Cta *cta = warp->cta;
  if (cluster_member(cta, other->cta)) return ordered(warp, other->stamp, lane);
  const u32 *known = cta->races->foreign ? cta->races->foreign[other->cta] : NULL;
  return known && STAMP_CLOCK(other->stamp) < known[STAMP_ACTOR(other->stamp) % actors_per_cta(cta)];
}

static int readers_ordered(const Warp *warp, const GlobalStamp *reader, int lane) {
  if (reader->kind_epoch == 0) return ordered_global(warp, reader, lane);
  if (reader->kind_epoch == SEVERAL_CTAS) return 0;
  return reader->cta == warp->cta->index && reader->kind_epoch - 1 < warp->cta->barrier_epoch;
}

static void note_reader(Warp *warp, GlobalStamp *reader, Stamp mine, u32 owner, int lane) {
  const Cta *cta = warp->cta;
  if (!reader->stamp || (reader->kind_epoch == 0 && ordered_global(warp, reader, lane))) {
    *reader = (GlobalStamp){mine, owner, 0};
  } else if (reader->cta == owner && reader->kind_epoch != SEVERAL_CTAS) {
    *reader = (GlobalStamp){mine, owner, cta->barrier_epoch + 1};
  } else {
    *reader = (GlobalStamp){mine, owner, SEVERAL_CTAS};
  }
}

/* An access inside one stripe that is recorded as `mine` of CTA `owner`. `is_async`: by the asynchronous proxy. */
static int race_global_as(Warp *warp, const Row *row, int lane, Region *region, u64 address, u32 bytes, Access access, Stamp mine, u32 owner,
                          int is_async) {
  int is_atomic = access_is_strong(access), is_write = access_writes(access);
  volatile char *stripe = stripe_of(address);
  int result = STEP;
  lock(stripe);
  Records at = global_records(region, address, bytes);
  for (u64 i = at.first; i <= at.last && result == STEP; i++) {
    GlobalStamp *write = (GlobalStamp *)region->writes + i, *reader = (GlobalStamp *)region->reads + i;
    u64 place = global_place_of(region, at, i);
    if (write->stamp && !(is_atomic && write->stamp & STAMP_ATOMIC) && !ordered_global(warp, write, lane)) {
      result = report_race(warp, row, lane, place, "global", write->stamp, write->cta, is_write ? "a write" : "a read", "a write");
    } else if (is_async && write->stamp && cluster_member(warp->cta, write->cta) && !fenced(warp, write->stamp, lane)) {
      result = report_unfenced(warp, row, lane, place, "global", write->stamp, "an asynchronous operation uses");
    } else if (is_write) {
      if (reader->stamp && !(is_atomic && reader->stamp & STAMP_ATOMIC) && !readers_ordered(warp, reader, lane))
        result = report_race(warp, row, lane, place, "global", reader->stamp, reader->cta, "a write", "a read");
      *write = (GlobalStamp){mine, owner, 0};
    } else {
      note_reader(warp, reader, mine, owner, lane);
    }
  }
  unlock(stripe);
  return result;
}

static int race_global(Warp *warp, const Row *row, int lane, Region *region, u64 address, u32 bytes, Access access) {
  Stamp mine = make_stamp(warp, row, (u32)lane) | (access_is_strong(access) ? STAMP_ATOMIC : 0);
  return race_global_as(warp, row, lane, region, address, bytes, access, mine, warp->cta->index, 0);
}

/* The same for an asynchronous operation, at its issue: the access belongs to the actor. */
static int race_async_global(Warp *issuer, const Row *row, int lane, Region *region, u64 address, u32 bytes, Access access, u32 actor) {
  if (!issuer->races || !region || !region->writes || !bytes) return STEP;
  Cta *owner = actor_cta(issuer->cta, actor);
  Stamp mine = stamp_of(owner->launch, row, actor, *actor_clock(owner, actor), (u32)lane) | (access_is_strong(access) ? STAMP_ATOMIC : 0);
  for (u64 next, end = address + bytes; address < end; address = next) {
    next = ((address >> STRIPE_LOG2) + 1) << STRIPE_LOG2;
    if (next > end) next = end;
    if (race_global_as(issuer, row, lane, region, address, (u32)(next - address), access, mine, owner->index, 1)) return FAILED;
  }
  return STEP;
}

/* ---- order between CTAs: a location that atomics meet at, with a vector clock for every CTA that released there */

struct SyncObject {
  u64 address;
  u32 **clocks;           /* [CTAs][actors of a CTA], NULL where that CTA never released here */
  SyncObject *next;
};

enum { NUM_SYNC_BUCKETS = 256 };
static volatile char sync_lock;

static u32 num_ctas(const Launch *launch) { return launch->grid[0] * launch->grid[1] * launch->grid[2]; }

static SyncObject *sync_object(Launch *launch, u64 address, int create) {
  if (!launch->sync_objects) {
    if (!create) return NULL;
    launch->sync_objects = calloc(NUM_SYNC_BUCKETS, sizeof *launch->sync_objects);
  }
  SyncObject **bucket = &launch->sync_objects[(address >> 2) % NUM_SYNC_BUCKETS];
  for (SyncObject *object = *bucket; object; object = object->next)
    if (object->address == address) return object;
  if (!create) return NULL;
  SyncObject *object = calloc(1, sizeof *object);
  object->address = address;
  object->clocks = calloc(num_ctas(launch), sizeof *object->clocks);
  object->next = *bucket;
  return *bucket = object;
}

static void join_clocks(u32 **into, const u32 *from, u32 count) {
  if (!*into) *into = calloc(count, sizeof **into);
  raise_clocks(*into, from, count);
}

/* An atomic publishes what the last fence of this warp covered, */
static void race_release(Warp *warp, u8 **pointers, int space) {
  Cta *cta = warp->cta;
  WarpRaces *races = warp->races;
  u32 per = actors_per_cta(cta);
  if (space == SPACE_SHARED || !races->fence_clock) return;
  lock(&sync_lock);
  for (u32 rest = warp->exec; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    SyncObject *object = sync_object(cta->launch, (u64)(uintptr_t)pointers[lane], 1);
    for (u32 rank = 0; rank < cta->cluster->size; rank++) {
      u32 **clocks = &object->clocks[cta->cluster->ctas[rank]->index];
      join_clocks(clocks, races->view.order + rank * per, per);
      if (races->lanes_ahead >> lane & 1) join_clocks(clocks, races->lanes[lane].order + rank * per, per);
    }
    raise_clock(&object->clocks[cta->index][warp->id], races->fence_clock);
  }
  unlock(&sync_lock);
}

/* and takes over what others published there (at once: a missing fence on this side is not seen). */
static void race_acquire(Warp *warp, u8 **pointers, int space) {
  Cta *cta = warp->cta;
  if (space == SPACE_SHARED) return;
  u32 total = num_ctas(cta->launch), per = actors_per_cta(cta);
  lock(&sync_lock);
  for (u32 rest = warp->exec; rest; rest &= rest - 1) {
    SyncObject *object = sync_object(cta->launch, (u64)(uintptr_t)pointers[__builtin_ctz(rest)], 0);
    if (!object) continue;
    if (!cta->races->foreign) cta->races->foreign = calloc(total, sizeof *cta->races->foreign);
    for (u32 other = 0; other < total; other++) {
      if (!object->clocks[other] || other == cta->index) continue;
      Cta *member = cluster_member(cta, other);
      if (member) raise_clocks(warp->races->view.order + member->rank * per, object->clocks[other], per);
      else join_clocks(&cta->races->foreign[other], object->clocks[other], per);
    }
  }
  unlock(&sync_lock);
}

/* ---- life of the records */

static CtaRaces *races_new(const Cta *cta) {
  CtaRaces *races = calloc(1, sizeof *races);
  races->num_readers = cta->num_warps + num_warpgroups(cta) + 3;
  races->num_lines = (cta->launch->smem_bytes >> LINE_LOG2) + 1;
  races->num_records = races->num_lines + (races->num_lines << (LINE_LOG2 - cta->launch->smem_granule_log2));
  races->writes = malloc(races->num_records * sizeof(Stamp));
  races->reads = malloc((size_t)races->num_records * races->num_readers * sizeof(Stamp));
  races->last_read = calloc(races->num_readers, sizeof(u32));
  races->clocks = calloc(actors_per_cta(cta), sizeof(u32));
  return races;
}

static void races_forget(const Cta *cta) {
  CtaRaces *races = cta->races;
  for (u32 i = 0; races->foreign && i < num_ctas(cta->launch); i++) free(races->foreign[i]);
  free(races->foreign);
  races->foreign = NULL;
}

/* A CTA starts. Records of granules are made when their line is split, those of a reader when it first reads. */
static void races_reset_cta(Cta *cta) {
  CtaRaces *races = cta->races;
  memset(races->writes, 0, races->num_lines * sizeof(Stamp));
  races->seen = 0;
  for (u32 i = 0; i < actors_per_cta(cta); i++) races->clocks[i] = 1;
  for (u32 i = 0; i < NUM_BARRIERS; i++) view_reset(cta, &races->barriers[i]);
  for (u32 i = 0; i < 2 * races->num_mbarriers; i++) view_reset(cta, &races->mbarriers[i]);
  view_reset(cta, &races->cluster_arrived);
  view_reset(cta, &races->cluster_passed);
  races_forget(cta);
}

static void races_free_cta(Cta *cta) {
  CtaRaces *races = cta->races;
  if (!races) return;
  races_forget(cta);
  for (u32 i = 0; i < NUM_BARRIERS; i++) view_free(&races->barriers[i]);
  for (u32 i = 0; i < 2 * races->num_mbarriers; i++) view_free(&races->mbarriers[i]);
  view_free(&races->cluster_arrived);
  view_free(&races->cluster_passed);
  free(races->mbarriers);
  free(races->writes);
  free(races->reads);
  free(races->last_read);
  free(races->clocks);
  free(races);
}

static void races_reset_warp(Warp *warp) {
  WarpRaces *races = warp->races;
  warp->clock = 1;
  if (!races) return;
  races->actor = actor_base(warp->cta) + warp->id;
  view_reset(warp->cta, &races->view);
  races->lanes_ahead = races->full_sync = races->fence_clock = 0;
  if (races->pair) memset(races->pair, 0, WARP_SIZE * WARP_SIZE * sizeof *races->pair);
}

static void races_free_warp(Warp *warp) {
  if (!warp->races) return;
  view_free(&warp->races->view);
  for (u32 i = 0; i < WARP_SIZE; i++) view_free(&warp->races->lanes[i]);
  free(warp->races->pair);
  free(warp->races);
}

static void races_free_launch(Launch *launch) {
  for (int bucket = 0; launch->sync_objects && bucket < NUM_SYNC_BUCKETS; bucket++) {
    for (SyncObject *object = launch->sync_objects[bucket], *next; object; object = next) {
      next = object->next;
      for (u32 i = 0; i < num_ctas(launch); i++) free(object->clocks[i]);
      free(object->clocks);
      free(object);
    }
  }
  free(launch->sync_objects);
  launch->sync_objects = NULL;
}
