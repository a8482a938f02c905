/* The executor's one header: what a row, a warp and a CTA are, and how a handler is written.
 *
 * The unit of work is the warp instruction. A PTX register is a slot of 32 lanes (structure of arrays), a row of
 * the table is one PTX instruction with the byte offsets of its slots, and a handler carries out one row for the
 * lanes in `warp->exec`. Registers of 8, 16 and 32 bits and predicates take a slot of 32 x u32 (narrow values zero
 * extended, predicates 0 or 1); 64-bit registers take 32 x u64. Constants are slots that never change. */
#ifndef CUATTN_EXECUTOR_H
#define CUATTN_EXECUTOR_H

#include <stddef.h>
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int8_t s8;
typedef int16_t s16;
typedef int32_t s32;
typedef int64_t s64;

enum { WARP_SIZE = 32, MAX_OPERANDS = 20 };
#define ALL_LANES 0xffffffffu

/* One PTX instruction. Python writes this struct (table.py mirrors it). `a` holds destinations, then sources (byte
 * offsets into the warp's register file), then plain numbers, in the order that the lowering rule lists them. */
typedef struct {
  s32 op;        /* index into the handler table */
  s32 pred;      /* offset of the guard predicate's slot, or -1 */
  s32 pred_neg;  /* 1 for @!p */
  s32 flags;     /* modifiers, bits defined beside the handlers that read them */
  u32 reads;     /* bit k: a[k] is the slot of a register that some row has in its `side`, and is read */
  u32 writes;    /* likewise written */
  s32 a[MAX_OPERANDS];
} Row;

typedef struct Warp Warp;
typedef struct Cta Cta;
typedef struct Cluster Cluster;

/* What a handler tells the scheduler. */
enum {
  STEP = 0,    /* go on with the next row */
  JUMPED = 1,  /* the handler has set the lanes' program counters */
  BLOCKED = 2, /* the lanes wait: run something else */
  FAILED = 3   /* an error has been reported */
};
typedef int (*Handler)(Warp *warp, const Row *row);
typedef struct {
  const char *name;
  Handler run;
} OpEntry;

#define SLOT(T, k) ((T *)__builtin_assume_aligned(warp->regs + row->a[k], 64))
#define IVDEP _Pragma("GCC ivdep")

/* Element-wise result: EXPR (of the lane number `i`) goes to the active lanes of destination slot 0. EXPR is
 * evaluated for all lanes, so it must be safe for any operand bits (no division by zero, no shift past the width);
 * that is what lets the compiler vectorise both arms. */
#define EACH_LANE(T, EXPR)                                                    \
  do {                                                                        \
    T *each_dst = SLOT(T, 0);                                                      \
    if (warp->exec == ALL_LANES) {                                            \
      IVDEP for (int i = 0; i < WARP_SIZE; i++) each_dst[i] = (T)(EXPR);           \
    } else {                                                                  \
      T each_result[WARP_SIZE];                                                    \
      const u32 *each_lanes = warp->exec_lanes;                                    \
      IVDEP for (int i = 0; i < WARP_SIZE; i++) each_result[i] = (T)(EXPR);        \
      IVDEP for (int i = 0; i < WARP_SIZE; i++) each_dst[i] = each_lanes[i] ? each_result[i] : each_dst[i]; \
    }                                                                         \
    return STEP;                                                              \
  } while (0)

/* ACTION for every executing `lane`; a full warp needs no look at who takes part. */
#define EXECUTING_LANES(ACTION)                                               \
  do {                                                                        \
    if (warp->exec == ALL_LANES) {                                            \
      for (int lane = 0; lane < WARP_SIZE; lane++) { ACTION; }                \
    } else {                                                                  \
      for (u32 rest = warp->exec; rest; rest &= rest - 1) {                   \
        int lane = __builtin_ctz(rest);                                       \
        ACTION;                                                               \
      }                                                                       \
    }                                                                         \
  } while (0)

static inline float as_f32(u32 bits) { float x; __builtin_memcpy(&x, &bits, 4); return x; }
static inline u32 bits_f32(float x) { u32 bits; __builtin_memcpy(&bits, &x, 4); return bits; }
static inline double as_f64(u64 bits) { double x; __builtin_memcpy(&x, &bits, 8); return x; }
static inline u64 bits_f64(double x) { u64 bits; __builtin_memcpy(&bits, &x, 8); return bits; }

enum { NUM_BARRIERS = 16, NUM_SPECIALS = 48 };

