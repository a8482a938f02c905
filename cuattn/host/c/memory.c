/* Loads, stores and atomics: from a lane's address to host memory, with the checks on the way.
 *
 * Global addresses are host pointers. Shared addresses are 32-bit offsets from SHARED_BASE, local ones from LOCAL_BASE
 * within each thread's stretch; generic addresses carry their window in the top bits. */
#include <string.h>

/* ---- initialisation states */

/* Whether all of `bits` are set in each state. Most accesses that are checked are of 16 bytes. */
static inline int bytes_have(const u8 *state, u32 bytes, u8 bits) {
  if (bytes == 16) {
    u64 halves[2], wanted = bits * 0x0101010101010101ull;
    memcpy(halves, state, sizeof halves);
    return (halves[0] & halves[1] & wanted) == wanted;
  }
  u8 all = bits;
  for (u32 i = 0; i < bytes; i++) all &= state[i];
  return all == bits;
}

static inline int bytes_ready(const u8 *state, u32 bytes) { return bytes_have(state, bytes, BYTE_READY); }

/* Check an access against byte states and note what it writes. Returns STEP or FAILED. */
static int check_states(Warp *warp, const Row *row, int lane, u8 *state, u64 address, u32 bytes, Access access, const char *space) {
  const Launch *launch = warp->cta->launch;
  if (launch->check_mem && !bytes_have(state, bytes, BYTE_ADDRESSABLE))
    return fail(warp, row, lane, FAULT_MEMORY, address, "%u-byte %s of %s memory between the elements of an array",
                bytes, access_name(access), space);
  if (access_reads(access) && launch->check_init && !bytes_ready(state, bytes))
    return fail(warp, row, lane, FAULT_UNINITIALIZED, address, "%u-byte %s of %s memory that nothing has written",
                bytes, access_name(access), space);
  if (access_writes(access)) memset(state, BYTE_READY, bytes);
  return STEP;
}

/* ---- the windows */

static int shared_pointer(Warp *warp, const Row *row, int lane, u64 address, u32 bytes, Access access, u8 **pointer) {
  Cta *cta = warp->cta;
  Launch *launch = cta->launch;
  u64 offset = address - SHARED_BASE;
  if (address < SHARED_BASE || offset + bytes > launch->smem_bytes)
    return fail(warp, row, lane, FAULT_MEMORY, address,
                "%u-byte %s at shared address 0x%llx (byte %lld) outside the CTA's %u bytes", bytes, access_name(access),
                (unsigned long long)address, (long long)offset, launch->smem_bytes);
  if (address % bytes)
    return fail(warp, row, lane, FAULT_MEMORY, address, "misaligned %u-byte %s at shared byte %llu", bytes, access_name(access), (unsigned long long)offset);
  if (launch->check_mem && cta->mbarriers.count && mbarrier_overlap(cta, (u32)offset, bytes))
    return fail(warp, row, lane, FAULT_MEMORY, address, "%u-byte %s at shared byte %llu, where an mbarrier lives", bytes, access_name(access), (unsigned long long)offset);
  if (cta->smem_state && check_states(warp, row, lane, cta->smem_state + offset, offset, bytes, access, "shared")) return FAILED;
  if (cta->races && race_shared(warp, row, lane, (u32)offset, bytes, access)) return FAILED;
  *pointer = cta->smem + offset;
  return STEP;
}

/* The shared memory of any CTA of the cluster. */
static int cluster_pointer(Warp *warp, const Row *row, int lane, u64 address, u32 bytes, Access access, u8 **pointer) {
  Cta *target = NULL;
  u32 offset = 0;
  if (cluster_target(warp, row, lane, address, &target, &offset)) return FAILED;
  if (target == warp->cta) return shared_pointer(warp, row, lane, offset + SHARED_BASE, bytes, access, pointer);
  if (offset + bytes > target->launch->smem_bytes || offset % bytes)
    return fail(warp, row, lane, FAULT_MEMORY, address, "%u-byte %s at byte %u of the shared memory of CTA %u: misaligned, or outside its %u bytes",
                bytes, access_name(access), offset, target->rank, target->launch->smem_bytes);
  if (target->launch->check_mem && mbarrier_overlap(target, offset, bytes))
    return fail(warp, row, lane, FAULT_MEMORY, address, "%u-byte %s at byte %u of CTA %u, where an mbarrier lives", bytes, access_name(access), offset, target->rank);
  if (target->smem_state && check_states(warp, row, lane, target->smem_state + offset, offset, bytes, access, "shared")) return FAILED;
  if (target->races && race_distributed(warp, row, lane, target, offset, bytes, access)) return FAILED;
  *pointer = target->smem + offset;
  return STEP;
}

