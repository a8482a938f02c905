/* Faults: the first one of a launch is kept, with the thread, the row and the address. */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static void thread_position(const Cta *cta, u32 linear, u32 tid[3]) {
  const u32 *block = cta->launch->block;
  tid[0] = linear % block[0];
  tid[1] = linear / block[0] % block[1];
  tid[2] = linear / (block[0] * block[1]);
}

/* Report a fault of `lane` (or -1: the first executing lane). Always returns FAILED. */
__attribute__((format(printf, 7, 8))) static int
fail_pair(const Warp *warp, const Row *row, int lane, int kind, u64 address, s32 other_row, const char *format, ...) {
  Cta *cta = warp->cta;
  Launch *launch = cta->launch;
  s32 expected = 0;
  if (!__atomic_compare_exchange_n(&launch->stop, &expected, 1, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) return FAILED;
  Report *report = &launch->report;
  report->kind = kind;
  report->row = row ? (s32)(row - launch->rows) : -1;
  report->other_row = other_row;
  report->address = address;
  memcpy(report->ctaid, cta->ctaid, sizeof report->ctaid);
  if (lane < 0) lane = warp->exec ? __builtin_ctz(warp->exec) : 0;
  thread_position(cta, warp->id * WARP_SIZE + (u32)lane, report->tid);
  va_list args;
  va_start(args, format);
  vsnprintf(report->message, sizeof report->message, format, args);
  va_end(args);
  return FAILED;
}

#define fail(warp, row, lane, kind, address, ...) fail_pair(warp, row, lane, kind, address, -1, __VA_ARGS__)
