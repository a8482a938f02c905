// Tiles of cached rows on their way to shared memory: row by row, as each row has an address of its own.
//
// Rows of elements are copied as they are. Other formats are copied as they are stored, asynchronously, and become
// elements from shared memory to shared memory, once a tile has landed: loads that wait for registers would leave the
// memory idle.
#pragma once
#include "decode/cached_keys.cuh"
#include "kv/kv_pairs.cuh"
#include "common/tiles.cuh"

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

// Threads that share a row of a tile.
template <int ROW_BYTES>
constexpr int GATHER_THREADS = power_of_two_divisor(ROW_BYTES / 16, 8);

// A thread's share of the rows of a tile that are ROW_BYTES long: CHUNKS pieces of 16 bytes, THREADS pieces apart.
template <bool ALIGNED, int ITEM_BYTES, int ROW_BYTES, int THREADS>
struct RowShare {
    static constexpr int CHUNKS = ROW_BYTES / 16 / THREADS;
    static_assert(CHUNKS * THREADS * 16 == ROW_BYTES, "rows are whole chunks");

    int first_byte;
    int num_valid[CHUNKS];  // bytes of a chunk that the row has

    __device__ __forceinline__ RowShare(int num_bytes) : first_byte(threadIdx.x % THREADS * 16) {
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) num_valid[i] = max(0, min(16, num_bytes - first_byte - i * THREADS * 16));
    }

    // Starts copying a row; bytes that it has not become zero, all of them where it does not exist.
    __device__ __forceinline__ void copy(unsigned char* s_row, const void* g_row, bool exists) const {
        const unsigned char* g_chunk = static_cast<const unsigned char*>(g_row) + first_byte;
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            const int byte = i * THREADS * 16;
            const int valid = exists ? num_valid[i] : 0;
            if constexpr (ALIGNED) {
                cp_async_16(smem_address(s_row + first_byte + byte), g_chunk + byte, valid);
            } else {
                load_bytes<ITEM_BYTES>(s_row + first_byte + byte, g_chunk + byte, valid);
            }
        }
    }
};

// Starts copying ROWS rows of ROW_BYTES bytes to s_tile, rows S_STRIDE bytes apart: of row r the first num_bytes from
// row_of(r); rows whose pointer is null become zero. Called by all threads of the CTA. g_any stands for rows that are
// not read: any address in global memory.
template <bool ALIGNED, int ITEM_BYTES, int ROWS, int ROW_BYTES, int S_STRIDE, int NUM_THREADS, typename RowOf>
__device__ __forceinline__ void gather_rows(unsigned char* s_tile, int num_bytes, const void* g_any, RowOf row_of) {
    constexpr int THREADS = GATHER_THREADS<ROW_BYTES>;
    const RowShare<ALIGNED, ITEM_BYTES, ROW_BYTES, THREADS> share(num_bytes);
    for (int row = threadIdx.x / THREADS; row < ROWS; row += NUM_THREADS / THREADS) {
        const void* g_row = row_of(row);
        share.copy(s_tile + row * S_STRIDE, g_row == nullptr ? g_any : g_row, g_row != nullptr);
    }
}

// Starts copying the rows of ROWS keys, and of their values, as they are stored; a key is looked up once for both. Rows
// that do not exist become zero. s_k, s_v: tiles with rows K_STRIDE and V_STRIDE bytes apart. Called by all threads.
template <bool ALIGNED, int ROWS, int HEAD_DIM, int HEAD_DIM_V, int K_STRIDE, int V_STRIDE, int NUM_THREADS,
          typename Storage, typename PlaceOf>
__device__ __forceinline__ void gather_keys(unsigned char* s_k, unsigned char* s_v, const CachedRows<Storage>& k_rows,
                                            const CachedRows<Storage>& v_rows, int head_dim, int head_dim_v,
                                            PlaceOf place_of) {
    constexpr int PER_ITEM = KvFormat<Storage>::PER_ITEM;
    constexpr int K_BYTES = STORED_BYTES<Storage, HEAD_DIM>, V_BYTES = STORED_BYTES<Storage, HEAD_DIM_V>;
    constexpr int THREADS = GATHER_THREADS<K_BYTES> < GATHER_THREADS<V_BYTES> ? GATHER_THREADS<K_BYTES>
                                                                             : GATHER_THREADS<V_BYTES>;
    const RowShare<ALIGNED, sizeof(Storage), K_BYTES, THREADS> k_share((head_dim + PER_ITEM - 1) / PER_ITEM *
                                                                       sizeof(Storage));
    const RowShare<ALIGNED, sizeof(Storage), V_BYTES, THREADS> v_share((head_dim_v + PER_ITEM - 1) / PER_ITEM *
                                                                       sizeof(Storage));
#pragma unroll(ALIGNED ? 4 : 1)
    for (int row = threadIdx.x / THREADS; row < ROWS; row += NUM_THREADS / THREADS) {
        const KeyPlace place = place_of(row);
        k_share.copy(s_k + row * K_STRIDE, k_rows.row(place), place.exists);
        v_share.copy(s_v + row * V_STRIDE, v_rows.row(place), place.exists);
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
            s_scales.row[row] = place.exists && rows.g_scales != nullptr ? rows.scale(place) : 1.0f;
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
    constexpr int CHUNKS = COLS / 8;  // of eight numbers: 16 bytes of elements
    using Words = Run<unsigned, STORED_WORDS<Storage>>;
#pragma unroll 2
    for (int i = threadIdx.x; i < ROWS * CHUNKS; i += NUM_THREADS) {
        const int row = i / CHUNKS, chunk = i % CHUNKS;
        Words words;
        words.load(reinterpret_cast<const unsigned*>(s_stored + row * STORED_STRIDE<Storage, COLS>) +
                   chunk * STORED_WORDS<Storage>);
        union {
            unsigned pairs[4];
            uint4 vector;
        } elements;
        widen_pairs(Element(), Storage(), elements.pairs, words.element);
        if constexpr (Format::BLOCK != 0) {
            const unsigned scale =
                block_scale_pair(Element(), Storage(), s_scales.block[row][chunk * 8 / Format::BLOCK]);
#pragma unroll
            for (int n = 0; n < 4; n++) elements.pairs[n] = multiply_pair(Element(), elements.pairs[n], scale);
        }
        if constexpr (SLOT_SCALES) {
#pragma unroll
            for (int n = 0; n < 4; n++) {
                elements.pairs[n] = scale_pair(Element(), elements.pairs[n], s_scales.row[row]);
            }
        }
        *reinterpret_cast<uint4*>(s_tile + row * (COLS + ROW_PADDING<Element>) + chunk * 8) = elements.vector;
    }
}
