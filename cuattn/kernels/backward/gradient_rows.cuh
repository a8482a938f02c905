// Gradients of a warp's rows on their way from accumulators to memory.
//
// Constants used: Element; ROW_TILES and WARP_ROWS of the including kernel.
#pragma once
#include "common/mma.cuh"
#include "common/tiles.cuh"

// Writes acc * factor to this warp's rows [num_rows x num_cols]: rounded to Element, by way of s_rows, which only this
// warp uses; or as it is, where Gradient is float and Element is not.
template <int COLS, typename Gradient>
__device__ __forceinline__ void store_gradient(Gradient* g_rows, long long g_stride, Element* s_rows,
                                               const AccTiles<ROW_TILES, COLS>& acc, float factor, int num_rows,
                                               int num_cols, int lane_idx) {
    if constexpr (sizeof(Gradient) != sizeof(Element)) {
        const bool pairs = ((reinterpret_cast<unsigned long long>(g_rows) | g_stride * sizeof(float)) & 7) == 0;
#pragma unroll
        for (int i = 0; i < 2 * ROW_TILES; i++) {
            const int row = i * 8 + frag_acc_row(lane_idx);
            if (row >= num_rows) continue;
            store_acc_row(g_rows + row * g_stride, acc[i / 2], i % 2, factor, num_cols, pairs, lane_idx);
        }
    } else {
        // SYNC: every lane has read what it needs of the operand that was here.
        __syncwarp();
#pragma unroll
        for (int t = 0; t < ROW_TILES; t++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int row = t * MMA_M + half * 8 + frag_acc_row(lane_idx);
                Element* s_row = s_rows + row * TILE_STRIDE<COLS> + frag_acc_col(lane_idx);
#pragma unroll
                for (int e = 0; e < COLS / MMA_N; e++) {
                    store_pair(s_row + e * MMA_N, acc[t][e][2 * half] * factor, acc[t][e][2 * half + 1] * factor);
                }
            }
        }
        // SYNC: the warp's rows are in shared memory; only the warp that wrote them reads them.
        __syncwarp();
        const bool vectors = ((reinterpret_cast<unsigned long long>(g_rows) | g_stride * sizeof(Element)) & 15) == 0;
        store_tile_by_warp<WARP_ROWS, COLS>(g_rows, g_stride, s_rows, num_rows, num_cols, vectors, lane_idx);
    }
}
