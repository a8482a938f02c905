/* What happened before: vector clocks.
 *
 * After FastTrack (Flanagan and Freund, 2009), with one entry a warp instead of one a thread, and entries for the
 * asynchronous operations. An actor is a warp, the wgmma of a warpgroup, the operations that complete on one mbarrier,
 * or the bulk groups of a warp; its clock counts its synchronisations. An access is recorded with its actor and the
 * actor's clock at that time; it happened before what a warp does now if that clock is below the warp's entry.
 *
 * Inside a warp a synchronisation of all lanes orders everything before it (lockstep orders nothing); one of some lanes
 * orders those lanes. When single lanes release or acquire (one thread arrives at an mbarrier for its warp), entries
 * for lanes stand beside those for warps, and a lane has a view of its own until the warp synchronises.
 *
 * `fenced` is the part of `order` that a fence.proxy.async has covered on the way: only such writes of ordinary stores
 * are seen by asynchronous operations. */
#include <stdlib.h>
#include <string.h>

typedef struct {
  u32 *order, *fenced;           /* [actors of the cluster] */
  u32 *lane_order, *lane_fenced; /* [warps of the cluster][lanes], or NULL while no lane is ahead of its warp */
} View;

enum { MBARRIER_ACTORS = 64 };

struct CtaRaces {
  u64 *writes;            /* [num_records] a Stamp each: of lines, then of granules (race_records.c) */
  u64 *reads;             /* [num_readers][num_records] */
  u32 num_lines, num_records;
  u32 num_readers;        /* warps, warpgroups, and one each for bulk groups, mbarriers, other CTAs */
  u64 seen;               /* bit r: reader r has read something */
  u32 *last_read;         /* [num_readers] the clock of the latest read of each that has */
  u32 *clocks;            /* [actors of the CTA] of those that are not warps */
  View barriers[NUM_BARRIERS];
  View cluster_arrived, cluster_passed; /* rank 0 only */
  View *mbarriers;        /* two for each entry of the CTA's table: the phase in progress, and those completed */
  u32 num_mbarriers;
  u32 **foreign;          /* [CTAs of the grid] clocks of CTAs outside the cluster that this one has synchronised with */
};

struct WarpRaces {
  u32 actor;
  View view;
  View lanes[WARP_SIZE];  /* what single lanes know beyond it */
  u32 lanes_ahead;        /* lanes with such knowledge */
  u32 full_sync;          /* clock of the last synchronisation of the whole warp */
  u32 fence_clock;        /* clock at the last memory fence, 0 none */
  u32 *pair;              /* [lane][lane] clock of their last common partial synchronisation, or NULL */
};

/* ---- actors: numbers inside a CTA, then unique in the cluster */

static inline u32 num_warpgroups(const Cta *cta) { return (cta->num_warps + 3) / 4; }
static inline u32 actors_per_cta(const Cta *cta) { return 3 * cta->num_warps + num_warpgroups(cta) + MBARRIER_ACTORS; }
static inline u32 actor_base(const Cta *cta) { return cta->rank * actors_per_cta(cta); }
static inline u32 warp_actor(const Warp *warp) { return warp->races->actor; }
static inline u32 lane_base(const Warp *warp) { return (warp->cta->rank * warp->cta->num_warps + warp->id) * WARP_SIZE; }

static u32 actor_of_warpgroup(Cta *cta, u32 warp_id) { return actor_base(cta) + cta->num_warps + warp_id / 4; }

static u32 actor_of_mbarrier(Cta *cta, u32 offset) {
  u32 index = cta->mbarriers.at ? cta->mbarriers.at[offset / 8] : 0;
  return actor_base(cta) + cta->num_warps + num_warpgroups(cta) + index % MBARRIER_ACTORS;
}

/* The bulk groups of a warp: this actor reads their sources, the next one writes global memory. */
static u32 actor_of_bulk_group(Warp *warp, int lane) {
  (void)lane;
  Cta *cta = warp->cta;
  return actor_base(cta) + cta->num_warps + num_warpgroups(cta) + MBARRIER_ACTORS + 2 * warp->id;
}

static inline Cta *actor_cta(const Cta *cta, u32 actor) { return cta->cluster->ctas[actor / actors_per_cta(cta)]; }
static inline u32 *actor_clock(const Cta *cta, u32 actor) { return &actor_cta(cta, actor)->races->clocks[actor % actors_per_cta(cta)]; }

/* An operation of the actor has completed. */
static void race_actor_tick(Cta *cta, u32 actor) {
  if (cta->races) ++*actor_clock(cta, actor);
}

