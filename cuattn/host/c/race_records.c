/* Where the race checker keeps what it knows of a location: the records of `writes` and `reads`.
 *
 * The location is a granule: the smallest shared access of the kernel, the element of a global array. A line of 16
 * bytes has one record for all its granules as long as every access takes whole lines, as most do; they would all be
 * the same. The first access that takes a part of a line gives each granule of it a record of its own, for good. */
enum { LINE_LOG2 = 4 };

/* Records first to last; record i is that of the location (i - base) << shift. */
typedef struct {
  u64 first, last, base;
  u32 shift;
} Records;

static inline u64 whole_lines(u64 place, u64 bytes) { return !((place | bytes) & ((1u << LINE_LOG2) - 1)); }

/* ---- shared memory: a place is a byte of the CTA's */

#define STAMP_SPLIT (~0ull) /* among the writes of lines: look at the granules */

static inline u32 place_of(Records records, u64 i) { return (u32)((i - records.base) << records.shift); }
static inline Stamp *reads_of(CtaRaces *races, u32 reader) { return races->reads + (size_t)reader * races->num_records; }

static void split_line(CtaRaces *races, u32 line, u32 shift) {
  u32 first = races->num_lines + (line << (LINE_LOG2 - shift)), end = first + (1u << (LINE_LOG2 - shift));
  for (u32 i = first; i < end; i++) races->writes[i] = races->writes[line];
  races->writes[line] = STAMP_SPLIT;
  for (u32 reader = 0; reader < races->num_readers; reader++) {
    Stamp *reads = reads_of(races, reader);
    for (u32 i = first; i < end; i++) reads[i] = reads[line];
  }
}

static Records shared_records(const Cta *cta, u32 offset, u32 bytes) {
  CtaRaces *races = cta->races;
  u32 first = offset >> LINE_LOG2, last = (offset + bytes - 1) >> LINE_LOG2, shift = (u32)cta->launch->smem_granule_log2;
  u64 whole = whole_lines(offset, bytes);
  for (u32 line = first; whole && line <= last; line++) whole = races->writes[line] != STAMP_SPLIT;
  if (whole) return (Records){first, last, 0, LINE_LOG2};
  for (u32 line = first; line <= last; line++)
    if (races->writes[line] != STAMP_SPLIT) split_line(races, line, shift);
  u64 base = races->num_lines;
  return (Records){base + (offset >> shift), base + ((offset + bytes - 1) >> shift), base, shift};
}

/* ---- global memory: a place is an address */

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
