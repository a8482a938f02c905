/* Threads of the host take CTAs from a queue; each runs the warps of its resident CTAs in turn.
 *
 * In random order the queue is permuted, several CTAs are resident at once, and a random warp runs for a random
 * number of rows, all from the launch's seed. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum { RANDOM_RESIDENTS = 2 };

typedef struct {
  Launch *launch;
  u64 next_cta;  /* position in the queue, shared by the threads */
  u64 stride;    /* the queue visits start + k * stride modulo the number of CTAs */
  u64 start;
} Queue;

static void *zeroed(size_t bytes) {
  bytes = (bytes + 127) / 64 * 64;
  void *memory = aligned_alloc(64, bytes);
  if (memory) memset(memory, 0, bytes);
  return memory;
}

static Cta *cta_new(Launch *launch) {
  Cta *cta = zeroed(sizeof *cta);
  cta->launch = launch;
  cta->num_threads = launch->block[0] * launch->block[1] * launch->block[2];
  cta->num_warps = (cta->num_threads + WARP_SIZE - 1) / WARP_SIZE;
  cta->smem = zeroed(launch->smem_bytes + 1);
  if (launch->check_init) cta->smem_state = zeroed(launch->smem_bytes + 1);
  size_t local = (size_t)launch->local_bytes * cta->num_warps * WARP_SIZE;
  cta->local = zeroed(local + 1);
  if (launch->check_init && local) cta->local_state = zeroed(local);
  cta->warps = zeroed(cta->num_warps * sizeof *cta->warps);
  if (launch->check_race) {
    size_t granules = (launch->smem_bytes >> launch->smem_granule_log2) + 1;
    cta->races = zeroed(sizeof *cta->races);
    cta->races->writes = zeroed(granules * sizeof(Stamp));
    cta->races->reads = zeroed(granules * cta->num_warps * sizeof(Stamp));
  }
  for (u32 i = 0; i < cta->num_warps; i++) {
    Warp *warp = &cta->warps[i];
    warp->cta = cta;
    warp->id = i;
    warp->regs = zeroed((size_t)launch->reg_bytes + 64);
    warp->async = zeroed(sizeof *warp->async);
    warp->vc = zeroed(cta->num_warps * sizeof *warp->vc);
  }
  return cta;
}

static void cta_free(Cta *cta) {
  for (u32 i = 0; i < cta->num_warps; i++) {
    Warp *warp = &cta->warps[i];
    free(warp->regs);
    free(warp->async->copies);
    free(warp->async);
    free(warp->vc);
    free(warp->pair);
  }
  if (cta->races) {
    races_reset_cta(cta);
    free(cta->races->writes);
    free(cta->races->reads);
    free(cta->races);
  }
  free(cta->warps);
  free(cta->smem);
  free(cta->smem_state);
  free(cta->local);
  free(cta->local_state);
  free(cta);
}

/* ---- starting a CTA */

static u32 special_value(const Cta *cta, const Warp *warp, int special, u32 lane) {
  const Launch *launch = cta->launch;
  u32 tid[3];
  thread_position(cta, warp->id * WARP_SIZE + lane, tid);
  switch (special) {
    case SPECIAL_TID_X: case SPECIAL_TID_Y: case SPECIAL_TID_Z: return tid[special - SPECIAL_TID_X];
    case SPECIAL_NTID_X: case SPECIAL_NTID_Y: case SPECIAL_NTID_Z: return launch->block[special - SPECIAL_NTID_X];
    case SPECIAL_CTAID_X: case SPECIAL_CTAID_Y: case SPECIAL_CTAID_Z: return cta->ctaid[special - SPECIAL_CTAID_X];
    case SPECIAL_NCTAID_X: case SPECIAL_NCTAID_Y: case SPECIAL_NCTAID_Z: return launch->grid[special - SPECIAL_NCTAID_X];
    case SPECIAL_LANEID: return lane;
    case SPECIAL_WARPID: return warp->id;
    case SPECIAL_NWARPID: return cta->num_warps;
    case SPECIAL_NSMID: return 1;
    case SPECIAL_LANEMASK_EQ: return 1u << lane;
    case SPECIAL_LANEMASK_LE: return (2u << lane) - 1;
    case SPECIAL_LANEMASK_LT: return (1u << lane) - 1;
    case SPECIAL_LANEMASK_GE: return ~((1u << lane) - 1);
    case SPECIAL_LANEMASK_GT: return ~((2u << lane) - 1);
    case SPECIAL_DYNAMIC_SMEM_SIZE: return launch->smem_bytes - launch->static_smem_bytes;
    case SPECIAL_TOTAL_SMEM_SIZE: return launch->smem_bytes;
    default: return 0;
  }
}

