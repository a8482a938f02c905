/* The race checker: two accesses to one location by different threads, at least one a write, with nothing between
 * them that orders them (race_clocks.c says what does).
 *
 * Shared memory keeps the last write, and of each warp or kind of asynchronous operation the last read, for every
 * location (race_records.c). */
#include <stdlib.h>
#include <string.h>

/* Who accessed, when and where: clock 26 | row 18 | actor 12 | pending 1 | atomic 1 | lane 6. Zero: nobody. */
typedef u64 Stamp;
#define STAMP_CLOCK(stamp) ((u32)((stamp) >> 38))
#define STAMP_ROW(stamp) ((s32)((stamp) >> 20 & 0x3ffff))
#define STAMP_ACTOR(stamp) ((u32)((stamp) >> 8 & 0xfff))
#define STAMP_PENDING 0x80u
#define STAMP_ATOMIC 0x40u
#define STAMP_LANE(stamp) ((u32)((stamp) & 63))
#define SEVERAL_LANES 32u

#include "race_records.c"

static inline Stamp stamp_of(const Launch *launch, const Row *row, u32 actor, u32 clock, u32 lane) {
  return (u64)clock << 38 | ((u64)(row - launch->rows) & 0x3ffff) << 20 | (u64)actor << 8 | lane;
}

static inline Stamp make_stamp(const Warp *warp, const Row *row, u32 lane) {
  return stamp_of(warp->cta->launch, row, warp_actor(warp), warp->clock, lane);
}

static inline int is_warp_stamp(const Cta *cta, Stamp stamp) { return STAMP_ACTOR(stamp) % actors_per_cta(cta) < cta->num_warps; }

/* Where the lanes of the warp that made the stamp have their entries in a view. */
static inline u32 lane_base_of(const Cta *cta, Stamp stamp) {
  u32 actor = STAMP_ACTOR(stamp), per = actors_per_cta(cta);
  return (actor / per * cta->num_warps + actor % per) * WARP_SIZE;
}

static int view_covers(const Cta *cta, const u32 *actors, const u32 *lanes, Stamp stamp) {
  if (STAMP_CLOCK(stamp) < actors[STAMP_ACTOR(stamp)]) return 1;
  if (!lanes || !is_warp_stamp(cta, stamp)) return 0;
  lanes += lane_base_of(cta, stamp);
  if (STAMP_LANE(stamp) < WARP_SIZE) return STAMP_CLOCK(stamp) < lanes[STAMP_LANE(stamp)];
  u32 least = lanes[0]; /* several lanes: which ones is not known */
  for (u32 lane = 1; lane < WARP_SIZE; lane++) least = lanes[lane] < least ? lanes[lane] : least;
  return STAMP_CLOCK(stamp) < least;
}

static int ordered_by_lanes(const Warp *warp, Stamp stamp, int lane) {
  const WarpRaces *races = warp->races;
  if (view_covers(warp->cta, races->view.order, races->view.lane_order, stamp)) return 1;
  return races->lanes_ahead >> lane & 1 && view_covers(warp->cta, races->lanes[lane].order, races->lanes[lane].lane_order, stamp);
}

/* Whether an access happened before what `lane` does now. */
static inline int ordered(const Warp *warp, Stamp stamp, int lane) {
  const WarpRaces *races = warp->races;
  u32 other = STAMP_ACTOR(stamp), clock = STAMP_CLOCK(stamp);
  if (other != races->actor) return clock < races->view.order[other] || ordered_by_lanes(warp, stamp, lane);
  return STAMP_LANE(stamp) == (u32)lane || clock < races->full_sync || clock < clock_in_warp(warp, STAMP_LANE(stamp), (u32)lane);
}

/* Whether a fence.proxy.async lies between a write and what `lane` does now. */
static int fenced(const Warp *warp, Stamp stamp, int lane) {
  const WarpRaces *races = warp->races;
  if (!is_warp_stamp(warp->cta, stamp)) return 1; /* an asynchronous write needs none */
  if (view_covers(warp->cta, races->view.fenced, races->view.lane_fenced, stamp)) return 1;
  return races->lanes_ahead >> lane & 1 && view_covers(warp->cta, races->lanes[lane].fenced, races->lanes[lane].lane_fenced, stamp);
}

/* ---- reports */

