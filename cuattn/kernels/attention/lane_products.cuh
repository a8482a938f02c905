// Matrix products of attention without tensor cores, one half-warp a row: weights = a b^T and acc += weights b, where
// every product is an IEEE fused multiply-add in the element type.
//
// Tiles lie row by row in shared memory, rows of WIDTH + ROW_PADDING elements. Lane l of a warp has LANE_M neighbouring
// rows and, of a tile of weights, the columns l % 16, l % 16 + 16, ...; of an output row it has groups of neighbouring
// columns, so that each number read from shared memory is used several times.
//
// Constants used: Element; LANE_M (rows of a lane) and LANE_N (columns of weights of a lane) of the including kernel.
#pragma once
#include "common/tiles.cuh"

constexpr int LANES_PER_ROW = 16;
constexpr int CHUNK = 16 / sizeof(Element);  // elements of a 128-bit access
constexpr int DOT_BLOCK = 32;                // terms of a dot product that are summed on their own
constexpr int WEIGHTS_WIDTH = LANE_N * LANES_PER_ROW;

// Elements from row to row of a tile of WIDTH columns.
template <int WIDTH>
constexpr int TILE_STRIDE = WIDTH + ROW_PADDING<Element>;

// N neighbouring elements, read and written in one access.
template <int N>
struct alignas(N * sizeof(Element)) Vector {
    Element x[N];
};
template <int N>
__device__ __forceinline__ Vector<N> load_vector(const Element* pointer) {
    return *reinterpret_cast<const Vector<N>*>(pointer);
}

// A lane's part of a tile of weights: weights[i][j] is row i, column j * LANES_PER_ROW from the lane's first ones.
using Weights = Element[LANE_M][LANE_N];

// They as a lane's part of a tile of logits (logits.cuh).
struct LaneLayout {
    using Tile = Weights;
    static constexpr int ROWS = LANE_M, COLUMNS = LANE_N;
    static constexpr bool APPROXIMATE = false;
    static __device__ __forceinline__ int row(int r) { return r; }
    static __device__ __forceinline__ int column(int c) { return c * LANES_PER_ROW; }
    static __device__ __forceinline__ Element& at(Tile& tile, int r, int c) { return tile[r][c]; }

    // One column (tile_list.cuh).
    struct Slice {
        struct Tile {
            Weights& whole;
            int index;
        };
        static constexpr int ROWS = LANE_M, COLUMNS = 1;
        static constexpr bool APPROXIMATE = false;
        static __device__ __forceinline__ int row(int r) { return r; }
        static __device__ __forceinline__ int column(int) { return 0; }
        static __device__ __forceinline__ Element& at(Tile& tile, int r, int) { return tile.whole[r][tile.index]; }
    };
};

// A lane's part of a row of WIDTH output columns: VECTORS groups of VECTOR neighbours, groups STEP columns apart.
template <int WIDTH>
struct RowPart {
    static constexpr int VECTOR = WIDTH % (CHUNK * LANES_PER_ROW) == 0 ? CHUNK : 2;
    static constexpr int STEP = VECTOR * LANES_PER_ROW;
    static constexpr int VECTORS = WIDTH / STEP;
    static_assert(WIDTH % DOT_BLOCK == 0, "head dims come in buckets");

    Element x[VECTORS][VECTOR];

    __device__ __forceinline__ void scale(Element factor) {
#pragma unroll
        for (int e = 0; e < VECTORS; e++) {
#pragma unroll
            for (int i = 0; i < VECTOR; i++) x[e][i] *= factor;
        }
    }
};

template <int WIDTH>
using RowParts = RowPart<WIDTH>[LANE_M];

template <int WIDTH>
__device__ __forceinline__ void clear(RowParts<WIDTH>& acc) {
#pragma unroll
    for (int i = 0; i < LANE_M; i++) acc[i] = {};
}