static void warp_start(Warp *warp) {
  Cta *cta = warp->cta;
  const Launch *launch = cta->launch;
  memcpy(warp->regs, launch->slots_init, (size_t)launch->init_bytes);
  for (int special = 0; special < NUM_SPECIALS; special++) {
    if (launch->specials[special] < 0) continue;
    u32 *slot = (u32 *)(warp->regs + launch->specials[special]);
    for (u32 lane = 0; lane < WARP_SIZE; lane++) slot[lane] = special_value(cta, warp, special, lane);
  }
  u32 threads = cta->num_threads - warp->id * WARP_SIZE;
  warp->live = warp->active = threads >= WARP_SIZE ? ALL_LANES : (1u << threads) - 1;
  warp->waiting = warp->tried_live = 0;
  warp->next = warp->regroup = 0;
  warp->meet = NULL;
  warp->state = RUNNABLE;
  warp->async->count = 0;
  memset(warp->async->committed, 0, sizeof warp->async->committed);
  memset(warp->vc, 0, cta->num_warps * sizeof *warp->vc);
  warp->clock = warp->vc[warp->id] = 1;
  warp->full_sync = warp->fence_clock = 0;
  if (warp->pair) memset(warp->pair, 0, WARP_SIZE * WARP_SIZE * sizeof *warp->pair);
}

static void cta_start(Cta *cta, u64 index) {
  Launch *launch = cta->launch;
  cta->index = (u32)index;
  cta->ctaid[0] = (u32)(index % launch->grid[0]);
  cta->ctaid[1] = (u32)(index / launch->grid[0] % launch->grid[1]);
  cta->ctaid[2] = (u32)(index / launch->grid[0] / launch->grid[1]);
  cta->num_live_warps = cta->num_warps;
  cta->barrier_epoch = 0;
  cta->random = (launch->seed + 1) * 0x9e3779b97f4a7c15ull ^ (index + 1) * 0xd1342543de82ef95ull;
  memset(cta->barriers, 0, sizeof cta->barriers);
  memset(cta->smem, 0xff, launch->smem_bytes);
  memset(cta->local, 0xff, (size_t)launch->local_bytes * cta->num_warps * WARP_SIZE);
  if (cta->smem_state) memset(cta->smem_state, BYTE_ADDRESSABLE, launch->smem_bytes);
  if (cta->local_state) memset(cta->local_state, BYTE_ADDRESSABLE, (size_t)launch->local_bytes * cta->num_warps * WARP_SIZE);
  if (cta->races) races_reset_cta(cta);
  for (u32 i = 0; i < cta->num_warps; i++) warp_start(&cta->warps[i]);
}

/* ---- running */