static void describe_actor(const Cta *cta, Stamp stamp, char *text, size_t size) {
  u32 actor = STAMP_ACTOR(stamp) % actors_per_cta(cta), tid[3];
  if (actor >= cta->num_warps + num_warpgroups(cta)) snprintf(text, size, "an asynchronous copy");
  else if (actor >= cta->num_warps) snprintf(text, size, "the wgmma of warpgroup %u", actor - cta->num_warps);
  else if (STAMP_LANE(stamp) == SEVERAL_LANES) snprintf(text, size, "several threads of warp %u", actor);
  else {
    thread_position(cta, actor * WARP_SIZE + STAMP_LANE(stamp), tid);
    snprintf(text, size, "thread (%u, %u, %u)", tid[0], tid[1], tid[2]);
  }
}

static int report_race(Warp *warp, const Row *row, int lane, u64 address, const char *space, Stamp other, u32 other_cta,
                       const char *mine, const char *theirs) {
  const Launch *launch = warp->cta->launch;
  char who[96], where[64] = "";
  describe_actor(warp->cta, other, who, sizeof who);
  if (other_cta != warp->cta->index) {
    u32 x = other_cta % launch->grid[0], y = other_cta / launch->grid[0] % launch->grid[1];
    snprintf(where, sizeof where, " of CTA (%u, %u, %u)", x, y, other_cta / launch->grid[0] / launch->grid[1]);
  }
  int kind = other & STAMP_PENDING || !is_warp_stamp(warp->cta, other) ? FAULT_ASYNC : FAULT_RACE;
  return fail_pair(warp, row, lane, kind, address, STAMP_ROW(other),
                   "%s of %s memory (address 0x%llx) races with %s by %s%s: nothing orders the two", mine, space,
                   (unsigned long long)address, theirs, who, where);
}

/* ---- shared memory, of the own CTA or of another one of the cluster */

static int report_shared(Warp *warp, const Row *row, int lane, u32 place, Stamp other, const char *mine, const char *theirs) {
  if (other & STAMP_PENDING) theirs = "an asynchronous write that is still in flight, issued";
  return report_race(warp, row, lane, place, "shared", other, actor_cta(warp->cta, STAMP_ACTOR(other))->index, mine, theirs);
}

/* The first byte of the smallest location that a place is in. */
static inline u32 place_of(const Cta *cta, u32 place) { return place >> cta->launch->smem_granule_log2 << cta->launch->smem_granule_log2; }

/* `last_read` holds for readers that are warps: a record of theirs has no later clock. */
static inline void note_shared_read(CtaRaces *races, const Warp *warp, u32 reader) {
  note_reader_seen(races, reader);
  races->last_read[reader] = warp->clock;
}

static inline int race_in(Cta *cta, u32 reader, Warp *warp, const Row *row, int lane, u32 offset, u32 bytes, Access access) {
  CtaRaces *races = cta->races;
  int is_atomic = access_is_strong(access), is_write = access_writes(access);
  Stamp mine = make_stamp(warp, row, (u32)lane) | (is_atomic ? STAMP_ATOMIC : 0);
  if (!is_write) note_shared_read(races, warp, reader);
  for (u32 place = offset, next, end = offset + bytes; place < end; place = next) {
    next = end;
    Stamp write = stamp_at(cta, races->writes, place, &next);
    if (write && !(is_atomic && write & STAMP_ATOMIC) && (write & STAMP_PENDING || !ordered(warp, write, lane)))
      return report_shared(warp, row, lane, place_of(cta, place), write, is_write ? "a write" : "a read", "a write");
    for (u64 readers = is_write ? races->seen : 0; readers; readers &= readers - 1) {
      Stamp read = stamp_at(cta, reads_of(races, (u32)__builtin_ctzll(readers)), place, &next);
      if (read && !(is_atomic && read & STAMP_ATOMIC) && !ordered(warp, read, lane))
        return report_shared(warp, row, lane, place_of(cta, place), read, "a write", "a read");
    }
  }
  if (is_write) set_stamps(cta, races->writes, offset, offset + bytes, mine);
  for (u32 place = offset, next, end = is_write ? offset : offset + bytes; place < end; place = next) {
    Stamp *read = record_for(cta, reads_of(races, reader), place, offset, end, &next), old = *read;
    int several = old && STAMP_ACTOR(old) == warp_actor(warp) && STAMP_CLOCK(old) == warp->clock && STAMP_LANE(old) != (u32)lane;
    *read = several ? (mine & ~63ull) | SEVERAL_LANES : mine;
  }
  return STEP;
}

