/* Control flow: groups of lanes, branches, exits, barriers, and the loop that runs a warp.
 *
 * Lanes of a warp may stand at different rows. The group with the lowest row runs until it blocks, exits, jumps, or
 * reaches a row where other lanes stand; rows are in program order, so that joins happen where the code joins. Lanes
 * held at a collective whose partners have not come are passed over until they do; so are lanes whose wait (for an
 * mbarrier, a wgmma, a cluster) has failed, until no other lane can run: then the whole warp waits. */

static void park(Warp *warp, u32 lanes, s32 row) {
  for (u32 rest = lanes; rest; rest &= rest - 1) warp->pc[__builtin_ctz(rest)] = row;
}

/* Hold the executing lanes at `row` until the lanes that they need arrive. */
static int hold_lanes(Warp *warp, const Row *row) {
  s32 here = (s32)(row - warp->cta->launch->rows);
  park(warp, warp->exec, here);
  park(warp, warp->active & ~warp->exec, here + 1);
  warp->waiting |= warp->exec;
  warp->regroup = 1;
  return JUMPED;
}

/* A collective that names `mask`: every live lane of it must execute this row together. */
#define REQUIRE_LANES(warp, row, mask)                                        \
  do {                                                                        \
    u32 required = (mask) & (warp)->live;                                     \
    if (((warp)->exec & required) != required) return hold_lanes(warp, row);  \
  } while (0)

/* Choose the group that runs next. Returns STEP, BLOCKED when all lanes wait, or FAILED. */
static int select_group(Warp *warp) {
  u32 candidates = warp->live & ~warp->waiting & ~warp->stalled;
  if (!candidates && warp->stalled) {
    warp->state = 31 - __builtin_clz(warp->waits);
    return BLOCKED;
  }
  if (!candidates) {
    if (warp->tried_live == warp->live) {
      int lane = __builtin_ctz(warp->live);
      fail(warp, warp->cta->launch->rows + warp->pc[lane], lane, FAULT_DIVERGENCE, 0,
           "lanes %08x of warp %u wait at a warp-level or barrier instruction for lanes that never come "
           "(divergent code, or a member mask that names lanes which do not take part)", warp->waiting, warp->id);
      return FAILED;
    }
    warp->tried_live = warp->live; /* lanes may have exited since: try each once more */
    warp->waiting = 0;
    candidates = warp->live;
  }
  s32 lowest = INT32_MAX;
  for (u32 rest = candidates; rest; rest &= rest - 1) {
    s32 pc = warp->pc[__builtin_ctz(rest)];
    lowest = pc < lowest ? pc : lowest;
  }
  u32 group = 0;
  s32 meet = INT32_MAX;
  for (u32 rest = warp->live; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    s32 pc = warp->pc[lane];
    if (pc == lowest && !(warp->stalled >> lane & 1)) group |= 1u << lane;
    else if (pc > lowest && pc < meet) meet = pc;
  }
  warp->active = group;
  warp->waiting &= ~group;
  warp->next = lowest;
  warp->regroup = 0;
  warp->meet = meet == INT32_MAX ? NULL : warp->cta->launch->rows + meet;
  return STEP;
}

/* The executing lanes wait in `state` and execute `row` anew after a wake; what a handler that waits returns. */
static int block_warp(Warp *warp, const Row *row, int state) {
  s32 here = (s32)(row - warp->cta->launch->rows);
  warp->waits |= 1u << state;
  if (warp->exec == warp->live) {
    warp->next = here;
    warp->state = state;
    return BLOCKED;
  }
  park(warp, warp->exec, here);
  park(warp, warp->active & ~warp->exec, here + 1);
  warp->stalled |= warp->exec;
  warp->regroup = 1;
  return JUMPED;
}

/* Let a warp that waits look again. */
static void wake(Warp *warp) {
  if (warp->state >= AT_MBARRIER) {
    warp->state = RUNNABLE;
    if (warp->stalled) warp->regroup = 1;
  }
  warp->stalled = warp->waits = 0;
}

