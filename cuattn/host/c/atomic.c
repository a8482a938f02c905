/* atom and red. One lock serves all of global memory: CTAs run on several threads of the host. */
#include <math.h>
#include <string.h>

enum { ATOM_ADD, ATOM_MIN, ATOM_MAX, ATOM_AND, ATOM_OR, ATOM_XOR, ATOM_EXCH, ATOM_CAS, ATOM_INC, ATOM_DEC };
enum { ATOM_U32, ATOM_S32, ATOM_U64, ATOM_S64, ATOM_F32, ATOM_F64 };

static volatile char global_atomics_lock;

#define INTEGER_ATOMIC(T)                                                     \
  do {                                                                        \
    T x = (T)old, y = (T)operand, z = (T)compare;                             \
    switch (operation) {                                                      \
      case ATOM_ADD: return (u64)(T)((u64)x + (u64)y);                        \
      case ATOM_MIN: return (u64)(x < y ? x : y);                             \
      case ATOM_MAX: return (u64)(x > y ? x : y);                             \
      case ATOM_AND: return (u64)(x & y);                                     \
      case ATOM_OR: return (u64)(x | y);                                      \
      case ATOM_XOR: return (u64)(x ^ y);                                     \
      case ATOM_EXCH: return (u64)y;                                          \
      case ATOM_CAS: return (u64)(x == y ? z : x);                            \
      case ATOM_INC: return (u64)(x >= y ? 0 : x + 1);                        \
      default: return (u64)(x == 0 || x > y ? y : x - 1);                     \
    }                                                                         \
  } while (0)

static u64 atomic_result(int operation, int type, u64 old, u64 operand, u64 compare) {
  switch (type) {
    case ATOM_U32: INTEGER_ATOMIC(u32);
    case ATOM_S32: INTEGER_ATOMIC(s32);
    case ATOM_U64: INTEGER_ATOMIC(u64);
    case ATOM_S64: INTEGER_ATOMIC(s64);
    case ATOM_F32: return bits_f32(as_f32((u32)old) + as_f32((u32)operand)); /* only add exists */
    default: return bits_f64(as_f64(old) + as_f64(operand));
  }
}

/* a: [dst], address, offset, operand, compare. flags: MEM_*, and from bit 16: operation, type, has a destination */
static int op_atom(Warp *warp, const Row *row) {
  int operation = row->flags >> 16 & 15, type = row->flags >> 20 & 15, has_dst = row->flags >> 24 & 1;
  int size = 1 << MEM_SIZE_LOG2(row->flags), at = has_dst;
  u8 *pointers[WARP_SIZE];
  if (resolve(warp, row, at, (u32)size, ACCESS_UPDATE, pointers)) return FAILED;
  Cta *cta = warp->cta;
  if (cta->races) {
    if (row->flags & MEM_RELEASE) race_fence(warp);
    race_release(warp, pointers, MEM_SPACE(row->flags));
    race_acquire(warp, pointers, MEM_SPACE(row->flags));
    if (row->flags & MEM_ACQUIRE) race_fence(warp);
  }
  int wide = size == 8;
  lock(&global_atomics_lock);
  for (u32 rest = warp->exec; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    u64 old = 0, operand, compare = 0;
    memcpy(&old, pointers[lane], (size_t)size);
    operand = wide ? SLOT(u64, at + 2)[lane] : SLOT(u32, at + 2)[lane];
    if (operation == ATOM_CAS) compare = wide ? SLOT(u64, at + 3)[lane] : SLOT(u32, at + 3)[lane];
    u64 result = atomic_result(operation, type, old, operand, compare);
    memcpy(pointers[lane], &result, (size_t)size);
    if (has_dst) {
      if (wide) SLOT(u64, 0)[lane] = old;
      else SLOT(u32, 0)[lane] = (u32)old;
    }
  }
  unlock(&global_atomics_lock);
  return STEP;
}

static int op_fence(Warp *warp, const Row *row) {
  (void)row;
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  if (warp->cta->races) race_fence(warp);
  return STEP;
}

static const OpEntry ops_atomic[] = {{"atom", op_atom}, {"fence", op_fence}, {0, 0}};
