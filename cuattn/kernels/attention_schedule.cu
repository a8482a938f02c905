// The list of work of packed attention (query_block.cuh), made on the device from cu_seqlens that the host has not
// seen. A block of BLOCK_M queries of one sequence is one entry.
//
// One CTA of NUM_THREADS threads.
//
// Constants: BLOCK_M, NUM_THREADS.
#include "attention/query_block.cuh"
#include "attention/work_schedule.cuh"

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) cuattn_attention_schedule(
    const int* __restrict__ g_cu_seqlens_q,  // [num_sequences + 1]
    int* g_first_work,                       // [num_sequences + 1] workspace: index of the first entry of each sequence
    int* __restrict__ g_work,                // [capacity, 2]
    int num_sequences, int total, int max_seqlen, int capacity)
{
    make_work_list(g_first_work, g_work, num_sequences, capacity, [&](int sequence) {
        int start, length;
        sequence_bounds(g_cu_seqlens_q, sequence, total, max_seqlen, start, length);
        return (static_cast<unsigned>(length) + BLOCK_M - 1) / BLOCK_M;
    });
}