/* Send the executing lanes to `target`; the others of the group fall through. */
static int jump(Warp *warp, const Row *row, s32 target) {
  u32 stay = warp->active & ~warp->exec;
  if (!stay && warp->active == warp->live) {
    warp->next = target;
  } else {
    park(warp, warp->exec, target);
    park(warp, stay, (s32)(row - warp->cta->launch->rows) + 1);
    warp->regroup = 1;
  }
  return JUMPED;
}

static int op_bra(Warp *warp, const Row *row) { return jump(warp, row, row->a[0]); }

/* brx.idx: a[0] the index slot, a[1] the number of targets, then the targets. */
static int op_brx(Warp *warp, const Row *row) {
  const u32 *index = SLOT(u32, 0);
  for (u32 rest = warp->exec; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    if (index[lane] >= (u32)row->a[1])
      return fail(warp, row, lane, FAULT_MEMORY, 0, "branch index %u of %d targets", index[lane], row->a[1]);
    warp->pc[lane] = row->a[2 + index[lane]];
  }
  park(warp, warp->active & ~warp->exec, (s32)(row - warp->cta->launch->rows) + 1);
  warp->regroup = 1;
  return JUMPED;
}

static void cluster_barrier_check(Cluster *cluster);

static int op_exit(Warp *warp, const Row *row) {
  (void)row;
  warp->live &= ~warp->exec;
  if (warp->cta->cluster->barrier_open) cluster_barrier_check(warp->cta->cluster);
  warp->active &= ~warp->exec;
  if (warp->active) return STEP;
  warp->regroup = 1;
  return JUMPED;
}

static int op_trap(Warp *warp, const Row *row) {
  return fail(warp, row, -1, FAULT_MEMORY, 0, "the kernel executed trap");
}

static int op_nop(Warp *warp, const Row *row) {
  (void)warp;
  (void)row;
  return STEP;
}

/* ---- barriers of the CTA */

enum { BARRIER_SYNC, BARRIER_ARRIVE, BARRIER_RED_POPC, BARRIER_RED_AND, BARRIER_RED_OR };

static void barrier_release(Cta *cta, u32 id) {
  Barrier *barrier = &cta->barriers[id];
  cta->cluster->timeouts = 0;
  if (!barrier->expected) cta->barrier_epoch++;
  for (u32 rest = barrier->warps; rest; rest &= rest - 1) {
    Warp *warp = &cta->warps[__builtin_ctz(rest)];
    warp->state = RUNNABLE;
    if (cta->races) race_acquire_barrier(warp, id);
    const Row *row = warp->barrier_row;
    if (row->flags >= BARRIER_RED_POPC) {
      u32 result = row->flags == BARRIER_RED_POPC ? barrier->popc : row->flags == BARRIER_RED_AND ? barrier->all : barrier->any;
      u32 *dst = (u32 *)(warp->regs + row->a[0]);
      for (int i = 0; i < WARP_SIZE; i++) dst[i] = result;
    }
  }
  *barrier = (Barrier){.all = 1};
  if (cta->races) race_reset_barrier(cta, id);
}

static int barrier_complete(const Cta *cta, const Barrier *barrier) {
  if (barrier->expected) return barrier->threads >= barrier->expected;
  return barrier->num_arrived_warps == cta->num_live_warps;
}

