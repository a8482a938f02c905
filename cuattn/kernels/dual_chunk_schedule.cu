// The list of work of packed dual-chunk attention (dual_chunk/chunk_block.cuh), made on the device from cu_seqlens that
// the host has not seen. A tile of queries, at most BLOCK_M of one chunk, is one entry.
//
// One CTA of NUM_THREADS threads.
//
// Constants: BLOCK_M, NUM_THREADS.
#include "attention/work_schedule.cuh"
#include "dual_chunk/chunk_block.cuh"

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) cuattn_dual_chunk_schedule(
    const int* __restrict__ g_cu_seqlens_q,  // [num_sequences + 1]
    const int* __restrict__ g_cu_seqlens_k,  // [num_sequences + 1]
    int* g_first_work,                       // [num_sequences + 1] workspace: index of the first entry of each sequence
    int* __restrict__ g_work,                // [capacity, 2]
    int num_sequences, int total_q, int total_k, int max_seqlen_q, int max_seqlen_k, int chunk_length, int capacity)
{
    make_work_list(g_first_work, g_work, num_sequences, capacity, [&](int sequence) {
        int start, seqlen_q, seqlen_k;
        sequence_bounds(g_cu_seqlens_q, sequence, total_q, max_seqlen_q, start, seqlen_q);
        sequence_bounds(g_cu_seqlens_k, sequence, total_k, max_seqlen_k, start, seqlen_k);
        return ChunkTiles<BLOCK_M>(seqlen_q, seqlen_k - seqlen_q, chunk_length).count(seqlen_q);
    });
}
