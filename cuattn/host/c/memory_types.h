/* Spaces, kinds of access, and the flags of a memory row. */
#ifndef CUATTN_MEMORY_TYPES_H
#define CUATTN_MEMORY_TYPES_H

#include "executor.h"

enum { SPACE_GENERIC, SPACE_GLOBAL, SPACE_SHARED, SPACE_LOCAL, SPACE_PARAM, SPACE_CLUSTER };

/* flags of a memory row */
#define MEM_SPACE(flags) ((flags) & 7)
#define MEM_WIDE_ADDRESS 8
#define MEM_SIZE_LOG2(flags) (((flags) >> 4) & 3)
#define MEM_SIGNED 64
#define MEM_WIDE_REGISTER 128
#define MEM_COUNT(flags) (((flags) >> 8) & 15)
#define MEM_ACQUIRE 4096
#define MEM_RELEASE 8192
#define MEM_STRONG 16384 /* relaxed and above */

/* Strong accesses (relaxed and above) do not race among themselves; an update is an atomic read and write. */
typedef enum { ACCESS_READ, ACCESS_WRITE, ACCESS_STRONG_READ, ACCESS_STRONG_WRITE, ACCESS_UPDATE } Access;
static inline int access_is_strong(Access access) { return access >= ACCESS_STRONG_READ; }
static inline int access_reads(Access access) { return access != ACCESS_WRITE && access != ACCESS_STRONG_WRITE; }
static inline int access_writes(Access access) { return access != ACCESS_READ && access != ACCESS_STRONG_READ; }

static inline const char *access_name(Access access) {
  static const char *const names[] = {"read", "write", "strong read", "strong write", "atomic update"};
  return names[access];
}

#endif