/* flags: BARRIER_*; sources: barrier number, thread count (0: all), and for reductions the predicate. */
static int op_bar(Warp *warp, const Row *row) {
  REQUIRE_LANES(warp, row, ALL_LANES);
  Cta *cta = warp->cta;
  int kind = row->flags;
  int first = kind >= BARRIER_RED_POPC;
  int lane = __builtin_ctz(warp->exec);
  u32 id = SLOT(u32, first)[lane], expected = SLOT(u32, first + 1)[lane];
  if (id >= NUM_BARRIERS) return fail(warp, row, lane, FAULT_MEMORY, id, "barrier %u: there are %d", id, NUM_BARRIERS);
  if (expected % WARP_SIZE) return fail(warp, row, lane, FAULT_DIVERGENCE, 0, "barrier %u waits for %u threads, no multiple of %d", id, expected, WARP_SIZE);
  Barrier *barrier = &cta->barriers[id];
  if (barrier->num_arrived_warps && barrier->expected != expected)
    return fail(warp, row, lane, FAULT_DIVERGENCE, 0, "barrier %u: warps disagree on the thread count (%u and %u)", id, barrier->expected, expected);
  if (!barrier->num_arrived_warps) *barrier = (Barrier){.all = 1, .expected = expected};
  if (kind >= BARRIER_RED_POPC) {
    const u32 *value = SLOT(u32, 3);
    for (u32 rest = warp->exec; rest; rest &= rest - 1) {
      u32 x = value[__builtin_ctz(rest)] != 0;
      barrier->popc += x;
      barrier->any |= x;
      barrier->all &= x;
    }
  }
  if (cta->races) race_release_barrier(warp, id);
  barrier->threads += WARP_SIZE;
  barrier->num_arrived_warps++;
  s32 after = (s32)(row - cta->launch->rows) + 1;
  if (kind != BARRIER_ARRIVE) {
    barrier->warps |= 1u << warp->id;
    warp->barrier = (s32)id;
    warp->barrier_row = row;
    warp->next = after;
    warp->state = AT_BARRIER;
  }
  if (barrier_complete(cta, barrier)) barrier_release(cta, id);
  return warp->state == AT_BARRIER ? BLOCKED : STEP;
}

/* A warp has exited: barriers that waited for all threads may be complete now. */
static void warp_finished(Warp *warp) {
  Cta *cta = warp->cta;
  warp->state = FINISHED;
  cta->num_live_warps--;
  for (u32 id = 0; id < NUM_BARRIERS; id++) {
    Barrier *barrier = &cta->barriers[id];
    if (barrier->num_arrived_warps && barrier_complete(cta, barrier)) barrier_release(cta, id);
  }
}

static inline u32 predicate_bits(const u32 *pred) {
  u32 bits = 0;
  for (int i = 0; i < WARP_SIZE; i++) bits |= (u32)(pred[i] != 0) << i;
  return bits;
}

static const Handler *handlers; /* set by ops.c */
static int wgmma_touch(Warp *warp, const Row *row);

/* Run a warp until it blocks, yields, finishes or fails. Returns FAILED or STEP. */
static int run_warp(Warp *warp) {
  Launch *launch = warp->cta->launch;
  const Row *rows = launch->rows;
  u64 *counts = launch->count_rows;
  s64 budget = warp->budget;
  if (warp->regroup && select_group(warp) == FAILED) return FAILED;
  const Row *row = rows + warp->next;
  for (;;) {
    if (row == warp->meet || budget-- <= 0) {
      s32 here = (s32)(row - rows);
      park(warp, warp->active, here);
      if (select_group(warp) == FAILED) return FAILED;
      if (budget < 0) return STEP;
      row = rows + warp->next;
    }
    u32 lanes = warp->active;
    if (row->pred >= 0) {
      u32 bits = predicate_bits((const u32 *)(warp->regs + row->pred));
      lanes &= row->pred_neg ? ~bits : bits;
      if (!lanes) {
        row++;
        continue;
      }
    }
    set_exec(warp, lanes);
    if ((row->reads | row->writes) && launch->check_race && wgmma_touch(warp, row) != STEP) return FAILED;
    if (counts) {
      __atomic_fetch_add(&counts[row - rows], 1, __ATOMIC_RELAXED);
      __atomic_fetch_add(&launch->count_lanes[row - rows], (u64)__builtin_popcount(lanes), __ATOMIC_RELAXED);
    }
    switch (handlers[row->op](warp, row)) {
      case STEP:
        row++;
        continue;
      case JUMPED:
        if (launch->stop) return FAILED; /* a loop may be endless */
        if (!warp->live) {
          warp_finished(warp);
          return STEP;
        }
        if (warp->regroup) {
          int status = select_group(warp);
          if (status != STEP) return status == FAILED ? FAILED : STEP;
        }
        row = rows + warp->next;
        continue;
      case BLOCKED:
        return STEP;
      default:
        return FAILED;
    }
  }
}

static const OpEntry ops_control[] = {
  {"bra", op_bra}, {"brx", op_brx}, {"exit", op_exit}, {"trap", op_trap}, {"nop", op_nop}, {"bar", op_bar}, {0, 0},
};
