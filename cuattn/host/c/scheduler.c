/* Threads of the host take clusters (mostly of one CTA) from a queue; each runs the warps of its resident clusters in
 * turn. When no warp can run, asynchronous operations land; when there is none, waits that may time out do; then it is
 * a deadlock.
 *
 * In random order the queue is permuted, several clusters are resident at once, and a random warp runs for a random
 * number of rows, all from the launch's seed. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum { RANDOM_RESIDENTS = 2, MAX_TIMEOUTS = 1000, MAX_THREADS = 64 };

typedef struct {
  Launch *launch;
  Running running;
  u64 next;      /* position in the queue, shared by the threads */
  u64 stride;    /* the queue visits start + k * stride modulo the number of clusters */
  u64 start;
} Queue;

/* Memory that is written before it is read: a launch is often shorter than clearing a CTA's memory twice. */
static void *uncleared(size_t bytes) { return aligned_alloc(64, (bytes + 127) / 64 * 64); }

static void *zeroed(size_t bytes) {
  void *memory = uncleared(bytes);
  if (memory) memset(memory, 0, (bytes + 127) / 64 * 64);
  return memory;
}

static Cta *cta_new(Launch *launch, Cluster *cluster, u32 rank) {
  Cta *cta = zeroed(sizeof *cta);
  cta->launch = launch;
  cta->cluster = cluster;
  cta->rank = rank;
  cta->num_threads = launch->block[0] * launch->block[1] * launch->block[2];
  cta->num_warps = (cta->num_threads + WARP_SIZE - 1) / WARP_SIZE;
  cta->smem = uncleared(launch->smem_bytes + 1);
  if (launch->check_init) cta->smem_state = uncleared(launch->smem_bytes + 1);
  size_t local = (size_t)launch->local_bytes * cta->num_warps * WARP_SIZE;
  cta->local = uncleared(local + 1);
  if (launch->check_init && local) cta->local_state = uncleared(local);
  cta->warps = zeroed(cta->num_warps * sizeof *cta->warps);
  if (launch->check_race) cta->races = races_new(cta);
  for (u32 i = 0; i < cta->num_warps; i++) {
    Warp *warp = &cta->warps[i];
    warp->cta = cta;
    warp->id = i;
    warp->regs = zeroed((size_t)launch->reg_bytes + 64);
    warp->async = zeroed(sizeof *warp->async);
    warp->wgmma = wgmma_new(warp);
    if (cta->races) warp->races = zeroed(sizeof *warp->races);
  }
  return cta;
}

static void cta_free(Cta *cta) {
  for (u32 i = 0; i < cta->num_warps; i++) {
    Warp *warp = &cta->warps[i];
    free(warp->regs);
    free(warp->async->copies);
    free(warp->async);
    wgmma_free(warp);
    races_free_warp(warp);
  }
  races_free_cta(cta);
  mbarriers_free(cta);
  free(cta->warps);
  free(cta->smem);
  free(cta->smem_state);
  free(cta->local);
  free(cta->local_state);
  free(cta);
}

static Cluster *cluster_new(Launch *launch) {
  Cluster *cluster = zeroed(sizeof *cluster);
  cluster->launch = launch;
  cluster->size = launch->cluster[0] * launch->cluster[1] * launch->cluster[2];
  cluster->ctas = zeroed(cluster->size * sizeof *cluster->ctas);
  for (u32 i = 0; i < cluster->size; i++) cluster->ctas[i] = cta_new(launch, cluster, i);
  return cluster;
}

