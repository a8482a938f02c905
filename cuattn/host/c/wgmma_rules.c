/* What wgmma forbids, looked at by the race checker (registers) and by all three (shared memory).
 *
 * From its issue until its warp has waited, an operation owns its accumulators, which nothing may touch but another
 * wgmma on the same ones, and A's registers, which nothing may write. Ordinary accesses to either before a wgmma must
 * have a wgmma.fence in between. Plain moves do not count there: NVRTC puts constants and copies where it likes, also
 * behind the fence, and ptxas folds them or places a fence of its own (its notes C7517 and C7519). A move that reads
 * accumulators in flight is a real copy, since NVRTC has joined those that can be joined; ptxas then serialises. */

static int op_wgmma(Warp *warp, const Row *row);
static int op_mov_b32(Warp *warp, const Row *row);

enum { SLOT_BYTES = 128 };

static void wgmma_new_slots(Warp *warp) {
  WgmmaQueue *queue = warp->wgmma;
  queue->num_slots = (u32)warp->cta->launch->reg_bytes / SLOT_BYTES + 1;
  queue->accumulator_until = zeroed(4 * queue->num_slots * sizeof(u32));
  queue->fragment_until = queue->accumulator_until + queue->num_slots;
  queue->accessed = queue->fragment_until + queue->num_slots;
  queue->written = queue->accessed + queue->num_slots;
}

static int touched_in_flight(Warp *warp, const Row *row, const char *how, const char *what, u32 until) {
  const WgmmaOp *op = op_number(warp->wgmma->group, until - 1);
  return fail_pair(warp, row, -1, FAULT_ASYNC, 0, (s32)(op->row - warp->cta->launch->rows),
                   "%s %s of a wgmma that is still in flight (no wgmma.wait_group covers it yet)", how, what);
}

/* An instruction other than wgmma reads or writes registers that wgmma uses somewhere in the kernel. */
static int wgmma_touch(Warp *warp, const Row *row) {
  WgmmaQueue *queue = warp->wgmma;
  if (!queue->num_slots) wgmma_new_slots(warp);
  if (handlers[row->op] == op_wgmma) return STEP;
  const int is_move = handlers[row->op] == op_mov_b32;
  for (u32 rest = row->reads | row->writes; rest; rest &= rest - 1) {
    const u32 k = (u32)__builtin_ctz(rest), slot = (u32)row->a[k] / SLOT_BYTES, writes = row->writes >> k & 1;
    if (queue->accumulator_until[slot] > queue->retired)
      return touched_in_flight(warp, row, writes ? "writes" : "reads", "an accumulator", queue->accumulator_until[slot]);
    if (writes && queue->fragment_until[slot] > queue->retired)
      return touched_in_flight(warp, row, "writes", "a register with A", queue->fragment_until[slot]);
    if (is_move) continue;
    queue->accessed[slot] = queue->fences + 1;
    if (writes) queue->written[slot] = queue->fences + 1;
  }
  return STEP;
}

static int no_fence(Warp *warp, const Row *row, const char *what) {
  return fail(warp, row, -1, FAULT_ASYNC, 0, "no wgmma.fence between %s and this wgmma", what);
}

/* Whether the accumulators in flight that the wgmma names are those of one earlier wgmma, in the same order. */
static int continues_chain(const Warp *warp, const Row *row, const s32 *slots, u32 num_slots) {
  const WgmmaGroup *group = warp->wgmma->group;
  for (u32 i = 0; i < group->num_chains; i++) {
    const WgmmaChain *chain = group->chains[i];
    if (chain->pending[warp->id % WARPGROUP] && chain->shape == WGMMA_SHAPE_D(row->flags) &&
        !memcmp(chain->slots, slots, num_slots * sizeof *slots))
      return 1;
  }
  return 0;
}

/* The registers of a wgmma that is about to be issued. */
static int wgmma_check_registers(Warp *warp, const Row *row) {
  WgmmaQueue *queue = warp->wgmma;
  if (!queue->num_slots) wgmma_new_slots(warp);
  if (!queue->fences) return no_fence(warp, row, "the start of the kernel");
  const s32 *slots = warp->cta->launch->side + row->a[WGMMA_AT_SIDE];
  const u32 num_slots = wgmma_accumulators(row->flags);
  u32 in_flight = 0;
  for (u32 i = 0; i < num_slots; i++) {
    const u32 slot = (u32)slots[i] / SLOT_BYTES;
    if (queue->fragment_until[slot] > queue->retired)
      return touched_in_flight(warp, row, "accumulates in", "a register with A", queue->fragment_until[slot]);
    if (queue->accumulator_until[slot] > queue->retired) in_flight = queue->accumulator_until[slot];
    else if (queue->accessed[slot] == queue->fences + 1)
      return no_fence(warp, row, "an access to an accumulator by another instruction");
  }
  if (in_flight && !continues_chain(warp, row, slots, num_slots))
    return touched_in_flight(warp, row, "accumulates, in another shape or order, in", "accumulators", in_flight);
  for (int e = 0; e < 4 && row->flags & WGMMA_A_REGISTERS; e++) {
    const u32 slot = (u32)row->a[WGMMA_AT_A + e] / SLOT_BYTES;
    if (queue->accumulator_until[slot] > queue->retired)
      return touched_in_flight(warp, row, "takes as A", "an accumulator", queue->accumulator_until[slot]);
    if (queue->written[slot] == queue->fences + 1)
      return no_fence(warp, row, "a write to a register with A");
  }
  return STEP;
}

static void wgmma_note_registers(Warp *warp, const Row *row) {
  WgmmaQueue *queue = warp->wgmma;
  const s32 *slots = warp->cta->launch->side + row->a[WGMMA_AT_SIDE];
  const u32 num_slots = wgmma_accumulators(row->flags);
  for (u32 i = 0; i < num_slots; i++) queue->accumulator_until[(u32)slots[i] / SLOT_BYTES] = queue->issued;
  for (int e = 0; e < 4 && row->flags & WGMMA_A_REGISTERS; e++)
    queue->fragment_until[(u32)row->a[WGMMA_AT_A + e] / SLOT_BYTES] = queue->issued;
}

/* What a warp reads of shared memory: its rows of A, all of B. */
static int wgmma_check_shared(Warp *warp, const Row *row, u64 a, u64 b) {
  const u32 me = warp->id % WARPGROUP, n = WGMMA_N(row->flags);
  const int a_mn = (row->flags & WGMMA_A_MN_MAJOR) != 0, b_mn = (row->flags & WGMMA_B_MN_MAJOR) != 0;
  const u32 k16[2] = {0, 16}, halves[2] = {0, 2}, a_lines[2] = {WARP_ROWS * me, WARP_ROWS * (me + 1)}, a_chunks[2] = {2 * me, 2 * me + 2};
  const u32 b_lines[2] = {0, n}, b_chunks[2] = {0, n / 8};
  /* The reads carry the number of the group, so that a wait for older groups does not cover them. */
  if (warp->cta->races) race_actor_set(warp->cta, actor_of_warpgroup(warp->cta, warp->id), warp->wgmma->committed + 1);
  if (!(row->flags & WGMMA_A_REGISTERS) && wgmma_check_operand(warp, row, a, a_mn, 'A', a_mn ? k16 : a_lines, a_mn ? a_chunks : halves))
    return FAILED;
  return wgmma_check_operand(warp, row, b, b_mn, 'B', b_mn ? k16 : b_lines, b_mn ? b_chunks : halves);
}
