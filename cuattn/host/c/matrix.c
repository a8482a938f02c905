/* ldmatrix and stmatrix: 8 x 8 matrices of 16-bit elements between shared memory and fragments.
 *
 * Lane 8 m + r gives the address of row r of matrix m. Without .trans lane l receives elements 2 (l % 4) and the next
 * of row l / 4; with .trans those of column l / 4. */
#include <string.h>

/* flags: MEM_* with the count of matrices, bit 12: transposed */
#define MATRIX_TRANS 4096

static int matrix_rows(Warp *warp, const Row *row, int address_at, int count, Access access, u8 **rows) {
  REQUIRE_LANES(warp, row, ALL_LANES);
  if (warp->exec != ALL_LANES) return fail(warp, row, -1, FAULT_DIVERGENCE, 0, "a matrix move needs all 32 lanes; %08x take part", warp->exec);
  Cta *cta = warp->cta;
  if (cta->races) race_warp_sync(warp, ALL_LANES);
  int wide = row->flags & MEM_WIDE_ADDRESS;
  u64 addresses[WARP_SIZE], offset = (u64)(s64)row->a[address_at + 1], window = MEM_SPACE(row->flags) == SPACE_GENERIC ? GENERIC_SHARED : 0;
  for (int i = 0; i < WARP_SIZE; i++) addresses[i] = ((wide ? SLOT(u64, address_at)[i] : SLOT(u32, address_at)[i]) + offset) & ~window;
  if (shared_pointers(warp, row, addresses, ALL_LANES >> (WARP_SIZE - 8 * count), 16, access, rows)) return FAILED;
  if (cta->launch->count_bytes)
    __atomic_fetch_add(&cta->launch->count_bytes[row - cta->launch->rows], (u64)count * 128, __ATOMIC_RELAXED);
  return STEP;
}

/* a: destinations, address, offset */
static int op_ldmatrix(Warp *warp, const Row *row) {
  u8 *rows[WARP_SIZE];
  int count = MEM_COUNT(row->flags);
  int status = matrix_rows(warp, row, count, count, ACCESS_READ, rows);
  if (status != STEP) return status;
  for (int m = 0; m < count; m++) {
    u32 *dst = SLOT(u32, m);
    if (!(row->flags & MATRIX_TRANS)) {
      for (int r = 0; r < 8; r++) memcpy(dst + 4 * r, rows[8 * m + r], 16);
      continue;
    }
    for (int pair = 0; pair < 4; pair++) { /* rows 2 pair and 2 pair + 1 go to lanes with l % 4 == pair */
      u16 even[8], odd[8];
      memcpy(even, rows[8 * m + 2 * pair], 16);
      memcpy(odd, rows[8 * m + 2 * pair + 1], 16);
      for (int column = 0; column < 8; column++) dst[4 * column + pair] = even[column] | (u32)odd[column] << 16;
    }
  }
  return STEP;
}

/* a: address, offset, sources */
static int op_stmatrix(Warp *warp, const Row *row) {
  u8 *rows[WARP_SIZE];
  int count = MEM_COUNT(row->flags);
  int status = matrix_rows(warp, row, 0, count, ACCESS_WRITE, rows);
  if (status != STEP) return status;
  for (int m = 0; m < count; m++) {
    const u32 *src = SLOT(u32, 2 + m);
    for (int lane = 0; lane < WARP_SIZE; lane++) {
      int g = lane / 4, t = lane % 4;
      if (row->flags & MATRIX_TRANS) {
        memcpy(rows[8 * m + 2 * t] + 2 * g, &src[lane], 2);
        memcpy(rows[8 * m + 2 * t + 1] + 2 * g, (const u8 *)&src[lane] + 2, 2);
      } else {
        memcpy(rows[8 * m + g] + 4 * t, &src[lane], 4);
      }
    }
  }
  return STEP;
}

static const OpEntry ops_matrix[] = {{"ldmatrix", op_ldmatrix}, {"stmatrix", op_stmatrix}, {0, 0}};
