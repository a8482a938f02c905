/* wgmma: asynchronous matrix products of a warpgroup.
 *
 * Issue takes what the registers hold (accumulators into the chain's tile, A's fragments) and leaves poison. The
 * product reads shared memory when it is carried out: as late as a wait allows, at a random moment, or as soon as all
 * four warps have committed. A warp's accumulators come back when it waits. */
#include "wgmma_types.h"

#include "wgmma_operand.c"
#include "wgmma_pack.c"
#include "wgmma_product.c"
#include "wgmma_registers.c"

static inline WgmmaQueue *leader_queue(const Warp *warp) { return warp->cta->warps[warp->id - warp->id % WARPGROUP].wgmma; }
static inline WgmmaOp *op_number(WgmmaGroup *group, u32 number) { return &group->ops[(number - group->origin) % MAX_IN_FLIGHT]; }
static inline Warp *warp_of_group(const Warp *warp, u32 i) { return &warp->cta->warps[warp->id - warp->id % WARPGROUP + i]; }

#include "wgmma_rules.c"

/* ---- carrying out */

/* Carry out the operations before number `end`, consecutive ones on one chain together. */
static int wgmma_execute(Warp *warp, WgmmaGroup *group, u32 end) {
  u64 done[MAX_IN_FLIGHT / 64] = {0};
  for (u32 first = group->executed; first < end; first++) {
    u32 place = first - group->executed;
    if (done[place / 64] >> place % 64 & 1) continue;
    WgmmaOp *run[MAX_IN_FLIGHT], *head = op_number(group, first);
    const int flags = head->row->flags, alone = WGMMA_TYPE_D(flags) == WGMMA_TO_F16 || flags & WGMMA_SATURATE;
    const u32 most = alone ? 1 : MAX_K * wgmma_element_bytes(WGMMA_TYPE_A(flags)) / (2 * CHUNK);
    u32 count = 0;
    for (u32 number = first; number < end && count < most; number++) {
      WgmmaOp *op = op_number(group, number);
      if (op->chain != head->chain) continue;
      if (count && (!op->scale_d || (op->row->flags ^ flags) & 0x3f)) break;
      place = number - group->executed;
      done[place / 64] |= 1ull << place % 64;
      run[count++] = op;
    }
    if (wgmma_run(warp, run, count, leader_queue(warp)->packed)) return FAILED;
  }
  group->executed = end;
  return STEP;
}

/* Show the results of what has been carried out to warps that have not waited yet. */
static void wgmma_show(Warp *warp, WgmmaGroup *group) {
  for (u32 c = 0; c < group->num_chains; c++)
    for (u32 i = 0; i < WARPGROUP; i++)
      if (group->chains[c]->pending[i]) store_accumulators(warp_of_group(warp, i), group->chains[c]);
}

static u32 groups_of_all(const Warp *warp) {
  u32 least = UINT32_MAX;
  for (u32 i = 0; i < WARPGROUP; i++) {
    u32 committed = warp_of_group(warp, i)->wgmma->committed;
    if (committed < least) least = committed;
  }
  return least;
}

static int wgmma_execute_groups(Warp *warp, WgmmaGroup *group, u32 groups) {
  u32 end = groups ? group->ends[(groups - 1) % MAX_IN_FLIGHT] : 0;
  return groups && end > group->executed ? wgmma_execute(warp, group, end) : STEP;
}

/* ---- issue */

/* The value of a register that all lanes must agree on. */
static int uniform_u64(Warp *warp, const Row *row, int operand, u64 *value) {
  const u64 *lanes = SLOT(u64, operand);
  for (int i = 1; i < WARP_SIZE; i++)
    if (lanes[i] != lanes[0])
      return fail(warp, row, i, FAULT_DIVERGENCE, 0, "the lanes of a warp give wgmma different matrix descriptors: 0x%llx and 0x%llx",
                  (unsigned long long)lanes[0], (unsigned long long)lanes[i]);
  *value = lanes[0];
  return STEP;
}

