/* Reductions of bulk copies: each element of the destination becomes destination (operation) source. */
#include <string.h>

static inline u32 narrow_f32_of_f16(u32 h); /* narrow.c */
static inline u32 narrow_f32_of_bf16(u32 h);
static inline u32 narrow_f16_of_f32(u32 x);
static inline u32 narrow_bf16_of_f32(u32 x);

enum { NO_REDUCTION = -1 }; /* otherwise ATOM_* of atomic.c */

static const u8 data_bytes[NUM_DATA_TYPES] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2};

/* Which element types an operation on global memory has. */
static int reduction_exists(int operation, u32 type) {
  switch (operation) {
    case ATOM_ADD: return (type >= DATA_U32 && type != DATA_S64);
    case ATOM_MIN: case ATOM_MAX: return type >= DATA_U32 && type != DATA_F32 && type != DATA_F64;
    case ATOM_AND: case ATOM_OR: case ATOM_XOR: return type >= DATA_U32 && type <= DATA_S64;
    default: return type == DATA_U32; /* inc, dec */
  }
}

static inline float flushed(u32 bits) { return as_f32(bits & 0x7f800000u ? bits : bits & 0x80000000u); }

static inline u32 reduce_f32(u32 a, u32 b) {
  u32 sum = bits_f32(flushed(a) + flushed(b)); /* the documented behaviour: subnormals count as zeros */
  return bits_f32(flushed(sum));
}

static float reduce_half_value(int operation, float a, float b) {
  if (operation == ATOM_ADD) return a + b; /* f32 holds twice the bits and two more: rounding again is innocent */
  if (a != a) return b;
  if (b != b) return a;
  if (a == b) return (operation == ATOM_MIN) == (__builtin_signbit(a) != 0) ? a : b; /* -0 is below +0 */
  return (operation == ATOM_MIN) == (a < b) ? a : b;
}

static u32 reduce_half(int operation, int is_bf16, u32 a, u32 b) {
  float x = as_f32(is_bf16 ? narrow_f32_of_bf16(a) : narrow_f32_of_f16(a));
  float y = as_f32(is_bf16 ? narrow_f32_of_bf16(b) : narrow_f32_of_f16(b));
  u32 result = bits_f32(reduce_half_value(operation, x, y));
  return is_bf16 ? narrow_bf16_of_f32(result) : narrow_f16_of_f32(result);
}

/* Not inlined: the loop around it would be compiled anew for every type and operation. */
__attribute__((noinline)) static u64 reduce_value(int operation, u32 type, u64 old, u64 operand) {
  switch (type) {
    case DATA_U32: return (u32)atomic_result(operation, ATOM_U32, old, operand, 0);
    case DATA_S32: return (u32)atomic_result(operation, ATOM_S32, old, operand, 0);
    case DATA_U64: return atomic_result(operation, ATOM_U64, old, operand, 0);
    case DATA_S64: return atomic_result(operation, ATOM_S64, old, operand, 0);
    case DATA_F64: return atomic_result(operation, ATOM_F64, old, operand, 0);
    default: return reduce_half(operation, type == DATA_BF16, (u32)old, (u32)operand);
  }
}

static void reduce_elements(int operation, u32 type, u8 *to, const u8 *from, u32 bytes) {
  u32 size = data_bytes[type];
  if (type == DATA_F32) { /* sums of gradients: worth a loop that the compiler can vectorise */
    u32 *sum = (u32 *)to;
    const u32 *term = (const u32 *)from;
    IVDEP for (u32 i = 0; i < bytes / 4; i++) sum[i] = reduce_f32(sum[i], term[i]);
    return;
  }
  for (u32 i = 0; i < bytes; i += size) {
    u64 old = 0, operand = 0;
    memcpy(&old, to + i, size);
    memcpy(&operand, from + i, size);
    u64 result = reduce_value(operation, type, old, operand);
    memcpy(to + i, &result, size);
  }
}

typedef struct {
  u8 *memory;
  int operation;
  u32 type;
} ReduceContext;

static int reduce_piece(void *context, u32 shared, u64 global, u32 bytes, int inside) {
  const ReduceContext *reduce = context;
  if (inside) reduce_elements(reduce->operation, reduce->type, (u8 *)global, reduce->memory + shared, bytes);
  return STEP;
}

/* Into global memory, one lock for all of it as for other atomics. */
static void reduce_tile(const Tile *tile, u8 *memory, u32 shared, int operation) {
  lock(&global_atomics_lock);
  visit_tile(tile, shared, reduce_piece, &(ReduceContext){memory, operation, tile->data_type});
  unlock(&global_atomics_lock);
}
