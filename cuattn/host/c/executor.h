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
  s32 a[MAX_OPERANDS];
} Row;

typedef struct Warp Warp;
typedef struct Cta Cta;

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

static inline float as_f32(u32 bits) { float x; __builtin_memcpy(&x, &bits, 4); return x; }
static inline u32 bits_f32(float x) { u32 bits; __builtin_memcpy(&bits, &x, 4); return bits; }
static inline double as_f64(u64 bits) { double x; __builtin_memcpy(&x, &bits, 8); return x; }
static inline u64 bits_f64(double x) { u64 bits; __builtin_memcpy(&bits, &x, 8); return bits; }

enum { MAX_WARPS = 32, NUM_BARRIERS = 16, NUM_SPECIALS = 32 };

/* The special registers that a kernel may read; `Launch.specials` gives the slot of each, or -1. Order as in table.py. */
enum {
  SPECIAL_TID_X, SPECIAL_TID_Y, SPECIAL_TID_Z, SPECIAL_NTID_X, SPECIAL_NTID_Y, SPECIAL_NTID_Z,
  SPECIAL_CTAID_X, SPECIAL_CTAID_Y, SPECIAL_CTAID_Z, SPECIAL_NCTAID_X, SPECIAL_NCTAID_Y, SPECIAL_NCTAID_Z,
  SPECIAL_LANEID, SPECIAL_WARPID, SPECIAL_NWARPID, SPECIAL_SMID, SPECIAL_NSMID,
  SPECIAL_LANEMASK_EQ, SPECIAL_LANEMASK_LE, SPECIAL_LANEMASK_LT, SPECIAL_LANEMASK_GE, SPECIAL_LANEMASK_GT,
  SPECIAL_CLOCK, SPECIAL_DYNAMIC_SMEM_SIZE, SPECIAL_TOTAL_SMEM_SIZE
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
  char message[384];
} Report;

enum { ASYNC_EAGER, ASYNC_LATE, ASYNC_RANDOM };

/* A launch. Python fills this struct (library.py mirrors it). */
typedef struct {
  const Row *rows;
  const u8 *slots_init;  /* constants and zeros for the special registers, one warp's worth */
  const u8 *params;
  Region *regions;
  u64 *count_rows, *count_lanes, *count_bytes; /* per row, or NULL: counters are off */
  u64 seed;
  s64 num_rows, init_bytes, reg_bytes;
  u32 grid[3], block[3];
  s32 specials[NUM_SPECIALS];
  u32 static_smem_bytes, smem_bytes, local_bytes, num_regions;
  s32 check_mem, check_init, check_race, async_mode, random_schedule, num_threads, smem_granule_log2;
  volatile s32 stop;     /* set by the first fault, or from outside */
  Report report;
} Launch;

typedef struct AsyncQueue AsyncQueue; /* async.c */
typedef struct CtaRaces CtaRaces;     /* race.c */

enum { RUNNABLE, AT_BARRIER, FINISHED };

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
  s32 next;               /* row where the active group goes on */
  s32 regroup;            /* the group has split or moved: choose anew */
  s32 pc[WARP_SIZE];      /* where lanes outside the active group stand */
  const Row *meet;        /* lanes outside the group stand at this row: stop there and join them */
  s64 budget;             /* rows until the warp must yield */
  s32 state;
  s32 barrier;            /* the barrier it waits at */
  const Row *barrier_row; /* for a reduction's result */
  AsyncQueue *async;
  /* race checker */
  u32 clock;              /* counts the warp's synchronisations; an access carries the clock of its time */
  u32 full_sync;          /* clock of the last synchronisation of the whole warp */
  u32 fence_clock;        /* clock at the last memory fence, 0 none */
  u32 *vc;                /* vc[w]: accesses of warp w with a smaller clock happened before now */
  u32 *pair;              /* [lane][lane] clock of their last common partial synchronisation, or NULL */
};

typedef struct {
  u32 threads;            /* arrived so far */
  u32 warps;              /* warps that wait */
  u32 num_arrived_warps;
  u32 expected;           /* 0: all threads of the CTA */
  u32 popc, any, all;     /* of a reduction */
  u32 vc[MAX_WARPS];
} Barrier;

struct Cta {
  Launch *launch;
  u32 index;              /* linear */
  u32 ctaid[3];
  u32 num_warps, num_live_warps, num_threads;
  u8 *smem;               /* byte 0 is shared address SHARED_BASE */
  u8 *smem_state;         /* or NULL */
  u8 *local;              /* [thread][local_bytes] */
  u8 *local_state;        /* or NULL */
  Warp *warps;
  u64 random;
  u32 barrier_epoch;      /* counts barriers of the whole CTA */
  CtaRaces *races;
  Barrier barriers[NUM_BARRIERS];
};

/* Shared addresses start here, so that a null pointer is no shared address; generic addresses carry their window. */
#define SHARED_BASE 1024u
#define LOCAL_BASE 64u
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
