// Softmax, log-softmax or log-sum-exp with several CTAs a row: for few, long rows.
//
// A row is cut into chunks of layout.chunk_cols columns, one a CTA. cuattn_softmax_partial writes the state of every
// chunk to a workspace; cuattn_softmax_finish, a later launch, merges the states of a row and writes the result. The
// end of the first launch is the only synchronisation between CTAs. Reads and writes are those of one CTA a row, plus
// the small workspace.
//
// Grid:  x the chunks of a row, exactly; y any number: CTA (c, y) takes chunk c of the row groups y, y + gridDim.y, ...
// Block: NUM_THREADS, shared by ROWS_PER_CTA rows (see softmax_rows.cuh).
#include "softmax/softmax_algorithms.cuh"
#include "softmax/softmax_output.cuh"

// This CTA's columns [begin, end) of every row.
struct Chunk {
    unsigned begin;
    unsigned end;
};

__device__ __forceinline__ Chunk this_chunk(const RowLayout& layout) {
    const unsigned begin = blockIdx.x * layout.chunk_cols;
    return {begin, min(begin + layout.chunk_cols, layout.num_cols)};
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1)
    cuattn_softmax_partial(const Element* g_x,  // [num_rows, num_cols], strides in layout
                           RowState* g_states,  // [num_rows, num_chunks]
                           const RowLayout layout) {
    __shared__ Smem smem;
    const Place place = thread_place();
    const Chunk chunk = this_chunk(layout);

    for (long long first_row = static_cast<long long>(blockIdx.y) * ROWS_PER_CTA; first_row < layout.num_rows;
         first_row += static_cast<long long>(gridDim.y) * ROWS_PER_CTA) {
        // Threads beyond the last row stay for the barriers and shuffles, with no columns to read.
        const bool has_row = first_row + place.row < layout.num_rows;
        const long long row_idx = has_row ? first_row + place.row : 0;
        const Element* g_row = g_x + row_offsets(layout, row_idx).x;
        const unsigned end = has_row ? chunk.end : 0;

        const RowState state = row_state(g_row, layout.x_col_stride, chunk.begin, end, place.thread, smem);
        if (place.thread == 0 && has_row) g_states[row_idx * gridDim.x + blockIdx.x] = state;
        end_of_row();
    }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1)
    cuattn_softmax_finish(const Element* g_x,         // [num_rows, num_cols], strides in layout
                          const RowState* g_states,   // [num_rows, num_states]
                          Result* g_out,              // [num_rows, num_cols], or [num_rows] for LOGSUMEXP; may be g_x
                          const unsigned num_states,  // chunks of the partial launch; not always those of this one
                          const RowLayout layout) {
    __shared__ Smem smem;
    const Place place = thread_place();
    const Chunk chunk = this_chunk(layout);

    for (long long first_row = static_cast<long long>(blockIdx.y) * ROWS_PER_CTA; first_row < layout.num_rows;
         first_row += static_cast<long long>(gridDim.y) * ROWS_PER_CTA) {
        const bool has_row = first_row + place.row < layout.num_rows;
        const long long row_idx = has_row ? first_row + place.row : 0;

        RowState state = empty_state();
        for (unsigned i = place.thread; i < num_states; i += THREADS_PER_ROW) {
            state = merge(state, g_states[row_idx * num_states + i]);
        }
        state = reduce_state(state, smem);
        const RowOffsets offsets = row_offsets(layout, row_idx);
        const unsigned end = has_row ? chunk.end : 0;
        write_row(g_x + offsets.x, g_out + offsets.out, layout, chunk.begin, end, place.thread, state);
    }
}
