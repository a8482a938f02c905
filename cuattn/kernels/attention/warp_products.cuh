// The matrix products of attention for one warp, on tensor cores: acc = a b^T and acc += p b.
//
// A warp owns ROW_TILES * MMA_M rows of a tile. Elements lie row by row in shared memory, TILE_STRIDE apart. 16-bit
// elements are multiplied by mma.m16n8k16; floats are rounded to tf32 (10 bits of mantissa) on their way into
// mma.m16n8k8. Both accumulate in float, and have the same accumulator layout.
//
// Constant used: Element.
#pragma once
#include "common/mma.cuh"
#include "common/tiles.cuh"

constexpr bool TF32 = sizeof(Element) == 4;

static_assert(sizeof(Element) <= 4, "fragments hold 16-bit elements or tf32; 8-bit ones are for hopper/ alone");

// Elements from row to row of a tile of COLS columns.
template <int COLS>
constexpr int TILE_STRIDE = COLS + ROW_PADDING<Element>;

// Accumulators of a warp: [ROW_TILES * MMA_M] rows of COLS columns. A fragment of b, once loaded, serves ROW_TILES mma.
template <int ROW_TILES, int COLS>
using AccTiles = float[ROW_TILES][COLS / MMA_N][4];

// They as a lane's part of a tile of logits (logits.cuh): two rows of every row tile, eight apart.
template <int ROW_TILES, int COLS>
struct AccLayout {
    using Tile = AccTiles<ROW_TILES, COLS>;
    static constexpr int ROWS = 2 * ROW_TILES, COLUMNS = COLS / MMA_N * 2;
    static constexpr bool APPROXIMATE = true;
    static __device__ __forceinline__ int row(int r) { return r / 2 * MMA_M + r % 2 * 8; }
    static __device__ __forceinline__ int column(int c) { return c / 2 * MMA_N + c % 2; }
    static __device__ __forceinline__ float& at(Tile& tile, int r, int c) {
        return tile[r / 2][c / 2][r % 2 * 2 + c % 2];
    }

    // The columns of one accumulator (tile_list.cuh).
    struct Slice {
        struct Tile {
            AccTiles<ROW_TILES, COLS>& whole;
            int index;
        };
        static constexpr int ROWS = 2 * ROW_TILES, COLUMNS = 2;
        static constexpr bool APPROXIMATE = true;
        static __device__ __forceinline__ int row(int r) { return AccLayout::row(r); }
        static __device__ __forceinline__ int column(int c) { return c; }
        static __device__ __forceinline__ float& at(Tile& tile, int r, int c) {
            return tile.whole[r / 2][tile.index][r % 2 * 2 + c];
        }
    };
};

template <int ROW_TILES, int COL_TILES>
__device__ __forceinline__ void clear(float (&acc)[ROW_TILES][COL_TILES][4]) {
#pragma unroll
    for (int t = 0; t < ROW_TILES; t++) {
#pragma unroll
        for (int n = 0; n < COL_TILES; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) acc[t][n][i] = 0.0f;
        }
    }
}

// Where this lane's fragment addresses start: the tile's base plus these many bytes. As a: rows from first_row on. As b
// of a b^T: the rows are columns of the product. As b of p b: the rows are summed over. A 16-byte row of the matrices
// that ldmatrix fetches holds eight 16-bit elements or four floats, so that both kinds are fetched alike.
template <int COLS>
__device__ __forceinline__ unsigned lane_offset_a(int first_row, int lane_idx) {
    return (first_row + frag_a_row(lane_idx)) * TILE_STRIDE<COLS> * sizeof(Element) + frag_a_bytes(lane_idx);
}
template <int COLS>
__device__ __forceinline__ unsigned lane_offset_bt(int lane_idx) {
    return frag_b_n(lane_idx) * TILE_STRIDE<COLS> * sizeof(Element) + frag_b_bytes(lane_idx);
}
template <int COLS>
__device__ __forceinline__ unsigned lane_offset_b(int lane_idx) {
    return TF32 ? (frag_acc_col(lane_idx) * TILE_STRIDE<COLS> + frag_acc_row(lane_idx)) * sizeof(Element)
                : frag_b_trans_k(lane_idx) * TILE_STRIDE<COLS> * sizeof(Element) + frag_b_trans_bytes(lane_idx);
}

