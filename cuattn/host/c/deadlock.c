/* A deadlock: which warp waits for what. */
#include <stdio.h>

/* printf at the end of a text of limited size. */
#define APPEND(...) used += used < size ? (size_t)snprintf(text + used, size - used, __VA_ARGS__) : 0

static void describe_mbarrier_wait(const Warp *warp, char *text, size_t size) {
  u32 lanes = warp->stalled ? warp->stalled : warp->live;
  int lane = __builtin_ctz(lanes);
  const Launch *launch = warp->cta->launch;
  const Row *row = launch->rows + (warp->stalled ? warp->pc[lane] : warp->next);
  u64 address = (row->flags & MBARRIER_WIDE ? SLOT(u64, 1)[lane] : SLOT(u32, 1)[lane]) + (u64)(s64)row->a[2];
  u32 offset = (u32)(address & CLUSTER_OFFSET_MASK) - SHARED_BASE;
  const Mbarrier *mbarrier = mbarrier_find(warp->cta, offset);
  char parity[24] = "";
  if (row->flags & MBARRIER_PARITY) snprintf(parity, sizeof parity, " for parity %u", SLOT(u32, 3)[lane] & 1);
  if (!mbarrier) snprintf(text, size, "at the mbarrier at byte %u%s, which is gone", offset, parity);
  else snprintf(text, size, "at the mbarrier at byte %u%s, which is in phase %u with %u of %u arrivals and %lld bytes pending", offset, parity,
                mbarrier->phase, mbarrier->pending, mbarrier->expected, (long long)mbarrier->tx_bytes);
}

static void describe_wait(const Warp *warp, char *text, size_t size) {
  const Cta *cta = warp->cta;
  const Barrier *barrier = &cta->barriers[warp->barrier];
  u32 threads = barrier->expected ? barrier->expected : cta->num_live_warps * WARP_SIZE;
  switch (warp->state) {
    case FINISHED: snprintf(text, size, "exited"); break;
    case AT_BARRIER: snprintf(text, size, "at barrier %d, which has %u of %u threads", warp->barrier, barrier->threads, threads); break;
    case AT_MBARRIER: describe_mbarrier_wait(warp, text, size); break;
    case AT_WGMMA: wgmma_describe(warp, text, size); break;
    case AT_CLUSTER_BARRIER: snprintf(text, size, "at the cluster barrier"); break;
    case AT_REGISTERS: snprintf(text, size, "at setmaxnreg, %u registers are free", cta->free_registers); break;
    default: snprintf(text, size, "runnable");
  }
}

/* Neighboring warps that wait for the same thing share a line. */
static size_t describe_cta(const Cta *cta, char *text, size_t size) {
  char words[160], next[160];
  size_t used = 0;
  if (cta->cluster->size > 1) APPEND("\n  CTA %u of the cluster:", cta->rank);
  for (u32 i = 0, end; i < cta->num_warps; i = end) {
    describe_wait(&cta->warps[i], words, sizeof words);
    for (end = i + 1; end < cta->num_warps; end++) {
      describe_wait(&cta->warps[end], next, sizeof next);
      if (strcmp(words, next)) break;
    }
    if (end == i + 1) APPEND("\n  warp %u: %s", i, words);
    else APPEND("\n  warps %u to %u: %s", i, end - 1, words);
  }
  return used;
}

static void report_deadlock(Cluster *cluster) {
  char text[900] = "";
  size_t used = 0, size = sizeof text;
  Warp *first = NULL;
  for (u32 r = 0; r < cluster->size; r++) {
    Cta *cta = cluster->ctas[r];
    if (used < size) used += describe_cta(cta, text + used, size - used);
    for (u32 i = 0; i < cta->num_warps && !first; i++)
      if (cta->warps[i].state != FINISHED) first = &cta->warps[i];
  }
  int lane = __builtin_ctz(first->stalled ? first->stalled : first->live);
  const Row *row = first->state == AT_BARRIER ? first->barrier_row : cluster->launch->rows + (first->stalled ? first->pc[lane] : first->next);
  fail(first, row, lane, FAULT_DEADLOCK, 0, "no warp can go on:%s", text);
}
