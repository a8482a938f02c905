/* Asynchronous operations in the race checker: accesses of an actor of their own, which are ordered by what completes
 * the operation (a wait for the mbarrier, the bulk group, the wgmma) and not by what their issuer does next.
 *
 * At the issue everything earlier must be ordered before the issuing lane, and what ordinary stores have written must
 * have been fenced for the asynchronous proxy. A write is marked as in flight until it lands. */

static int report_unfenced(Warp *issuer, const Row *row, int lane, u64 address, const char *space, Stamp write, const char *what) {
  char who[96];
  describe_actor(issuer->cta, write, who, sizeof who);
  return fail_pair(issuer, row, lane, FAULT_ASYNC, address, STAMP_ROW(write),
                   "%s %s memory (address 0x%llx) that %s wrote with ordinary stores: no fence.proxy.async lies between the two", what,
                   space, (unsigned long long)address, who);
}

static int check_async_source(Warp *issuer, const Row *row, int lane, u32 place, Stamp write, const char *access, const char *what) {
  if (!write) return STEP;
  if (write & STAMP_PENDING || !ordered(issuer, write, lane)) return report_shared(issuer, row, lane, place, write, access, "a write");
  return fenced(issuer, write, lane) ? STEP : report_unfenced(issuer, row, lane, place, "shared", write, what);
}

/* An operation that will write: nothing may still use the place. */
static int race_async_issue_write(Warp *issuer, const Row *row, int lane, Cta *target, u32 offset, u32 bytes, u32 actor) {
  CtaRaces *races = target->races;
  if (!races || !bytes) return STEP;
  Stamp mine = stamp_of(target->launch, row, actor, *actor_clock(target, actor), (u32)lane) | STAMP_PENDING, passed = 0;
  u32 end = offset + bytes;
  for (u64 readers = races->seen; readers; readers &= readers - 1) {
    Stamp *reads = reads_of(races, (u32)__builtin_ctzll(readers));
    for (u32 place = offset, next; place < end; place = next) {
      Stamp *read = record_for(target, reads, place, offset, end, &next);
      if (*read && *read != passed && !ordered(issuer, *read, lane))
        return report_shared(issuer, row, lane, place_of(target, place), *read, "an asynchronous write", "a read");
      passed = *read;
      *read = 0; /* whoever knows this write knows of the read */
    }
  }
  for (u32 place = offset, next; place < end; place = next) {
    Stamp *write = record_for(target, races->writes, place, offset, end, &next);
    if (*write != passed && check_async_source(issuer, row, lane, place_of(target, place), *write, "an asynchronous write", "an asynchronous operation writes to"))
      return FAILED;
    passed = *write;
    *write = mine;
  }
  return STEP;
}

static int race_async_land_write(Cta *target, const Row *row, Warp *issuer, int lane, u32 offset, u32 bytes, u32 actor) {
  (void)issuer;
  CtaRaces *races = target->races;
  if (!races || !bytes) return STEP;
  set_stamps(target, races->writes, offset, offset + bytes, stamp_of(target->launch, row, actor, *actor_clock(target, actor), (u32)lane));
  return STEP;
}

/* Which of the records of readers an actor uses; actors of a kind share one, the latest read counts. */
static u32 reader_of(const Cta *target, u32 actor) {
  u32 local = actor % actors_per_cta(target), groups = target->num_warps + num_warpgroups(target);
  if (actor / actors_per_cta(target) != target->rank) return target->races->num_readers - 1;
  return local < groups ? local : local < groups + MBARRIER_ACTORS ? groups + 1 : groups;
}

/* What the reads of one operation, or of one instruction's, have in common. */
typedef struct {
  Warp *issuer;
  const Row *row;
  Cta *target;
  Stamp *reads, mine;
  Stamp passed;           /* the last write that was found to be right */
} AsyncReads;

static AsyncReads race_async_reads(Warp *issuer, const Row *row, int lane, Cta *target, u32 actor) {
  if (!target->races) return (AsyncReads){0};
  u32 reader = reader_of(target, actor);
  note_reader_seen(target->races, reader);
  return (AsyncReads){.issuer = issuer, .row = row, .target = target, .reads = reads_of(target->races, reader),
                      .mine = stamp_of(target->launch, row, actor, *actor_clock(target, actor), (u32)lane)};
}

/* An operation reads, from its issue until it completes. */
static int race_async_read(AsyncReads *async, u32 offset, u32 bytes) {
  u32 end = offset + bytes;
  Stamp mine = async->mine;
  if (!async->target) return STEP;
  for (u32 place = offset, next = end; place < end; place = next, next = end) {
    Stamp write = stamp_at(async->target, async->target->races->writes, place, &next);
    if (write == async->passed) continue;
    if (check_async_source(async->issuer, async->row, (int)STAMP_LANE(mine), place_of(async->target, place), write, "an asynchronous read", "an asynchronous operation reads"))
      return FAILED;
    async->passed = write;
  }
  for (u32 place = offset, next; place < end; place = next) {
    Stamp *old = record_for(async->target, async->reads, place, offset, end, &next);
    if (!*old || STAMP_ACTOR(*old) != STAMP_ACTOR(mine) || STAMP_CLOCK(*old) <= STAMP_CLOCK(mine)) *old = mine;
  }
  return STEP;
}