static void report_deadlock(Cta *cta) {
  char text[256];
  size_t used = 0;
  Warp *first = NULL;
  for (u32 i = 0; i < cta->num_warps; i++) {
    Warp *warp = &cta->warps[i];
    if (warp->state == AT_BARRIER) {
      if (!first) first = warp;
      if (used < sizeof text) used += (size_t)snprintf(text + used, sizeof text - used, " warp %u at barrier %d,", i, warp->barrier);
    } else if (used < sizeof text) {
      used += (size_t)snprintf(text + used, sizeof text - used, " warp %u has exited,", i);
    }
  }
  text[used && used < sizeof text ? used - 1 : sizeof text - 1] = 0;
  const Barrier *barrier = &cta->barriers[first->barrier];
  fail(first, first->barrier_row, __builtin_ctz(first->live), FAULT_DEADLOCK, 0, "no warp can go on; barrier %d has %u of %u threads:%s",
       first->barrier, barrier->threads, barrier->expected ? barrier->expected : cta->num_live_warps * WARP_SIZE, text);
}

/* Give every runnable warp of the CTA a turn. Returns whether the CTA is still alive. */
static int cta_turn(Cta *cta) {
  Launch *launch = cta->launch;
  int ran = 0;
  u32 offset = launch->random_schedule ? next_random(&cta->random) % cta->num_warps : 0;
  for (u32 i = 0; i < cta->num_warps; i++) {
    Warp *warp = &cta->warps[(i + offset) % cta->num_warps];
    if (warp->state != RUNNABLE) continue;
    if (launch->random_schedule && ran && next_random(&cta->random) % 2) continue;
    warp->budget = launch->random_schedule ? 1 + next_random(&cta->random) % 400 : 1 << 20;
    ran = 1;
    if (run_warp(warp) == FAILED || launch->stop) return 0;
  }
  if (cta->num_live_warps == 0) return 0;
  if (!ran) {
    report_deadlock(cta);
    return 0;
  }
  return 1;
}

static void *worker(void *argument) {
  Queue *queue = argument;
  Launch *launch = queue->launch;
  u64 total = num_ctas(launch);
  int residents = launch->random_schedule ? RANDOM_RESIDENTS : 1, alive = 0;
  Cta *ctas[RANDOM_RESIDENTS] = {0};
  int busy[RANDOM_RESIDENTS] = {0};
  do {
    alive = 0;
    for (int i = 0; i < residents && !launch->stop; i++) {
      if (!busy[i]) {
        u64 position = __atomic_fetch_add(&queue->next_cta, 1, __ATOMIC_RELAXED);
        if (position >= total) continue;
        if (!ctas[i]) ctas[i] = cta_new(launch);
        cta_start(ctas[i], (queue->start + position * queue->stride) % total);
        busy[i] = 1;
      }
      do busy[i] = cta_turn(ctas[i]);
      while (busy[i] && residents == 1);
      alive = 1;
    }
  } while (alive && !launch->stop);
  for (int i = 0; i < residents; i++)
    if (ctas[i]) cta_free(ctas[i]);
  return NULL;
}

static u64 greatest_divisor(u64 a, u64 b) { return b ? greatest_divisor(b, a % b) : a; }

static void run_launch(Launch *launch) {
  u64 total = num_ctas(launch);
  Queue queue = {.launch = launch, .stride = 1};
  if (launch->random_schedule && total > 1) {
    u64 random = launch->seed * 0x9e3779b97f4a7c15ull + 0x2545f4914f6cdd1dull;
    queue.start = next_random(&random) % total;
    queue.stride = 1 + next_random(&random) % (total - 1);
    while (greatest_divisor(queue.stride, total) != 1) queue.stride = queue.stride % (total - 1) + 1;
  }
  u64 threads = (u64)launch->num_threads < total ? (u64)launch->num_threads : total;
  pthread_t ids[64];
  if (threads > 64) threads = 64;
  u64 started = 0;
  for (u64 i = 1; i < threads; i++)
    if (!pthread_create(&ids[started], NULL, worker, &queue)) started++;
  worker(&queue);
  for (u64 i = 0; i < started; i++) pthread_join(ids[i], NULL);
  if (launch->check_race) races_reset_launch(launch);
}
