/* wgmma operands in shared memory: matrix descriptors, and where each 16-byte chunk of a matrix is.
 *
 * A K-major matrix has a line for every row of A or column of B, and two chunks (32 bytes of k) in a line. An MN-major
 * one has a line for every k, with a chunk for every eight rows or columns. Eight lines make a group.
 *
 *                K-major                                        MN-major (W = chunks in the swizzle's span)
 *   no swizzle   16 l + SBO group + LBO chunk                   16 l + LBO group + SBO chunk
 *   swizzled     span l + SBO group + 16 chunk                  span l + SBO group + 16 (chunk % W) + LBO (chunk / W)
 *
 * (l: line in its group.) A swizzle then permutes the chunks of the span: bits 4-6 of the address ^= bits 7-9, counted
 * from the start of the pattern, which the descriptor's base offset gives. */

typedef struct {
  u32 start, leading, stride, base_offset;
  u32 span, mask;         /* bytes that a swizzle permutes (16: none), and the address bits that take part */
} WgmmaMatrix;

static WgmmaMatrix wgmma_matrix(u64 descriptor) {
  static const u8 spans[4] = {16, 128, 64, 32};
  u32 span = spans[descriptor >> 62];
  return (WgmmaMatrix){
    .start = (u32)(descriptor & 0x3fff) << 4,
    .leading = (u32)(descriptor >> 16 & 0x3fff) << 4,
    .stride = (u32)(descriptor >> 32 & 0x3fff) << 4,
    .base_offset = (u32)(descriptor >> 49 & 7),
    .span = span,
    .mask = span / CHUNK - 1,
  };
}

/* Shared address of a chunk. */
static inline u32 chunk_address(const WgmmaMatrix *matrix, int mn_major, u32 line, u32 chunk) {
  u32 in_group = line % 8, group = line / 8, address;
  if (matrix->mask == 0)
    address = matrix->start + CHUNK * in_group + (mn_major ? matrix->leading * group + matrix->stride * chunk
                                                           : matrix->stride * group + matrix->leading * chunk);
  else if (mn_major)
    address = matrix->start + matrix->span * in_group + matrix->stride * group + CHUNK * (chunk & matrix->mask) +
              matrix->leading * (chunk / (matrix->mask + 1));
  else
    address = matrix->start + matrix->span * in_group + matrix->stride * group + CHUNK * chunk;
  return address ^ (((address >> 7) - matrix->base_offset) & matrix->mask) << 4;
}

static int chunk_outside(Warp *warp, const Row *row, u32 address, char operand) {
  return fail(warp, row, 0, FAULT_MEMORY, address, "the descriptor of %c leads wgmma to shared address 0x%x (byte %lld), outside the CTA's %u bytes",
              operand, address, (long long)address - SHARED_BASE, warp->cta->launch->smem_bytes);
}

/* Host pointer of a chunk, NULL outside. */
static inline const u8 *chunk_pointer(const Cta *cta, u32 address) {
  u32 offset = address - SHARED_BASE;
  return offset < cta->launch->smem_bytes && offset + CHUNK <= cta->launch->smem_bytes ? cta->smem + offset : NULL;
}

static inline int check_stretch(Warp *warp, const Row *row, AsyncReads *reads, u32 address, u32 bytes) {
  const u8 *state = warp->cta->smem_state;
  u32 offset = address - SHARED_BASE;
  if (state && !bytes_ready(state + offset, bytes)) return check_states(warp, row, 0, warp->cta->smem_state + offset, address, bytes, ACCESS_READ, "shared");
  return race_async_read(reads, offset, bytes);
}

/* The part of an operand that a warp reads must be in bounds, written, and ordered before the issue. Lines and chunks
 * [from, to). The chunks of a line that a swizzle permutes mostly make one stretch of memory. */
static int wgmma_check_operand(Warp *warp, const Row *row, u64 descriptor, int mn_major, char operand, const u32 lines[2], const u32 chunks[2]) {
  WgmmaMatrix matrix = wgmma_matrix(descriptor);
  AsyncReads reads = race_async_reads(warp, row, 0, warp->cta, actor_of_warpgroup(warp->cta, warp->id));
  u32 together = mn_major ? matrix.mask + 1 : 2;
  for (u32 line = lines[0]; line < lines[1]; line++)
    for (u32 first = chunks[0]; first < chunks[1]; first += together) {
      u32 count = chunks[1] - first < together ? chunks[1] - first : together, low = UINT32_MAX, high = 0;
      u32 addresses[8];
      for (u32 i = 0; i < count; i++) {
        u32 address = addresses[i] = chunk_address(&matrix, mn_major, line, first + i);
        if (!chunk_pointer(warp->cta, address)) return chunk_outside(warp, row, address, operand);
        low = address < low ? address : low;
        high = address > high ? address : high;
      }
      if (high - low + CHUNK == count * CHUNK) {
        if (check_stretch(warp, row, &reads, low, count * CHUNK)) return FAILED;
        continue;
      }
      for (u32 i = 0; i < count; i++)
        if (check_stretch(warp, row, &reads, addresses[i], CHUNK)) return FAILED;
    }
  return STEP;
}
