// Tiles of cached rows on their way to shared memory: row by row, as each row has an address of its own.
//
// Rows of elements are copied as they are. Other formats are copied as they are stored, asynchronously, and become
// elements from shared memory to shared memory, once a tile has landed: loads that wait for registers would leave the
// memory idle.
#pragma once
#include "cached_keys.cuh"
#include "tiles.cuh"

// Bytes of a stored row of COLS numbers, and from row to row of a tile of them: see ROW_PADDING.
template <typename Storage, int COLS>
constexpr int STORED_BYTES = COLS / KvFormat<Storage>::PER_ITEM * static_cast<int>(sizeof(Storage));
template <typename Storage, int COLS>
constexpr int STORED_STRIDE = STORED_BYTES<Storage, COLS> + 16;

// One chunk of 16 bytes from an address that is no multiple of 16; bytes from num_valid on are zero. ITEM_BYTES divides
// the address.
template <int ITEM_BYTES>
__device__ __forceinline__ void load_bytes(unsigned char* s_chunk, const unsigned char* g_chunk, int num_valid) {
    union {
        unsigned char bytes[16];
        unsigned short shorts[8];
        uint4 vector;
    } chunk;
    chunk.vector = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < 16 / ITEM_BYTES; i++) {
        if (i * ITEM_BYTES < num_valid) {
            if constexpr (ITEM_BYTES == 2) {
                chunk.shorts[i] = reinterpret_cast<const unsigned short*>(g_chunk)[i];
            } else {
                chunk.bytes[i] = g_chunk[i];
            }
        }
    }
    *reinterpret_cast<uint4*>(s_chunk) = chunk.vector;
}

// Starts copying ROWS rows of ROW_BYTES bytes to s_tile, rows S_STRIDE bytes apart: of row r the first num_bytes from
// row_of(r), a pointer; the rest, and rows whose pointer is null, become zero. Called by all threads of the CTA. g_any
// stands for rows that are not read: any address in global memory.
template <bool ALIGNED, int ITEM_BYTES, int ROWS, int ROW_BYTES, int S_STRIDE, int NUM_THREADS, typename RowOf>
__device__ __forceinline__ void gather_rows(unsigned char* s_tile, int num_bytes, const void* g_any, RowOf row_of) {
    constexpr int CHUNKS = ROW_BYTES / 16;
    constexpr int THREADS_PER_ROW = power_of_two_divisor(CHUNKS, 8);
    constexpr int ROWS_PER_PASS = NUM_THREADS / THREADS_PER_ROW;
    static_assert(ROW_BYTES % 16 == 0 && S_STRIDE % 16 == 0, "rows are whole chunks");
    const int first_byte = threadIdx.x % THREADS_PER_ROW * 16;
#pragma unroll(ALIGNED ? 4 : 1)
    for (int row = threadIdx.x / THREADS_PER_ROW; row < ROWS; row += ROWS_PER_PASS) {
        const unsigned char* g_row = reinterpret_cast<const unsigned char*>(row_of(row));
        const int num_valid = g_row == nullptr ? 0 : num_bytes;
        if (g_row == nullptr) g_row = static_cast<const unsigned char*>(g_any);
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk += THREADS_PER_ROW) {
            const int byte = first_byte + chunk * 16;
            const int valid = max(0, min(16, num_valid - byte));
            unsigned char* s_chunk = s_tile + row * S_STRIDE + byte;
            if constexpr (ALIGNED) {
                cp_async_16(smem_address(s_chunk), g_row + byte, valid);
            } else {
                load_bytes<ITEM_BYTES>(s_chunk, g_row + byte, valid);
            }
        }
    }
}

// The scales of the rows of a tile: one a row, and those of blocks.
template <int ROWS, int COLS>
struct TileScales {
    static constexpr int MAX_BLOCKS = COLS / 16;
    float row[ROWS];
    unsigned char block[ROWS][MAX_BLOCKS];
};

// Copies the scales that the format has, for rows at place_of(r). Rows that do not exist get scales that keep zeros.
template <bool SLOT_SCALES, int NUM_THREADS, typename Storage, int ROWS, int COLS, typename PlaceOf>
__device__ __forceinline__ void load_scales(TileScales<ROWS, COLS>& s_scales, const CachedRows<Storage>& rows,
                                            int num_cols, PlaceOf place_of) {
    constexpr int BLOCK = KvFormat<Storage>::BLOCK;
    if constexpr (SLOT_SCALES) {
        for (int row = threadIdx.x; row < ROWS; row += NUM_THREADS) {
            const KeyPlace place = place_of(row);
            s_scales.row[row] = place.exists ? rows.scale(place) : 1.0f;
        }
    }
    if constexpr (BLOCK != 0) {
        constexpr int BLOCKS = COLS / BLOCK;
        for (int i = threadIdx.x; i < ROWS * BLOCKS; i += NUM_THREADS) {
            const int row = i / BLOCKS, block = i % BLOCKS;
            const KeyPlace place = place_of(row);
            const bool exists = place.exists && block * BLOCK < num_cols;
            s_scales.block[row][block] = exists ? rows.blocks(place)[block] : 0;
        }
    }
}

// A tile of stored numbers, times their scales, rounded to elements. Called by all threads of the CTA.
template <bool SLOT_SCALES, int NUM_THREADS, typename Storage, int ROWS, int COLS>
__device__ __forceinline__ void convert_tile(Element* s_tile, const unsigned char* s_stored,
                                             const TileScales<ROWS, COLS>& s_scales) {
    using Format = KvFormat<Storage>;
    constexpr int NUMBERS = 8;  // 16 bytes of elements
    constexpr int ITEMS = NUMBERS / Format::PER_ITEM;
    constexpr int CHUNKS = COLS / NUMBERS;
#pragma unroll 2
    for (int i = threadIdx.x; i < ROWS * CHUNKS; i += NUM_THREADS) {
        const int row = i / CHUNKS, col = i % CHUNKS * NUMBERS;
        Run<Storage, ITEMS> stored;
        stored.load(reinterpret_cast<const Storage*>(s_stored + row * STORED_STRIDE<Storage, COLS>) +
                    col / Format::PER_ITEM);
        float x[NUMBERS];
        widen(x, stored.element);
        float scale = 1.0f;
        if constexpr (SLOT_SCALES) scale = s_scales.row[row];
        if constexpr (Format::BLOCK != 0) {
            scale *= block_scale(Storage(), s_scales.block[row][col / Format::BLOCK]);
        }
        Run<Element, NUMBERS> converted;
#pragma unroll
        for (int n = 0; n < NUMBERS; n++) {
            converted.set(n, SLOT_SCALES || Format::BLOCK != 0 ? x[n] * scale : x[n]);
        }
        converted.store(s_tile + row * (COLS + ROW_PADDING<Element>) + col);
    }
}
