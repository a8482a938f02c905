// The tiles of the logits that a block mask keeps, as a list: a CTA goes from entry to entry of its own rows, and what
// is not listed costs nothing.
//
// A tile has the rows of the CTA and BLOCK_OTHER columns, in granules of eight. The granules of a tile ascend, but need
// not follow each other: blocks that are smaller than a tile, or that lie apart, are gathered into whole tiles, so that
// the work is that of what is kept. A granule begins at a multiple of eight, as a column tile of the tensor cores does.
//
// Rows of one block see the same, so that bits for the columns say it for all of them: a word (two, where a tile has 64
// columns) for each block of rows that a CTA has a part of, or for each row where a mask shows elements of its blocks.
// Only tiles that are not wholly visible (MIXED) have words; the others are compared with nothing.
//
// The list is one array of int, made on the host (cuattn/ops/sparse/tile_list.py):
//
//     [entries, begins, piece, 0]      begins: where the third part begins; piece: columns that are always together,
//                                      from a multiple of so many columns of the tile on (eight at least)
//     entries x [first, head, rows, 0] for batch entry b, or the last for all behind: its first of the begins, how far
//                                      it is from head to head (0: one list for all heads), rows that share a word
//     begins                           for each block of the rows that a CTA has: where its tiles begin, and those of
//                                      the one before end
//     tiles: [granule * 4 + GATHERED * 2 + MIXED, details]
//     details of a tile                its granules, if it is gathered; then its words, if it is mixed
//
// Queries have a list of the keys that they see, keys one of the queries that see them.
#pragma once
#include "attention/logits.cuh"
#include "common/tiles.cuh"

constexpr int GRANULE = 8;  // columns

// A tile as the list has it.
struct ListedTile {
    static constexpr int INTS = 2;
    int place, details;

    __device__ __forceinline__ bool is_mixed() const { return place & 1; }
    __device__ __forceinline__ bool is_gathered() const { return place & 2; }
    __device__ __forceinline__ int first() const { return (place >> 2) * GRANULE; }  // column of the logits
};

constexpr int NO_ROW = -1;

// For each row of a lane, which word says what it sees: eight bits a row, all set where the row does not exist.
template <typename Layout>
struct RowWords {
    static constexpr int NONE = 255;
    static_assert(Layout::ROWS <= 4, "a register holds four rows");

    unsigned packed;

    __device__ __forceinline__ RowWords(int first_row, int lane_row, int num_rows, int rows_per_word) : packed(0) {
        const int first_word = first_row / rows_per_word;
#pragma unroll
        for (int r = 0; r < Layout::ROWS; r++) {
            const int row = lane_row + Layout::row(r);
            packed |= static_cast<unsigned>(row < num_rows ? row / rows_per_word - first_word : NONE) << 8 * r;
        }
    }
    // The same for rows that need not follow each other: row_of(r), or NO_ROW.
    template <typename RowOf>
    __device__ __forceinline__ RowWords(int first_row, int rows_per_word, const RowOf& row_of) : packed(0) {
        const int first_word = first_row / rows_per_word;
#pragma unroll
        for (int r = 0; r < Layout::ROWS; r++) {
            const int row = row_of(r);
            packed |= static_cast<unsigned>(row == NO_ROW ? NONE : row / rows_per_word - first_word) << 8 * r;
        }
    }
    __device__ __forceinline__ int of(int r) const { return packed >> 8 * r & NONE; }
};

template <int BLOCK_OTHER>
struct TileList {
    static constexpr int GRANULES = BLOCK_OTHER / GRANULE;
    static constexpr int WORDS = (BLOCK_OTHER + 31) / 32;

    const int* g_list;
    int first_begin, head_stride, rows_per_word;  // of the CTA's rows

    __device__ __forceinline__ TileList(const int* g_list, int batch_idx, int own_block) : g_list(g_list) {
        const int* g_entry = g_list + 4 + 4 * min(batch_idx, g_list[0] - 1);
        first_begin = g_list[1] + g_entry[0] + own_block;
        head_stride = g_entry[1];
        rows_per_word = g_entry[2];
    }
    __device__ __forceinline__ int piece() const { return g_list[2]; }
    // Where the tiles of a head begin and end; they are two apart.
    __device__ __forceinline__ int begin(int head_idx) const { return g_list[first_begin + head_idx * head_stride]; }
    __device__ __forceinline__ int end(int head_idx) const { return g_list[first_begin + head_idx * head_stride + 1]; }

    __device__ __forceinline__ ListedTile tile(int at) const {
        const int2 entry = *reinterpret_cast<const int2*>(g_list + at);
        return {entry.x, entry.y};
    }

    // Leaves of the tiles [begin, end) those that may have a column of [first_column, end_column).
    __device__ __forceinline__ void narrow(int& begin, int& end, int first_column, int end_column) const {
        end = lower_bound(begin, end, end_column);
        begin = max(begin, lower_bound(begin, end, first_column + 1) - 2);  // it may reach beyond its first column
    }

