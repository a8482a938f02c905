// Tiles on their way between global and shared memory.
#pragma once
#include "common/float8.cuh"
#include "common/ptx.cuh"

// Elements added to each row of a tile in shared memory: 16 bytes, so that the eight rows of which ldmatrix and 128-bit
// loads read one 16-byte chunk each lie in different banks. Tile widths are multiples of 32 elements.
template <typename Element>
constexpr int ROW_PADDING = 16 / sizeof(Element);

// The largest power of two that divides x, up to `limit`.
constexpr int power_of_two_divisor(int x, int limit) {
    return x % 2 || limit == 1 ? 1 : 2 * power_of_two_divisor(x / 2, limit / 2);
}

// A thread's share of copying a [ROWS x COLS] tile in chunks of 16 bytes: THREADS_PER_ROW neighbours read consecutive
// chunks of a row (128 bytes where the width allows), the block covers ROWS_PER_PASS rows at a time.
template <typename Element, int ROWS, int COLS, int NUM_THREADS>
struct TileShare {
    static constexpr int CHUNK = 16 / sizeof(Element);
    static constexpr int THREADS_PER_ROW = power_of_two_divisor(COLS / CHUNK, 8);
    static constexpr int ROWS_PER_PASS = NUM_THREADS / THREADS_PER_ROW;
    static constexpr int COLS_PER_PASS = THREADS_PER_ROW * CHUNK;
    static_assert(COLS % COLS_PER_PASS == 0 && NUM_THREADS % THREADS_PER_ROW == 0, "every thread copies whole chunks");
    static __device__ __forceinline__ int row() { return threadIdx.x / THREADS_PER_ROW; }
    static __device__ __forceinline__ int col() { return threadIdx.x % THREADS_PER_ROW * CHUNK; }
};

// One chunk, element by element, for addresses that are no multiples of 16 bytes; elements from num_valid on are zero.
// 4- and 8-byte elements are still copied asynchronously, 16-bit ones pass through registers.
template <typename Element>
__device__ __forceinline__ void load_chunk_elementwise(Element* s_chunk, const Element* g_chunk, int num_valid) {
    constexpr int CHUNK = 16 / sizeof(Element);
    if constexpr (sizeof(Element) == 2) {
        union {
            unsigned short elements[CHUNK];
            uint4 vector;
        } chunk;
#pragma unroll
        for (int i = 0; i < CHUNK; i++) {
            chunk.elements[i] = i < num_valid ? reinterpret_cast<const unsigned short*>(g_chunk)[i] : 0;
        }
        *reinterpret_cast<uint4*>(s_chunk) = chunk.vector;
    } else {
#pragma unroll
        for (int i = 0; i < CHUNK; i++) {
            const int src_bytes = i < num_valid ? sizeof(Element) : 0;
            if constexpr (sizeof(Element) == 4) {
                cp_async_4(smem_address(s_chunk + i), g_chunk + i, src_bytes);
            } else {
                cp_async_8(smem_address(s_chunk + i), g_chunk + i, src_bytes);
            }
        }
    }
}

// One chunk of eight __half from eight numbers of 8 bits; numbers from num_valid on are zero.
template <bool ALIGNED, typename Storage>
__device__ __forceinline__ void load_chunk_widened(__half* s_chunk, const Storage* g_chunk, int num_valid) {
    union {
        unsigned char bytes[8];
        uint2 vector;
    } chunk;
    chunk.vector = make_uint2(0, 0);
    if (ALIGNED && num_valid == 8) {
        chunk.vector = *reinterpret_cast<const uint2*>(g_chunk);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (i < num_valid) chunk.bytes[i] = g_chunk[i].bits;
        }
    }
    uint4 widened;
    widened.x = widen_pair(Storage(), chunk.vector.x & 0xffff);
    widened.y = widen_pair(Storage(), chunk.vector.x >> 16);
    widened.z = widen_pair(Storage(), chunk.vector.y & 0xffff);
    widened.w = widen_pair(Storage(), chunk.vector.y >> 16);
    *reinterpret_cast<uint4*>(s_chunk) = widened;
}

// Starts copying a tile: s_tile [ROWS x COLS] with rows of COLS + ROW_PADDING elements, from g_tile
// [num_rows x num_cols] with rows g_stride elements apart. What lies outside of [num_rows x num_cols] becomes zero: it
// is multiplied with, and 0 times whatever was there before need not be 0. Complete after cp_async_commit,
// cp_async_wait and a barrier. Storage is Element, or an 8-bit type that is widened to it.
template <bool ALIGNED, int ROWS, int COLS, int NUM_THREADS, typename Element, typename Storage>
__device__ __forceinline__ void load_tile(Element* s_tile, const Storage* g_tile, long long g_stride, int num_rows,
                                          int num_cols) {
    constexpr bool WIDEN = sizeof(Storage) != sizeof(Element);
    constexpr bool ASYNC = ALIGNED && !WIDEN;
    using Share = TileShare<Element, ROWS, COLS, NUM_THREADS>;
    constexpr int S_STRIDE = COLS + ROW_PADDING<Element>;
    constexpr int COL_PASSES = COLS / Share::COLS_PER_PASS;
    const int col = Share::col();
    int col_valid[COL_PASSES];  // of this thread's chunk: bytes, or elements on the element-wise path
#pragma unroll
    for (int i = 0; i < COL_PASSES; i++) {
        col_valid[i] = min(Share::CHUNK, max(0, num_cols - col - i * Share::COLS_PER_PASS));
        if (ASYNC) col_valid[i] *= sizeof(Element);
    }
    Element* s_row = s_tile + Share::row() * S_STRIDE + col;
    const Storage* g_row = g_tile + Share::row() * g_stride + col;
    const unsigned s_address = smem_address(s_row);
#pragma unroll(ASYNC ? ROWS : 1)
    for (int first_row = 0; first_row < ROWS; first_row += Share::ROWS_PER_PASS) {
        const int row = first_row + Share::row();
        if (ROWS % Share::ROWS_PER_PASS != 0 && row >= ROWS) break;
#pragma unroll
        for (int i = 0; i < COL_PASSES; i++) {
            const int offset = first_row * S_STRIDE + i * Share::COLS_PER_PASS;
            const int num_valid = row < num_rows ? col_valid[i] : 0;
            if constexpr (ASYNC) {
                cp_async_16(s_address + offset * sizeof(Element), g_row + i * Share::COLS_PER_PASS, num_valid);
            } else if constexpr (WIDEN) {
                load_chunk_widened<ALIGNED>(s_row + offset, g_row + i * Share::COLS_PER_PASS, num_valid);
            } else {
                load_chunk_elementwise(s_row + offset, g_row + i * Share::COLS_PER_PASS, num_valid);
            }
        }
        g_row += Share::ROWS_PER_PASS * g_stride;
    }
}

