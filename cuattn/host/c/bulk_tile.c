/* What a bulk copy moves: a tile of rows, contiguous in shared memory, anywhere in global memory.
 *
 * A tensor map and the coordinates of a box make such a tile; a plain bulk copy is a tile of one row. A row lies whole
 * inside the array but for its ends, or whole outside: what is outside is filled by loads and skipped by stores. Within
 * a swizzled row the 16-byte pieces are permuted by bits 7 to 9 of the shared address. */
#include <string.h>

enum { MAP_MAGIC = 0x4d547563, MAP_MAX_RANK = 5, PIECE = 16 };

/* The numbers of the driver's CUtensorMapDataType. */
enum {
  DATA_U8, DATA_U16, DATA_U32, DATA_S32, DATA_U64, DATA_S64, DATA_F16, DATA_F32, DATA_F64, DATA_BF16, NUM_DATA_TYPES
};

/* The host executor's encoding of a tensor map; host/tensor_map.py writes it. Dimensions innermost first. */
typedef struct {
  u32 magic;
  u8 data_type, rank, swizzle, fill; /* swizzle: 0 none, 1 32 bytes, 2 64 bytes, 3 128 bytes; fill: 0 zeros, 1 NaN */
  u64 base;
  u32 last[MAP_MAX_RANK];            /* extents minus one */
  u32 item_bytes;
  u64 strides[MAP_MAX_RANK];         /* bytes */
  u16 box[MAP_MAX_RANK];
  u8 steps[MAP_MAX_RANK];
  u8 unused[33];
} TensorMap;
_Static_assert(sizeof(TensorMap) == 128, "host/tensor_map.py writes 128 bytes");

typedef struct {
  u64 base;                              /* of the first row, were it at coordinates 0 in the outer dimensions */
  u64 strides[MAP_MAX_RANK];             /* the outer dimensions are 1 to 4 */
  s64 start[MAP_MAX_RANK], extent[MAP_MAX_RANK];
  u32 step[MAP_MAX_RANK], count[MAP_MAX_RANK];
  u32 rows, row_bytes;
  u32 low, high;                         /* bytes [low, high) of a row are inside the array */
  u32 swizzle_mask;                      /* of bits 7 to 9 of the address */
  u32 data_type, fill;
} Tile;

static Tile linear_tile(u64 address, u32 bytes) {
  return (Tile){.base = address, .extent = {0, 1, 1, 1, 1}, .step = {0, 1, 1, 1, 1}, .count = {0, 1, 1, 1, 1},
                .rows = bytes > 0, .row_bytes = bytes, .high = bytes};
}

static s64 clamp(s64 x, s64 low, s64 high) { return x < low ? low : x > high ? high : x; }

static Tile tensor_tile(const TensorMap *map, const s32 *coordinates) {
  Tile tile = {.rows = 1, .row_bytes = (u32)map->box[0] * map->item_bytes, .data_type = map->data_type, .fill = map->fill};
  tile.base = map->base + (u64)(s64)coordinates[0] * map->item_bytes;
  s64 inner = (s64)map->last[0] + 1 - coordinates[0];
  tile.low = (u32)clamp(-(s64)coordinates[0], 0, map->box[0]) * map->item_bytes;
  tile.high = (u32)clamp(inner, 0, map->box[0]) * map->item_bytes;
  tile.swizzle_mask = (1u << map->swizzle) - 1;
  for (int k = 1; k < MAP_MAX_RANK; k++) {
    tile.start[k] = k < map->rank ? coordinates[k] : 0;
    tile.extent[k] = (s64)map->last[k] + 1;
    tile.strides[k] = map->strides[k];
    tile.step[k] = map->steps[k];
    tile.count[k] = ((u32)map->box[k] + map->steps[k] - 1) / map->steps[k];
    tile.rows *= tile.count[k];
  }
  return tile;
}

static u64 tile_bytes(const Tile *tile) { return (u64)tile->rows * tile->row_bytes; }

/* Bytes of global memory that a copy touches. */
typedef int (*PieceVisitor)(void *context, u32 shared, u64 global, u32 bytes, int inside);

#define BULK_INLINE static inline __attribute__((always_inline)) /* the visitor becomes part of the loop */

/* The part [from, to) of a row: up to three pieces, of which the middle one is inside the array. */
BULK_INLINE int visit_part(const Tile *tile, u32 shared, u64 global, u32 from, u32 to, int row_inside, PieceVisitor visit, void *context) {
  u32 low = row_inside ? tile->low : to, high = row_inside ? tile->high : to;
  low = low < from ? from : low > to ? to : low;
  high = high < low ? low : high > to ? to : high;
  if (from < low && visit(context, shared, 0, low - from, 0)) return FAILED;
  if (low < high && visit(context, shared + (low - from), global + low, high - low, 1)) return FAILED;
  if (high < to && visit(context, shared + (high - from), 0, to - high, 0)) return FAILED;
  return STEP;
}

