// The state of a softmax whose rows arrive in pieces: one RowState a row, kept in global memory between launches.
//
//   cuattn_online_softmax_update     takes one more piece of every row into the states
//   cuattn_online_softmax_merge      takes other states of the same rows into the states
//   cuattn_online_softmax_logsumexp  the log-sum-exp of what the states have seen
//
// Grid:  any number of CTAs; CTA c takes the row groups c, c + gridDim.x, ...
// Block: NUM_THREADS, shared by ROWS_PER_CTA rows (see softmax_rows.cuh); for the log-sum-exp one thread a row.
#include "softmax/softmax_algorithms.cuh"

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1)
    cuattn_online_softmax_update(const Element* g_x,  // [num_rows, num_cols], strides in layout
                                 RowState* g_states,  // [num_rows]
                                 const RowLayout layout) {
    __shared__ Smem smem;
    const Place place = thread_place();

    for (long long first_row = static_cast<long long>(blockIdx.x) * ROWS_PER_CTA; first_row < layout.num_rows;
         first_row += static_cast<long long>(gridDim.x) * ROWS_PER_CTA) {
        const long long row_idx = first_row + place.row;
        const bool has_row = row_idx < layout.num_rows;
        const Element* g_row = g_x + row_offsets(layout, has_row ? row_idx : 0).x;

        const RowState piece =
            row_state(g_row, layout.x_col_stride, 0, has_row ? layout.num_cols : 0, place.thread, smem);
        if (place.thread == 0 && has_row) g_states[row_idx] = merge(g_states[row_idx], piece);
    }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1)
    cuattn_online_softmax_merge(RowState* g_states,        // [num_rows]
                                const RowState* g_others,  // [num_rows, num_others]; may be g_states
                                const long long num_rows, const unsigned num_others) {
    __shared__ Smem smem;
    const Place place = thread_place();

    for (long long first_row = static_cast<long long>(blockIdx.x) * ROWS_PER_CTA; first_row < num_rows;
         first_row += static_cast<long long>(gridDim.x) * ROWS_PER_CTA) {
        const long long row_idx = first_row + place.row;
        const bool has_row = row_idx < num_rows;

        RowState others = empty_state();
        for (unsigned i = place.thread; has_row && i < num_others; i += THREADS_PER_ROW) {
            others = merge(others, g_others[row_idx * num_others + i]);
        }
        others = reduce_state(others, smem);
        if (place.thread == 0 && has_row) g_states[row_idx] = merge(g_states[row_idx], others);
    }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1)
    cuattn_online_softmax_logsumexp(const RowState* g_states,  // [num_rows]
                                    Accumulator* g_lse,        // [num_rows]
                                    const long long num_rows) {
    for (long long row_idx = static_cast<long long>(blockIdx.x) * NUM_THREADS + threadIdx.x; row_idx < num_rows;
         row_idx += static_cast<long long>(gridDim.x) * NUM_THREADS) {
        g_lse[row_idx] = logsumexp(g_states[row_idx]);
    }
}