static WgmmaChain *find_chain(WgmmaGroup *group, const Row *row, const s32 *slots) {
  const u32 num_slots = wgmma_accumulators(row->flags);
  WgmmaChain *unused = NULL;
  for (u32 i = 0; i < group->num_chains; i++) {
    WgmmaChain *chain = group->chains[i];
    u32 pending = 0;
    for (u32 w = 0; w < WARPGROUP; w++) pending |= chain->pending[w];
    if (!pending) unused = chain;
    else if (chain->shape == WGMMA_SHAPE_D(row->flags) && !memcmp(chain->slots, slots, num_slots * sizeof *slots)) return chain;
  }
  if (!unused) {
    group->chains = realloc(group->chains, (group->num_chains + 1) * sizeof *group->chains);
    unused = group->chains[group->num_chains++] = calloc(1, sizeof *unused);
    unused->tile = zeroed(WGMMA_M * TILE_LD * sizeof *unused->tile);
  }
  unused->slots = slots;
  unused->num_slots = num_slots;
  unused->shape = WGMMA_SHAPE_D(row->flags);
  return unused;
}

/* The operation that the warp issues: a new one, or the one that another warp of the four has issued in this place. */
static int claim_op(Warp *warp, const Row *row, WgmmaGroup *group, u64 a, u64 b, u32 scale_d, WgmmaOp **claimed) {
  WgmmaQueue *queue = warp->wgmma;
  u32 number = queue->issued, oldest = number;
  for (u32 i = 0; i < WARPGROUP; i++) {
    u32 retired = warp_of_group(warp, i)->wgmma->retired;
    if (retired < oldest) oldest = retired;
  }
  if (oldest == group->num_ops) group->origin = group->num_ops; /* nothing in flight: use the same memory again */
  if (number - oldest >= MAX_IN_FLIGHT)
    return fail(warp, row, 0, FAULT_INTERNAL, 0, "more than %d wgmma between issue and wait: the host executor keeps no more", MAX_IN_FLIGHT);
  WgmmaOp *op = *claimed = op_number(group, number);
  if (number == group->num_ops) {
    group->num_ops++;
    op->row = row, op->a = a, op->b = b, op->scale_d = scale_d, op->issued = 0;
    op->chain = find_chain(group, row, warp->cta->launch->side + row->a[WGMMA_AT_SIDE]);
  } else if (op->row != row || op->a != a || op->b != b || op->scale_d != scale_d) {
    return fail_pair(warp, row, 0, FAULT_DIVERGENCE, 0, (s32)(op->row - warp->cta->launch->rows),
                     "the warps of a warpgroup must execute the same wgmma with the same descriptors and scale-d; warp %u and an earlier one differ", warp->id);
  }
  return STEP;
}

static int wgmma_start(Warp *warp, const Row *row) {
  if (warp->wgmma->group) return STEP;
  if ((warp->id | (WARPGROUP - 1)) >= warp->cta->num_warps)
    return fail(warp, row, 0, FAULT_DIVERGENCE, 0, "wgmma needs a warpgroup of %d warps, aligned; the CTA has %u", WARPGROUP, warp->cta->num_warps);
  WgmmaQueue *leader = leader_queue(warp);
  if (!leader->group) {
    leader->group = uncleared(sizeof *leader->group);
    memset(leader->group, 0, offsetof(WgmmaGroup, ops)); /* the operations are filled as they are issued */
    leader->packed = uncleared((PACKED_A + PACKED_B + PACKED_SUMS) * sizeof *leader->packed);
    memset(leader->packed, 0, (PACKED_A + PACKED_B) * sizeof *leader->packed);
    wgmma_fill_tables();
  }
  warp->wgmma->group = leader->group;
  return STEP;
}