/* The address of the row at `index` (of the outer dimensions), and whether it is inside the array; steps on. */
BULK_INLINE int next_row(const Tile *tile, u32 *index, u64 *global) {
  int inside = 1;
  *global = tile->base;
  for (int k = 1; k < MAP_MAX_RANK; k++) {
    s64 position = tile->start[k] + (s64)index[k] * tile->step[k];
    inside &= position >= 0 && position < tile->extent[k];
    *global += (u64)position * tile->strides[k];
  }
  for (int k = 1; k < MAP_MAX_RANK && ++index[k] == tile->count[k]; k++) index[k] = 0;
  return inside;
}

/* What the place of a 16-byte piece within its row is flipped by: the same for all of a row, which is as wide as the
 * swizzle. */
static inline u32 row_flip(const Tile *tile, u32 shared) { return (shared >> 7 & tile->swizzle_mask) * PIECE; }

BULK_INLINE int visit_row(const Tile *tile, u32 shared, u64 global, int inside, PieceVisitor visit, void *context) {
  if (!tile->swizzle_mask) return visit_part(tile, shared, global, 0, tile->row_bytes, inside, visit, context);
  u32 flip = row_flip(tile, shared);
  for (u32 at = 0; at < tile->row_bytes; at += PIECE)
    if (visit_part(tile, shared + (at ^ flip), global, at, at + PIECE, inside, visit, context)) return FAILED;
  return STEP;
}

/* Call `visit` for every contiguous piece of the tile, which stands at byte `shared` of shared memory. */
BULK_INLINE int visit_tile(const Tile *tile, u32 shared, PieceVisitor visit, void *context) {
  u32 index[MAP_MAX_RANK] = {0};
  for (u32 row = 0; row < tile->rows; row++, shared += tile->row_bytes) {
    u64 global;
    int inside = next_row(tile, index, &global);
    if (visit_row(tile, shared, global, inside, visit, context)) return FAILED;
  }
  return STEP;
}

/* ---- copies */

typedef struct {
  u8 *memory;      /* shared memory, or a copy of the tile that is addressed as it is, so that the swizzle is the same */
  u32 fill;
} CopyContext;

static int load_piece(void *context, u32 shared, u64 global, u32 bytes, int inside) {
  const CopyContext *copy = context;
  u8 *to = copy->memory + shared;
  if (inside) memcpy(to, (const void *)global, bytes);
  else for (u32 i = 0; i < bytes; i++) to[i] = copy->fill ? (i & 1 ? 0x7f : 0xf7) : 0; /* 0x7ff7: NaN in every format */
  return STEP;
}

typedef u8 Piece __attribute__((vector_size(PIECE), aligned(1), may_alias));

static void load_tile(const Tile *tile, u8 *smem, u32 shared) {
  u32 index[MAP_MAX_RANK] = {0};
  int whole = tile->low == 0 && tile->high == tile->row_bytes;
  for (u32 row = 0; row < tile->rows; row++, shared += tile->row_bytes) {
    u64 global;
    int inside = next_row(tile, index, &global);
    if (!inside || !whole) {
      visit_row(tile, shared, global, inside, load_piece, &(CopyContext){smem, tile->fill});
      continue;
    }
    u8 *to = smem + shared;
    const u8 *from = (const u8 *)global;
    u32 flip = row_flip(tile, shared);
    if (tile->row_bytes == 128) { /* the row of the matrix kernels */
      for (u32 at = 0; at < 128; at += PIECE) *(Piece *)(to + (at ^ flip)) = *(const Piece *)(from + at);
    } else if (tile->swizzle_mask) {
      for (u32 at = 0; at < tile->row_bytes; at += PIECE) *(Piece *)(to + (at ^ flip)) = *(const Piece *)(from + at);
    } else {
      memcpy(to, from, tile->row_bytes);
    }
  }
}

static int store_piece(void *context, u32 shared, u64 global, u32 bytes, int inside) {
  if (inside) memcpy((void *)global, ((const CopyContext *)context)->memory + shared, bytes);
  return STEP;
}

static void store_tile(const Tile *tile, u8 *memory, u32 shared) {
  visit_tile(tile, shared, store_piece, &(CopyContext){memory, 0});
}
