/* setmaxnreg: the registers of a CTA as one pool. A dec gives back, an inc waits until there are enough. */

/* a: registers a thread. flags: 1 inc, else dec */
static int op_setmaxnreg(Warp *warp, const Row *row) {
  REQUIRE_LANES(warp, row, ALL_LANES);
  Cta *cta = warp->cta;
  u32 wanted = (u32)row->a[0], held = warp->registers;
  if (warp->id / 4 * 4 + 4 > cta->num_warps || warp->exec != ALL_LANES)
    return fail(warp, row, -1, FAULT_DIVERGENCE, 0, "setmaxnreg needs all threads of a warpgroup: lanes %08x of warp %u of %u execute it", warp->exec, warp->id, cta->num_warps);
  if (row->flags & 1 ? wanted < held : wanted > held)
    return fail(warp, row, -1, FAULT_DIVERGENCE, 0, "setmaxnreg.%s to %u registers from %u", row->flags & 1 ? "inc" : "dec", wanted, held);
  if (row->flags & 1) {
    u32 needed = (wanted - held) * WARP_SIZE;
    if (needed > cta->free_registers) return block_warp(warp, row, AT_REGISTERS);
    cta->free_registers -= needed;
  } else {
    cta->free_registers += (held - wanted) * WARP_SIZE;
    for (u32 i = 0; i < cta->num_warps; i++)
      if (cta->warps[i].waits >> AT_REGISTERS & 1) wake(&cta->warps[i]);
  }
  cta->cluster->timeouts = 0;
  warp->registers = wanted;
  warp->register_changes = warp->register_changes * 257 + wanted;
  warp->register_row = row;
  return STEP;
}

/* A CTA has ended: the warps of a warpgroup must have executed the same setmaxnreg. */
static int registers_check_exit(Cta *cta) {
  for (u32 i = 0; i < cta->num_warps; i++) {
    Warp *warp = &cta->warps[i], *first = &cta->warps[i / 4 * 4];
    if (warp->register_changes == first->register_changes) continue;
    const Warp *teller = warp->register_row ? warp : first;
    return fail(teller, teller->register_row, 0, FAULT_DIVERGENCE, 0, "warps %u and %u of one warpgroup did not execute the same setmaxnreg", first->id, warp->id);
  }
  return STEP;
}

static const OpEntry ops_setmaxnreg[] = {{"setmaxnreg", op_setmaxnreg}, {0, 0}};