#define WGMMA_PROLOGUE                                                        \
  REQUIRE_LANES(warp, row, ALL_LANES);                                        \
  if (warp->exec != ALL_LANES)                                                \
    return fail(warp, row, -1, FAULT_DIVERGENCE, 0, "wgmma needs all 32 lanes of a warp; %08x take part", warp->exec); \
  if (warp->cta->races) race_warp_sync(warp, ALL_LANES);                      \
  if (wgmma_start(warp, row)) return FAILED;                                  \
  WgmmaQueue *queue = warp->wgmma;                                            \
  WgmmaGroup *group = queue->group;                                           \
  const Launch *launch = warp->cta->launch;                                   \
  (void)launch, (void)group

static int op_wgmma(Warp *warp, const Row *row) {
  WGMMA_PROLOGUE;
  const int flags = row->flags;
  const u32 me = warp->id % WARPGROUP;
  u64 a = 0, b = 0;
  if (!(flags & WGMMA_A_REGISTERS) && uniform_u64(warp, row, WGMMA_AT_A, &a)) return FAILED;
  if (uniform_u64(warp, row, WGMMA_AT_B, &b)) return FAILED;
  u32 scale_d = predicate_bits(SLOT(u32, WGMMA_AT_SCALE));
  if (scale_d && scale_d != ALL_LANES) return fail(warp, row, 0, FAULT_DIVERGENCE, 0, "the lanes of a warp disagree on wgmma's scale-d: %08x", scale_d);
  if (launch->check_race && wgmma_check_registers(warp, row)) return FAILED;
  if ((launch->check_mem | launch->check_init | launch->check_race) && wgmma_check_shared(warp, row, a, b)) return FAILED;
  WgmmaOp *op = NULL;
  if (claim_op(warp, row, group, a, b, scale_d & 1, &op)) return FAILED;
  WgmmaChain *chain = op->chain;
  if (!chain->pending[me] && scale_d) load_accumulators(warp, chain);
  if (launch->async_mode == ASYNC_RANDOM || (launch->async_mode == ASYNC_LATE && !chain->pending[me])) poison_accumulators(warp, chain);
  if (flags & WGMMA_A_REGISTERS) copy_fragments(warp, row, op);
  chain->pending[me]++;
  op->issued |= 1u << me;
  queue->issued++;
  if (launch->check_race) wgmma_note_registers(warp, row);
  return STEP;
}

/* ---- fence, commit, wait */

static int op_wgmma_fence(Warp *warp, const Row *row) {
  WGMMA_PROLOGUE;
  queue->fences++;
  return STEP;
}

static int op_wgmma_commit(Warp *warp, const Row *row) {
  WGMMA_PROLOGUE;
  u32 number = queue->committed, *end = &group->ends[number % MAX_IN_FLIGHT];
  for (u32 i = 0; i < WARPGROUP; i++)
    if (number - warp_of_group(warp, i)->wgmma->waited >= MAX_IN_FLIGHT)
      return fail(warp, row, 0, FAULT_INTERNAL, 0, "more than %d wgmma groups between commit and wait: the host executor keeps no more", MAX_IN_FLIGHT);
  if (number == group->num_groups) {
    *end = queue->issued;
    group->num_groups++;
  } else if (*end != queue->issued) {
    return fail(warp, row, 0, FAULT_DIVERGENCE, 0, "the warps of a warpgroup commit different wgmma: group %u ends after %u of them here, elsewhere after %u",
                number, queue->issued, *end);
  }
  queue->committed++;
  if (launch->async_mode == ASYNC_EAGER || (launch->async_mode == ASYNC_RANDOM && next_random(&warp->cta->random) % 2)) {
    if (wgmma_execute_groups(warp, group, groups_of_all(warp))) return FAILED;
    if (launch->async_mode == ASYNC_EAGER || next_random(&warp->cta->random) % 2) wgmma_show(warp, group);
  }
  for (u32 i = 0; i < WARPGROUP; i++)
    if (warp_of_group(warp, i)->state == AT_WGMMA) wake(warp_of_group(warp, i));
  return STEP;
}

