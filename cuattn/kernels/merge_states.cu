// Merges S partial attention results of the same queries, over disjoint sets of keys, into one: merge.cuh says how.
//
// One CTA merges blockDim.z rows at a time, a row being one query of one head. Its blockDim.x lanes share the columns,
// PACK neighbouring ones each; its blockDim.y groups share the parts, and are added up in shared memory, in order: with
// few rows and many parts (decoding) one group alone would wait for memory most of the time.
//
// Rows are numbered with the position in the sequence as the fastest index: lse is contiguous there, and each row of an
// out is a stretch of memory anyway.
//
// Grid:  any number of CTAs; CTA c takes the groups of blockDim.z rows c, c + gridDim.x, ...
// Block: at most NUM_THREADS.
#include "merge/merge_groups.cuh"

static_assert(sizeof(Result) <= sizeof(Element), "a pack of results takes one store");

struct Strides {
    long long batch;
    long long seq;
    long long head;
};

// Passed by value. Strides are in elements.
struct MergeLayout {
    long long num_rows;  // batch * num_heads * seqlen
    Strides first_out;
    Strides rest_out;
    Strides out;
    Strides first_lse;
    Strides rest_lse;
    Strides lse;
    long long rest_out_part_stride;
    long long rest_lse_part_stride;
    unsigned seqlen;
    unsigned num_heads;
    unsigned num_parts;
    unsigned head_dim;
};

struct RowPosition {
    long long batch_idx;
    long long head_idx;
    long long seq_idx;

    __device__ __forceinline__ long long offset(const Strides& strides) const {
        return batch_idx * strides.batch + seq_idx * strides.seq + head_idx * strides.head;
    }
};

template <typename Index>
__device__ __forceinline__ RowPosition split_row(Index row_idx, const MergeLayout& layout) {
    const Index head_row = row_idx / layout.seqlen;
    const Index batch_idx = head_row / layout.num_heads;
    return {static_cast<long long>(batch_idx), static_cast<long long>(head_row - batch_idx * layout.num_heads),
            static_cast<long long>(row_idx - head_row * layout.seqlen)};
}

// Divisions of 64 bits are several times as slow.
__device__ __forceinline__ RowPosition row_position(long long row_idx, const MergeLayout& layout) {
    if (layout.num_rows <= 0xffffffffLL) return split_row(static_cast<unsigned>(row_idx), layout);
    return split_row(row_idx, layout);
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1)
    cuattn_merge_states(const Element* g_first_out,      // [batch, seqlen, num_heads, head_dim], strides in layout
                        const Accumulator* g_first_lse,  // [batch, num_heads, seqlen]
                        const Element* g_rest_out,       // [num_parts - 1, batch, seqlen, num_heads, head_dim]
                        const Accumulator* g_rest_lse,   // [num_parts - 1, batch, num_heads, seqlen]
                        const Accumulator* g_sinks,      // [num_heads], or null
                        Result* g_out,                   // as g_first_out, and may be it
                        Accumulator* g_lse,              // as g_first_lse, and may be it
                        const MergeLayout layout) {
    __shared__ GroupSums smem;
    const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    const int first_thread = thread - threadIdx.y * blockDim.x;  // of group 0, same column
    const bool has_groups = blockDim.y > 1;

    for (long long first_row = static_cast<long long>(blockIdx.x) * blockDim.z; first_row < layout.num_rows;
         first_row += static_cast<long long>(gridDim.x) * blockDim.z) {
        // Threads beyond the last row stay for the barriers, with no parts to merge.
        const bool has_row = first_row + threadIdx.z < layout.num_rows;
        const RowPosition row = row_position(has_row ? first_row + threadIdx.z : 0, layout);
        const Parts<Accumulator> parts = {
            g_first_out + row.offset(layout.first_out), g_rest_out + row.offset(layout.rest_out),
            g_first_lse + row.offset(layout.first_lse), g_rest_lse + row.offset(layout.rest_lse),
            layout.rest_out_part_stride,                layout.rest_lse_part_stride,
            has_row ? layout.num_parts : 0};

        const Accumulator sink = g_sinks == nullptr ? -infinity() : g_sinks[row.head_idx];
        Accumulator row_max = maximum(sink, largest_max(parts, threadIdx.y, blockDim.y));
        if (has_groups) row_max = largest_of_groups(row_max, thread, first_thread, smem);
        const Accumulator shift = exponent_shift(row_max);
        const Accumulator sink_weight = exponential(sink - shift);

        unsigned tile = 0;
        do {  // once even where there are no columns: lse wants its sum
            const PackColumns columns(tile, threadIdx.x, blockDim.x, layout.head_dim);
            MergeAccumulator acc = weighted_sum(parts, threadIdx.y, blockDim.y, shift, columns);
            if (has_groups) add_groups(acc, thread, smem);
            acc.row_sum += sink_weight;
            if (threadIdx.y == 0 && has_row) store_merged(g_out + row.offset(layout.out), acc, columns);
            tile += blockDim.x * PACK;
            // SYNC: group 0 has read the sums before the next tile, or row, overwrites them; and every thread has read
            // the row's lse before it is replaced, should it be that of the first part.
            __syncthreads();
            if (thread == first_thread && threadIdx.x == 0 && has_row && tile >= layout.head_dim) {
                g_lse[row.offset(layout.lse)] = shift + logarithm(acc.row_sum);
            }
        } while (tile < layout.head_dim);
    }
}