static int race_shared(Warp *warp, const Row *row, int lane, u32 offset, u32 bytes, Access access) {
  return race_in(warp->cta, warp->id, warp, row, lane, offset, bytes, access);
}

/* In the shared memory of any CTA of the cluster: readers of other CTAs share one record, the latest counts. */
static int race_distributed(Warp *warp, const Row *row, int lane, Cta *cta, u32 offset, u32 bytes, Access access) {
  if (cta == warp->cta) return race_shared(warp, row, lane, offset, bytes, access);
  return race_in(cta, cta->races->num_readers - 1, warp, row, lane, offset, bytes, access);
}

/* ---- barriers of the CTA and of the cluster */

static void race_release_barrier(Warp *warp, u32 id) {
  race_warp_sync(warp, ALL_LANES);
  view_release(warp, ALL_LANES, &warp->cta->races->barriers[id]);
}

static void race_acquire_barrier(Warp *warp, u32 id) {
  view_acquire(warp, ALL_LANES, &warp->cta->races->barriers[id]);
  warp->races->full_sync = warp->clock;
}

static void race_reset_barrier(Cta *cta, u32 id) { view_reset(cta, &cta->races->barriers[id]); }

static void race_cluster_arrive(Warp *warp) { view_release(warp, warp->exec, &warp->cta->cluster->ctas[0]->races->cluster_arrived); }
static void race_cluster_wait(Warp *warp) { view_acquire(warp, warp->exec, &warp->cta->cluster->ctas[0]->races->cluster_passed); }

static void race_cluster_barrier_complete(Cluster *cluster) {
  CtaRaces *races = cluster->ctas[0]->races;
  view_join(cluster->ctas[0], &races->cluster_passed, &races->cluster_arrived);
  for (u32 rank = 0; rank < cluster->size; rank++) cluster->ctas[rank]->barrier_epoch++;
}

/* ---- mbarriers */

static View *mbarrier_views(Cta *cta, const Mbarrier *mbarrier) {
  CtaRaces *races = cta->races;
  u32 index = (u32)(mbarrier - cta->mbarriers.items);
  if (index >= races->num_mbarriers) {
    races->mbarriers = realloc(races->mbarriers, 2 * (index + 1) * sizeof(View));
    memset(races->mbarriers + 2 * races->num_mbarriers, 0, 2 * (index + 1 - races->num_mbarriers) * sizeof(View));
    for (u32 i = 2 * races->num_mbarriers; i < 2 * (index + 1); i++) view_reset(cta, &races->mbarriers[i]);
    races->num_mbarriers = index + 1;
  }
  return &races->mbarriers[2 * index];
}

/* The object itself: initialised and invalidated by ordinary writes, used by atomic ones. */
static int race_mbarrier_access(Warp *warp, const Row *row, int lane, Cta *target, const Mbarrier *mbarrier) {
  return race_distributed(warp, row, lane, target, mbarrier->offset, 8, ACCESS_STRONG_READ);
}

static void race_mbarrier_arrive(Warp *warp, u32 lanes, Cta *target, Mbarrier *mbarrier) {
  view_release(warp, lanes, mbarrier_views(target, mbarrier));
}

static void race_mbarrier_complete_tx(Cta *target, Mbarrier *mbarrier, u32 actor) {
  race_actor_tick(target, actor);
  raise_clock(&mbarrier_views(target, mbarrier)->order[actor], *actor_clock(target, actor));
}

static void race_mbarrier_complete(Cta *cta, Mbarrier *mbarrier) {
  View *views = mbarrier_views(cta, mbarrier);
  view_join(cta, &views[1], &views[0]);
}

/* A wait of `lanes` is over. Mostly they have waited for the same mbarrier. */
static int race_mbarrier_wait(Warp *warp, const Row *row, u32 lanes, Mbarrier **mbarriers, int acquires) {
  for (u32 rest = lanes, same; rest; rest &= ~same) {
    int lane = __builtin_ctz(rest);
    same = 0;
    for (u32 others = rest; others; others &= others - 1) {
      int other = __builtin_ctz(others);
      if (mbarriers[other] == mbarriers[lane]) same |= 1u << other;
    }
    if (race_mbarrier_access(warp, row, lane, warp->cta, mbarriers[lane])) return FAILED;
    if (acquires) view_acquire(warp, same, &mbarrier_views(warp->cta, mbarriers[lane])[1]);
  }
  return STEP;
}