// acc = a b^T for this warp's rows of a and all rows of b, DEPTH columns each. s_a, s_b: fragment addresses of this
// lane.
template <int DEPTH, int ROW_TILES, int COL_TILES>
__device__ __forceinline__ void multiply_abt(float (&acc)[ROW_TILES][COL_TILES][4], unsigned s_a, unsigned s_b) {
    static_assert(DEPTH % 32 == 0 && COL_TILES % 2 == 0, "head dims come in buckets, b in pairs of fragments");
    clear(acc);
#pragma unroll
    for (int d = 0; d < DEPTH; d += MMA_STEP_BYTES / sizeof(Element)) {
        unsigned frag_a[ROW_TILES][4];
#pragma unroll
        for (int t = 0; t < ROW_TILES; t++) {
            ldmatrix_x4(frag_a[t], s_a + (t * MMA_M * TILE_STRIDE<DEPTH> + d) * sizeof(Element));
            round_fragment(Element(), frag_a[t]);
        }
#pragma unroll
        for (int n = 0; n < COL_TILES; n += 2) {
            unsigned frag_b[4];
            ldmatrix_x4(frag_b, s_b + (n * MMA_N * TILE_STRIDE<DEPTH> + d) * sizeof(Element));
            round_fragment(Element(), frag_b);
#pragma unroll
            for (int t = 0; t < ROW_TILES; t++) {
                mma(Element(), acc[t][n], frag_a[t], frag_b[0], frag_b[1]);
                mma(Element(), acc[t][n + 1], frag_a[t], frag_b[2], frag_b[3]);
            }
        }
    }
}

// acc += p b, where p is an accumulator itself, rounded to elements, and b has a row for each of its columns. s_b:
// fragment address of this lane. The tag is a 16-bit element type here ...
template <typename Element, int ROW_TILES, int COL_TILES, int P_TILES>
__device__ __forceinline__ void multiply_add(Element tag, float (&acc)[ROW_TILES][COL_TILES][4],
                                             const float (&p)[ROW_TILES][P_TILES][4], unsigned s_b) {
    static_assert(P_TILES % 2 == 0, "p is whole k steps");
#pragma unroll
    for (int n = 0; n < P_TILES; n += 2) {
        unsigned frag_p[ROW_TILES][4];
#pragma unroll
        for (int t = 0; t < ROW_TILES; t++) frag_a_from_acc<Element>(frag_p[t], p[t][n], p[t][n + 1]);
#pragma unroll
        for (int e = 0; e < COL_TILES; e += 2) {
            unsigned frag_b[4];
            ldmatrix_x4_trans(frag_b, s_b + (n * TILE_STRIDE<COL_TILES * MMA_N> + e) * MMA_N * sizeof(Element));
#pragma unroll
            for (int t = 0; t < ROW_TILES; t++) {
                mma(tag, acc[t][e], frag_p[t], frag_b[0], frag_b[1]);
                mma(tag, acc[t][e + 1], frag_p[t], frag_b[2], frag_b[3]);
            }
        }
    }
}

// ... and float, for tf32, here. A lane of the accumulator holds columns 2 c and 2 c + 1, and a lane of the left
// operand columns c and c + 4: the sum over them has no order, so column 2 c takes the place of c, and 2 c + 1 that of
// c + 4, in p and b.
template <int ROW_TILES, int COL_TILES, int P_TILES>
__device__ __forceinline__ void multiply_add(float tag, float (&acc)[ROW_TILES][COL_TILES][4],
                                             const float (&p)[ROW_TILES][P_TILES][4], unsigned s_b) {
    constexpr int STRIDE = TILE_STRIDE<COL_TILES * MMA_N>;
#pragma unroll
    for (int n = 0; n < P_TILES; n++) {
        unsigned frag_p[ROW_TILES][4];
#pragma unroll
        for (int t = 0; t < ROW_TILES; t++) {
#pragma unroll
            for (int i = 0; i < 4; i++) frag_p[t][i] = round_to_tf32(p[t][n][i % 2 * 2 + i / 2]);
        }
#pragma unroll
        for (int e = 0; e < COL_TILES; e++) {
            const unsigned s_frag = s_b + (n * STRIDE + e) * MMA_N * sizeof(float);
            const unsigned b0 = round_to_tf32(load_shared_float(s_frag));
            const unsigned b1 = round_to_tf32(load_shared_float(s_frag + STRIDE * sizeof(float)));
#pragma unroll
            for (int t = 0; t < ROW_TILES; t++) mma(tag, acc[t][e], frag_p[t], b0, b1);
        }
    }
}