static void cluster_free(Cluster *cluster) {
  bulk_free(cluster);
  for (u32 i = 0; i < cluster->size; i++) cta_free(cluster->ctas[i]);
  free(cluster->ctas);
  free(cluster);
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
    case SPECIAL_CLUSTER_CTARANK: return cta->rank;
    case SPECIAL_CLUSTER_NCTARANK: return cta->cluster->size;
    case SPECIAL_IS_EXPLICIT_CLUSTER: return launch->explicit_cluster;
    default: break;
  }
  u32 axis = (u32)(special - SPECIAL_CLUSTER_CTAID_X) % 3;
  switch (special - (s32)axis) {
    case SPECIAL_CLUSTER_CTAID_X: return cta->ctaid[axis] % launch->cluster[axis];
    case SPECIAL_CLUSTER_NCTAID_X: return launch->cluster[axis];
    case SPECIAL_CLUSTERID_X: return cta->ctaid[axis] / launch->cluster[axis];
    case SPECIAL_NCLUSTERID_X: return launch->grid[axis] / launch->cluster[axis];
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
  warp->waiting = warp->tried_live = warp->stalled = warp->waits = warp->timed_out = 0;
  warp->cluster_arrived = warp->cluster_passed = 0;
  warp->registers = launch->entry_registers;
  warp->register_changes = 0;
  warp->register_row = NULL;
  warp->next = warp->regroup = 0;
  warp->meet = NULL;
  warp->state = RUNNABLE;
  wgmma_reset(warp);
  warp->async->count = 0;
  memset(warp->async->committed, 0, sizeof warp->async->committed);
  races_reset_warp(warp);
}

