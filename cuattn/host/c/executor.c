/* The executor as one translation unit, compiled once per instruction set (ISA names the symbols).
 * Order: what is used stands before its users. */
#include "executor.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "lock.c"
#include "report.c"
#include "memory_types.h"
#include "race_clocks.c"
#include "race.c"
#include "race_quick.c"
#include "race_async.c"
#include "race_global.c"
#include "control.c"
#include "cluster.c"
#include "mbarrier.c"
#include "setmaxnreg.c"
#include "memory.c"
#include "shared_access.c"
#include "global_access.c"
#include "load_store.c"
#include "atomic.c"
#include "collective.c"
#include "matrix.c"
#include "mma.c"
#include "async.c"
#include "bulk.c"
#include "wgmma.c"
#include "deadlock.c"
#include "caller.c"
#include "scheduler.c"
#include "op_files.h"
#include "ops.c"