/* a: how many of the latest groups may stay in flight */
static int op_wgmma_wait(Warp *warp, const Row *row) {
  WGMMA_PROLOGUE;
  const u32 me = warp->id % WARPGROUP;
  u32 groups = queue->committed < (u32)row->a[0] ? 0 : queue->committed - (u32)row->a[0];
  if (groups <= queue->waited) return STEP;
  if (groups_of_all(warp) < groups) return block_warp(warp, row, AT_WGMMA);
  if (wgmma_execute_groups(warp, group, groups)) return FAILED;
  u32 end = group->ends[(groups - 1) % MAX_IN_FLIGHT];
  for (; queue->retired < end; queue->retired++) {
    WgmmaChain *chain = op_number(group, queue->retired)->chain;
    if (--chain->pending[me] == 0) store_accumulators(warp, chain);
  }
  queue->waited = groups;
  if (warp->cta->races) race_acquire_actor_until(warp, -1, actor_of_warpgroup(warp->cta, warp->id), groups + 1);
  return STEP;
}

/* ---- life */

static WgmmaQueue *wgmma_new(Warp *warp) {
  (void)warp;
  return zeroed(sizeof(WgmmaQueue));
}

static void wgmma_reset(Warp *warp) {
  WgmmaQueue *queue = warp->wgmma;
  WgmmaGroup *group = queue->group;
  queue->issued = queue->retired = queue->committed = queue->waited = queue->fences = 0;
  if (queue->num_slots) memset(queue->accumulator_until, 0, 4 * queue->num_slots * sizeof(u32));
  if (!group || warp->id % WARPGROUP) return;
  group->origin = group->num_ops = group->num_groups = group->executed = 0;
  for (u32 i = 0; i < group->num_chains; i++) memset(group->chains[i]->pending, 0, sizeof group->chains[i]->pending);
}

static void wgmma_free(Warp *warp) {
  WgmmaQueue *queue = warp->wgmma;
  WgmmaGroup *group = queue->group;
  if (group && warp->id % WARPGROUP == 0) {
    for (u32 i = 0; i < group->num_chains; i++) {
      free(group->chains[i]->tile);
      free(group->chains[i]);
    }
    free(group->chains);
    free(group);
    free(queue->packed);
  }
  free(queue->accumulator_until);
  free(queue);
}

/* A CTA has ended: nothing may be in flight. */
static int wgmma_check_exit(Cta *cta) {
  for (u32 i = 0; i < cta->num_warps; i++) {
    Warp *warp = &cta->warps[i];
    const WgmmaQueue *queue = warp->wgmma;
    if (!queue->group || queue->retired == queue->issued) continue;
    const WgmmaOp *op = op_number(queue->group, queue->retired);
    return fail(warp, op->row, 0, FAULT_ASYNC, 0, "warp %u has ended with %u wgmma that it never waited for", i, queue->issued - queue->retired);
  }
  return STEP;
}

/* What a warp AT_WGMMA waits for, in words; returns the length, as snprintf. */
static int wgmma_describe(const Warp *warp, char *text, size_t size) {
  u32 late = 0;
  for (u32 i = 0; i < WARPGROUP; i++)
    if (warp_of_group(warp, i)->wgmma->committed < warp->wgmma->committed) late |= 1u << i;
  int length = snprintf(text, size, "wgmma group %u, not committed by warp", warp->wgmma->waited);
  for (u32 i = 0; i < WARPGROUP; i++)
    if (late >> i & 1) length += snprintf(text + ((size_t)length < size ? (size_t)length : size), (size_t)length < size ? size - (size_t)length : 0, " %u", warp_of_group(warp, i)->id);
  return length;
}

static const OpEntry ops_wgmma[] = {
  {"wgmma", op_wgmma}, {"wgmma_fence", op_wgmma_fence}, {"wgmma_commit", op_wgmma_commit}, {"wgmma_wait", op_wgmma_wait}, {0, 0},
};