    // The first column of granule `slot` of a tile.
    __device__ __forceinline__ int column(const ListedTile& tile, int slot) const {
        return tile.is_gathered() ? g_list[tile.details + slot] * GRANULE : tile.first() + slot * GRANULE;
    }
    // How far a tile may reach from its first column on.
    __device__ __forceinline__ int reach(const ListedTile& tile) const {
        return tile.is_gathered() ? UNBOUNDED - tile.first() : BLOCK_OTHER;
    }
    // Whether all columns of a tile are among [begin, end).
    __device__ __forceinline__ bool inside(const ListedTile& tile, int begin, int end) const {
        return tile.first() >= begin && column(tile, GRANULES - 1) + GRANULE <= end;
    }

    // Whether a row of the warp sees anything of a tile.
    template <typename Layout>
    __device__ __forceinline__ bool any_visible(const ListedTile& tile, const RowWords<Layout>& words) const {
        if (!tile.is_mixed()) return true;
        const int* g_words = words_of(tile);
        int found = 0;
#pragma unroll
        for (int r = 0; r < Layout::ROWS; r++) {
            if (words.of(r) == RowWords<Layout>::NONE) continue;
#pragma unroll
            for (int w = 0; w < WORDS; w++) found |= g_words[words.of(r) * WORDS + w];
        }
        return __any_sync(0xffffffff, found != 0);
    }

    // `hidden` where a row does not see a column. lane_column: the lane's first of the tile.
    template <typename Layout, typename Real>
    __device__ __forceinline__ void hide(typename Layout::Tile& part, Real hidden, const ListedTile& tile,
                                         const RowWords<Layout>& words, int lane_column) const {
        if (!tile.is_mixed()) return;
        const int* g_words = words_of(tile);
        each_row<Layout>([&](int r) {
            const int word = words.of(r);
            unsigned bits[WORDS];
#pragma unroll
            for (int w = 0; w < WORDS; w++) {
                bits[w] = word == RowWords<Layout>::NONE ? 0u : static_cast<unsigned>(g_words[word * WORDS + w]);
                bits[w] >>= lane_column;
            }
            each_column<Layout>(part, r, [&](Real& element, int column) {
                if (!(bits[column / 32] >> column % 32 & 1)) element = hidden;
            });
        });
    }

   private:
    __device__ __forceinline__ const int* words_of(const ListedTile& tile) const {
        return g_list + tile.details + (tile.is_gathered() ? GRANULES : 0);
    }
    // The first of the tiles [begin, end) that begins at `column` or behind; `end` if none does.
    __device__ __forceinline__ int lower_bound(int begin, int end, int column) const {
        while (begin < end) {
            const int middle = begin + ((end - begin) >> 2 << 1);
            if (tile(middle).first() < column) {
                begin = middle + 2;
            } else {
                end = middle;
            }
        }
        return begin;
    }
};

// Where a lane's part of a listed tile lies: its rows follow each other, as in TilePosition, its columns only within a
// granule.
template <bool OWN_KEYS, int BLOCK_OTHER>
struct ListedPosition {
    const TileList<BLOCK_OTHER>& list;
    ListedTile tile;
    int own, lane_column;  // first row in the logits, first column of the tile

    // The column of the logits that is `column` (a multiple of eight) of the tile's columns behind the lane's first.
    __device__ __forceinline__ int other(int column) const {
        return list.column(tile, column / GRANULE + lane_column / GRANULE) + lane_column % GRANULE;
    }
};

// f(slice, position) for the parts of a lane's tile whose columns lie in one granule.
template <typename Layout, bool OWN_KEYS, int BLOCK_OTHER, typename F>
__device__ __forceinline__ void each_slice(typename Layout::Tile& part,
                                           const ListedPosition<OWN_KEYS, BLOCK_OTHER>& lane, const F& f) {
    using Slice = typename Layout::Slice;
#pragma unroll
    for (int s = 0; s < Layout::COLUMNS / Slice::COLUMNS; s++) {
        typename Slice::Tile slice{part, s};
        f(slice, TilePosition<OWN_KEYS>{lane.own, lane.other(Layout::column(s * Slice::COLUMNS))});
    }
}

// Starts copying the rows of the other side that are the columns of a tile, num_rows of which exist: see load_tile.
template <bool ALIGNED, int ROWS, int COLS, int NUM_THREADS, typename Element>
__device__ __forceinline__ void load_listed_tile(Element* s_tile, const Element* g_rows, long long g_stride,
                                                 int num_rows, int num_cols, const TileList<ROWS>& list,
                                                 const ListedTile& tile) {
    if (tile.is_gathered()) {
        const int* g_granules = list.g_list + tile.details;
        gather_tile<ALIGNED, GRANULE, ROWS, COLS, NUM_THREADS>(s_tile, g_rows, g_stride, num_rows, num_cols,
                                                               [&](int slot) { return g_granules[slot]; });
    } else {
        load_tile<ALIGNED, ROWS, COLS, NUM_THREADS>(s_tile, g_rows + tile.first() * g_stride, g_stride,
                                                    num_rows - tile.first(), num_cols);
    }
}