/* The special registers that a kernel may read; `Launch.specials` gives the slot of each, or -1. Order as in table.py. */
enum {
  SPECIAL_TID_X, SPECIAL_TID_Y, SPECIAL_TID_Z, SPECIAL_NTID_X, SPECIAL_NTID_Y, SPECIAL_NTID_Z,
  SPECIAL_CTAID_X, SPECIAL_CTAID_Y, SPECIAL_CTAID_Z, SPECIAL_NCTAID_X, SPECIAL_NCTAID_Y, SPECIAL_NCTAID_Z,
  SPECIAL_LANEID, SPECIAL_WARPID, SPECIAL_NWARPID, SPECIAL_SMID, SPECIAL_NSMID,
  SPECIAL_LANEMASK_EQ, SPECIAL_LANEMASK_LE, SPECIAL_LANEMASK_LT, SPECIAL_LANEMASK_GE, SPECIAL_LANEMASK_GT,
  SPECIAL_CLOCK, SPECIAL_DYNAMIC_SMEM_SIZE, SPECIAL_TOTAL_SMEM_SIZE,
  SPECIAL_CLUSTER_CTAID_X, SPECIAL_CLUSTER_CTAID_Y, SPECIAL_CLUSTER_CTAID_Z,
  SPECIAL_CLUSTER_NCTAID_X, SPECIAL_CLUSTER_NCTAID_Y, SPECIAL_CLUSTER_NCTAID_Z,
  SPECIAL_CLUSTERID_X, SPECIAL_CLUSTERID_Y, SPECIAL_CLUSTERID_Z,
  SPECIAL_NCLUSTERID_X, SPECIAL_NCLUSTERID_Y, SPECIAL_NCLUSTERID_Z,
  SPECIAL_CLUSTER_CTARANK, SPECIAL_CLUSTER_NCTARANK, SPECIAL_IS_EXPLICIT_CLUSTER
};

/* State of a byte of checked memory: a byte that belongs to no element is 0. */
enum { BYTE_ADDRESSABLE = 1, BYTE_WRITTEN = 2, BYTE_READY = 3 };

/* A stretch of global memory that the kernel was given. */
typedef struct {
  u64 base, end;
  u8 *state;          /* a state a byte, or NULL when every byte is ready */
  void *writes;       /* race.c: a record a granule, or NULL when races are not checked */
  void *reads;
  s32 granule_log2;   /* the element size of the array, at most 4 bytes */
  s32 argument;       /* which argument it is */
} Region;

enum {
  FAULT_NONE, FAULT_MEMORY, FAULT_UNINITIALIZED, FAULT_RACE, FAULT_DEADLOCK, FAULT_DIVERGENCE, FAULT_ASYNC,
  FAULT_INTERNAL
};

/* The first fault of a launch. */
typedef struct {
  s32 kind, row, other_row; /* other_row: the other access of a race, or -1 */
  u32 ctaid[3], tid[3];
  u64 address;
  char message[1024];
} Report;

enum { ASYNC_EAGER, ASYNC_LATE, ASYNC_RANDOM };

/* A stretch of global memory that must not be written: arrays that are read-only, as far as no writable one covers them. */
typedef struct {
  u64 base, end;
  s64 argument;
} ReadOnly;

typedef struct SyncObject SyncObject; /* race_global.c */

/* A launch. Python fills this struct (library.py mirrors it). */
typedef struct {
  const Row *rows;
  const u8 *slots_init;  /* constants and zeros for the special registers, one warp's worth */
  const u8 *params;
  const s32 *side;       /* slots of rows with many registers: a[k] of such a row is an index into it */
  Region *regions;
  const ReadOnly *read_only;
  SyncObject **sync_objects; /* the race checker's own */
  u64 *count_rows, *count_lanes, *count_bytes; /* per row, or NULL: counters are off */
  u64 seed;
  s64 num_rows, init_bytes, reg_bytes;
  u32 grid[3], block[3], cluster[3]; /* cluster: extents in CTAs; 1, 1, 1 without */
  s32 specials[NUM_SPECIALS];
  u32 static_smem_bytes, smem_bytes, local_bytes, num_regions, num_read_only;
  u32 entry_registers;   /* registers a thread starts with; 0 where setmaxnreg has no say */
  s32 check_mem, check_init, check_race, async_mode, random_schedule, num_threads, smem_granule_log2, explicit_cluster;
  volatile s32 stop;     /* set by the first fault, or from outside */
  Report report;
} Launch;

typedef struct AsyncQueue AsyncQueue; /* async.c */
typedef struct CtaRaces CtaRaces;     /* race_clocks.c */
typedef struct WarpRaces WarpRaces;
typedef struct BulkQueue BulkQueue;   /* bulk.c */
typedef struct WgmmaQueue WgmmaQueue; /* wgmma.c */

/* What a warp does. From AT_MBARRIER on it stands before an instruction that is executed anew after a wake. */
enum { RUNNABLE, AT_BARRIER, FINISHED, AT_MBARRIER, AT_WGMMA, AT_CLUSTER_BARRIER, AT_REGISTERS };

/* Why the scheduler asks for an asynchronous operation to land. */
enum { LAND_STUCK, LAND_RANDOM };

