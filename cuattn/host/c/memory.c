/* From a lane's address to host memory, with the checks on the way.
 *
 * Global addresses are host pointers. Shared addresses are 32-bit offsets from SHARED_BASE, local ones from LOCAL_BASE
 * within each thread's stretch; generic addresses carry their window in the top bits. */
#include <string.h>

/* ---- initialisation states */

/* Whether all of `bits` are set in each state. */
static inline int bytes_have(const u8 *state, u32 bytes, u8 bits) {
  const u64 wanted = bits * 0x0101010101010101ull;
  if (bytes == 4) {
    u32 word;
    memcpy(&word, state, sizeof word);
    return (word & (u32)wanted) == (u32)wanted;
  }
  u64 all = wanted, word;
  u32 at = 0;
  for (; at + sizeof word <= bytes; at += sizeof word) {
    memcpy(&word, state + at, sizeof word);
    all &= word;
  }
  for (; at < bytes; at++) all &= ~0xffull | state[at];
  return (all & wanted) == wanted;
}

static inline int bytes_ready(const u8 *state, u32 bytes) { return bytes_have(state, bytes, BYTE_READY); }

/* What memset does, without a call for the sizes of accesses. */
static inline void set_bytes(u8 *to, u8 value, u32 bytes) {
  if (bytes == 16) memset(to, value, 16);
  else if (bytes == 8) memset(to, value, 8);
  else if (bytes == 4) memset(to, value, 4);
  else memset(to, value, bytes);
}

/* Check an access against byte states and note what it writes. Returns STEP or FAILED. */
static int check_states(Warp *warp, const Row *row, int lane, u8 *state, u64 address, u32 bytes, Access access, const char *space) {
  const Launch *launch = warp->cta->launch;
  if (launch->check_mem && !bytes_have(state, bytes, BYTE_ADDRESSABLE))
    return fail(warp, row, lane, FAULT_MEMORY, address, "%u-byte %s of %s memory between the elements of an array",
                bytes, access_name(access), space);
  if (access_reads(access) && launch->check_init && !bytes_ready(state, bytes))
    return fail(warp, row, lane, FAULT_UNINITIALIZED, address, "%u-byte %s of %s memory that nothing has written",
                bytes, access_name(access), space);
  if (access_writes(access)) set_bytes(state, BYTE_READY, bytes);
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