static int local_pointer(Warp *warp, const Row *row, int lane, u64 address, u32 bytes, Access access, u8 **pointer) {
  Cta *cta = warp->cta;
  u32 size = cta->launch->local_bytes;
  u64 offset = address - LOCAL_BASE;
  if (address < LOCAL_BASE || offset + bytes > size)
    return fail(warp, row, lane, FAULT_MEMORY, address, "%u-byte %s at byte %lld of %u bytes of local memory", bytes, access_name(access), (long long)offset, size);
  if (address % bytes)
    return fail(warp, row, lane, FAULT_MEMORY, address, "misaligned %u-byte %s at local byte %llu", bytes, access_name(access), (unsigned long long)offset);
  u64 base = (u64)(warp->id * WARP_SIZE + (u32)lane) * size + offset;
  if (cta->local_state && check_states(warp, row, lane, cta->local_state + base, offset, bytes, access, "local")) return FAILED;
  *pointer = cta->local + base;
  return STEP;
}

static Region *find_region(const Launch *launch, u64 address, u32 bytes) {
  for (u32 i = 0; i < launch->num_regions; i++) {
    Region *region = &launch->regions[i];
    if (address >= region->base && address + bytes <= region->end) return region;
  }
  return NULL;
}

static int global_outside(Warp *warp, const Row *row, int lane, u64 address, u32 bytes, Access access) {
  const Launch *launch = warp->cta->launch;
  const Region *nearest = NULL;
  u64 distance = ~0ull;
  for (u32 i = 0; i < launch->num_regions; i++) {
    const Region *region = &launch->regions[i];
    u64 away = address < region->base ? region->base - address : address + bytes - region->end;
    if (away < distance) distance = away, nearest = region;
  }
  if (!nearest) return fail(warp, row, lane, FAULT_MEMORY, address, "%u-byte %s at 0x%llx, which is in no argument array", bytes, access_name(access), (unsigned long long)address);
  return fail(warp, row, lane, FAULT_MEMORY, address,
              "%u-byte %s at 0x%llx, which is in no argument array: the nearest is argument %d (%llu bytes), byte %lld of it", bytes,
              access_name(access), (unsigned long long)address, nearest->argument, (unsigned long long)(nearest->end - nearest->base),
              (long long)(address - nearest->base));
}

/* Whether an access to global memory has anything to be checked for. */
static inline int global_is_checked(const Launch *launch, Access access) {
  return launch->check_mem | launch->check_init | launch->check_race | (access_writes(access) && launch->num_read_only);
}

/* A write into an array that NumPy calls read-only: it may be a file, a constant, or many elements in one place. */
static int check_read_only(Warp *warp, const Row *row, int lane, u64 address, u32 bytes, Access access) {
  const Launch *launch = warp->cta->launch;
  if (!access_writes(access)) return STEP;
  for (u32 i = 0; i < launch->num_read_only; i++) {
    const ReadOnly *stretch = &launch->read_only[i];
    if (address < stretch->end && address + bytes > stretch->base)
      return fail(warp, row, lane, FAULT_MEMORY, address, "%u-byte %s at byte %lld of argument %d, a read-only array", bytes,
                  access_name(access), (long long)(address - stretch->base), (int)stretch->argument);
  }
  return STEP;
}

/* Bounds, alignment and initialisation of a global access. Without the memory checker an address outside every array is
 * trusted, as on a GPU: then there is no region. */
static int global_region(Warp *warp, const Row *row, int lane, u64 address, u32 bytes, Access access, Region **found) {
  Launch *launch = warp->cta->launch;
  Region *region = *found = find_region(launch, address, bytes);
  if (!region) return launch->check_mem ? global_outside(warp, row, lane, address, bytes, access) : STEP;
  if (launch->check_mem && address % bytes)
    return fail(warp, row, lane, FAULT_MEMORY, address, "misaligned %u-byte %s at byte %llu of argument %d", bytes, access_name(access),
                (unsigned long long)(address - region->base), region->argument);
  if (region->state) return check_states(warp, row, lane, region->state + (address - region->base), address, bytes, access, "global");
  return STEP;
}

