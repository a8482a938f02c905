/* Instructions in which the lanes of a warp work together: shuffles, votes, matches, reductions. */

#define COLLECTIVE(mask_operand)                                              \
  u32 member_mask = SLOT(u32, mask_operand)[__builtin_ctz(warp->exec)];       \
  REQUIRE_LANES(warp, row, member_mask);                                      \
  if (~member_mask & warp->exec)                                              \
    return fail(warp, row, __builtin_ctz(~member_mask & warp->exec), FAULT_DIVERGENCE, 0,            \
                "a lane executes a warp-level instruction whose member mask %08x does not name it", member_mask); \
  if (warp->cta->races) race_warp_sync(warp, member_mask)

enum { SHFL_UP, SHFL_DOWN, SHFL_BFLY, SHFL_IDX };

/* a: dst, predicate destination, value, offset, clamp, member mask. flags: SHFL_*, 8: the predicate is wanted */
static int op_shfl(Warp *warp, const Row *row) {
  COLLECTIVE(5);
  const u32 *value = SLOT(u32, 2), *offset = SLOT(u32, 3), *clamp = SLOT(u32, 4);
  u32 result[WARP_SIZE], inside[WARP_SIZE];
  s32 from[WARP_SIZE];
  /* One loop for each kind, so that the compiler vectorises them. */
#define SHUFFLE(FROM, INSIDE)                                                 \
  IVDEP for (int i = 0; i < WARP_SIZE; i++) {                                 \
    int by = (int)(offset[i] & 31), segment = (int)((clamp[i] >> 8) & 31), min_lane = i & segment; \
    int max_lane = min_lane | ((int)(clamp[i] & 31) & ~segment), source = (FROM); \
    inside[i] = (INSIDE);                                                     \
    from[i] = ((INSIDE) ? source : i) & 31;                                   \
  }
  switch (row->flags & 3) {
    case SHFL_UP: SHUFFLE(i - by, source >= max_lane) break;
    case SHFL_DOWN: SHUFFLE(i + by, source <= max_lane) break;
    case SHFL_BFLY: SHUFFLE(i ^ by, source <= max_lane) break;
    default: SHUFFLE(min_lane | (by & ~segment), source <= max_lane) break;
  }
#undef SHUFFLE
  for (u32 rest = warp->exec == ALL_LANES ? 0 : warp->exec; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    if (!(warp->exec >> from[lane] & 1))
      return fail(warp, row, lane, FAULT_DIVERGENCE, 0, "shfl reads lane %d, which does not take part", from[lane]);
  }
  IVDEP for (int i = 0; i < WARP_SIZE; i++) result[i] = value[from[i]];
  u32 *dst = SLOT(u32, 0), *pred = SLOT(u32, 1);
  EXECUTING_LANES(dst[lane] = result[lane]);
  if (row->flags & 8) EXECUTING_LANES(pred[lane] = inside[lane]);
  return STEP;
}

enum { VOTE_ALL, VOTE_ANY, VOTE_UNI, VOTE_BALLOT };

/* a: dst, predicate, member mask. flags: VOTE_*, 8: the predicate is negated */
static int op_vote(Warp *warp, const Row *row) {
  COLLECTIVE(2);
  u32 bits = predicate_bits(SLOT(u32, 1));
  if (row->flags & 8) bits = ~bits;
  bits &= warp->exec;
  u32 result = 0;
  switch (row->flags & 3) {
    case VOTE_ALL: result = bits == warp->exec; break;
    case VOTE_ANY: result = bits != 0; break;
    case VOTE_UNI: result = bits == 0 || bits == warp->exec; break;
    default: result = bits;
  }
  EACH_LANE(u32, (result + 0 * (u32)i));
}

/* a: dst, predicate destination, value, member mask. flags: 1 all (else any), 2 the value is 64 bits wide, 8 predicate wanted */
static int op_match(Warp *warp, const Row *row) {
  COLLECTIVE(3);
  u64 value[WARP_SIZE];
  for (int i = 0; i < WARP_SIZE; i++) value[i] = row->flags & 2 ? SLOT(u64, 2)[i] : SLOT(u32, 2)[i];
  u32 *dst = SLOT(u32, 0), *pred = SLOT(u32, 1);
  for (u32 rest = warp->exec; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    u32 same = 0;
    for (u32 others = warp->exec; others; others &= others - 1) {
      int other = __builtin_ctz(others);
      same |= (u32)(value[other] == value[lane]) << other;
    }
    u32 all = same == warp->exec;
    dst[lane] = row->flags & 1 ? (all ? same : 0) : same;
    if (row->flags & 8) pred[lane] = all;
  }
  return STEP;
}

enum { REDUX_ADD, REDUX_MIN_U, REDUX_MAX_U, REDUX_MIN_S, REDUX_MAX_S, REDUX_AND, REDUX_OR, REDUX_XOR };

/* a: dst, value, member mask. flags: REDUX_* */
static int op_redux(Warp *warp, const Row *row) {
  COLLECTIVE(2);
  const u32 *value = SLOT(u32, 1);
  u32 result = value[__builtin_ctz(warp->exec)];
  for (u32 rest = warp->exec & (warp->exec - 1); rest; rest &= rest - 1) {
    u32 x = value[__builtin_ctz(rest)];
    switch (row->flags) {
      case REDUX_ADD: result += x; break;
      case REDUX_MIN_U: result = x < result ? x : result; break;
      case REDUX_MAX_U: result = x > result ? x : result; break;
      case REDUX_MIN_S: result = (s32)x < (s32)result ? x : result; break;
      case REDUX_MAX_S: result = (s32)x > (s32)result ? x : result; break;
      case REDUX_AND: result &= x; break;
      case REDUX_OR: result |= x; break;
      default: result ^= x;
    }
  }
  EACH_LANE(u32, (result + 0 * (u32)i));
}

/* a: member mask */
static int op_warp_sync(Warp *warp, const Row *row) {
  COLLECTIVE(0);
  return STEP;
}

static int op_activemask(Warp *warp, const Row *row) {
  u32 bits = warp->exec;
  EACH_LANE(u32, (bits + 0 * (u32)i));
}

/* elect.sync: a: dst (the elected lane), predicate destination, member mask. flags 8: dst wanted */
static int op_elect(Warp *warp, const Row *row) {
  COLLECTIVE(2);
  u32 leader = (u32)__builtin_ctz(member_mask & warp->exec);
  u32 *dst = SLOT(u32, 0), *pred = SLOT(u32, 1);
  for (u32 rest = warp->exec; rest; rest &= rest - 1) {
    u32 lane = (u32)__builtin_ctz(rest);
    if (row->flags & 8) dst[lane] = leader;
    pred[lane] = lane == leader;
  }
  return STEP;
}

static const OpEntry ops_collective[] = {
  {"shfl", op_shfl}, {"vote", op_vote}, {"match", op_match}, {"redux", op_redux}, {"warp_sync", op_warp_sync},
  {"activemask", op_activemask}, {"elect", op_elect}, {0, 0},
};
