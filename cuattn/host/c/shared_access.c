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
  int written;            /* the state of what a write has written */
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

/* pending: 0, or STAMP_PENDING for a write that is only issued. */
static SharedAccess shared_access(Warp *warp, const Row *row, Access access, Stamp pending) {
  CtaRaces *races = warp->cta->races;
  if (access == ACCESS_READ) note_shared_read(races, warp, warp->id);
  return (SharedAccess){
    .quick = quick_of(warp, row, pending), .cta = warp->cta, .writes = races->writes, .reads = reads_of(races, warp->id),
    .readers = access == ACCESS_WRITE ? readers_since(warp) : 0, .state = warp->cta->smem_state,
    .written = pending ? BYTE_ADDRESSABLE : BYTE_READY,
  };
}

static inline int quick_shared_read(SharedAccess *shared, u32 record, u32 lane) {
  Stamp mine = shared->quick.mine | lane, *read = &shared->reads[record], before = *read ^ mine;
  if (!quick_write(&shared->quick, shared->writes[record], mine)) return 0;
  *read = !(before & STAMP_WHEN) && before & STAMP_LANES ? shared->quick.mine | SEVERAL_LANES : mine;
  return 1;
}

static inline int quick_shared_write(SharedAccess *shared, u32 record, u32 lane) {
  Stamp mine = shared->quick.mine | lane;
  if (!quick_write(&shared->quick, shared->writes[record], mine)) return 0;
  for (u64 readers = shared->readers; readers; readers &= readers - 1)
    if (!quick_read(&shared->quick, reads_of(shared->cta->races, (u32)__builtin_ctzll(readers))[record], mine)) return 0;
  shared->writes[record] = mine;
  return 1;
}

/* Whether an access of at most sixteen bytes, in bounds and aligned, is surely right; then it is noted. */
static inline int quick_shared(SharedAccess *shared, u32 offset, u32 bytes, u32 lane, Access access) {
  const CtaRaces *races = shared->cta->races;
  u32 line = offset >> LINE_LOG2, first = line, last = line;
  if (races->writes[line] == STAMP_SPLIT) {
    u32 shift = (u32)shared->cta->launch->smem_granule_log2;
    if (shared->cta->mbarriers.count) return 0; /* one may live here */
    if (access == ACCESS_READ && shared->state && !bytes_ready(shared->state + offset, bytes)) return 0;
    first = races->num_lines + (offset >> shift);
    last = races->num_lines + ((offset + bytes - 1) >> shift);
  } else {
    /* A line in one piece has only seen accesses of all of it: if it has been written, it is initialised, and no
     * mbarrier lives there. */
    if (bytes != 1 << LINE_LOG2) return 0;
    if (access == ACCESS_READ && shared->state && !races->writes[line]) return 0;
  }
  for (u32 record = first; record <= last; record++)
    if (!(access == ACCESS_READ ? quick_shared_read(shared, record, lane) : quick_shared_write(shared, record, lane))) return 0;
  if (access == ACCESS_WRITE && shared->state) set_bytes(shared->state + offset, (u8)shared->written, bytes);
  return 1;
}

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
  if (!wrong && !cta->races && !cta->smem_state && !(launch->check_mem && cta->mbarriers.count)) return STEP;
  int quick = !wrong && cta->races && bytes <= 1 << LINE_LOG2 && (access == ACCESS_READ || access == ACCESS_WRITE);
  SharedAccess shared;
  if (quick) shared = shared_access(warp, row, access, 0);
  for (u32 rest = lanes; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    if (quick && quick_shared(&shared, (u32)(addresses[lane] - SHARED_BASE), bytes, (u32)lane, access)) continue;
    if (shared_pointer(warp, row, lane, addresses[lane], bytes, access, &pointers[lane])) return FAILED;
  }
  return STEP;
}