// The same with rows that do not follow each other but in groups of GROUP: row r is row r % GROUP of group
// group_of(r / GROUP), counted in groups of g_rows, and becomes zero where that is row num_rows or behind.
template <bool ALIGNED, int GROUP, int ROWS, int COLS, int NUM_THREADS, typename Element, typename GroupOf>
__device__ __forceinline__ void gather_tile(Element* s_tile, const Element* g_rows, long long g_stride, int num_rows,
                                            int num_cols, const GroupOf& group_of) {
    using Share = TileShare<Element, ROWS, COLS, NUM_THREADS>;
    constexpr int S_STRIDE = COLS + ROW_PADDING<Element>;
    constexpr int COL_PASSES = COLS / Share::COLS_PER_PASS;
    constexpr bool IN_ONE_GROUP = GROUP % Share::ROWS_PER_PASS == 0;  // the rows of a pass
    const int col = Share::col();
    int col_valid[COL_PASSES];  // as in load_tile
#pragma unroll
    for (int i = 0; i < COL_PASSES; i++) {
        col_valid[i] = min(Share::CHUNK, max(0, num_cols - col - i * Share::COLS_PER_PASS));
        if (ALIGNED) col_valid[i] *= sizeof(Element);
    }
    Element* s_row = s_tile + Share::row() * S_STRIDE + col;
    const unsigned s_address = smem_address(s_row);
    // A thread's row within its group is the same in every pass, or GROUP / ROWS_PER_PASS passes take turns.
    const int lane_row = IN_ONE_GROUP ? Share::row() : Share::row() % GROUP;
    const Element* g_lane = g_rows + lane_row * g_stride + col;
#pragma unroll(ALIGNED ? ROWS : 1)
    for (int first_row = 0; first_row < ROWS; first_row += Share::ROWS_PER_PASS) {
        if (ROWS % Share::ROWS_PER_PASS != 0 && first_row + Share::row() >= ROWS) break;
        const int group = group_of(IN_ONE_GROUP ? first_row / GROUP : (first_row + Share::row()) / GROUP);
        const int group_row = group * GROUP + (IN_ONE_GROUP ? first_row % GROUP : 0);
        const Element* g_row = g_lane + group_row * g_stride;
#pragma unroll
        for (int i = 0; i < COL_PASSES; i++) {
            const int offset = first_row * S_STRIDE + i * Share::COLS_PER_PASS;
            const int num_valid = group_row + lane_row < num_rows ? col_valid[i] : 0;
            if constexpr (ALIGNED) {
                cp_async_16(s_address + offset * sizeof(Element), g_row + i * Share::COLS_PER_PASS, num_valid);
            } else {
                load_chunk_elementwise(s_row + offset, g_row + i * Share::COLS_PER_PASS, num_valid);
            }
        }
    }
}

// One warp writes s_tile [ROWS x COLS], rows of COLS + ROW_PADDING elements, to g_tile [num_rows x num_cols].
// `vectors`: the tile's global rows all start at multiples of 16 bytes.
template <int ROWS, int COLS, typename Element>
__device__ __forceinline__ void store_tile_by_warp(Element* g_tile, long long g_stride, const Element* s_tile,
                                                   int num_rows, int num_cols, bool vectors, int lane_idx) {
    constexpr int CHUNK = 16 / sizeof(Element);
    constexpr int CHUNKS_PER_ROW = COLS / CHUNK;
#pragma unroll 1
    for (int i = lane_idx; i < ROWS * CHUNKS_PER_ROW; i += 32) {
        const int row = i / CHUNKS_PER_ROW;
        const int col = i % CHUNKS_PER_ROW * CHUNK;
        if (row >= num_rows) break;
        const Element* s_chunk = s_tile + row * (COLS + ROW_PADDING<Element>) + col;
        Element* g_chunk = g_tile + row * g_stride + col;
        if (vectors && col + CHUNK <= num_cols) {
            *reinterpret_cast<uint4*>(g_chunk) = *reinterpret_cast<const uint4*>(s_chunk);
        } else {
#pragma unroll 1
            for (int j = 0; j < min(CHUNK, num_cols - col); j++) g_chunk[j] = s_chunk[j];
        }
    }
}
