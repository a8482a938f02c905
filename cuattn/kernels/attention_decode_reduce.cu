// The second half of FlashDecoding: merges the partial results that the splits of a sequence have left. merge.cuh says
// how; Dao et al., "Flash-Decoding for long-context inference", 2023.
//
// A row is one token of one query head. Its parts are the splits of its sequence, seqlen_q partial rows apart
// (splits.cuh), already divided by their own sums; a split without visible keys has sum 0, and its out is not
// read. The sink of the head enters here, once. Sequences of one split are finished already: their rows are left
// alone, and so are tokens of no sequence.
//
// One CTA merges blockDim.z rows at a time, as merge_groups.cuh says. Sums are in the order of the splits, so that the
// same call gives the same bits.
//
// Grid:  any number of CTAs; CTA c takes the groups of blockDim.z rows c, c + gridDim.x, ...
// Block: at most NUM_THREADS.
//
// Constants: Element (of the partial results), Result, VECTORIZED, NUM_THREADS.
#include "decode/splits.cuh"
#include "merge/merge_groups.cuh"

// A row of the result, and where its partial results are.
struct MergedRow {
    int batch_idx, token, head_idx;  // token: within the sequence
    int q_start, seqlen_q;           // of the sequence
    Splits splits;                   // count 0: there is nothing to do
};

// The last sequence that begins at or before a token: those without queries begin where the next one does.
__device__ __forceinline__ int sequence_of(const int* g_cu_seqlens_q, int batch, int token) {
    int low = 0, high = batch;
    while (high - low > 1) {
        const int middle = low + (high - low) / 2;
        if (g_cu_seqlens_q[middle] <= token) low = middle; else high = middle;
    }
    return low;
}

template <typename Index>
__device__ __forceinline__ MergedRow split_row(Index row_idx, const DecodeParams<Accumulator>& params,
                                               const int* g_cu_seqlens_q, const int* g_splits) {
    MergedRow row;
    const int token = static_cast<int>(row_idx / params.num_heads);  // of all tokens
    row.head_idx = static_cast<int>(row_idx - static_cast<Index>(token) * params.num_heads);
    row.batch_idx = g_cu_seqlens_q == nullptr ? static_cast<unsigned>(token) / params.seqlen_q
                                              : sequence_of(g_cu_seqlens_q, params.batch, token);
    find_queries(params, g_cu_seqlens_q, row.batch_idx, row.q_start, row.seqlen_q);
    row.token = token - row.q_start;
    row.splits = splits_of(params, g_splits, row.batch_idx, row.q_start);
    if (row.splits.count <= 1 || row.token < 0 || row.token >= row.seqlen_q) row.splits.count = 0;
    return row;
}

// Divisions of 64 bits are several times as slow.
__device__ __forceinline__ MergedRow merged_row(long long row_idx, long long num_rows,
                                                const DecodeParams<Accumulator>& params, const int* g_cu_seqlens_q,
                                                const int* g_splits) {
    if (num_rows <= 0xffffffffLL) {
        return split_row(static_cast<unsigned>(row_idx), params, g_cu_seqlens_q, g_splits);
    }
    return split_row(row_idx, params, g_cu_seqlens_q, g_splits);
}

__device__ __forceinline__ Parts<StoredState> parts_of(const MergedRow& row, const DecodeParams<Accumulator>& params,
                                                       const Element* g_partial_out,
                                                       const StoredState* g_partial_state) {
    const long long first = (row.splits.first + row.token) * params.num_heads + row.head_idx;
    const long long step = static_cast<long long>(row.seqlen_q) * params.num_heads;
    const Element* g_out = g_partial_out + first * params.head_dim_v;
    const StoredState* g_state = g_partial_state + first;
    const long long out_step = step * params.head_dim_v;
    return {g_out, g_out + out_step, g_state, g_state + step, out_step, step, static_cast<unsigned>(row.splits.count)};
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) cuattn_attention_decode_reduce(
    const Element* __restrict__ g_partial_out,        // [num_partials, num_heads, head_dim_v]
    const StoredState* __restrict__ g_partial_state,  // [num_partials, num_heads]
    const Accumulator* __restrict__ g_sinks,          // [num_heads], or null
    Result* __restrict__ g_out,           // [batch, seqlen_q, num_heads, head_dim_v]; packed: without the first axis
    Accumulator* __restrict__ g_lse,      // [batch, num_heads, seqlen_q]; likewise; or null
    const int* __restrict__ g_cu_seqlens_q,  // [batch + 1] of packed sequences, else null
    const int* __restrict__ g_splits,        // [batch, 2] (count, first partial row), or null
    const DecodeParams<Accumulator> params) {
    __shared__ GroupSums smem;
    const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    const int first_thread = thread - threadIdx.y * blockDim.x;  // of group 0, same column
    const bool has_groups = blockDim.y > 1;
    const bool is_packed = g_cu_seqlens_q != nullptr;
    const long long num_tokens = is_packed ? params.seqlen_q : static_cast<long long>(params.batch) * params.seqlen_q;
    const long long num_rows = num_tokens * params.num_heads;

    for (long long first_row = static_cast<long long>(blockIdx.x) * blockDim.z; first_row < num_rows;
         first_row += static_cast<long long>(gridDim.x) * blockDim.z) {
        // Threads beyond the last row stay for the barriers, with no parts to merge.
        const bool is_row = first_row + threadIdx.z < num_rows;
        MergedRow row = merged_row(is_row ? first_row + threadIdx.z : 0, num_rows, params, g_cu_seqlens_q, g_splits);
        if (!is_row) row.splits.count = 0;
        const bool has_parts = row.splits.count > 0;
        const Parts<StoredState> parts = parts_of(row, params, g_partial_out, g_partial_state);

        const Accumulator sink = g_sinks == nullptr ? -infinity() : g_sinks[row.head_idx];
        Accumulator row_max = maximum(sink, largest_max(parts, threadIdx.y, blockDim.y));
        if (has_groups) row_max = largest_of_groups(row_max, thread, first_thread, smem);
        const Accumulator shift = exponent_shift(row_max);
        const Accumulator sink_weight = exponential(sink - shift);

        // A packed array has no batch axis: its tokens are counted from the first of all sequences.
        const int out_token = row.token + (is_packed ? row.q_start : 0);
        for (unsigned tile = 0; tile < params.head_dim_v; tile += blockDim.x * PACK) {
            const PackColumns columns(tile, threadIdx.x, blockDim.x, params.head_dim_v);
            MergeAccumulator acc = weighted_sum(parts, threadIdx.y, blockDim.y, shift, columns);
            if (has_groups) add_groups(acc, thread, smem);
            acc.row_sum += sink_weight;
            if (threadIdx.y == 0 && has_parts) {
                store_merged(g_out + row.batch_idx * params.out.batch + out_token * params.out.seq +
                                 row.head_idx * params.out.head,
                             acc, columns);
                if (tile == 0 && threadIdx.x == 0 && g_lse != nullptr) {
                    g_lse[row.batch_idx * params.lse_batch + row.head_idx * params.lse_head + out_token] =
                        shift + logarithm(acc.row_sum);
                }
            }
            // SYNC: group 0 has read the sums before the next tile, or row, overwrites them.
            if (has_groups) __syncthreads();
        }
    }
}
