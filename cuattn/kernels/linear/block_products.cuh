// Products of blocks of BLOCK x BLOCK elements in shared memory, whichever way they lie: acc += op(a) op(b).
//
// 16-bit elements are multiplied on tensor cores (mma.sync) and summed in float; float and double by IEEE fused
// multiply-adds in their own type. A CTA computes a block: a warp has WARP_ROWS neighbouring rows of it, and a lane the
// elements (row(r), column(c)) of ROWS rows and COLUMNS columns, the same for every product.
//
// Constants used: Element, Real, BLOCK, NUM_WARPS of the including kernel.
#pragma once
#include "common/elements.cuh"
#include "common/mma.cuh"
#include "common/tiles.cuh"

constexpr bool TENSOR = sizeof(Element) == 2;
constexpr int NUM_THREADS = NUM_WARPS * WARP_SIZE;
constexpr int STRIDE = BLOCK + ROW_PADDING<Element>;  // elements from row to row of a block
constexpr int WARP_ROWS = BLOCK / NUM_WARPS;
constexpr int ROW_LANES = TENSOR ? 4 : 16;             // lanes that share a row of a block
constexpr int ROWS = WARP_ROWS * ROW_LANES / WARP_SIZE;
constexpr int COLUMNS = BLOCK / ROW_LANES;

static_assert(!TENSOR || (WARP_ROWS == MMA_M && BLOCK % 16 == 0), "a warp has one row of mma tiles");
static_assert(ROWS * WARP_SIZE == WARP_ROWS * ROW_LANES && COLUMNS * ROW_LANES == BLOCK, "lanes have whole parts");

using SharedBlock = Element[BLOCK * STRIDE];

__device__ __forceinline__ int lane_index() { return threadIdx.x % WARP_SIZE; }
__device__ __forceinline__ int warp_row() { return threadIdx.x / WARP_SIZE * WARP_ROWS; }

// A lane's part of a block.
struct Block {
    Real x[TENSOR ? COLUMNS / 2 : ROWS][TENSOR ? 4 : COLUMNS];

    static __device__ __forceinline__ int row(int r) {
        return warp_row() + (TENSOR ? frag_acc_row(lane_index()) + r * 8 : lane_index() / ROW_LANES * ROWS + r);
    }
    static __device__ __forceinline__ int column(int c) {
        return TENSOR ? c / 2 * MMA_N + frag_acc_col(lane_index()) + c % 2 : lane_index() % ROW_LANES + c * ROW_LANES;
    }
    __device__ __forceinline__ Real& at(int r, int c) { return TENSOR ? x[c / 2][r * 2 + c % 2] : x[r][c]; }

    __device__ __forceinline__ void clear() {
        each([](int, int, Real& x) { x = 0; });
    }
    // Calls f(r, c, element) for all elements of this lane.
    template <typename F>
    __device__ __forceinline__ void each(F f) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) f(r, c, at(r, c));
        }
    }
    // Rounds this lane's elements and stores them as a block.
    __device__ __forceinline__ void store(Element* s_block) {
        if constexpr (TENSOR) {
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
#pragma unroll
                for (int c = 0; c < COLUMNS; c += 2) {
                    store_pair(s_block + row(r) * STRIDE + column(c), at(r, c), at(r, c + 1));
                }
            }
        } else {
            each([&](int r, int c, Real& x) { from_real(x, s_block[row(r) * STRIDE + column(c)]); });
        }
    }
};

// The sum over the lanes of a row, in each of them.
__device__ __forceinline__ Real row_sum(Real x) {
#pragma unroll
    for (int lanes = ROW_LANES / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffff, x, lanes);
    return x;
}
// Whether this lane speaks for its rows.
__device__ __forceinline__ bool first_of_row() { return lane_index() % ROW_LANES == 0; }

// Columns, or terms, of a product that are wanted; the others are 0, or unwanted. In whole steps of 16.
struct Window {
    int begin, end;
    __device__ __forceinline__ bool has(int first) const { return first >= begin && first < end; }
};
constexpr Window WHOLE = {0, BLOCK};