static void cta_start(Cta *cta) {
  Launch *launch = cta->launch;
  const u32 *extent = launch->cluster, *grid = launch->grid;
  u32 cluster = cta->cluster->index, rank = cta->rank, place[3], inside[3];
  place[0] = cluster % (grid[0] / extent[0]);
  place[1] = cluster / (grid[0] / extent[0]) % (grid[1] / extent[1]);
  place[2] = cluster / (grid[0] / extent[0]) / (grid[1] / extent[1]);
  inside[0] = rank % extent[0];
  inside[1] = rank / extent[0] % extent[1];
  inside[2] = rank / extent[0] / extent[1];
  for (int axis = 0; axis < 3; axis++) cta->ctaid[axis] = place[axis] * extent[axis] + inside[axis];
  cta->index = (cta->ctaid[2] * grid[1] + cta->ctaid[1]) * grid[0] + cta->ctaid[0];
  u64 index = cta->index;
  cta->free_registers = 0;
  mbarriers_reset(cta);
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

static void cluster_start(Cluster *cluster, u64 index) {
  cluster->index = (u32)index;
  cluster->num_live_ctas = cluster->size;
  cluster->timeouts = cluster->barrier_open = 0;
  cluster->random = (cluster->launch->seed + 1) * 0x9e3779b97f4a7c15ull ^ (index + 1) * 0xd1342543de82ef95ull;
  bulk_reset(cluster);
  for (u32 i = 0; i < cluster->size; i++) cta_start(cluster->ctas[i]);
}

/* ---- running */

/* Give every runnable warp of the CTA a turn; counts those that ran, and those that ended or came to wait. */
static int cta_turn(Cta *cta, u32 *ran, u32 *settled) {
  Launch *launch = cta->launch;
  u32 offset = launch->random_schedule ? next_random(&cta->random) % cta->num_warps : 0;
  for (u32 i = 0; i < cta->num_warps; i++) {
    Warp *warp = &cta->warps[(i + offset) % cta->num_warps];
    if (warp->state != RUNNABLE) continue;
    if (launch->random_schedule && *ran && next_random(&cta->random) % 2) continue;
    warp->budget = launch->random_schedule ? 1 + next_random(&cta->random) % 400 : 1 << 20;
    ++*ran;
    if (run_warp(warp) == FAILED || launch->stop) return FAILED;
    *settled += warp->state != RUNNABLE;
  }
  if (cta->num_live_warps) return STEP;
  cta->cluster->num_live_ctas--;
  return bulk_check_exit(cta) || wgmma_check_exit(cta) || mbarriers_check_exit(cta) || registers_check_exit(cta) ? FAILED : STEP;
}

/* Let every wait that may time out do so. Returns 0 when that has not helped often enough. */
static int expire_waits(Cluster *cluster) {
  int any = 0;
  if (cluster->timeouts++ >= MAX_TIMEOUTS) return 0;
  for (u32 r = 0; r < cluster->size; r++)
    for (u32 i = 0; i < cluster->ctas[r]->num_warps; i++) {
      Warp *warp = &cluster->ctas[r]->warps[i];
      if (!(warp->waits >> AT_MBARRIER & 1)) continue;
      warp->timed_out = warp->stalled ? warp->stalled : warp->live;
      wake(warp);
      any = 1;
    }
  return any;
}

/* Run each warp of the cluster once. Returns whether the cluster is still alive. */
static int cluster_turn(Cluster *cluster) {
  Launch *launch = cluster->launch;
  u32 ran = 0, settled = 0, offset = launch->random_schedule && cluster->size > 1 ? next_random(&cluster->random) % cluster->size : 0;
  for (u32 i = 0; i < cluster->size; i++) {
    Cta *cta = cluster->ctas[(i + offset) % cluster->size];
    if (cta->num_live_warps && cta_turn(cta, &ran, &settled)) return 0;
  }
  if (!cluster->num_live_ctas) return 0;
  int landed = launch->random_schedule ? bulk_land(cluster, LAND_RANDOM) : 0;
  if (ran && (settled || launch->random_schedule)) return landed >= 0; /* else some may spin on what is still to land */
  if (landed == 0) landed = bulk_land(cluster, LAND_STUCK);
  for (u32 i = 0; i < cluster->size && landed == 0; i++) landed = async_land_stuck(cluster->ctas[i]);
  if (landed < 0) return 0;
  if (landed > 0) cluster->timeouts = 0;
  if (ran || landed || expire_waits(cluster)) return 1;
  report_deadlock(cluster);
  return 0;
}

static u64 num_clusters(const Launch *launch) {
  return num_ctas(launch) / (launch->cluster[0] * launch->cluster[1] * launch->cluster[2]);
}

static void run_clusters(Queue *queue) {
  Launch *launch = queue->launch;
  u64 total = num_clusters(launch);
  int residents = launch->random_schedule ? RANDOM_RESIDENTS : 1, alive = 0;
  Cluster *clusters[RANDOM_RESIDENTS] = {0};
  int busy[RANDOM_RESIDENTS] = {0};
  do {
    alive = 0;
    for (int i = 0; i < residents && !launch->stop; i++) {
      if (!busy[i]) {
        u64 position = __atomic_fetch_add(&queue->next, 1, __ATOMIC_RELAXED);
        if (position >= total) continue;
        if (!clusters[i]) clusters[i] = cluster_new(launch);
        cluster_start(clusters[i], (queue->start + position * queue->stride) % total);
        busy[i] = 1;
      }
      do busy[i] = cluster_turn(clusters[i]);
      while (busy[i] && residents == 1);
      alive = 1;
    }
  } while (alive && !launch->stop);
  for (int i = 0; i < residents; i++)
    if (clusters[i]) cluster_free(clusters[i]);
}

static void *worker(void *argument) {
  Queue *queue = argument;
  run_clusters(queue);
  worker_stops(&queue->running);
  return NULL;
}

static u64 greatest_divisor(u64 a, u64 b) { return b ? greatest_divisor(b, a % b) : a; }

static void queue_order(Queue *queue, u64 total) {
  const Launch *launch = queue->launch;
  queue->stride = 1;
  if (!launch->random_schedule || total <= 1) return;
  u64 random = launch->seed * 0x9e3779b97f4a7c15ull + 0x2545f4914f6cdd1dull;
  queue->start = next_random(&random) % total;
  queue->stride = 1 + next_random(&random) % (total - 1);
  while (greatest_divisor(queue->stride, total) != 1) queue->stride = queue->stride % (total - 1) + 1;
}

/* Called with the interpreter's lock, which is given back meanwhile. */
static void run_launch(Launch *launch, const Caller *caller) {
  void *state = caller->release();
  u64 total = num_clusters(launch), threads = (u64)launch->num_threads < total ? (u64)launch->num_threads : total;
  pthread_t ids[MAX_THREADS];
  Queue queue = {.launch = launch, .running = {.launch = launch}};
  queue_order(&queue, total);
  launch_enters(&queue.running);
  u64 started = 0;
  pthread_mutex_lock(&queue.running.mutex); /* none stops before all are counted */
  while (started < threads && started < MAX_THREADS && !pthread_create(&ids[started], NULL, worker, &queue)) started++;
  queue.running.workers = started;
  pthread_mutex_unlock(&queue.running.mutex);
  if (!started) run_clusters(&queue); /* no thread to be had: without a look at the interpreter */
  state = wait_for_launch(&queue.running, caller, state);
  for (u64 i = 0; i < started; i++) pthread_join(ids[i], NULL);
  if (launch->check_race) races_free_launch(launch);
  launch_leaves(&queue.running);
  caller->acquire(state);
}