static int global_pointer(Warp *warp, const Row *row, int lane, u64 address, u32 bytes, Access access, u8 **pointer) {
  Launch *launch = warp->cta->launch;
  *pointer = (u8 *)address;
  if (!global_is_checked(launch, access)) return STEP;
  if (check_read_only(warp, row, lane, address, bytes, access)) return FAILED;
  Region *region;
  if (global_region(warp, row, lane, address, bytes, access, &region)) return FAILED;
  return region && region->writes ? race_global(warp, row, lane, region, address, bytes, access) : STEP;
}

static int lane_pointer(Warp *warp, const Row *row, int lane, int space, u64 address, u32 bytes, Access access, u8 **pointer) {
  if (space == SPACE_GENERIC) {
    if (address & GENERIC_SHARED) space = SPACE_CLUSTER, address &= ~GENERIC_SHARED;
    else if (address & GENERIC_LOCAL) space = SPACE_LOCAL, address &= ~GENERIC_LOCAL;
    else space = SPACE_GLOBAL;
  }
  if (space == SPACE_SHARED) return shared_pointer(warp, row, lane, (u32)address, bytes, access, pointer);
  if (space == SPACE_CLUSTER) return address >> CLUSTER_RANK_SHIFT ? cluster_pointer(warp, row, lane, address, bytes, access, pointer)
                                                                  : shared_pointer(warp, row, lane, (u32)address, bytes, access, pointer);
  if (space == SPACE_LOCAL) return local_pointer(warp, row, lane, (u32)address, bytes, access, pointer);
  return global_pointer(warp, row, lane, address, bytes, access, pointer);
}

/* Host pointers of all executing lanes, `bytes` each. a[address_at] is the address slot, a[address_at + 1] the offset. */
static int resolve(Warp *warp, const Row *row, int address_at, u32 bytes, Access access, u8 **pointers) {
  const Launch *launch = warp->cta->launch;
  int space = MEM_SPACE(row->flags);
  s64 offset = row->a[address_at + 1];
  const u64 *wide = (const u64 *)(warp->regs + row->a[address_at]);
  const u32 *narrow = (const u32 *)wide;
  if (launch->count_bytes)
    __atomic_fetch_add(&launch->count_bytes[row - launch->rows], (u64)__builtin_popcount(warp->exec) * bytes, __ATOMIC_RELAXED);
  if (space == SPACE_GLOBAL && (row->flags & MEM_WIDE_ADDRESS) && !global_is_checked(launch, access)) {
    for (int i = 0; i < WARP_SIZE; i++) pointers[i] = (u8 *)(wide[i] + (u64)offset);
    return STEP;
  }
  for (u32 rest = warp->exec; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    u64 address = (row->flags & MEM_WIDE_ADDRESS ? wide[lane] : narrow[lane]) + (u64)offset;
    if (lane_pointer(warp, row, lane, space, address, bytes, access, &pointers[lane])) return FAILED;
  }
  return STEP;
}

/* ---- ld and st: destinations or sources (MEM_COUNT of them) stand beside the address and its offset */

#define LOAD_LANES(T, R)                                                      \
  for (int v = 0; v < count; v++) {                                           \
    R *dst = (R *)(warp->regs + row->a[v]);                                   \
    for (u32 rest = warp->exec; rest; rest &= rest - 1) {                     \
      int lane = __builtin_ctz(rest);                                         \
      T value;                                                                \
      memcpy(&value, pointers[lane] + v * (int)sizeof(T), sizeof(T));         \
      dst[lane] = (R)value;                                                   \
    }                                                                         \
  }

static int op_ld(Warp *warp, const Row *row) {
  u8 *pointers[WARP_SIZE];
  int flags = row->flags, count = MEM_COUNT(flags);
  Access access = flags & MEM_STRONG ? ACCESS_STRONG_READ : ACCESS_READ;
  if (resolve(warp, row, count, (u32)count << MEM_SIZE_LOG2(flags), access, pointers)) return FAILED;
  int is_signed = flags & MEM_SIGNED, wide = flags & MEM_WIDE_REGISTER;
  switch (MEM_SIZE_LOG2(flags) | (is_signed ? 4 : 0) | (wide ? 8 : 0)) {
    case 0: LOAD_LANES(u8, u32) break;
    case 1: LOAD_LANES(u16, u32) break;
    case 2: case 6: LOAD_LANES(u32, u32) break;
    case 4: LOAD_LANES(s8, s32) break;
    case 5: LOAD_LANES(s16, s32) break;
    case 8: LOAD_LANES(u8, u64) break;
    case 9: LOAD_LANES(u16, u64) break;
    case 10: LOAD_LANES(u32, u64) break;
    case 11: case 15: LOAD_LANES(u64, u64) break;
    case 12: LOAD_LANES(s8, s64) break;
    case 13: LOAD_LANES(s16, s64) break;
    case 14: LOAD_LANES(s32, s64) break;
    default: return fail(warp, row, -1, FAULT_INTERNAL, 0, "load of unknown size");
  }
  if (flags & MEM_ACQUIRE && warp->cta->races) race_acquire(warp, pointers, MEM_SPACE(flags));
  return STEP;
}

