// Several groups of lanes share the parts of a row (merge.cuh): blockDim.x lanes share its columns, blockDim.y groups
// its parts, blockDim.z rows are merged at a time. With few rows and many parts (decoding) one group alone would wait
// for memory most of the time. What each group has found meets in shared memory, and is added in a fixed order.
//
// Constants: those of merge.cuh, and NUM_THREADS, the most threads of a CTA.
#pragma once
#include "merge/merge.cuh"

// The sums of the groups of a row meet here.
struct GroupSums {
    Accumulator row_max[NUM_THREADS];
    Accumulator row_sum[NUM_THREADS];
    Accumulator value[PACK][NUM_THREADS];
};

// The larger of the maxima of all groups of the row, for each of its threads. Called by all threads of the CTA.
__device__ __forceinline__ Accumulator largest_of_groups(Accumulator row_max, int thread, int first_thread,
                                                         GroupSums& smem) {
    smem.row_max[thread] = row_max;
    // SYNC: the maximum of every group is in shared memory before any thread compares them.
    __syncthreads();
    for (int group = 0; group < blockDim.y; ++group) {
        row_max = maximum(row_max, smem.row_max[first_thread + group * blockDim.x]);
    }
    return row_max;
}

// For the threads of group 0: their sums and those of the other groups. Called by all threads of the CTA.
__device__ __forceinline__ void add_groups(MergeAccumulator& acc, int thread, GroupSums& smem) {
    smem.row_sum[thread] = acc.row_sum;
#pragma unroll
    for (int i = 0; i < PACK; ++i) smem.value[i][thread] = acc.value[i];
    // SYNC: the sums of every group are in shared memory before group 0 adds them up.
    __syncthreads();
    if (threadIdx.y != 0) return;
    for (int group = 1; group < blockDim.y; ++group) {
        const int other = thread + group * blockDim.x;
        acc.row_sum += smem.row_sum[other];
#pragma unroll
        for (int i = 0; i < PACK; ++i) acc.value[i] += smem.value[i][other];
    }
}
