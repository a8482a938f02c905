// Softmax, log-softmax or log-sum-exp of the rows of an array, rows of any length.
//
// One CTA computes ROWS_PER_CTA whole rows at a time: it reads a row once (naive, online) or twice (safe) for its
// state, then once more to write the result. Rows short enough for the registers are read only once by
// softmax_onchip.cu; when there are few long rows, softmax_split.cu gives each to several CTAs.
//
// Grid:  any number of CTAs; CTA c takes the row groups c, c + gridDim.x, ...
// Block: NUM_THREADS, shared by ROWS_PER_CTA rows (see softmax_rows.cuh).
#include "softmax/softmax_algorithms.cuh"
#include "softmax/softmax_output.cuh"

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1)
    cuattn_softmax(const Element* g_x,  // [num_rows, num_cols], strides in layout
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
        const Element* g_row = g_x + offsets.x;

        const RowState state = row_state(g_row, layout.x_col_stride, 0, num_cols, place.thread, smem);
        write_row(g_row, g_out + offsets.out, layout, 0, num_cols, place.thread, state);
        end_of_row();
    }
}