#define STORE_LANES(T)                                                        \
  for (int v = 0; v < count; v++) {                                           \
    int wide = row->flags & MEM_WIDE_REGISTER;                                \
    const u8 *src = warp->regs + row->a[2 + v];                               \
    for (u32 rest = warp->exec; rest; rest &= rest - 1) {                     \
      int lane = __builtin_ctz(rest);                                         \
      memcpy(pointers[lane] + v * (int)sizeof(T), src + lane * (wide ? 8 : 4), sizeof(T)); \
    }                                                                         \
  }

static int op_st(Warp *warp, const Row *row) {
  u8 *pointers[WARP_SIZE];
  int flags = row->flags, count = MEM_COUNT(flags);
  Access access = flags & MEM_STRONG ? ACCESS_STRONG_WRITE : ACCESS_WRITE;
  if (resolve(warp, row, 0, (u32)count << MEM_SIZE_LOG2(flags), access, pointers)) return FAILED;
  if (flags & MEM_RELEASE && warp->cta->races) {
    race_fence(warp);
    race_release(warp, pointers, MEM_SPACE(flags));
  }
  switch (MEM_SIZE_LOG2(flags)) {
    case 0: STORE_LANES(u8) break;
    case 1: STORE_LANES(u16) break;
    case 2: STORE_LANES(u32) break;
    default: STORE_LANES(u64) break;
  }
  return STEP;
}

/* Kernel parameters: the same bytes for every lane unless the address is computed. a: dst..., address slot, offset */
static int op_ld_param(Warp *warp, const Row *row) {
  int count = MEM_COUNT(row->flags), size = 1 << MEM_SIZE_LOG2(row->flags);
  for (int v = 0; v < count; v++) {
    const u8 *src = warp->cta->launch->params + row->a[count] + v * size;
    s64 value = 0;
    memcpy(&value, src, (size_t)size);
    if (row->flags & MEM_SIGNED) value = (s64)((u64)value << (64 - 8 * size)) >> (64 - 8 * size);
    if (row->flags & MEM_WIDE_REGISTER) {
      u64 *dst = SLOT(u64, v);
      for (u32 rest = warp->exec; rest; rest &= rest - 1) dst[__builtin_ctz(rest)] = (u64)value;
    } else {
      u32 *dst = SLOT(u32, v);
      for (u32 rest = warp->exec; rest; rest &= rest - 1) dst[__builtin_ctz(rest)] = (u32)value;
    }
  }
  return STEP;
}

/* Address of a parameter in this launch, for mov and cvta.param. */
static int op_param_address(Warp *warp, const Row *row) {
  u64 address = (u64)(uintptr_t)(warp->cta->launch->params + row->a[1]);
  EACH_LANE(u64, (address + 0 * (u64)i));
}

/* isspacep: which window a generic address lies in. flags: SPACE_* */
static int op_isspacep(Warp *warp, const Row *row) {
  const u64 *address = SLOT(u64, 1);
  u64 window = row->flags == SPACE_SHARED || row->flags == SPACE_CLUSTER ? GENERIC_SHARED : row->flags == SPACE_LOCAL ? GENERIC_LOCAL : 0;
  u64 mask = GENERIC_SHARED | GENERIC_LOCAL, own = (u64)(warp->cta->rank + 1) << CLUSTER_RANK_SHIFT;
  u64 rank = row->flags == SPACE_SHARED ? 0xffull << CLUSTER_RANK_SHIFT : 0; /* the window of the own CTA only */
  EACH_LANE(u32, ((address[i] & mask) == window && ((address[i] & rank) == 0 || (address[i] & rank) == own)));
}

static const OpEntry ops_memory[] = {
  {"ld", op_ld}, {"st", op_st}, {"ld_param", op_ld_param}, {"param_address", op_param_address}, {"isspacep", op_isspacep}, {0, 0},
};
