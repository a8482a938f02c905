// A list of work (query_block.cuh) made on the device, by one CTA of NUM_THREADS threads: it counts the entries of each
// sequence, sums the counts up, and fills the list. How many there are is known to the device only, so the list has
// room for the most that there can be; the rest of it is marked as no work. Sequence by sequence, the last entry of
// each first: under a causal mask it has the most keys to visit.
//
// Constant used: NUM_THREADS.
#pragma once

constexpr int WARP_SIZE = 32;

// Sum of `x` over the threads before this one, and over all threads in `total`.
__device__ __forceinline__ int exclusive_sum(int x, int& total) {
    __shared__ int s_warp_sums[NUM_THREADS / WARP_SIZE];
    const int lane_idx = threadIdx.x % WARP_SIZE;
    int inclusive = x;
    for (int distance = 1; distance < WARP_SIZE; distance *= 2) {
        const int before = __shfl_up_sync(0xffffffff, inclusive, distance);
        if (lane_idx >= distance) inclusive += before;
    }
    if (lane_idx == WARP_SIZE - 1) s_warp_sums[threadIdx.x / WARP_SIZE] = inclusive;
    // SYNC: the sum of every warp is written.
    __syncthreads();
    int before_warp = 0;
    total = 0;
    for (int warp_idx = 0; warp_idx < NUM_THREADS / WARP_SIZE; warp_idx++) {
        if (warp_idx < threadIdx.x / WARP_SIZE) before_warp += s_warp_sums[warp_idx];
        total += s_warp_sums[warp_idx];
    }
    // SYNC: all have read the sums, which the next call overwrites.
    __syncthreads();
    return before_warp + inclusive - x;
}

// count_of(sequence): its entries. g_first_work [num_sequences + 1]: workspace, the index of the first entry of each
// sequence. g_work [capacity, 2].
template <typename CountOf>
__device__ __forceinline__ void make_work_list(int* g_first_work, int* g_work, int num_sequences, int capacity,
                                               const CountOf& count_of) {
    int num_work = 0;
    for (int first = 0; first < num_sequences; first += NUM_THREADS) {
        const int sequence = first + threadIdx.x;
        int sum;
        const int before = exclusive_sum(sequence < num_sequences ? count_of(sequence) : 0, sum);
        if (sequence < num_sequences) g_first_work[sequence] = num_work + before;
        num_work += sum;
    }
    if (threadIdx.x == 0) g_first_work[num_sequences] = num_work;
    // SYNC: every entry's place is known.
    __syncthreads();

    for (int work_idx = threadIdx.x; work_idx < capacity; work_idx += NUM_THREADS) {
        int sequence = -1, entry = 0;
        if (work_idx < num_work) {
            // The last sequence that begins at or before work_idx: those without queries begin where the next one does.
            int low = 0, high = num_sequences;
            while (high - low > 1) {
                const int middle = low + (high - low) / 2;
                if (g_first_work[middle] <= work_idx) low = middle; else high = middle;
            }
            sequence = low;
            entry = g_first_work[sequence + 1] - 1 - work_idx;
        }
        g_work[2 * work_idx] = sequence;
        g_work[2 * work_idx + 1] = entry;
    }
}