// weights = a b^T over the first `num_terms` columns. s_a: this lane's first row, s_b: the row of this lane's first
// column. Columns from num_terms on are zero in both.
//
// A dot product is summed in blocks of DOT_BLOCK terms, which keeps its error near that of pairwise summation.
template <int WIDTH>
__device__ __forceinline__ void multiply_abt(Weights& weights, const Element* s_a, const Element* s_b, int num_terms) {
#pragma unroll
    for (int i = 0; i < LANE_M; i++) {
#pragma unroll
        for (int j = 0; j < LANE_N; j++) weights[i][j] = 0;
    }
#pragma unroll 1
    for (int block = 0; block < num_terms; block += DOT_BLOCK) {
        Weights partial = {};
#pragma unroll(2)
        for (int d = block; d < block + DOT_BLOCK; d += CHUNK) {
            Vector<CHUNK> a[LANE_M], b[LANE_N];
#pragma unroll
            for (int i = 0; i < LANE_M; i++) a[i] = load_vector<CHUNK>(s_a + i * TILE_STRIDE<WIDTH> + d);
#pragma unroll
            for (int j = 0; j < LANE_N; j++) {
                b[j] = load_vector<CHUNK>(s_b + j * LANES_PER_ROW * TILE_STRIDE<WIDTH> + d);
            }
#pragma unroll
            for (int c = 0; c < CHUNK; c++) {
#pragma unroll
                for (int i = 0; i < LANE_M; i++) {
#pragma unroll
                    for (int j = 0; j < LANE_N; j++) partial[i][j] = fma(a[i].x[c], b[j].x[c], partial[i][j]);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < LANE_M; i++) {
#pragma unroll
            for (int j = 0; j < LANE_N; j++) weights[i][j] += partial[i][j];
        }
    }
}

// s_weights: this lane's first row and column.
__device__ __forceinline__ void store_weights(const Weights& weights, Element* s_weights) {
#pragma unroll
    for (int i = 0; i < LANE_M; i++) {
#pragma unroll
        for (int j = 0; j < LANE_N; j++) s_weights[i * TILE_STRIDE<WEIGHTS_WIDTH> + j * LANES_PER_ROW] = weights[i][j];
    }
}

// acc += weights b, row after row of b. s_weights: this lane's first row, s_b: this lane's first output column.
template <int WIDTH>
__device__ __forceinline__ void multiply_add(RowParts<WIDTH>& acc, const Element* s_weights, const Element* s_b) {
    using Part = RowPart<WIDTH>;
#pragma unroll(CHUNK / 2)
    for (int n = 0; n < WEIGHTS_WIDTH; n += CHUNK) {
        Vector<CHUNK> weights[LANE_M];
#pragma unroll
        for (int i = 0; i < LANE_M; i++) {
            weights[i] = load_vector<CHUNK>(s_weights + i * TILE_STRIDE<WEIGHTS_WIDTH> + n);
        }
#pragma unroll
        for (int c = 0; c < CHUNK; c++) {
#pragma unroll
            for (int e = 0; e < Part::VECTORS; e++) {
                const Vector<Part::VECTOR> b =
                    load_vector<Part::VECTOR>(s_b + (n + c) * TILE_STRIDE<WIDTH> + e * Part::STEP);
#pragma unroll
                for (int i = 0; i < LANE_M; i++) {
#pragma unroll
                    for (int x = 0; x < Part::VECTOR; x++) {
                        acc[i].x[e][x] = fma(weights[i].x[c], b.x[x], acc[i].x[e][x]);
                    }
                }
            }
        }
    }
}

// Writes factor times this lane's columns of a row to g_row, where the lane's first column is `col` of num_cols.
// `vectors`: all such addresses are multiples of 16 bytes.
template <int WIDTH>
__device__ __forceinline__ void store_row(Element* g_row, const RowPart<WIDTH>& row, Element factor, int col,
                                          int num_cols, bool vectors) {
    using Part = RowPart<WIDTH>;
#pragma unroll
    for (int e = 0; e < Part::VECTORS; e++) {
        Vector<Part::VECTOR> out;
#pragma unroll
        for (int x = 0; x < Part::VECTOR; x++) out.x[x] = row.x[e][x] * factor;
        if (vectors && col + e * Part::STEP + Part::VECTOR <= num_cols) {
            *reinterpret_cast<Vector<Part::VECTOR>*>(g_row + e * Part::STEP) = out;
        } else {
#pragma unroll
            for (int x = 0; x < Part::VECTOR; x++) {
                if (col + e * Part::STEP + x < num_cols) g_row[e * Part::STEP + x] = out.x[x];
            }
        }
    }
}
