/* Global memory as a whole warp accesses it: the checks of global_pointer (memory.c), for what almost always passes. A lane
 * that is not surely right goes to global_pointer, as shared_access.c says. */

typedef struct {
  Quick quick;            /* when races are checked */
  const Warp *warp;
  Region *region;         /* of the last lane, or NULL: mostly that of the next one */
  volatile char *stripe;  /* held, or NULL */
  u32 cta, barrier_epoch;
  int alone;              /* nothing of any other CTA is ordered before what this one does */
} GlobalAccess;

static GlobalAccess global_access(const Warp *warp, const Row *row) {
  const Cta *cta = warp->cta;
  GlobalAccess global = {.warp = warp, .cta = cta->index, .barrier_epoch = cta->barrier_epoch};
  if (!cta->races) return global;
  global.quick = quick_of(warp, row);
  global.alone = cta->cluster->size == 1 && !cta->races->foreign;
  return global;
}

/* Lanes of one stripe share a lock. */
static inline void hold_stripe(GlobalAccess *global, volatile char *stripe) {
  if (stripe == global->stripe) return;
  if (global->stripe) unlock(global->stripe);
  if (stripe) lock(stripe);
  global->stripe = stripe;
}

static inline Region *region_of(GlobalAccess *global, u64 address, u32 bytes) {
  Region *region = global->region;
  if (region && address >= region->base && address + bytes <= region->end) return region;
  region = find_region(global->warp->cta->launch, address, bytes);
  if (region) global->region = region;
  return region;
}

static inline int quick_global_write(GlobalAccess *global, const GlobalStamp *write, Stamp mine) {
  return !write->stamp || (write->cta == global->cta && quick_write(&global->quick, write->stamp, mine));
}

/* note_reader, where it needs no closer look. */
static inline int quick_note_reader(const GlobalAccess *global, GlobalStamp *reader, Stamp mine) {
  u32 kind = 0;
  if (reader->stamp && reader->kind_epoch == SEVERAL_CTAS) {
    kind = SEVERAL_CTAS;
  } else if (reader->stamp && reader->cta != global->cta) {
    if (!global->alone) return 0;
    kind = SEVERAL_CTAS;
  } else if (reader->stamp && reader->kind_epoch) {
    kind = global->barrier_epoch + 1;
  } else if (!quick_read(&global->quick, reader->stamp, mine)) {
    if (STAMP_ACTOR(reader->stamp) != global->quick.actor || global->warp->races->pair) return 0;
    kind = global->barrier_epoch + 1; /* another lane of this warp */
  }
  *reader = (GlobalStamp){mine, global->cta, kind};
  return 1;
}

static inline int quick_global_race(GlobalAccess *global, Region *region, u64 address, u32 bytes, u32 lane, Access access) {
  GlobalStamp *writes = region->writes, *reads = region->reads;
  u64 line = (address >> LINE_LOG2) - (region->base >> LINE_LOG2), first = line, last = line;
  Stamp mine = global->quick.mine | lane;
  hold_stripe(global, stripe_of(address));
  if (writes[line].kind_epoch == LINE_IS_SPLIT) {
    u64 base = num_global_lines(region), place = address - region->base;
    first = base + (place >> region->granule_log2);
    last = base + ((place + bytes - 1) >> region->granule_log2);
  } else if (bytes != 1 << LINE_LOG2) {
    return 0;
  }
  for (u64 i = first; i <= last; i++) {
    GlobalStamp *reader = &reads[i];
    if (!quick_global_write(global, &writes[i], mine)) return 0;
    if (access == ACCESS_READ) {
      if (!quick_note_reader(global, reader, mine)) return 0;
      continue;
    }
    if (reader->stamp && (reader->kind_epoch || reader->cta != global->cta || !quick_read(&global->quick, reader->stamp, mine))) return 0;
    writes[i] = (GlobalStamp){mine, global->cta, 0};
  }
  return 1;
}

/* Whether an access of at most sixteen bytes is surely right; then it is noted. */
static inline int quick_global(GlobalAccess *global, u64 address, u32 bytes, u32 lane, Access access) {
  Region *region = region_of(global, address, bytes);
  if (!region || address & (bytes - 1)) return 0;
  u8 *state = region->state ? region->state + (address - region->base) : NULL;
  if (state && !bytes_have(state, bytes, access == ACCESS_READ ? BYTE_READY : BYTE_ADDRESSABLE)) return 0;
  if (region->writes && !quick_global_race(global, region, address, bytes, lane, access)) return 0;
  if (state && access == ACCESS_WRITE) set_bytes(state, BYTE_READY, bytes);
  return 1;
}

/* Host pointers of the lanes of a mask, `bytes` each (a power of two), from their global addresses. */
static int global_pointers(Warp *warp, const Row *row, const u64 *addresses, u32 lanes, u32 bytes, Access access, u8 **pointers) {
  const Launch *launch = warp->cta->launch;
  for (int i = 0; i < WARP_SIZE; i++) pointers[i] = (u8 *)addresses[i];
  if (!global_is_checked(launch, access)) return STEP;
  int quick = bytes <= 1 << LINE_LOG2 && (access == ACCESS_READ || (access == ACCESS_WRITE && !launch->num_read_only));
  GlobalAccess global = global_access(warp, row);
  for (u32 rest = lanes; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    if (quick && quick_global(&global, addresses[lane], bytes, (u32)lane, access)) continue;
    hold_stripe(&global, NULL); /* global_pointer takes it */
    if (global_pointer(warp, row, lane, addresses[lane], bytes, access, &pointers[lane])) return FAILED;
  }
  hold_stripe(&global, NULL);
  return STEP;
}
