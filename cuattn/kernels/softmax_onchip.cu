// Softmax, log-softmax or log-sum-exp of rows that fit into the registers: one read, one write.
//
// One CTA computes ROWS_PER_CTA whole rows at a time. A thread keeps PACKS_PER_THREAD packs of its row in registers
// from the only read to the only write; with the row at hand the maximum comes first and no sum is ever rescaled.
//
// Grid:  any number of CTAs; CTA c takes the row groups c, c + gridDim.x, ...
// Block: NUM_THREADS, shared by ROWS_PER_CTA rows (see softmax_rows.cuh).
#include "softmax/softmax_output.cuh"

struct Row {
    Pack pack[PACKS_PER_THREAD];
};

__device__ __forceinline__ Row load_row(const Element* g_row, long long col_stride, unsigned num_cols, int thread) {
    Row row;
#pragma unroll
    for (int p = 0; p < PACKS_PER_THREAD; ++p) {
        row.pack[p] = load_pack(g_row, col_stride, p * TILE_COLS, thread, num_cols);
    }
    return row;
}

__device__ __forceinline__ Accumulator thread_max(const Row& row) {
    Accumulator row_max = -infinity();
#pragma unroll
    for (int p = 0; p < PACKS_PER_THREAD; ++p) {
#pragma unroll
        for (int i = 0; i < PACK; ++i) row_max = maximum(row_max, row.pack[p].value[i]);
    }
    return row_max;
}

// Replaces each x by what the output needs, e^(x - shift) or x - shift; returns the sum of the exponentials.
__device__ __forceinline__ Accumulator thread_sum(Row& row, Accumulator shift) {
    Accumulator row_sum = 0;
#pragma unroll
    for (int p = 0; p < PACKS_PER_THREAD; ++p) {
#pragma unroll
        for (int i = 0; i < PACK; ++i) {
            const Accumulator shifted = row.pack[p].value[i] - shift;
            const Accumulator e = exponential(shifted);
            row.pack[p].value[i] = OUTPUT == LOG_SOFTMAX ? shifted : e;
            row_sum += e;
        }
    }
    return row_sum;
}

__device__ __forceinline__ void store_row(Result* g_out, const RowLayout& layout, unsigned num_cols, int thread,
                                          Row& row, RowState state) {
    if constexpr (OUTPUT == LOGSUMEXP) {
        if (thread == 0 && num_cols > 0) *g_out = logsumexp(state);
    } else {
        const Normalizer normalizer(state);
        Element* g_row = reinterpret_cast<Element*>(g_out);  // Result is Element here, which only this branch knows
#pragma unroll
        for (int p = 0; p < PACKS_PER_THREAD; ++p) {
            Pack& pack = row.pack[p];
#pragma unroll
            for (int i = 0; i < PACK; ++i) {
                pack.value[i] = OUTPUT == LOG_SOFTMAX ? normalizer.log_probability(pack.value[i])
                                                      : normalizer.probability(pack.value[i]);
            }
            store_pack(g_row, layout.out_col_stride, p * TILE_COLS, thread, num_cols, pack);
        }
    }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) cuattn_softmax_onchip(
    const Element* g_x,  // [num_rows, num_cols <= TILE_COLS * PACKS_PER_THREAD]; strides: layout
    Result* g_out,       // [num_rows, num_cols], or [num_rows] for LOGSUMEXP; may be g_x
    const RowLayout layout) {
    __shared__ Smem smem;
    const Place place = thread_place();

    for (long long first_row = static_cast<long long>(blockIdx.x) * ROWS_PER_CTA; first_row < layout.num_rows;
         first_row += static_cast<long long>(gridDim.x) * ROWS_PER_CTA) {
        // Threads beyond the last row stay for the barriers and shuffles, with no columns to read or write.
        const bool has_row = first_row + place.row < layout.num_rows;
        const unsigned num_cols = has_row ? layout.num_cols : 0;
        const RowOffsets offsets = row_offsets(layout, has_row ? first_row + place.row : 0);

        Row row = load_row(g_x + offsets.x, layout.x_col_stride, num_cols, place.thread);
        RowState state;
        state.row_max = reduce_row<Maximum>(thread_max(row), smem.row_max);
        state.row_sum = reduce_row<Sum>(thread_sum(row, exponent_shift(state.row_max)), smem.row_sum);
        store_row(g_out + offsets.out, layout, num_cols, place.thread, row, state);
    }
}
