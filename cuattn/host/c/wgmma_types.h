/* wgmma: what a row says, and what is in flight.
 *
 * Four warps (a warpgroup) issue the same sequence of wgmma. An operation is numbered by its place in that sequence; it
 * is carried out once, for all four, when the schedule or a wait says so. */
#ifndef CUATTN_WGMMA_TYPES_H
#define CUATTN_WGMMA_TYPES_H

enum { WGMMA_F16, WGMMA_BF16, WGMMA_TF32, WGMMA_E4M3, WGMMA_E5M2, WGMMA_S8, WGMMA_U8 };
enum { WGMMA_TO_F32, WGMMA_TO_F16, WGMMA_TO_S32 };

/* Flags of a row, written by lowering/wgmma.py. */
#define WGMMA_TYPE_A(flags) ((flags) & 7)
#define WGMMA_TYPE_B(flags) ((flags) >> 3 & 7)
#define WGMMA_TYPE_D(flags) ((flags) >> 6 & 3)
#define WGMMA_A_REGISTERS 0x100
#define WGMMA_A_MN_MAJOR 0x200
#define WGMMA_B_MN_MAJOR 0x400
#define WGMMA_NEGATIVE 0x800 /* the product of the two imm-scale */
#define WGMMA_SATURATE 0x1000
#define WGMMA_N(flags) ((u32)((flags) >> 16 & 63) * 8)
#define WGMMA_SHAPE_D(flags) ((u32)(flags) & 0x3f00c0) /* n and the type of D */

/* Operands of a row: A (a descriptor, or four registers), B's descriptor, scale-d, the index of its side registers. */
enum { WGMMA_AT_A, WGMMA_AT_B = 4, WGMMA_AT_SCALE, WGMMA_AT_SIDE };

enum {
  WGMMA_M = 64, WARPGROUP = 4, WARP_ROWS = 16, WGMMA_MAX_N = 256,
  CHUNK = 16,             /* bytes of the unit that swizzles permute; every operand is 32 bytes deep: two chunks */
  TILE_LD = 272,          /* elements from row to row of an accumulator tile */
  PANEL = 48,             /* columns of a packed panel of B */
  MAX_K = 256,            /* elements of k of one matrix product; with it sums of 8-bit products are exact in f32 */
  MAX_IN_FLIGHT = 128     /* operations, and groups, between issue and wait */
};

/* A set of accumulator registers while operations on it are in flight. The tile is where their value is. */
typedef struct {
  const s32 *slots;
  u32 num_slots, shape;   /* shape: what the flags say of D and n */
  u32 pending[WARPGROUP]; /* operations that each warp has issued and not waited for */
  u32 *tile;              /* [64][TILE_LD]: f32 or s32; f16 as f32 */
} WgmmaChain;

typedef struct {
  const Row *row;
  u64 a, b;               /* descriptors */
  WgmmaChain *chain;
  u32 scale_d, issued;    /* issued: warps, a bit each */
  u8 fragments[WGMMA_M][2][CHUNK]; /* A from registers, copied at issue */
} WgmmaOp;

typedef struct {
  u32 origin;             /* the operation that sits in ops[0] */
  u32 num_ops, num_groups, executed; /* known, known, carried out */
  u32 ends[MAX_IN_FLIGHT]; /* of group g: the operation after its last */
  u32 num_chains;
  WgmmaChain **chains;
  WgmmaOp ops[MAX_IN_FLIGHT];
} WgmmaGroup;

/* A warp's part. Slots are numbered by their place in the register file, in units of 128 bytes. */
struct WgmmaQueue {
  WgmmaGroup *group;      /* the leader's (warp 0 of four) is the one in use */
  float *packed;          /* the leader's: A and B of one product */
  u32 issued, retired;    /* operations */
  u32 committed, waited;  /* groups */
  u32 fences;
  u32 num_slots;
  u32 *accumulator_until, *fragment_until; /* [slots] in flight until that many operations are retired */
  u32 *accessed, *written; /* [slots] by ordinary instructions: number of fences at that time, plus 1 */
};

static inline u32 wgmma_accumulators(int flags) { return WGMMA_N(flags) / (WGMMA_TYPE_D(flags) == WGMMA_TO_F16 ? 4 : 2); }

static void *uncleared(size_t bytes); /* scheduler.c */
static void *zeroed(size_t bytes);

#endif
