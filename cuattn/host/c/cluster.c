/* Clusters: CTAs that reach each other's shared memory (DSMEM), and the barrier of all their threads. */

/* The CTA and the byte of its shared memory that a shared::cluster address means. */
static int cluster_target(Warp *warp, const Row *row, int lane, u64 address, Cta **target, u32 *offset) {
  Cta *cta = warp->cta;
  u32 top = (u32)(address & ~GENERIC_SHARED) >> CLUSTER_RANK_SHIFT, place = (u32)address & CLUSTER_OFFSET_MASK;
  u32 rank = top ? top - 1 : cta->rank;
  if (rank >= cta->cluster->size)
    return fail(warp, row, lane, FAULT_MEMORY, address, "shared::cluster address 0x%llx means CTA %u of a cluster of %u",
                (unsigned long long)address, rank, cta->cluster->size);
  *target = cta->cluster->ctas[rank];
  *offset = place - SHARED_BASE;
  if (place < SHARED_BASE || *offset >= cta->launch->smem_bytes)
    return fail(warp, row, lane, FAULT_MEMORY, address, "shared::cluster address 0x%llx is outside the %u bytes of CTA %u",
                (unsigned long long)address, cta->launch->smem_bytes, rank);
  if (!(*target)->num_live_warps)
    return fail(warp, row, lane, FAULT_MEMORY, address,
                "the shared memory of CTA %u of the cluster is gone: all its threads have exited (a cluster barrier is missing)", rank);
  return STEP;
}

/* mapa: a: dst, address, rank. flags: 1 64-bit registers, 2 generic addresses */
static int op_mapa(Warp *warp, const Row *row) {
  const u32 *rank = SLOT(u32, 2);
  for (u32 rest = warp->exec; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    u64 address = row->flags & 1 ? SLOT(u64, 1)[lane] : SLOT(u32, 1)[lane];
    if (row->flags & 2 && !(address & GENERIC_SHARED))
      return fail(warp, row, lane, FAULT_MEMORY, address, "mapa of a generic address that is not in shared memory");
    if (rank[lane] >= warp->cta->cluster->size)
      return fail(warp, row, lane, FAULT_MEMORY, address, "mapa to CTA %u of a cluster of %u", rank[lane], warp->cta->cluster->size);
    u64 mapped = (address & (GENERIC_SHARED | CLUSTER_OFFSET_MASK)) | (u64)(rank[lane] + 1) << CLUSTER_RANK_SHIFT;
    if (row->flags & 1) SLOT(u64, 0)[lane] = mapped;
    else SLOT(u32, 0)[lane] = (u32)mapped;
  }
  return STEP;
}

/* getctarank: a: dst, address. flags: as mapa */
static int op_getctarank(Warp *warp, const Row *row) {
  for (u32 rest = warp->exec; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    u64 address = row->flags & 1 ? SLOT(u64, 1)[lane] : SLOT(u32, 1)[lane];
    Cta *target = NULL;
    u32 offset = 0;
    if (cluster_target(warp, row, lane, address, &target, &offset)) return FAILED;
    SLOT(u32, 0)[lane] = target->rank;
  }
  return STEP;
}

/* ---- barrier.cluster: all threads of the cluster that have not exited */

static void cluster_barrier_check(Cluster *cluster) {
  if (!cluster->barrier_open) return;
  for (u32 r = 0; r < cluster->size; r++)
    for (u32 i = 0; i < cluster->ctas[r]->num_warps; i++) {
      const Warp *warp = &cluster->ctas[r]->warps[i];
      if (warp->live & ~warp->cluster_arrived) return;
    }
  cluster->timeouts = cluster->barrier_open = 0;
  for (u32 r = 0; r < cluster->size; r++)
    for (u32 i = 0; i < cluster->ctas[r]->num_warps; i++) {
      Warp *warp = &cluster->ctas[r]->warps[i];
      warp->cluster_passed |= warp->cluster_arrived & warp->live;
      warp->cluster_arrived = 0;
      if (warp->waits >> AT_CLUSTER_BARRIER & 1) wake(warp);
    }
  if (cluster->ctas[0]->races) race_cluster_barrier_complete(cluster);
}

/* flags: 1 aligned (the whole warp), 2 relaxed */
static int op_cluster_arrive(Warp *warp, const Row *row) {
  if (row->flags & 1) REQUIRE_LANES(warp, row, ALL_LANES);
  u32 again = warp->exec & (warp->cluster_arrived | warp->cluster_passed);
  if (again)
    return fail(warp, row, __builtin_ctz(again), FAULT_DIVERGENCE, 0, "barrier.cluster.arrive twice without a barrier.cluster.wait between");
  warp->cluster_arrived |= warp->exec;
  warp->cta->cluster->barrier_open = 1;
  if (warp->cta->races && !(row->flags & 2)) race_cluster_arrive(warp);
  cluster_barrier_check(warp->cta->cluster);
  return STEP;
}

static int op_cluster_wait(Warp *warp, const Row *row) {
  if (row->flags & 1) REQUIRE_LANES(warp, row, ALL_LANES);
  u32 never = warp->exec & ~(warp->cluster_arrived | warp->cluster_passed);
  if (never)
    return fail(warp, row, __builtin_ctz(never), FAULT_DIVERGENCE, 0, "barrier.cluster.wait without a barrier.cluster.arrive before");
  if (warp->exec & warp->cluster_arrived) return block_warp(warp, row, AT_CLUSTER_BARRIER);
  warp->cluster_passed &= ~warp->exec;
  if (warp->cta->races && !(row->flags & 2)) race_cluster_wait(warp);
  return STEP;
}

static const OpEntry ops_cluster[] = {
  {"mapa", op_mapa}, {"getctarank", op_getctarank}, {"cluster_arrive", op_cluster_arrive}, {"cluster_wait", op_cluster_wait}, {0, 0},
};
