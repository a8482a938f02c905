/* Where the race checker keeps what it knows of a location: the records of `writes` and `reads`.
 *
 * The location is a granule: the smallest shared access of the kernel, the element of a global array. A line of 16
 * bytes has one record for all its granules as long as every access takes whole lines, as most do; they would all be
 * the same. The first access that takes a part of a line gives each granule of it a record of its own. */
enum { LINE_LOG2 = 4 };

static inline u64 whole_lines(u64 place, u64 bytes) { return !((place | bytes) & ((1u << LINE_LOG2) - 1)); }

/* ---- shared memory: a place is a byte of the CTA's
 *
 * The writes, and the reads of each reader, are an array each: records of lines, then those of granules. Each array
 * splits its lines by itself: that one warp reads a tile in parts does not concern what others know of it. */

#define STAMP_SPLIT (~0ull) /* the record of a line: look at the granules */

static inline Stamp *reads_of(CtaRaces *races, u32 reader) { return races->reads + (size_t)reader * races->num_records; }
static inline u32 granule_at(const Cta *cta, u32 place) { return cta->races->num_lines + (place >> cta->launch->smem_granule_log2); }

/* A reader reads for the first time in this CTA. */
static inline void note_reader_seen(CtaRaces *races, u32 reader) {
  if (races->seen >> reader & 1) return;
  memset(reads_of(races, reader), 0, races->num_lines * sizeof(Stamp));
  races->seen |= 1ull << reader;
}

/* The stamp at a place. It holds until `next`, which is lowered if need be. */
static inline Stamp stamp_at(const Cta *cta, const Stamp *array, u32 place, u32 *next) {
  Stamp stamp = array[place >> LINE_LOG2];
  u32 log2 = stamp == STAMP_SPLIT ? (u32)cta->launch->smem_granule_log2 : LINE_LOG2, end = ((place >> log2) + 1) << log2;
  if (end < *next) *next = end;
  return stamp == STAMP_SPLIT ? array[granule_at(cta, place)] : stamp;
}

/* The record of a place in an access of bytes [from, to): that of its line, if the access takes all of it or none has
 * been split; else of the granule. */
static inline Stamp *record_for(const Cta *cta, Stamp *array, u32 place, u32 from, u32 to, u32 *next) {
  Stamp *line = &array[place >> LINE_LOG2];
  u32 start = place >> LINE_LOG2 << LINE_LOG2, end = start + (1u << LINE_LOG2);
  if (*line != STAMP_SPLIT && (start < from || end > to)) {
    for (u32 i = granule_at(cta, start); i < granule_at(cta, end); i++) array[i] = *line;
    *line = STAMP_SPLIT;
  }
  if (*line != STAMP_SPLIT) {
    *next = end;
    return line;
  }
  *next = ((place >> cta->launch->smem_granule_log2) + 1) << cta->launch->smem_granule_log2;
  return &array[granule_at(cta, place)];
}

/* The same stamp for all of [from, to): a line that is taken whole has one record again. */
static inline void set_stamps(const Cta *cta, Stamp *array, u32 from, u32 to, Stamp stamp) {
  if (whole_lines(from, to)) {
    for (u32 line = from >> LINE_LOG2; line < to >> LINE_LOG2; line++) array[line] = stamp;
    return;
  }
  for (u32 place = from, next; place < to; place = next) {
    u32 start = place >> LINE_LOG2 << LINE_LOG2;
    next = start + (1u << LINE_LOG2);
    if (start < from || next > to) *record_for(cta, array, place, from, to, &next) = stamp;
    else array[place >> LINE_LOG2] = stamp;
  }
}

/* ---- global memory: a place is an address */

/* Records first to last; record i is that of the location (i - base) << shift. */
typedef struct {
  u64 first, last, base;
  u32 shift;
} Records;

/* A stamp with its CTA; for readers it may stand for several. */
typedef struct {
  Stamp stamp;
  u32 cta;                /* linear index */
  u32 kind_epoch;         /* readers only: 0 one thread, SEVERAL_CTAS, or 1 + the barrier epoch: several warps of `cta` */
} GlobalStamp;
#define SEVERAL_CTAS 0xffffffffu
#define LINE_IS_SPLIT 0xfffffffeu /* kind_epoch of the write of a line */

static inline u64 num_global_lines(const Region *region) { return ((region->end - 1) >> LINE_LOG2) - (region->base >> LINE_LOG2) + 1; }

/* Granules are counted from the region's first byte, which may lie inside a line. */
static void split_global_line(Region *region, u64 line) {
  GlobalStamp *writes = region->writes, *reads = region->reads;
  u64 start = ((region->base >> LINE_LOG2) + line) << LINE_LOG2, end = start + (1u << LINE_LOG2);
  u64 first = start < region->base ? 0 : (start - region->base) >> region->granule_log2;
  u64 last = ((end < region->end ? end : region->end) - 1 - region->base) >> region->granule_log2;
  for (u64 i = num_global_lines(region) + first; i <= num_global_lines(region) + last; i++) writes[i] = writes[line], reads[i] = reads[line];
  writes[line].kind_epoch = LINE_IS_SPLIT;
}

static Records global_records(Region *region, u64 address, u32 bytes) {
  const GlobalStamp *writes = region->writes;
  u64 origin = region->base >> LINE_LOG2, first = (address >> LINE_LOG2) - origin, last = ((address + bytes - 1) >> LINE_LOG2) - origin;
  u64 whole = whole_lines(address, bytes), base = num_global_lines(region), shift = (u64)region->granule_log2;
  for (u64 line = first; whole && line <= last; line++) whole = writes[line].kind_epoch != LINE_IS_SPLIT;
  if (whole) return (Records){first, last, 0, LINE_LOG2};
  for (u64 line = first; line <= last; line++)
    if (writes[line].kind_epoch != LINE_IS_SPLIT) split_global_line(region, line);
  return (Records){base + ((address - region->base) >> shift), base + ((address + bytes - 1 - region->base) >> shift), base, (u32)shift};
}

static inline u64 global_place_of(const Region *region, Records records, u64 i) {
  u64 origin = records.base ? region->base : region->base >> LINE_LOG2 << LINE_LOG2;
  return origin + ((i - records.base) << records.shift);
}