// Calls f(r, c, element) for those elements of this lane whose columns are in a window, and perhaps for more.
template <typename F>
__device__ __forceinline__ void each_in(Block& block, Window columns, F f) {
    block.each([&](int r, int c, Real& x) {
        if (!TENSOR || columns.has(c / 4 * 16)) f(r, c, x);
    });
}

// acc += op(a) op(b), where op transposes a block that lies the other way: s_a is [rows][terms], with A_TRANSPOSED
// [terms][rows]; s_b is [terms][columns], with B_TRANSPOSED [columns][terms]. Windows are those of this warp.
template <bool A_TRANSPOSED, bool B_TRANSPOSED, typename Acc>
__device__ __forceinline__ void multiply(Acc& acc, const Element* s_a, const Element* s_b, Window columns = WHOLE,
                                         Window terms = WHOLE) {
    if constexpr (TENSOR) {
        const int lane = lane_index();
        const unsigned a = smem_address(s_a) +
                           (A_TRANSPOSED ? (frag_a_trans_k(lane) * STRIDE + warp_row()) * 2 + frag_a_trans_bytes(lane)
                                         : (frag_a_row(lane) + warp_row()) * STRIDE * 2 + frag_a_bytes(lane));
        const unsigned b =
            smem_address(s_b) + (B_TRANSPOSED ? frag_b_n(lane) * STRIDE * 2 + frag_b_bytes(lane)
                                              : frag_b_trans_k(lane) * STRIDE * 2 + frag_b_trans_bytes(lane));
#pragma unroll
        for (int k = 0; k < BLOCK; k += 16) {
            if (!terms.has(k)) continue;
            unsigned frag_a[4];
            if (A_TRANSPOSED) {
                ldmatrix_x4_trans(frag_a, a + k * STRIDE * 2);
            } else {
                ldmatrix_x4(frag_a, a + k * 2);
            }
#pragma unroll
            for (int n = 0; n < BLOCK / MMA_N; n += 2) {
                if (!columns.has(n * MMA_N)) continue;
                unsigned frag_b[4];
                if (B_TRANSPOSED) {
                    ldmatrix_x4(frag_b, b + (n * MMA_N * STRIDE + k) * 2);
                } else {
                    ldmatrix_x4_trans(frag_b, b + (k * STRIDE + n * MMA_N) * 2);
                }
                mma(Element(), acc.x[n], frag_a, frag_b[0], frag_b[1]);
                mma(Element(), acc.x[n + 1], frag_a, frag_b[2], frag_b[3]);
            }
        }
    } else {
        constexpr int VECTOR = 16 / sizeof(Element);
        const int row = Block::row(0), column = Block::column(0);
        Block sums;  // of this block of terms on its own, which keeps the error near that of pairwise summation
        sums.clear();
#pragma unroll 2
        for (int k = terms.begin; k < terms.end; k += VECTOR) {
            Run<Element, VECTOR> a[ROWS], b[COLUMNS];
            if (!A_TRANSPOSED) {
#pragma unroll
                for (int r = 0; r < ROWS; r++) a[r].load(s_a + (row + r) * STRIDE + k);
            }
            if (B_TRANSPOSED) {
#pragma unroll
                for (int c = 0; c < COLUMNS; c++) b[c].load(s_b + (column + c * ROW_LANES) * STRIDE + k);
            }
#pragma unroll
            for (int i = 0; i < VECTOR; i++) {
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    const Real left = A_TRANSPOSED ? to_real(s_a[(k + i) * STRIDE + row + r]) : a[r].get(i);
#pragma unroll
                    for (int c = 0; c < COLUMNS; c++) {
                        const Real right = B_TRANSPOSED ? b[c].get(i)
                                                        : to_real(s_b[(k + i) * STRIDE + column + c * ROW_LANES]);
                        sums.at(r, c) = fma(left, right, sums.at(r, c));
                    }
                }
            }
        }
        sums.each([&](int r, int c, Real& x) { acc.at(r, c) += x; });
    }
}