static void race_actor_set(Cta *cta, u32 actor, u32 clock) {
  if (cta->races) *actor_clock(cta, actor) = clock;
}

/* ---- views */

static u32 view_actors(const Cta *cta) { return cta->cluster->size * actors_per_cta(cta); }
static u32 view_lanes(const Cta *cta) { return cta->cluster->size * cta->num_warps * WARP_SIZE; }

static void view_reset(const Cta *cta, View *view) {
  if (!view->order) {
    view->order = calloc(view_actors(cta), sizeof(u32));
    view->fenced = calloc(view_actors(cta), sizeof(u32));
    return;
  }
  memset(view->order, 0, view_actors(cta) * sizeof(u32));
  memset(view->fenced, 0, view_actors(cta) * sizeof(u32));
  if (!view->lane_order) return;
  memset(view->lane_order, 0, view_lanes(cta) * sizeof(u32));
  memset(view->lane_fenced, 0, view_lanes(cta) * sizeof(u32));
}

static void view_free(View *view) {
  free(view->order);
  free(view->fenced);
  free(view->lane_order);
  free(view->lane_fenced);
}

static void view_need_lanes(const Cta *cta, View *view) {
  if (view->lane_order) return;
  view->lane_order = calloc(view_lanes(cta), sizeof(u32));
  view->lane_fenced = calloc(view_lanes(cta), sizeof(u32));
}

static inline void raise_clock(u32 *entry, u32 clock) {
  if (*entry < clock) *entry = clock;
}

static void raise_clocks(u32 *into, const u32 *from, u32 count) {
  for (u32 i = 0; i < count; i++) into[i] = into[i] < from[i] ? from[i] : into[i];
}

static void view_join(const Cta *cta, View *into, const View *from) {
  raise_clocks(into->order, from->order, view_actors(cta));
  raise_clocks(into->fenced, from->fenced, view_actors(cta));
  if (!from->lane_order) return;
  view_need_lanes(cta, into);
  raise_clocks(into->lane_order, from->lane_order, view_lanes(cta));
  raise_clocks(into->lane_fenced, from->lane_fenced, view_lanes(cta));
}

/* The view of a lane beyond that of its warp. */
static View *lane_view(Warp *warp, int lane) {
  View *view = &warp->races->lanes[lane];
  if (!(warp->races->lanes_ahead >> lane & 1)) {
    view_reset(warp->cta, view);
    warp->races->lanes_ahead |= 1u << lane;
  }
  return view;
}

static u32 *warp_pairs(Warp *warp) {
  if (!warp->races->pair) warp->races->pair = calloc(WARP_SIZE * WARP_SIZE, sizeof(u32));
  return warp->races->pair;
}

static inline void next_clock(Warp *warp) { ++warp->clock; }

/* The clock below which accesses of lane `other` of this warp happened before what `lane` does now. */
static inline u32 clock_in_warp(const Warp *warp, u32 other, u32 lane) {
  const WarpRaces *races = warp->races;
  u32 pair = races->pair && other < WARP_SIZE ? races->pair[other * WARP_SIZE + lane] : 0;
  return pair > races->full_sync ? pair : races->full_sync;
}

/* Publish what `lanes` have done and know. */
static void view_release(Warp *warp, u32 lanes, View *into) {
  WarpRaces *races = warp->races;
  const Cta *cta = warp->cta;
  view_join(cta, into, &races->view);
  for (u32 rest = lanes & races->lanes_ahead; rest; rest &= rest - 1) view_join(cta, into, &races->lanes[__builtin_ctz(rest)]);
  if ((lanes & warp->live) == warp->live) {
    raise_clock(&into->order[warp_actor(warp)], warp->clock + 1);
  } else {
    raise_clock(&into->order[warp_actor(warp)], races->full_sync);
    view_need_lanes(cta, into);
    u32 *clocks = into->lane_order + lane_base(warp);
    for (u32 rest = lanes; rest; rest &= rest - 1) {
      u32 lane = (u32)__builtin_ctz(rest);
      raise_clock(&clocks[lane], warp->clock + 1);
      for (u32 other = 0; races->pair && other < WARP_SIZE; other++) raise_clock(&clocks[other], clock_in_warp(warp, other, lane));
    }
  }
  next_clock(warp);
}