struct Warp {
  u8 *regs;                                               /* register file, 64-byte aligned */
  u32 exec;                                               /* lanes that execute the current row */
  u32 exec_lanes[WARP_SIZE] __attribute__((aligned(64))); /* the same, 0 or ~0 a lane; valid unless exec is ALL_LANES */
  u32 lanes_hold;                                         /* the mask that exec_lanes expresses */
  Cta *cta;
  u32 id;
  u32 live;               /* lanes that have not exited */
  u32 active;             /* the group of lanes that runs now */
  u32 waiting;            /* lanes held at a collective until the lanes it names arrive */
  u32 tried_live;         /* `live` when all lanes were last found waiting */
  u32 stalled;            /* lanes whose wait failed while other lanes could run */
  u32 waits;              /* bit s: some lanes wait in state s */
  u32 timed_out;          /* nothing else can run: a try_wait returns false */
  u32 cluster_arrived;    /* lanes that have arrived at the cluster barrier in progress */
  u32 cluster_passed;     /* lanes whose cluster barrier is complete and that have not waited yet */
  u32 registers;          /* a thread's share, as setmaxnreg left it */
  u32 register_changes;   /* a digest of what it has executed, and the last of it */
  const Row *register_row;
  s32 next;               /* row where the active group goes on */
  s32 regroup;            /* the group has split or moved: choose anew */
  s32 pc[WARP_SIZE];      /* where lanes outside the active group stand */
  const Row *meet;        /* lanes outside the group stand at this row: stop there and join them */
  s64 budget;             /* rows until the warp must yield */
  s32 state;
  s32 barrier;            /* the barrier it waits at */
  const Row *barrier_row; /* for a reduction's result */
  AsyncQueue *async;
  WgmmaQueue *wgmma;
  u32 clock;              /* race checker: counts synchronisations; an access carries the clock of its time */
  WarpRaces *races;       /* or NULL */
};

typedef struct {
  u32 threads;            /* arrived so far */
  u32 warps;              /* warps that wait */
  u32 num_arrived_warps;
  u32 expected;           /* 0: all threads of the CTA */
  u32 popc, any, all;     /* of a reduction */
} Barrier;

/* An mbarrier object; its bytes of shared memory hold nothing (mbarrier.c). */
typedef struct {
  u32 offset;             /* byte of shared memory */
  u32 live;               /* initialised, and not invalidated since */
  u32 expected;           /* arrivals of a phase */
  u32 pending;            /* arrivals that the current phase still needs */
  u32 phase;              /* phases completed */
  s64 tx_bytes;           /* bytes that the current phase still expects */
  const Row *row;         /* where it was initialised */
  u32 thread;             /* by which thread of the CTA */
  u32 fenced;             /* a fence has made it known to asynchronous operations since */
} Mbarrier;

typedef struct {
  u32 count, capacity;
  Mbarrier *items;
  u16 *at;                /* [smem_bytes / 8 + 1] index into items plus one, NULL until the first init */
} MbarrierTable;

struct Cta {
  Launch *launch;
  Cluster *cluster;
  u32 rank;               /* in the cluster */
  u32 index;              /* linear */
  u32 ctaid[3];
  u32 num_warps, num_live_warps, num_threads;
  u32 free_registers;     /* given back by setmaxnreg.dec */
  u8 *smem;               /* byte 0 is shared address SHARED_BASE */
  u8 *smem_state;         /* or NULL */
  u8 *local;              /* [thread][local_bytes] */
  u8 *local_state;        /* or NULL */
  Warp *warps;
  u64 random;
  u32 barrier_epoch;      /* counts barriers of the whole CTA */
  CtaRaces *races;
  MbarrierTable mbarriers;
  Barrier barriers[NUM_BARRIERS];
};

/* CTAs that run together on one thread of the host and reach each other's shared memory; usually a single one. */
struct Cluster {
  Launch *launch;
  u32 index;              /* linear, in the grid of clusters */
  u32 size;               /* CTAs */
  u32 num_live_ctas;
  u32 timeouts;           /* since anything last changed */
  u32 barrier_open;       /* somebody has arrived at the cluster barrier */
  Cta **ctas;
  u64 random;
  BulkQueue *bulk;
};

/* Shared addresses start here, so that a null pointer is no shared address; generic addresses carry their window. */
#define SHARED_BASE 1024u
#define LOCAL_BASE 64u
/* A shared::cluster address: the rank of the CTA plus one in the top byte, or 0 for the own CTA. */
#define CLUSTER_RANK_SHIFT 24
#define CLUSTER_OFFSET_MASK 0xffffffu
#define GENERIC_SHARED (1ull << 60)
#define GENERIC_LOCAL (1ull << 61)

static inline u32 next_random(u64 *state) {
  u64 x = *state;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  *state = x;
  return (u32)(x >> 32);
}

/* Make `bits` the executing lanes. */
static inline void set_exec(Warp *warp, u32 bits) {
  warp->exec = bits;
  if (bits != ALL_LANES && bits != warp->lanes_hold) {
    for (int i = 0; i < WARP_SIZE; i++) warp->exec_lanes[i] = 0u - ((bits >> i) & 1u);
    warp->lanes_hold = bits;
  }
}

#endif
