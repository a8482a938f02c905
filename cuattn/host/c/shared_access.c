/* Shared memory as a whole warp accesses it: the checks of shared_pointer (memory.c), for what almost always passes.
 *
 * Bounds and alignment are looked at in one vector loop over the lanes. Then each lane, in order, has its records
 * compared with what its warp surely knows (race_quick.c); a lane that is not surely right goes to shared_pointer, which
 * looks at everything and reports. So a fault is found at the same lane, in the same order and with the same words as lane by
 * lane; what was noted of the lane before that is noted again. */

/* What the checks of one instruction have in common. */
typedef struct {
  Quick quick;
  Cta *cta;
  Stamp *writes, *reads;  /* reads: those of this warp */
  u64 readers;            /* those with a read that may not be ordered before a write */
  u8 *state;              /* or NULL: initialisation is not checked */
} SharedAccess;

/* The warps that have read something since what this one knows of them: only their records matter to a write. After a
 * barrier there are none but those that have run before this one. */
static u64 readers_since(const Warp *warp) {
  const CtaRaces *races = warp->cta->races;
  const u32 *order = warp->races->view.order + actor_base(warp->cta);
  u64 since = 0;
  for (u64 rest = races->seen; rest; rest &= rest - 1) {
    u32 reader = (u32)__builtin_ctzll(rest);
    if (reader < warp->cta->num_warps && races->last_read[reader] < (reader == warp->id ? warp->races->full_sync : order[reader])) continue;
    since |= 1ull << reader;
  }
  return since;
}

static SharedAccess shared_access(Warp *warp, const Row *row, Access access) {
  CtaRaces *races = warp->cta->races;
  if (access == ACCESS_READ) note_shared_read(races, warp, warp->id);
  return (SharedAccess){
    .quick = quick_of(warp, row), .cta = warp->cta, .writes = races->writes, .reads = reads_of(races, warp->id),
    .readers = access == ACCESS_WRITE ? readers_since(warp) : 0, .state = warp->cta->smem_state,
  };
}

static inline void quick_note_read(SharedAccess *shared, Stamp *read, Stamp mine) {
  Stamp before = *read ^ mine;
  *read = !(before & STAMP_WHEN) && before & STAMP_LANES ? shared->quick.mine | SEVERAL_LANES : mine;
}

/* What quick_write and quick_read say of all records of an array that an access of at most one line meets. */
static inline int quick_writes(SharedAccess *shared, u32 line, u32 first, u32 last, Stamp mine) {
  if (shared->writes[line] != STAMP_SPLIT) return quick_write(&shared->quick, shared->writes[line], mine);
  for (u32 i = first; i <= last; i++)
    if (!quick_write(&shared->quick, shared->writes[i], mine)) return 0;
  return 1;
}

static inline int quick_reads(SharedAccess *shared, const Stamp *reads, u32 line, u32 first, u32 last, Stamp mine) {
  if (reads[line] != STAMP_SPLIT) return quick_read(&shared->quick, reads[line], mine);
  for (u32 i = first; i <= last; i++)
    if (!quick_read(&shared->quick, reads[i], mine)) return 0;
  return 1;
}

/* Whether an access of at most sixteen bytes, in bounds and aligned, is surely right; then it is noted. */
static inline int quick_shared(SharedAccess *shared, u32 offset, u32 bytes, u32 lane, Access access) {
  CtaRaces *races = shared->cta->races;
  u32 line = offset >> LINE_LOG2, first = granule_at(shared->cta, offset), last = granule_at(shared->cta, offset + bytes - 1);
  int whole = bytes == 1 << LINE_LOG2, split = shared->writes[line] == STAMP_SPLIT;
  Stamp mine = shared->quick.mine | lane;
  if (split && shared->cta->mbarriers.count) return 0; /* one may live here */
  if (!quick_writes(shared, line, first, last, mine)) return 0;
  if (access == ACCESS_READ) {
    Stamp *reads = shared->reads;
    /* A line in one piece has been written as a whole, if at all. */
    if (shared->state && !(split ? bytes_ready(shared->state + offset, bytes) : shared->writes[line] != 0)) return 0;
    if (whole && reads[line] != STAMP_SPLIT) {
      quick_note_read(shared, &reads[line], mine);
      return 1;
    }
    for (u32 place = offset, next; place < offset + bytes; place = next)
      quick_note_read(shared, record_for(shared->cta, reads, place, offset, offset + bytes, &next), mine);
    return 1;
  }
  for (u64 readers = shared->readers; readers; readers &= readers - 1)
    if (!quick_reads(shared, reads_of(races, (u32)__builtin_ctzll(readers)), line, first, last, mine)) return 0;
  if (whole) shared->writes[line] = mine;
  else set_stamps(shared->cta, shared->writes, offset, offset + bytes, mine);
  if (shared->state) set_bytes(shared->state + offset, BYTE_READY, bytes);
  return 1;
}

/* Whether bounds and alignment are all that there is to check. */
static inline int shared_is_unchecked(const Cta *cta) { return !cta->races && !cta->smem_state && !(cta->launch->check_mem && cta->mbarriers.count); }

/* Host pointers of the lanes of a mask, `bytes` each (a power of two), from their shared addresses. */
static int shared_pointers(Warp *warp, const Row *row, const u64 *addresses, u32 lanes, u32 bytes, Access access, u8 **pointers) {
  Cta *cta = warp->cta;
  const Launch *launch = cta->launch;
  u32 wrong = launch->smem_bytes < bytes;
  IVDEP for (int i = 0; i < WARP_SIZE; i++) {
    u64 offset = addresses[i] - SHARED_BASE;
    pointers[i] = cta->smem + offset;
    wrong |= (lanes >> i & 1) & (u32)((offset > launch->smem_bytes - bytes) | ((offset & (bytes - 1)) != 0));
  }
  if (!wrong && shared_is_unchecked(cta)) return STEP;
  int quick = !wrong && cta->races && bytes <= 1 << LINE_LOG2 && (access == ACCESS_READ || access == ACCESS_WRITE);
  SharedAccess shared;
  if (quick) shared = shared_access(warp, row, access);
  for (u32 rest = lanes; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    if (quick && quick_shared(&shared, (u32)(addresses[lane] - SHARED_BASE), bytes, (u32)lane, access)) continue;
    if (shared_pointer(warp, row, lane, addresses[lane], bytes, access, &pointers[lane])) return FAILED;
  }
  return STEP;
}