/* Let `lanes` know what was published. */
static void view_acquire(Warp *warp, u32 lanes, const View *from) {
  WarpRaces *races = warp->races;
  u32 own = from->order[warp_actor(warp)];
  const u32 *own_lanes = from->lane_order ? from->lane_order + lane_base(warp) : NULL;
  int whole = (lanes & warp->live) == warp->live;
  if (whole) {
    view_join(warp->cta, &races->view, from);
    raise_clock(&races->full_sync, own);
  }
  int ahead = 0;
  for (u32 other = 0; own_lanes && other < WARP_SIZE; other++) ahead |= own_lanes[other] > races->full_sync;
  for (u32 rest = lanes; rest && (ahead || !whole); rest &= rest - 1) {
    u32 lane = (u32)__builtin_ctz(rest), *pair = warp_pairs(warp);
    if (!whole) view_join(warp->cta, lane_view(warp, (int)lane), from);
    for (u32 other = 0; other < WARP_SIZE; other++) {
      u32 clock = own_lanes && own_lanes[other] > own ? own_lanes[other] : own;
      raise_clock(&pair[other * WARP_SIZE + lane], clock);
    }
  }
}

/* What an actor did before `clock` is known to `lane`, or to all executing lanes (-1). */
static void race_acquire_actor_until(Warp *warp, int lane, u32 actor, u32 clock) {
  WarpRaces *races = warp->races;
  if (!races) return;
  u32 lanes = lane < 0 ? warp->exec : 1u << lane;
  if ((lanes & warp->live) == warp->live) raise_clock(&races->view.order[actor], clock);
  else
    for (u32 rest = lanes; rest; rest &= rest - 1) raise_clock(&lane_view(warp, __builtin_ctz(rest))->order[actor], clock);
}

/* ---- synchronisation inside a warp, and fences */

static void lanes_catch_up(Warp *warp, u32 mask) {
  WarpRaces *races = warp->races;
  u32 ahead = races->lanes_ahead & mask;
  if ((mask & warp->live) == warp->live) {
    for (u32 rest = ahead; rest; rest &= rest - 1) view_join(warp->cta, &races->view, &races->lanes[__builtin_ctz(rest)]);
    races->lanes_ahead = 0;
    return;
  }
  View *first = lane_view(warp, __builtin_ctz(ahead));
  for (u32 rest = ahead; rest; rest &= rest - 1) view_join(warp->cta, first, &races->lanes[__builtin_ctz(rest)]);
  for (u32 rest = mask & warp->live; rest; rest &= rest - 1) view_join(warp->cta, lane_view(warp, __builtin_ctz(rest)), first);
}

static void race_warp_sync(Warp *warp, u32 mask) {
  WarpRaces *races = warp->races;
  next_clock(warp);
  if (races->lanes_ahead & mask) lanes_catch_up(warp, mask);
  if ((mask & warp->live) == warp->live) {
    races->full_sync = warp->clock;
    return;
  }
  u32 *pair = warp_pairs(warp);
  for (u32 a = 0; a < WARP_SIZE; a++)
    for (u32 b = 0; b < WARP_SIZE; b++)
      if (mask >> a & mask >> b & 1) pair[a * WARP_SIZE + b] = warp->clock;
}

static void race_fence(Warp *warp) {
  next_clock(warp);
  warp->races->fence_clock = warp->clock;
}

static void fence_view(const Cta *cta, View *view, const View *known) {
  raise_clocks(view->fenced, known->order, view_actors(cta));
  if (!known->lane_order) return;
  view_need_lanes(cta, view);
  raise_clocks(view->lane_fenced, known->lane_order, view_lanes(cta));
}

/* fence.proxy.async by the executing lanes: what they wrote, and what happened before. */
static void race_proxy_fence(Warp *warp) {
  WarpRaces *races = warp->races;
  const Cta *cta = warp->cta;
  int whole = (warp->exec & warp->live) == warp->live;
  if (whole) {
    fence_view(cta, &races->view, &races->view);
    raise_clock(&races->view.fenced[warp_actor(warp)], warp->clock + 1);
  }
  for (u32 rest = whole ? races->lanes_ahead : warp->exec; rest; rest &= rest - 1) {
    u32 lane = (u32)__builtin_ctz(rest);
    View *view = lane_view(warp, (int)lane);
    fence_view(cta, view, &races->view);
    fence_view(cta, view, view);
    if (whole) continue;
    view_need_lanes(cta, view);
    u32 *fenced = view->lane_fenced + lane_base(warp);
    for (u32 other = 0; other < WARP_SIZE; other++) raise_clock(&fenced[other], other == lane ? warp->clock + 1 : clock_in_warp(warp, other, lane));
  }
  next_clock(warp);
}
