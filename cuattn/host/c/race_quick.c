/* The race checker's short cut: what is surely ordered, for any lane of the warp, by one comparison of clocks.
 *
 * "No" means only that it has to be looked at closely. What an instruction of a warp compares with is gathered once for
 * its lanes, and a stamp of the same actor and clock as the last one that passed needs no look at the clocks at all: the
 * tile that a warp reads was mostly written in few such steps. */

typedef struct {
  const u32 *order;       /* what the warp knows of other actors */
  u32 actor, full_sync;   /* its own, and what all its lanes know of each other */
  Stamp mine;             /* of the instruction, but for the lane */
  Stamp passed;           /* a write that was found to be ordered; first one that cannot be */
} Quick;

#define STAMP_WHEN (~0ull << 38 | 0xfffull << 8) /* clock and actor: what decides whether a stamp is ordered */
#define STAMP_LANES 63ull
#define STAMP_WHO (0xfffull << 8 | STAMP_LANES)  /* actor and lane */

static Quick quick_of(const Warp *warp, const Row *row) {
  return (Quick){.order = warp->races->view.order, .actor = warp_actor(warp), .full_sync = warp->races->full_sync,
                 .mine = make_stamp(warp, row, 0), .passed = STAMP_PENDING};
}

static inline int surely_ordered(const Quick *quick, Stamp stamp) {
  u32 actor = STAMP_ACTOR(stamp);
  return STAMP_CLOCK(stamp) < (actor == quick->actor ? quick->full_sync : quick->order[actor]);
}

/* A write in flight is never ordered. */
static inline int quick_write(Quick *quick, Stamp write, Stamp mine) {
  if (!write || !((write ^ quick->passed) & (STAMP_WHEN | STAMP_PENDING))) return 1;
  if (write & STAMP_PENDING) return 0;
  if (!surely_ordered(quick, write)) return !((write ^ mine) & STAMP_WHO);
  quick->passed = write;
  return 1;
}

static inline int quick_read(const Quick *quick, Stamp read, Stamp mine) {
  return !read || !((read ^ mine) & STAMP_WHO) || surely_ordered(quick, read);
}
